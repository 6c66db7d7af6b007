"""MaPO: err_w - beta log S(T (s(err_w) - s(err_l))) with the score s(m) = k m / (exp(k m) - 1); no reference."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses
from diffalign.errors import InputError
from diffalign.methods.measure import Safeguard, pair_errors, pair_metrics
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Shared, StepLoss

STEPS = 1000
"""T of the loss: the training timesteps of the paper's models, for every family."""


@dataclass(frozen=True, kw_only=True)
class MaPO:
    """Margin-aware preference optimization: the pre-training loss on the winner and a margin of bounded scores.

    Implicit rewards are logged as T (s(err) - 1), whose difference is the loss's log-odds: 0 for a perfect prediction,
    about -T k err / 2 for a small error.

    Paper: Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference", arXiv
    2406.06424; mapo-t2i/mapo.
    Departs: the score is computed without cancellation and is 1 at error 0, where the release gives NaN.
    """

    beta: float = 0.1
    """Weight of the margin's term beside the winner's error, on the paper's own scale: it multiplies no error."""
    snr_value: float = 0.5
    """k of the score, under the release's name; with T = 1000 the log-odds have a slope of about 250 on errors."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO)."""

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("snr_value", self.snr_value)):
            if value <= 0:
                raise InputError(f"method.{name} must be positive, got {value}")

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", references=("none",))

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = pair_errors(policy, None, batch, rng, error_space=self.error_space, safeguard=self.safeguard)
        implicit_w, implicit_l = (STEPS * (mapo_score(m, snr_value=self.snr_value) - 1) for m in (e.err_w, e.err_l))
        loss = e.err_w + self.beta * losses.sigmoid(implicit_w, implicit_l)
        return StepLoss(loss=loss, metrics=pair_metrics(e, implicit_w, implicit_l), noise_level=e.noise_level)


def mapo_score(err: Float[Tensor, " b"], *, snr_value: float) -> Float[Tensor, " b"]:
    """k m / (exp(k m) - 1) of an error m >= 0 with k = `snr_value`: 1 at 0, slope -k / 2 there, 0 at infinity.

    Written with exp(-k m), which does not overflow, and below k m = 0.01 by its series.

    Paper: Hong et al., arXiv 2406.06424.
    """
    x = snr_value * err
    small = x < 1e-2
    series = 1 - x / 2 + x.square() / 12 - x.pow(4) / 720
    safe = torch.where(small, torch.ones_like(x), x)  # a branch that is not taken must have a finite gradient too
    return torch.where(small, series, safe * torch.exp(-safe) / -torch.expm1(-safe))
