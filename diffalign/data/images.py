"""Encoded images to tensors in [-1, 1]: resize, crop and flip, to one size for both members of a pair."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign import rng
from diffalign.data.buckets import Size, name_of, nearest
from diffalign.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images become squares of the model's size, or get the shape of a bucket."""

    resolution: int
    """Side of the square, in pixels."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror at random; falsifies captions that name a side, so it is off."""
    variants: int = 1
    """Random variants of each pair that are kept in the cache; 1 without random crop or flip."""
    sizes: bool = False
    """Rows also say how large an image was and where it was cropped."""
    buckets: tuple[Size, ...] = ()
    """Sizes that images are fitted to, each to the one of the nearest aspect ratio; none makes squares."""

    def __post_init__(self) -> None:
        random = self.flip or self.crop == "random"
        if self.variants < 1 or (self.variants > 1 and not random):
            raise InputError(
                f"data.variants must be 1 without random crop or flip, got {self.variants}; all variants would be equal"
            )

    @property
    def names(self) -> list[str]:
        """The buckets as they are written."""
        return [name_of(size) for size in self.buckets]

    def size(self, bucket: int | None) -> Size:
        """Width and height of the images of a bucket."""
        return (self.resolution, self.resolution) if bucket is None else self.buckets[bucket]

    def bucket_of(self, data: bytes) -> int:
        """The bucket of an encoded image.

        Raises:
            OSError: The bytes are not an image.
        """
        return nearest(stored_size(data), self.buckets)


@dataclass(frozen=True)
class Placement:
    """Where the crop lies in the room that is left, in [0, 1] per axis, and whether it is mirrored."""

    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False


def place(prep: Preprocessing, seed: int, row: int, variant: int) -> Placement:
    """The placement of one variant of a row: one draw for the pair, so that both members move together."""
    x, y, mirror = torch.rand(3, generator=rng.generator(seed, row, variant, "placement")).tolist()
    if prep.crop == "center":
        x = y = 0.5
    return Placement(x, y, prep.flip and mirror < 0.5)


def decode(data: bytes) -> Image.Image:
    """An RGB image.

    Raises:
        OSError: The bytes are not a readable image.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"unreadable image: {error}") from error


def to_size(image: Image.Image, size: Size, placement: Placement) -> Float[Tensor, "3 height width"]:
    """Bilinear resize to just cover the size, crop, mirror, scale to [-1, 1]."""
    whole, left, top = _crop(image.size, size, placement)
    if image.size != whole:
        image = image.resize(whole, Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + size[0], top + size[1]))
    if placement.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _crop(stored: Size, size: Size, placement: Placement) -> tuple[Size, int, int]:
    """Width and height after resizing, and the left and upper edge of the crop in that."""
    scale = max(wanted / side for wanted, side in zip(size, stored, strict=True))
    width, height = (max(wanted, round(side * scale)) for wanted, side in zip(size, stored, strict=True))
    return (width, height), round((width - size[0]) * placement.x), round((height - size[1]) * placement.y)


def stored_size(data: bytes) -> Size:
    """Width and height of an encoded image, which is not decoded.

    Raises:
        OSError: The bytes are not an image.
    """
    try:
        return Image.open(io.BytesIO(data)).size
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"unreadable image: {error}") from error


def origin(data: bytes, size: Size, placement: Placement) -> tuple[int, int, int, int]:
    """Height and width of a stored image, and the upper and left edge of its crop to a size after resizing.

    The left edge of a mirrored crop is counted in the mirrored image.

    Raises:
        OSError: The bytes are not an image.
    """
    width, height = stored_size(data)
    whole, left, top = _crop((width, height), size, placement)
    return height, width, top, whole[0] - size[0] - left if placement.mirrored else left


def to_tensor(image: Image.Image | str | Path | bytes) -> Float[Tensor, "3 h w"]:
    """An image, a file of one or its bytes, as RGB in [0, 1]."""
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        image = decode(image)
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
