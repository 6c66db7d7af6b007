"""InPO: Diffusion-DPO at inverted latents. err is taken at (x_t, tau) instead of (add_noise(x_0, eps, t), eps)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import PairErrors, ScoreUse, errors_at, pair_step
from diffalign.rng import SampleRng
from diffalign.sampling.inversion import Ladder, Mode, draw_t, invert
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Shared, StepLoss

Inverter = Literal["policy", "reference"]
"""Which model an image is inverted with."""


@dataclass(frozen=True, kw_only=True)
class InPO:
    """DDIM-InPO: the logistic loss on gains in denoising error, at latents that the model itself ties to the images.

    Each image is inverted without gradient and guidance, so that x_t belongs to it: winner and loser share t, but not
    tau = (x_t - alpha_t x_0) / sigma_t, which takes the place of the noise. For v and velocity models the native target
    is formed of x_0 and tau, and a move of a flow is x + (s' - s) v. `forwards` counts the calls that an image's
    inversion took.

    Paper: Lu et al., "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model
    Alignment", arXiv 2503.18454, CVPR 2025; JaydenLyh/InPO.
    Departs: x_t stands at t exactly and no noise is added to it; `mode = "release"` does as the authors' code, whose
    x_t stands up to 99 timesteps away from the t that tau and the model take it to be at. t is not drawn below T/10.
    The inversion's arithmetic is float32 where theirs is float16.
    """

    beta: float = 2000.0
    """KL strength; multiplies a squared error *averaged* over elements. Authors' scripts: 2000 SD 1.5, 5000 SDXL."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    mode: Mode = "exact"
    """`exact` lands on t; `release` repeats the authors' grid, which misses t, on DDPM models only."""
    levels: int = 10
    """Levels that part the whole noise range; an inversion takes those below its t, so half of them on average."""
    eta: float | None = None
    """Noise after each move in mode `release`, in posterior standard deviations; None is the authors' 0.1 there."""
    inverter: Inverter = "policy"
    """The paper inverts with the current policy. With `reference`, and that one frozen, x_t is a function of image,
    prompt and t alone and could be computed once; it is the paper's method only as long as policy = reference."""
    scores: ScoreUse | None = None
    """Soft labels or margins from the data's score columns."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        _ = self.ladder  # its own checks

    @property
    def ladder(self) -> Ladder:
        """How images are inverted."""
        return Ladder(levels=self.levels, mode=self.mode, eta=self.eta)

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", references=("start", "ema"), scores=self.scores is not None)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = inverted_errors(policy, reference, batch, rng, self.ladder, self.inverter)
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * e.gain_l
        return pair_step(e, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared, scores=self.scores)


def inverted_errors(
    policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, ladder: Ladder, inverter: Inverter
) -> PairErrors:
    """The four squared errors of each pair at inverted latents, winner and loser at one t, each with its own tau."""

    def noise(like: torch.Tensor, purpose: str) -> torch.Tensor:
        members = zip(like.chunk(2), ("w", "l"), strict=True)
        return torch.cat([rng.normal(member, f"{purpose}_{name}") for member, name in members])

    t = draw_t(policy.path, rng, ladder)
    x_0 = torch.cat([batch.x_w, batch.x_l])  # [2B, C, H, W]
    model = policy if inverter == "policy" else reference
    found = invert(model, x_0, t.repeat(2), batch.cond.repeat(2), ladder, noise=noise)
    e = errors_at(policy, reference, batch, found.x_t, found.eps, t.to(x_0.device))
    return replace(e, metrics={**e.metrics, "forwards": found.forwards[: len(batch)]})
