"""Supervised fine-tuning on the winners: loss = err, the pre-training loss itself."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffalign.methods.measure import image_errors
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import Denoiser, ImageBatch, StepLoss


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Denoising error on the chosen images only, without a reference.

    Paper: the SFT baseline of Wallace et al., arXiv 2311.12908, section 5.1.
    """

    data: ClassVar[Literal["images"]] = "images"
    needs_reference: ClassVar[bool] = False

    error_space: ErrorSpace = "native"
    """Between which predictions the error is; `native` is what the network predicts, at constant weight."""

    def __call__(self, policy: Denoiser, reference: Denoiser | None, batch: ImageBatch, rng: SampleRng) -> StepLoss:
        err, noise_level = image_errors(policy, batch, rng, error_space=self.error_space)
        return StepLoss(loss=err, metrics={"err_w": err.detach()}, noise_level=noise_level)
