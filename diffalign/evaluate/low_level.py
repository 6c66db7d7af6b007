"""What can be measured of an image without any model: colour, contrast, clipping, fine detail, bytes.

Rewards can often be raised by these alone. Each function takes RGB images in [0, 1] and gives one number an image.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.rewards.jpeg import jpeg_kb

WORDS = {
    "saturation": "colour saturation (HSV)",
    "contrast": "contrast (standard deviation of luma)",
    "clipped": "share of clipped pixels",
    "detail": "fine detail (variance of the Laplacian)",
    "jpeg_kb": "size as JPEG of quality 95, kB",
}

_LUMA = (0.299, 0.587, 0.114)
"""Rec. 601, as in Pillow's conversion to gray."""


def low_level(images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, " b"]]:
    """All statistics by name."""
    return {
        "saturation": saturation(images),
        "contrast": contrast(images),
        "clipped": clipped(images),
        "detail": detail(images),
        "jpeg_kb": jpeg_kb(images),
    }


def saturation(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Mean over pixels of S in HSV: (largest - smallest channel) / largest, 0 for black."""
    largest, smallest = images.amax(1), images.amin(1)
    return ((largest - smallest) / torch.where(largest == 0, 1, largest)).mean((1, 2))


def contrast(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Standard deviation over pixels of the luma 0.299 R + 0.587 G + 0.114 B, in [0, 0.5]."""
    return luma(images).flatten(1).std(1, correction=0)


def clipped(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Share of pixels that have a channel at 0 or 255 in 8 bit."""
    bytes_ = (images.clamp(0, 1) * 255).round()
    return ((bytes_ == 0) | (bytes_ == 255)).any(1).float().mean((1, 2))


def detail(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Energy at high frequencies: variance of the luma's four-neighbour Laplacian over inner pixels; 0 below 3x3."""
    if min(images.shape[2:]) < 3:
        return images.new_zeros(len(images))
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(luma(images)[:, None], kernel[None, None]).flatten(1).var(1, correction=0)


def luma(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
    """Brightness as Rec. 601 weighs the channels."""
    return torch.einsum("c,bchw->bhw", images.new_tensor(_LUMA), images)
