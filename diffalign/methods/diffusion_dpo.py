"""Diffusion-DPO: implicit reward = -(beta / 2) (err - err_ref); loss = link(implicit reward of winner, of loser)."""

from dataclasses import dataclass

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard, ScoreUse, pair_errors, pair_step
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ErrorKind, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """Diffusion-DPO: logistic loss on the gain in denoising error over the reference.

    Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908, eq. 14.
    Departs: T * omega(lambda_t) is a constant folded into beta, errors are averaged over elements and halved, and a
    pair shares its noise, all as in the authors' code (SalesforceAIResearch/DiffusionDPO, train.py); the paper's eq.
    14 has independent noises. A margin of exactly 0 counts half in the accuracy, where the authors' code counts it as
    wrong.
    """

    beta: float = 5000.0
    """KL strength; multiplies a squared error *averaged* over elements, hence in the thousands (2000 to 5000)."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    share_noise: bool = True
    """Winner and loser get the same noise, as in the authors' code; False is the paper's eq. 14."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO); needs shared noise."""
    scores: ScoreUse | None = None
    """Soft labels or margins from the data's score columns."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if self.safeguard is not None and not self.share_noise:
            raise InputError(
                "method.safeguard must be left out with share_noise = false; it compares the residuals of winner and "
                "loser at one noise"
            )

    @property
    def needs(self) -> Needs:
        errors = ErrorKind(error_space=self.error_space, share_noise=self.share_noise)
        return Needs(data="pairs", references=("start", "ema"), scores=self.scores is not None, errors=errors)

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
        return pair_step(e, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared, scores=self.scores)
