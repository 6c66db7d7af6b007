"""NCP-DPO: implicit reward = -(beta / 2) (PL - PL_ref), with PL the error between features of a frozen encoder."""

from dataclasses import dataclass, field

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard, ScoreUse, pair_step
from diffalign.methods.perception import Perception, check_both, perceptual_errors
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Encoder, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class NCPDPO:
    """Diffusion-DPO with every denoising error replaced by a perceptual one.

    Paper: Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636.
    Departs: features are averaged over elements, as in the authors' code; the paper has a sum. Their loss has no
    factor 1/2, so its beta 2500 is 5000 here. See `Perception` for the rest.
    """

    beta: float = 5000.0
    """KL strength; multiplies a squared error averaged over features, halved. Published: 2500 without the half."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    perception: Perception = field(default_factory=Perception)
    """Where predictions are looked at, and what of the encoder counts."""
    both: float | None = None
    """Weight c of perceptual errors beside denoising errors, err + c PL; None is PL alone. Authors' `both`: 1."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse, in the encoder's eyes (Diffusion-SDPO on features; ours)."""
    scores: ScoreUse | None = None
    """Soft labels or margins from the data's score columns."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        check_both(self.both)

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", scores=self.scores is not None, float32_features=True)

    def __call__(
        self, policy: Denoiser, reference: Encoder, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e, latent = perceptual_errors(
            policy,
            reference,
            batch,
            rng,
            perception=self.perception,
            both=self.both,
            safeguard=self.safeguard,
        )
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * e.gain_l
        return pair_step(latent, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared, scores=self.scores)
