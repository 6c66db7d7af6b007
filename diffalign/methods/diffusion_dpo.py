"""Diffusion-DPO: implicit reward = -(beta / 2) (err - err_ref); loss = link(implicit reward of winner, of loser)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import pair_errors, pair_metrics
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import Denoiser, PairBatch, StepLoss


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """Diffusion-DPO: logistic loss on the gain in denoising error over the reference.

    Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908, eq. 14.
    Departs: T * omega(lambda_t) is a constant folded into beta, errors are averaged over elements and halved, and a
    pair shares its noise, all as in the authors' code (SalesforceAIResearch/DiffusionDPO, train.py); the paper's eq.
    14 has independent noises. A margin of exactly 0 counts half in the accuracy, where the authors' code counts it as
    wrong.
    """

    data: ClassVar[Literal["pairs"]] = "pairs"
    needs_reference: ClassVar[bool] = True

    beta: float = 5000.0
    """KL strength; multiplies a squared error *averaged* over elements, hence in the thousands (2000 to 5000)."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    share_noise: bool = True
    """Winner and loser get the same noise, as in the authors' code; False is the paper's eq. 14."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")

    def __call__(self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng) -> StepLoss:
        e = pair_errors(policy, reference, batch, rng, error_space=self.error_space, share_noise=self.share_noise)
        implicit_w = -0.5 * self.beta * (e.err_w - e.err_ref_w)
        implicit_l = -0.5 * self.beta * (e.err_l - e.err_ref_l)
        return StepLoss(
            loss=self.link(implicit_w, implicit_l),
            metrics=pair_metrics(e, implicit_w, implicit_l),
            noise_level=e.noise_level,
        )
