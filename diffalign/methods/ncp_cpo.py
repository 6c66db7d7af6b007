"""NCP-CPO: loss = link(-(beta / 2) PL_w, -(beta / 2) PL_l) + sft_weight PL_w, without a reference in the loss."""

from dataclasses import dataclass, field, replace

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard, ScoreUse, pair_step
from diffalign.methods.perception import Perception, check_both, perceptual_errors
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Encoder, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class NCPCPO:
    """Contrastive preference optimization on perceptual errors; the reference lends its encoder only.

    Paper: Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636, after
        Xu et al., "Contrastive Preference Optimization", arXiv 2401.08417.
    Departs: the paper adds a multiple of PL_w and does not say which; the authors' code leaves it out. We follow the
    paper with 1, and 0 gives the code. beta is halved, as for NCP-DPO; see `Perception` for the rest.
    """

    beta: float = 5000.0
    """Slope; multiplies a squared error averaged over features, halved. Published: 2500 without the half."""
    sft_weight: float = 1.0
    """Weight lambda of the winner's error beside the contrast; 0 is the authors' code."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config. Only links on their margin."""
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
        if self.sft_weight < 0:
            raise InputError(f"method.sft_weight must be at least 0, got {self.sft_weight}")
        check_both(self.both)
        name = losses.link_name(self.link)
        if not losses.PROPERTIES[name].margin_only:
            known = ", ".join(sorted(n for n, p in losses.PROPERTIES.items() if p.margin_only))
            raise InputError(
                f"method.link must be one on the margin alone ({known}), got {name!r}; without a reference an implicit "
                "reward has no zero"
            )

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
            compare=False,
            safeguard=self.safeguard,
        )
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * e.gain_l
        out = pair_step(latent, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared, scores=self.scores)
        return replace(out, loss=out.loss + self.sft_weight * e.err_w)
