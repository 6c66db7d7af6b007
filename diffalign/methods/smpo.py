"""SmPO: InPO with smooth preferences. L = softplus(gamma (2p - 1) (beta / 2) Delta), p from a judge's two scores."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses
from diffalign.errors import InputError
from diffalign.methods.inpo import Inverter, inverted_errors
from diffalign.methods.measure import pair_metrics, scores_of
from diffalign.rng import SampleRng
from diffalign.sampling.inversion import Ladder, Mode
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class SmPO:
    """SmPO-Diffusion: each pair pulls as strongly as a judge is sure, at latents found by ReNoise inversion.

    The judge's word stands: where it scores the loser higher the weight is negative, which is the same as swapping the
    two images, so no relabelling is needed. Metrics keep the data's labels. Equal scores pull not at all.

    Paper: Lu et al., "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied
    Human Preferences", arXiv 2506.02698, ICML 2025; JaydenLyh/SmPO.
    Departs: each pair has its own weight, where the authors' code takes the first of a batch for all; and x_t stands at
    t exactly, as in `InPO`.
    """

    beta: float = 2000.0
    """KL strength; multiplies a squared error *averaged* over elements. Authors' scripts: 2000 SD 1.5, 5000 SDXL."""
    gamma: float = 10.0
    """Sharpness of the weight gamma (2p - 1); gamma 1 and p 1 would be plain DPO."""
    score_min: float = 0.115435265
    """Score that counts as 0; the least PickScore (a raw cosine, not times 100) in Pick-a-Pic v2."""
    score_max: float = 0.282015711
    """Score that counts as 1; the greatest PickScore in Pick-a-Pic v2."""
    levels: int = 5
    """Levels that part the whole noise range, two calls each; 5 in the authors' code, 9 in the paper."""
    mode: Mode = "exact"
    """`exact` lands on t; `release` repeats the authors' grid, which misses t, on DDPM models only."""
    inverter: Inverter = "policy"
    """As in `InPO`: the paper's is the current policy; a frozen reference gives latents that never change."""

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("gamma", self.gamma)):
            if value <= 0:
                raise InputError(f"method.{name} must be positive, got {value}")
        if self.score_max <= self.score_min:
            raise InputError(
                f"method.score_max must be greater than score_min, got {self.score_max} and {self.score_min}"
            )
        _ = self.ladder  # its own checks

    @property
    def ladder(self) -> Ladder:
        """How images are inverted: with a correction and without noise."""
        return Ladder(levels=self.levels, mode=self.mode, eta=0.0, renoise=True)

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", references=("start", "ema"), scores=True)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        score_w, score_l = scores_of(batch)
        weight = smooth_weight(score_w, score_l, low=self.score_min, high=self.score_max, gamma=self.gamma)
        e = inverted_errors(policy, reference, batch, rng, self.ladder, self.inverter)
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * e.gain_l
        metrics = {**pair_metrics(e, implicit_w, implicit_l), "smooth_weight": weight}
        loss = losses.sigmoid(weight * implicit_w, weight * implicit_l)
        return StepLoss(loss=loss, metrics=metrics, noise_level=e.noise_level)


def smooth_weight(
    score_w: Float[Tensor, " b"], score_l: Float[Tensor, " b"], *, low: float, high: float, gamma: float
) -> Float[Tensor, " b"]:
    """gamma (2p - 1) with p = S(r'_w - r'_l) and r' = (score - low) / (high - low): what a margin is multiplied by.

    Between -0.4622 gamma and 0.4622 gamma for scores within [low, high]; 0 at equal scores.

    Paper: arXiv 2506.02698, the smoothed preference distribution.
    """
    return gamma * torch.tanh((score_w - score_l) / (high - low) / 2)
