"""DiffusionNFT: loss = 5 [r L+ / beta + (1 - r) L- / beta], r in [0, 1] what an image was worth.

L+ is the regression error of (1 - beta) old + beta policy, L- that of (1 + beta) old - beta policy: a good image pulls
the policy's prediction to its target, a bad one pushes it away, both measured from the old policy.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

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
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, Scored, Selection, Shared, StepLoss

AdvMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT:
    """Negative-aware fine-tuning: good and bad images of the old policy contrasted on the forward process.

    Without omega the loss is least, image by image, at old + (2 r - 1) / beta (target - old).

    Paper: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv 2509.16117, eq. 5;
    NVlabs/DiffusionNFT.
    Departs: the paper's residual x_0_hat - x_0 is -t (v - u) on a flow; here it is sqrt(error_factor) (pred - target),
    the same there and the residual in x_0 of a DDPM model whatever its network predicts. The KL is between native
    predictions. Images of prompts without spread are left out and counted, where the release trains them at r = 1/2.
    omega is float32, where the release takes double.
    """

    beta: float = 1.0
    """How much of the policy is in the two mixtures, not a KL strength. Paper: 1; 0.1 for OCR and several rewards."""
    kl_weight: float = 1e-4
    """Of the squared distance from the reference's prediction."""
    adv_mode: AdvMode = "all"
    """Advantages as they are; cut at 0 from below or from above; 1 for good images and 0 for others; or their signs."""
    adaptive: bool = True
    """Divide each squared error by omega, the mean absolute error."""
    error_space: ErrorSpace = "x0"
    """Between which predictions the errors are; at high t those in x_0 of an epsilon model are large, `eps` is even."""
    levels: Levels = "walk"
    """Train at the t of the walk's moves, in an order of each image's own; or at as many that the noise path draws."""
    level_fraction: float = 0.99
    """Share of the walk's moves, from the noisiest on, that are trained: 9 of 10."""
    level_count: int | None = None
    """How many of them each image is trained at; None takes all."""
    decay_type: Literal[0, 1, 2] = 1
    """How the old policy follows after step k: at once; with decay min(0.001 k, 0.5); at once until step 75, then with
    min(0.0075 (k - 75), 0.999) (OCR)."""

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_at_least(0, kl_weight=self.kl_weight)
        check_at_least(1, level_count=self.level_count)
        check_fraction(level_fraction=self.level_fraction)

    @property
    def needs(self) -> Needs:
        return Needs(
            data="prompts", items="images", references=references_for(self.kl_weight), group_at_least=2, old=True
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        return select_images(scored, lambda advantage: changed(advantage, self.adv_mode))

    def old_decay(self, step: int) -> float:
        return {0: 0.0, 1: min(0.001 * step, 0.5), 2: min(0.0075 * max(0, step - 75), 0.999)}[self.decay_type]

    def old_samples(self, step: int) -> bool:
        return True

    def passes(self, moves: int) -> int:
        return count_levels(self._trained(moves), self.level_count, "moves that level_fraction leaves")

    def train_levels(self, moves: int, generator: torch.Generator) -> tuple[int, ...] | None:
        return draw_levels(self._trained(moves), self.passes(moves), generator) if self.levels == "walk" else None

    def _trained(self, moves: int) -> int:
        return leading(self.level_fraction, moves)

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        advantage, old = advantage_of(batch, "diffusion_nft"), old_policy(shared, "diffusion_nft")
        f = renoise(policy, reference, batch, rng, old=old, error_space=self.error_space)
        assert f.pred_old is not None, "the old policy was run"
        r = optimality(advantage)
        contrast = nft_loss(f.residual(f.pred), f.residual(f.pred_old), r, beta=self.beta, adaptive=self.adaptive)
        policy_loss = ADVANTAGE_MAX * contrast
        metrics = {"policy_loss": policy_loss.detach(), "unweighted_policy_loss": contrast.detach(), "r": r}
        return StepLoss(
            loss=policy_loss + weighted_kl(f.pred, f.pred_ref, self.kl_weight),
            metrics=metrics | forward_metrics(f, advantage),
            noise_level=f.noise_level,
        )


def changed(advantage: Float[Tensor, " m"], mode: AdvMode) -> Float[Tensor, " m"]:
    """Advantages as `adv_mode` has them."""
    forms = {
        "all": advantage,
        "positive_only": advantage.clamp(min=0),
        "negative_only": advantage.clamp(max=0),
        "one_only": (advantage > 0).to(advantage.dtype),
        "binary": advantage.sign(),
    }
    return forms[mode]


def optimality(advantage: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """r: 0 at an advantage of -5, 1/2 at 0, 1 at 5."""
    return (0.5 + advantage / (2 * ADVANTAGE_MAX)).clamp(0, 1)


def nft_loss(
    residual: Float[Tensor, " b *rest"],
    residual_old: Float[Tensor, " b *rest"],
    r: Float[Tensor, " b"],
    *,
    beta: float,
    adaptive: bool = True,
) -> Float[Tensor, " b"]:
    """r L+ / beta + (1 - r) L- / beta: at residual = residual_old its value does not depend on r, its gradient does.

    Args:
        residual, residual_old: Prediction minus target of the policy and of the old policy.
        r: Probability that the image is a good one, in [0, 1].
        beta: How much of the policy is in the mixtures (1 - beta) old + beta policy and (1 + beta) old - beta policy.
        adaptive: Divide each squared error by its own mean absolute error, without gradient.

    Paper: Zheng et al., arXiv 2509.16117, eq. 5.
    """
    positive = (1 - beta) * residual_old + beta * residual
    negative = (1 + beta) * residual_old - beta * residual
    squares = [adaptive_error(x) if adaptive else x.square().flatten(1).mean(1) for x in (positive, negative)]
    return (r * squares[0] + (1 - r) * squares[1]) / beta
