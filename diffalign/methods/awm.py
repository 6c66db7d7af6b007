"""AWM: pre-training's own loss, weighted by advantage. loss = max(-A rho, -A clip(rho)) + two KLs.

rho = exp(l - l_old) with l = -w(t) phi(e), a stand-in for the log-likelihood of an image; e is the regression error. On
images of the policy itself rho is 1 and the gradient is A w phi'(e) grad e.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.methods.forward_process import (
    ADVANTAGE_MAX,
    Levels,
    advantage_of,
    check_at_least,
    check_fraction,
    check_positive,
    count_levels,
    forward_metrics,
    old_policy,
    references_for,
    renoise,
    select_images,
    weighted_kl,
)
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, Scored, Selection, Shared, StepLoss

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
_TINY = 1e-10


@dataclass(frozen=True, kw_only=True)
class AWM:
    """Advantage-weighted matching: flow matching on the policy's own images, toward good ones and away from bad ones.

    Paper: Xue et al., "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", arXiv
    2509.25050; scxue/advantage_weighted_matching.
    Departs: the papers' t is sigma_t and e the native regression error, the same on flows; a DDPM model is trained on
    its own epsilon or v error. l_old is the current value itself, or the old policy's with `off_policy`; the release
    also takes that of the round's start where a round has several updates. rho is taken at each t (`exp_first`). An
    image draws levels of its own, one of each stretch, where the release draws them once a batch. Both KLs are plain
    mean squares ("Uniform"). Images of prompts without spread are left out and counted.
    """

    weighting: Weighting = "ghuber"
    """w(t) phi(e): e; t e; t^2 e; t (sqrt(e) - 1e-5); or t e^p / p. The guards of 1e-10 beside e are the release's."""
    power: float | None = None
    """p, only with `ghuber`; None is 0.25."""
    kl_weight: float = 1e-3
    """Of the squared distance from the reference. Paper: 1e-3 for GenEval, 3e-3 for OCR, 1e-4 for PickScore."""
    old_kl_weight: float = 1.0
    """Of the squared distance from the old policy, which follows the trained one closely."""
    off_policy: bool = False
    """The old policy makes the images, and rho is measured against it."""
    clip: float | None = None
    """epsilon of clip(rho, 1 - epsilon, 1 + epsilon), only with `off_policy`: elsewhere rho is 1. Release: 1."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    levels: Levels = "walk"
    """Train at the t of the walk's moves but the first, or at as many that the noise path draws."""
    level_fraction: float = 0.9
    """Share of the walk's moves, from the noisiest on, that may be trained."""
    level_count: int = 6
    """How many of them each image is trained at, one from each of as many even stretches."""

    def __post_init__(self) -> None:
        check_at_least(0, kl_weight=self.kl_weight, old_kl_weight=self.old_kl_weight)
        check_at_least(1, level_count=self.level_count)
        check_positive(clip=self.clip)
        check_fraction(level_fraction=self.level_fraction)
        if self.power is not None:
            check_fraction(power=self.power)
            if self.weighting != "ghuber":
                raise InputError(f"method.power must be left out with weighting = {self.weighting!r}, got {self.power}")
        if self.clip is not None and not self.off_policy:
            raise InputError(
                f"method.clip must be left out without off_policy, where every ratio is 1, got {self.clip}"
            )

    @property
    def needs(self) -> Needs:
        old = self.off_policy or self.old_kl_weight > 0
        return Needs(
            data="prompts", items="images", references=references_for(self.kl_weight), group_at_least=2, old=old
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        return select_images(scored)

    def old_decay(self, step: int) -> float:
        return min(0.001 * step, 0.3)

    def old_samples(self, step: int) -> bool:
        return self.off_policy

    def passes(self, moves: int) -> int:
        if self.levels == "path":
            return self.level_count
        return count_levels(self._end(moves) - 1, self.level_count, "moves after the first that level_fraction leaves")

    def train_levels(self, moves: int, generator: torch.Generator) -> tuple[int, ...] | None:
        return stratified(1, self._end(moves), self.passes(moves), generator) if self.levels == "walk" else None

    def _end(self, moves: int) -> int:
        return int(self.level_fraction * moves)

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        advantage = advantage_of(batch, "awm")
        old = old_policy(shared, "awm") if self.needs.old else None
        f = renoise(policy, reference, batch, rng, old=old, error_space=self.error_space)
        log_prob = -self._weighted(f.error(f.pred), f.sigma_t)
        log_prob_old = log_prob.detach()
        if self.off_policy:
            assert f.pred_old is not None, "the old policy was run"
            log_prob_old = -self._weighted(f.error(f.pred_old), f.sigma_t)
        ratio = (log_prob - log_prob_old).exp()
        policy_loss = surrogate(ratio, advantage / ADVANTAGE_MAX, self.clip)
        metrics = {"policy_loss": policy_loss.detach(), "ratio": ratio.detach()}
        if self.clip is not None:
            metrics["clipfrac"] = ((ratio.detach() - 1).abs() > self.clip).float()
        loss = policy_loss + weighted_kl(f.pred, f.pred_ref, self.kl_weight)
        return StepLoss(
            loss=loss + weighted_kl(f.pred, f.pred_old, self.old_kl_weight),
            metrics=metrics | forward_metrics(f, advantage),
            noise_level=f.noise_level,
        )

    def _weighted(self, err: Float[Tensor, " b"], sigma_t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return weighted_error(err, sigma_t, self.weighting, power=0.25 if self.power is None else self.power)


def weighted_error(
    err: Float[Tensor, " b"], t: Float[Tensor, " b"], weighting: Weighting = "ghuber", *, power: float = 0.25
) -> Float[Tensor, " b"]:
    """w(t) phi(err), 0 at an error of 0.

    Args:
        err: Squared error, averaged over elements.
        t: Noise level sigma_t, in [0, 1].
        power: p of `ghuber`, in (0, 1]; 1 is `t`, and 1/2 is twice `huber`.
    """
    if weighting == "huber":
        return t * ((err + _TINY).sqrt() - _TINY**0.5)
    if weighting == "ghuber":
        return t / power * ((err + _TINY) ** power - _TINY**power)
    weight = {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}[weighting]
    return weight * err


def surrogate(ratio: Float[Tensor, " b"], advantage: Float[Tensor, " b"], clip: float | None) -> Float[Tensor, " b"]:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)): no gradient once rho has gone where A wants it by more than clip.

    Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, eq. 7.
    """
    plain = -advantage * ratio
    return plain if clip is None else torch.maximum(plain, -advantage * ratio.clamp(1 - clip, 1 + clip))


def stratified(first: int, end: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """One number from each of `count` even stretches of [first, end), in rising order."""
    bounds = torch.linspace(first, end, count + 1, dtype=torch.float64).long()
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return tuple((bounds[:-1] + (u * (bounds[1:] - bounds[:-1])).long()).tolist())
