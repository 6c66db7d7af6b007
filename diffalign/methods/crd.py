"""CRD: distils rewards into the policy. loss = 5 / beta (beta r_c - R_c)^2, both centred over the micro-batch.

r = err_old / omega_old - err / omega is the implicit reward of an image, up to a constant of its prompt that centring
takes away; R in [0, 1] is what the image was worth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffalign.errors import InputError
from diffalign.methods.diffusion_nft import optimality
from diffalign.methods.forward_process import (
    ADVANTAGE_MAX,
    Levels,
    adaptive_error,
    advantage_of,
    check_at_least,
    check_fraction,
    check_positive,
    count_levels,
    draw_levels,
    forward_metrics,
    leading,
    old_policy,
    references_for,
    renoise,
    select_images,
    weighted_kl,
)
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, Scored, Selection, Shared, StepLoss, alone

CentredLoss = Literal["mse", "bce"]


@dataclass(frozen=True, kw_only=True)
class CRD:
    """Centred reward distillation: differences of implicit rewards match differences of rewards, a finite goal.

    Paper: "Diffusion Reinforcement Learning via Centered Reward Distillation", arXiv 2603.14128; X-GenGroup/
    Flow-Factory, trainers/crd.py.
    Departs: written from that trainer. Errors are native regression errors, the same on flows. The KL is to the plain
    reference, where the trainer guides it with 4.5, and is not scaled by the reward. The policy makes the images, where
    the trainer keeps a third copy of the weights for that, equal to the policy for 75 steps. A temperature of 0, whose
    negative set is always empty, is left out, and so are images of prompts without spread, which are counted.
    """

    beta: float = 1.0
    """What implicit rewards are multiplied by to match rewards, not the weight of the KL."""
    loss: CentredLoss = "mse"
    """Squared difference, or cross-entropy of beta r_c against sigmoid(R_c)."""
    temperature: float | None = None
    """Rewards are centred at the mean of the good images and at that of the bad ones, by softmax(R / T) and
    softmax(-R / T), and the two losses averaged; None centres at the plain mean."""
    kl_weight: float = 0.1
    """Of the squared distance from the reference's prediction."""
    adaptive: bool = True
    """Divide each squared error by omega, the mean absolute error."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    levels: Levels = "walk"
    """Train at the t of the walk's moves, in an order of each image's own; or at as many that the noise path draws."""
    level_fraction: float = 0.99
    """Share of the walk's moves, from the noisiest on, that are trained."""
    level_count: int | None = None
    """How many of them each image is trained at; None takes all."""

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_at_least(0, kl_weight=self.kl_weight)
        check_at_least(1, level_count=self.level_count)
        check_fraction(level_fraction=self.level_fraction)
        if self.temperature is not None and not self.temperature >= 0.01:
            raise InputError(f"method.temperature must be at least 0.01, got {self.temperature}")

    @property
    def needs(self) -> Needs:
        return Needs(
            data="prompts",
            items="images",
            references=references_for(self.kl_weight),
            group_at_least=2,
            batch_statistics=True,
            old=True,
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        return select_images(scored)

    def old_decay(self, step: int) -> float:
        return min(0.25 + 0.005 * step, 0.999)

    def old_samples(self, step: int) -> bool:
        return False

    def passes(self, moves: int) -> int:
        return count_levels(self._trained(moves), self.level_count, "moves that level_fraction leaves")

    def train_levels(self, moves: int, generator: torch.Generator) -> tuple[int, ...] | None:
        return draw_levels(self._trained(moves), self.passes(moves), generator) if self.levels == "walk" else None

    def _trained(self, moves: int) -> int:
        return leading(self.level_fraction, moves)

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        advantage, old = advantage_of(batch, "crd"), old_policy(shared, "crd")
        f = renoise(policy, reference, batch, rng, old=old, error_space=self.error_space)
        assert f.pred_old is not None, "the old policy was run"
        implicit = self._error(f.residual(f.pred_old)) - self._error(f.residual(f.pred))
        value = optimality(advantage)
        signs = (0.0,) if self.temperature is None else (1 / self.temperature, -1 / self.temperature)
        terms = []
        for slope in signs:
            centre, centre_value = centres(implicit, value, slope, reduce=shared.reduce)
            terms.append(match(self.beta * (implicit - centre), value - centre_value, self.loss))
        contrast = torch.stack(terms).mean(0) / self.beta
        policy_loss = ADVANTAGE_MAX * contrast
        metrics = {"policy_loss": policy_loss.detach(), "unweighted_policy_loss": contrast.detach(),
                   "implicit": implicit.detach()}  # fmt: skip
        return StepLoss(
            loss=policy_loss + weighted_kl(f.pred, f.pred_ref, self.kl_weight),
            metrics=metrics | forward_metrics(f, advantage),
            noise_level=f.noise_level,
        )

    def _error(self, residual: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        return adaptive_error(residual) if self.adaptive else residual.square().flatten(1).mean(1)


def centres(
    implicit: Float[Tensor, " b"],
    value: Float[Tensor, " b"],
    slope: float,
    *,
    reduce: Callable[[Tensor], Tensor] = alone,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Means of implicit rewards and of values under weights softmax(slope value), without gradient.

    Args:
        value: In [0, 1].
        slope: 0 weights all alike; of either sign, to weight the good or the bad images.
        reduce: Sum over processes.
    """
    weight = (slope * value.detach().double() - max(0.0, slope)).exp()  # at most 1
    sums = torch.stack([weight @ implicit.detach().double(), weight @ value.detach().double(), weight.sum()])
    total, total_value, mass = reduce(sums)
    return (total / mass).to(implicit.dtype), (total_value / mass).to(implicit.dtype)


def match(implicit: Float[Tensor, " b"], value: Float[Tensor, " b"], loss: CentredLoss) -> Float[Tensor, " b"]:
    """How far centred implicit rewards are from centred values."""
    if loss == "mse":
        return (implicit - value).square()
    return functional.binary_cross_entropy_with_logits(implicit, value.sigmoid(), reduction="none")
