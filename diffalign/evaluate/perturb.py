"""Small changes that a person hardly sees and that leave what a picture shows; RGB in [0, 1] in and out."""

import io
import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.data.images import to_tensor
from diffalign.rewards.jpeg import jpeg

Images = Float[Tensor, "b 3 h w"]

_SIDED = re.compile(
    r"\b(left|right|leftmost|rightmost|leftwards?|rightwards?|clockwise|counterclockwise|anticlockwise|east|west)\b",
    re.IGNORECASE,
)
_WRITTEN = re.compile(
    r"[\"“”]|(?<!\w)'[^']+'(?!\w)"
    r"|\b(word|words|text|letter|letters|number|numbers|written|writing|says|saying|spells|reads|logo)\b",
    re.IGNORECASE,
)


def blur(images: Images, sigma: float = 1.0) -> Images:
    """Gaussian blur, cut off at 4 sigma, mirrored at the edges."""
    reach = min(int(4 * sigma + 0.5), min(images.shape[2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    wide = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="reflect"), kernel, groups=3)
    return F.conv2d(F.pad(wide, (0, 0, reach, reach), mode="reflect"), kernel.transpose(2, 3), groups=3)


def jpeg_round_trip(images: Images, quality: int = 75) -> Images:
    """What is left after saving as JPEG."""
    from PIL import Image

    decoded = [to_tensor(Image.open(io.BytesIO(jpeg(image, quality)))) for image in images]
    return torch.stack(decoded).to(images)


def resize_round_trip(images: Images, share: float = 0.9) -> Images:
    """Down to a share of each side and back, bicubic with antialiasing."""
    height, width = images.shape[2:]
    size = (max(1, round(height * share)), max(1, round(width * share)))
    small = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return F.interpolate(small, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def flip(images: Images) -> Images:
    """Left and right exchanged."""
    return images.flip(3)


PERTURBATIONS: dict[str, Callable[[Images], Images]] = {
    "blur": blur,
    "jpeg": jpeg_round_trip,
    "resize": resize_round_trip,
    "flip": flip,
}
"""By the name that a check gives them."""

WORDS = {
    "blur": "a Gaussian blur of sigma 1",
    "jpeg": "saving as JPEG of quality 75",
    "resize": "resizing to 90 % and back",
    "flip": "a horizontal flip",
}


def flip_changes_meaning(prompt: str) -> bool:
    """Whether a prompt names a side or asks for writing (English words only), so that a mirror image is wrong."""
    return bool(_SIDED.search(prompt) or _WRITTEN.search(prompt))
