"""The image front end of rewards and encoders: resize, crop or pad, normalise; each by two roads.

`FrontEnd.reference` does what the published code of a model does: 8-bit image, Pillow's resize, crop, normalise. Its
numbers compare with published ones. `FrontEnd.differentiable` is the same on float tensors, with their graph.

Differences of the two on the scale [0, 1], 512 -> 224 (mean / largest): smooth picture 0.0012 / 0.0054, uniform noise
0.0012 / 0.016 (Pillow rounds and clamps after each of its two passes); with `quantised` 0.0007 / 0.004 and 0.0006 /
0.016. Where the reference resizes floats: 0.0004 / 0.002, and with `quantised` 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError

Resize = Literal["shortest", "longest", "stretch"]
"""What becomes `size`: the shorter side, the longer side (then zeros are put around, centred), or both sides."""
Filter = Literal["bicubic", "bilinear"]
Colour = tuple[float, float, float]

CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
HALF: Colour = (0.5, 0.5, 0.5)
"""Mean and std of open_clip's ViT-L-14 of laion2b_s32b_b82k, SigLIP and others."""

_FILTERS: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}
"""By Pillow's number."""
_SLACK = {"bytes": 2e-3, "floats": 0.5}
"""How far a pixel may lie outside [0, 1]: what the door admits, or what a bicubic filter that is not clamped makes."""


@dataclass(frozen=True)
class FrontEnd:
    """What is done to an image in [0, 1] before it enters a network; the result is square."""

    size: int
    """Of the side or sides that `resize` names, in pixels."""
    resize: Resize = "shortest"
    crop: int | None = None
    """Side of the square that is cut out of the middle; `size` if None."""
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD
    filter: Filter = "bicubic"
    resized_as: Literal["bytes", "floats"] = field(default="bytes", kw_only=True)
    """What the reference resizes: an 8-bit image by Pillow, or a float tensor, antialiased and not clamped."""
    odd_margin: Literal["down", "even"] = field(default="down", kw_only=True)
    """Where a crop begins if the margin is odd: half of it rounded down (transformers), or to even (torchvision)."""

    def __post_init__(self) -> None:
        if not 0 < self.side <= self.size:
            raise InputError(f"front end must crop to 1..{self.size}, its size, got {self.crop!r}")

    @classmethod
    def of(cls, processor: Any) -> "FrontEnd":
        """The front end that a transformers image processor describes.

        Raises:
            InputError: It leaves out the resize, rescaling or normalisation, or has another filter or shape.
        """
        values: Mapping[str, Any] = processor.to_dict()
        needed = ("do_resize", "do_rescale", "do_normalize")
        if not all(values.get(name) for name in needed) or values.get("resample") not in _FILTERS:
            shown = {name: values.get(name) for name in (*needed, "resample")}
            raise InputError(f"image processor must resize (2 or 3), rescale and normalise, got {shown}")
        size, crop = _edges(values["size"]), None
        if values.get("do_center_crop"):
            crop = _edges(values["crop_size"])[1]
        if size[0] == "shortest" and crop is None:
            raise InputError(f"image processor must give a square image, got size {values['size']} without a crop")
        mean, std = ((float(r), float(g), float(b)) for r, g, b in (values["image_mean"], values["image_std"]))
        return cls(size[1], size[0], crop, mean, std, _FILTERS[int(values["resample"])])

    @property
    def side(self) -> int:
        """Of the result, in pixels."""
        return self.size if self.crop is None else self.crop

    @property
    def range(self) -> tuple[float, float]:
        """What black and white become at most: least and greatest value of a normalised pixel."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return min(-mean / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)

    @torch.no_grad()
    def reference(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 r r"]:
        """Normalised pixels as the published code of the model makes them, without gradient, on the images' device."""
        images = _bytes(images)
        if self.resized_as == "floats":
            return self._finish(self._interpolate(images.float() / 255))
        return self._finish(self._pillow(images.cpu()).to(images.device))

    def differentiable(self, images: Float[Tensor, "b 3 h w"], *, quantised: bool = False) -> Float[Tensor, "b 3 r r"]:
        """Normalised pixels with gradient to the images.

        Args:
            images: RGB in [0, 1].
            quantised: Round to 8 bit wherever the reference does, straight through: values come nearer to it, the
                gradient is the one without rounding.
        """
        pixels = self._interpolate(quantise(images) if quantised else images.float())
        if self.resized_as == "bytes":
            pixels = quantise(pixels) if quantised else pixels.clamp(0, 1)
        return self._finish(pixels)

    def _pillow(self, images: Tensor) -> Tensor:
        from PIL import Image

        height, width = self._resized(*images.shape[2:])
        kind = Image.Resampling.BICUBIC if self.filter == "bicubic" else Image.Resampling.BILINEAR
        arrays = [Image.fromarray(array).resize((width, height), kind) for array in images.permute(0, 2, 3, 1).numpy()]
        shape = (len(arrays), height, width, 3)
        return torch.from_numpy(np.array(arrays, dtype=np.uint8).reshape(shape)).permute(0, 3, 1, 2).float() / 255

    def _interpolate(self, images: Tensor) -> Tensor:
        size = self._resized(*images.shape[2:])
        return F.interpolate(images, size, mode=self.filter, antialias=True, align_corners=False)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize; the other side is rounded as the published code does it."""
        if self.resize == "stretch":
            return self.size, self.size
        if self.resize == "shortest":
            short = min(height, width)
            return int(self.size * height / short), int(self.size * width / short)
        scale = self.size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _finish(self, images: Tensor) -> Tensor:
        """Pads to `size` with zeros, crops to `side`, normalises."""
        down, right = (max(0, self.size - side) for side in images.shape[2:])
        images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        top, left = (self._margin(side - self.side) for side in images.shape[2:])
        images = images[:, :, top : top + self.side, left : left + self.side]
        return (images - _channels(self.mean, images)) / _channels(self.std, images)

    def _margin(self, pixels: int) -> int:
        return round(pixels / 2) if self.odd_margin == "even" else pixels // 2


def quantise(images: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The values of the 8-bit image with the gradient of the image as it is: a straight-through rounding."""
    return _bytes(images).float() / 255 + (images - images.detach())


