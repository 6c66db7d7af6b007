"""DMPO: loss = KL(Bernoulli(S(h)) : Bernoulli(1 - alpha)), h the margin of Diffusion-DPO's implicit rewards."""

from dataclasses import dataclass
from functools import partial

from diffalign import losses
from diffalign.errors import InputError
from diffalign.methods.measure import Safeguard, ScoreUse, pair_errors, pair_step
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ErrorKind, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class DMPO:
    """Divergence minimization: reverse KL from the model's preference to a label that is right with 1 - alpha.

    The margin has its goal at logit(1 - alpha), 4.6 nats by default. Far below 0 the gradient vanishes: a pair that the
    model holds for clearly mislabelled is left alone. As mathematics the loss is the link `exo_pair` with
    label_smoothing = alpha, and is computed by it.

    Paper: Li et al., "Divergence Minimization Preference Optimization for Diffusion Model Alignment", arXiv 2507.07510,
    as implemented in AIDC-AI/Diffusion-SDPO.
    """

    beta: float = 2000.0
    """KL strength; half of it multiplies a squared error averaged over elements. Published: 2000 for SD 1.5, 6000 for
    SDXL."""
    alpha: float = 0.01
    """Probability that a label is wrong, in (0, 0.5)."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO)."""
    scores: ScoreUse | None = None
    """Soft labels or margins from the data's score columns."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if not 0 < self.alpha < 0.5:
            raise InputError(f"method.alpha must be in (0, 0.5), got {self.alpha}")

    @property
    def needs(self) -> Needs:
        errors = ErrorKind(error_space=self.error_space)
        return Needs(data="pairs", references=("start", "ema"), scores=self.scores is not None, errors=errors)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = pair_errors(policy, reference, batch, rng, error_space=self.error_space, safeguard=self.safeguard)
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * e.gain_l
        link = partial(losses.exo_pair, label_smoothing=self.alpha)
        return pair_step(e, implicit_w, implicit_l, link=link, batch=batch, shared=shared, scores=self.scores)
