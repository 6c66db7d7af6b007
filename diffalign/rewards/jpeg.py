"""JPEG size: how many bytes an image takes, the reward of DDPO whose success can be seen with the naked eye."""

import io
import math

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError, near_match
from diffalign.rewards.inputs import images_of
from diffalign.types import Modality, RewardBatch, RewardOutput

SIGNS = {"compressibility": -1.0, "incompressibility": 1.0}
"""What a larger file is worth."""

SCALES = {"kB": 1.0, "div500": 1 / 500}
"""What the decimal kilobytes are multiplied by."""


class JPEGReward:
    """Size of the image as JPEG, in decimal kilobytes: small is good for "compressibility", large for the other.

    Rounded to 8 bit and written by Pillow with its default chroma subsampling. `scale` "div500" divides by 500. `raw`
    holds `size_kb`. The size grows with the pixel count and differs between encoders: compare numbers of one
    resolution and one version only. It rewards flat pictures, or noise, and nothing else: a check of an optimizer.

    Paper: Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.
    """

    name = "jpeg"
    requires = frozenset({"images"})
    modality: Modality = "image"
    differentiable = False
    licence = "-"

    def __init__(self, *, direction: str = "compressibility", scale: str = "kB", quality: int = 95) -> None:
        for key, value, known in (("direction", direction, SIGNS), ("scale", scale, SCALES)):
            if value not in known:
                raise InputError(
                    f"reward jpeg: {key} must be one of {', '.join(known)}, got {value!r}{near_match(value, known)}"
                )
        if not 1 <= quality <= 95:
            raise InputError(f"reward jpeg: quality must be from 1 to 95, as Pillow advises, got {quality!r}")
        self.direction, self.scale, self.quality = direction, scale, quality

    @property
    def version(self) -> str:
        import PIL
        from PIL import features

        encoder = features.version("libjpeg_turbo") or features.version("jpg")
        return f"{self.direction}, {self.scale}, quality {self.quality}, Pillow {PIL.__version__}, libjpeg {encoder}"

    @property
    def range(self) -> tuple[float, float]:
        return (-math.inf, 0.0) if self.direction == "compressibility" else (0.0, math.inf)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores on the images' device."""
        images = images_of(batch, self.name, self.requires)
        size = jpeg_kb(images, self.quality)
        return RewardOutput(scores=SIGNS[self.direction] * SCALES[self.scale] * size, raw={"size_kb": size})


def jpeg_kb(images: Float[Tensor, "b 3 h w"], quality: int = 95) -> Float[Tensor, " b"]:
    """Size as JPEG in units of 1000 bytes; grows with the number of pixels and depends on the encoder."""
    return images.new_tensor([len(jpeg(image, quality)) / 1000 for image in images], dtype=torch.float32)


def jpeg(image: Float[Tensor, "3 h w"], quality: int) -> bytes:
    """An image, rounded to 8 bit, as JPEG with Pillow's default 4:2:0 subsampling."""
    from PIL import Image

    file = io.BytesIO()
    picture = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return file.getvalue()