def check_pixels(pixels: Float[Tensor, "b 3 r r"], front: FrontEnd) -> None:
    """Checks what enters a network: images in [-1, 1] or 0..255, and images that were divided by 255 twice.

    The second give no value outside the range. They lie within 1/255 of black, which a batch that is not all of one
    colour does not; the std over a whole normalised image cannot tell, since black alone has 0.14 between channels.

    Raises:
        InputError: Pixels beyond what black and white become, NaN, or a batch within 1/255 of black but not of one
            colour.
    """
    if not pixels.numel():
        return
    units = pixels.detach() * _channels(front.std, pixels) + _channels(front.mean, pixels)
    low, high = (value.item() for value in torch.aminmax(units))
    slack = _SLACK[front.resized_as]
    if not (low >= -slack and high <= 1 + slack):
        raise InputError(
            f"pixels must be of images in [0, 1], got values from {low:.4g} to {high:.4g} before their mean"
        )
    if high < 1.5 / 255 and high - low > 1e-5:
        raise InputError(f"pixels must be of images in [0, 1], got none above {high:.4g}: divided by 255 twice?")


def _bytes(images: Tensor) -> Tensor:
    return (images.detach().clamp(0, 1) * 255).round().byte()


def _channels(colour: Colour, like: Tensor) -> Tensor:
    return like.new_tensor(colour).view(1, 3, 1, 1)


def _edges(size: Mapping[str, int | None]) -> tuple[Resize, int]:
    """(what is resized, to what) of a processor's size."""
    known = {name: value for name, value in dict(size).items() if value is not None}
    if known.keys() == {"shortest_edge"}:
        return "shortest", int(known["shortest_edge"])
    if known.keys() == {"height", "width"} and known["height"] == known["width"]:
        return "stretch", int(known["height"])
    raise InputError(f"image processor must have a shortest_edge or a square size, got {known}")
