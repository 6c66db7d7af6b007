"""Encoded images to tensors in [-1, 1]: resize, crop and flip, the same for both members of a pair."""

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
from diffalign.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images become squares of the model's size."""

    resolution: int
    """Side of the square, in pixels."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    """Mirror at random; falsifies captions that name a side, so it is off."""
    variants: int = 1
    """Random variants of each pair that are kept in the cache; 1 without random crop or flip."""
    sizes: bool = False
    """Rows also say how large an image was and where it was cropped."""

    def __post_init__(self) -> None:
        random = self.flip or self.crop == "random"
        if self.variants < 1 or (self.variants > 1 and not random):
            raise InputError(
                f"data.variants must be 1 without random crop or flip, got {self.variants}; all variants would be equal"
            )


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


def to_square(image: Image.Image, prep: Preprocessing, placement: Placement) -> Float[Tensor, "3 r r"]:
    """Bilinear resize of the shorter side to the resolution, crop, mirror, scale to [-1, 1]."""
    side = prep.resolution
    size, left, top = _crop(image.size, prep, placement)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + side, top + side))
    if placement.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _crop(whole: tuple[int, int], prep: Preprocessing, placement: Placement) -> tuple[tuple[int, int], int, int]:
    """Width and height after resizing, and the left and upper edge of the square in that."""
    side, (width, height) = prep.resolution, whole
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return size, round((size[0] - side) * placement.x), round((size[1] - side) * placement.y)


def origin(data: bytes, prep: Preprocessing, placement: Placement) -> tuple[int, int, int, int]:
    """Height and width of a stored image, and the upper and left edge of its square after resizing.

    The left edge of a mirrored square is counted in the mirrored image.

    Raises:
        OSError: The bytes are not an image.
    """
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"unreadable image: {error}") from error
    size, left, top = _crop((width, height), prep, placement)
    return height, width, top, size[0] - prep.resolution - left if placement.mirrored else left


def to_tensor(image: Image.Image | str | Path | bytes) -> Float[Tensor, "3 h w"]:
    """An image, a file of one or its bytes, as RGB in [0, 1]."""
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        image = decode(image)
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
