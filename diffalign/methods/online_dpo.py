"""Online Diffusion-DPO: the policy's own best and worst images of a prompt as pairs, then Diffusion-DPO's loss.

Also the engine of IPO: reward `judge`, reference `pool` (the policy as the round began), positive `winner_weight` and
`real_weight`, so that loss = link(implicit rewards) + lambda_1 err_w + lambda_2 err_real.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard, image_errors, pair_errors, pair_step
from diffalign.methods.pairing import all_pairs, best_and_worst
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Scored, Selection, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class OnlineDPO:
    """Diffusion-DPO on pairs of the policy's own images, ranked by the weighted sum of the rewards.

    Equal scores make no pair.

    Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908, eq. 14,
    on best against worst of a group as in verl-project/verl-omni. With a judge and `winner_weight`: Yang et al., "IPO:
    Iterative Preference Optimization for Text-to-Video Generation", arXiv 2502.02088.
    Departs: t is drawn uniformly, or as the flow's path says; a pair and the real image beside it share their draws of
    t and noise. The judge stays as it is, where Dual-IPO trains it in turn.
    """

    beta: float = 100.0
    """KL strength; multiplies a squared error *averaged* over elements. 100 is verl-omni's for own images; 2000 is
    Flow-Factory's, and what pairs of others' images take."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """The best against the worst image of a prompt, or all pairs of its images."""
    margin: float = 0.0
    """Pairs whose scores lie no further apart are left out and counted."""
    winner_weight: float = 0.0
    """lambda_1 of IPO: weight of the winner's own denoising error, against both images getting worse."""
    real_weight: float = 0.0
    """lambda_2 of IPO: weight of the denoising error of an image of the data beside every pair; prompts are then those
    of the data too."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    share_noise: bool = True
    """Winner and loser get the same noise; False is the paper's eq. 14."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO); needs shared noise."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        for name in ("margin", "winner_weight", "real_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"method.{name} must be at least 0, got {getattr(self, name)}")
        if self.safeguard is not None and not self.share_noise:
            raise InputError(
                "method.safeguard must be left out with share_noise = false; it compares the residuals of winner and "
                "loser at one noise"
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            data="prompts",
            items="pairs",
            references=("start", "pool", "ema"),
            group_at_least=2,
            real_beside=self.real_weight > 0,
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        """Pairs of every prompt whose images differ."""
        choose = best_and_worst if self.pairs == "best_worst" else all_pairs
        found = choose(scored.total, scored.group, margin=self.margin)
        return Selection(places=found.places, metrics=found.metrics)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = pair_errors(
            policy,
            reference,
            batch,
            rng,
            error_space=self.error_space,
            share_noise=self.share_noise,
            safeguard=self.safeguard,
        )
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * e.gain_l
        out = pair_step(e, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared)
        loss, metrics = out.loss + self.winner_weight * e.err_w, out.metrics
        if self.real_weight > 0:
            if batch.real is None:
                raise ValueError("batch.real must be images of the data with method.real_weight, got None")
            real = image_errors(policy, None, batch.real, rng, error_space=self.error_space)
            loss = loss + self.real_weight * real.err
            metrics = {**metrics, "err_real": real.err.detach()}
        return StepLoss(loss=loss, metrics=metrics, noise_level=out.noise_level, rewards=out.rewards)
