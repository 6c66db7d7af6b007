"""NCP-SFT: loss = PL, supervised fine-tuning on the winners with the error between features of a frozen encoder."""

from dataclasses import dataclass, field

from diffalign.methods.perception import Perception, check_both, mixed, perceptual_error
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Encoder, ImageBatch, Needs, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class NCPSFT:
    """Perceptual error on the chosen images only; the reference lends its encoder only.

    Paper: Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636.
    Departs: see `Perception`.
    """

    perception: Perception = field(default_factory=Perception)
    """Where predictions are looked at, and what of the encoder counts."""
    both: float | None = None
    """Weight c of the perceptual error beside the denoising error, err + c PL; None is PL alone. Authors' `both`: 1."""

    def __post_init__(self) -> None:
        check_both(self.both)

    @property
    def needs(self) -> Needs:
        return Needs(data="images", float32_features=True)

    def __call__(
        self, policy: Denoiser, reference: Encoder, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        felt, latent = perceptual_error(policy, reference, batch, rng, perception=self.perception)
        return StepLoss(
            loss=mixed(latent.err, felt.err, self.both),
            metrics={"err_w": latent.err.detach(), "perceptual/err_w": felt.err.detach()},
            noise_level=felt.noise_level,
        )
