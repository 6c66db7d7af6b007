"""Supervised fine-tuning on the winners: loss = err, the pre-training loss itself."""

from dataclasses import dataclass

from diffalign.methods.measure import image_errors
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Denoising error on the chosen images only, without a reference.

    Paper: the SFT baseline of Wallace et al., arXiv 2311.12908, section 5.1.
    """

    error_space: ErrorSpace = "native"
    """Between which predictions the error is; `native` is what the network predicts, at constant weight."""

    @property
    def needs(self) -> Needs:
        return Needs(data="images", references=("none",))

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = image_errors(policy, None, batch, rng, error_space=self.error_space)
        return StepLoss(loss=e.err, metrics={"err_w": e.err.detach()}, noise_level=e.noise_level)
