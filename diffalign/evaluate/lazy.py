"""Samples of two arms side by side, read from disk when they are looked at and not before."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.score import read_image


class ImageFiles(Sequence[Tensor]):
    """A sequence of images, RGB in [0, 1], [3, H, W], or of what else `read` makes; each read when it is asked for."""

    def __init__(self, files: Sequence[Path], read: Callable[[Path], Tensor] = read_image) -> None:
        self.files = tuple(files)
        self.read = read

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...

    def __getitem__(self, index: int | slice) -> "Tensor | ImageFiles":
        if isinstance(index, slice):
            return ImageFiles(self.files[index], self.read)
        return self.read(self.files[index])


@dataclass(frozen=True, kw_only=True)
class PairedImages:
    """Images or clips of an arm and of its base, row by row from the same prompt and the same initial noise."""

    prompt_index: Sequence[int]
    """Place of the prompt of each row."""
    k: Sequence[int]
    """Number of the seed of each row."""
    arm: Sequence[Tensor]
    base: Sequence[Tensor]
    medium: Medium = PICTURES
    """What they are."""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("prompt_index", "k", "arm", "base")}
        if len(set(lengths.values())) > 1:
            raise InputError(f"images must have one row each in {', '.join(lengths)}, got {lengths}")

    def __len__(self) -> int:
        return len(self.arm)

    def rows(self, chosen: Sequence[int]) -> "PairedImages":
        """Some of the rows; images that are kept in files stay there."""
        return PairedImages(
            prompt_index=[self.prompt_index[row] for row in chosen],
            k=[self.k[row] for row in chosen],
            arm=_chosen(self.arm, chosen),
            base=_chosen(self.base, chosen),
            medium=self.medium,
        )

    def batches(self, size: int) -> Iterator[tuple[range, Float[Tensor, " b *rest"], Float[Tensor, " b *rest"]]]:
        """(rows, the arm's images, the base's) of at most `size` neighbours of one shape.

        Raises:
            InputError: An arm's image differs in size from the base's.
        """
        start = 0
        for both in stacked(self._pairs(), size):
            yield range(start, start + len(both)), both[:, 0], both[:, 1]
            start += len(both)

    def _pairs(self) -> Iterator[Float[Tensor, " two *rest"]]:
        for row, (arm, base) in enumerate(zip(self.arm, self.base, strict=True)):
            if arm.shape != base.shape:
                raise InputError(
                    f"{self.medium.folder} of both arms must have one size, got {tuple(arm.shape)} against "
                    f"{tuple(base.shape)} for prompt {self.prompt_index[row]}, seed {self.k[row]}"
                )
            yield torch.stack([arm, base])


def stacked(images: Iterable[Float[Tensor, "..."]], size: int) -> Iterator[Float[Tensor, "..."]]:
    """Batches of at most `size` neighbours of one shape."""
    for _, run in itertools.groupby(images, key=lambda image: image.shape):
        while chunk := list(itertools.islice(run, size)):
            yield torch.stack(chunk)


def paired_files(
    arm: Mapping[tuple[int, int], Path], base: Mapping[tuple[int, int], Path], medium: Medium = PICTURES
) -> PairedImages:
    """Images or clips of two arms by (prompt's place, seed number), in that order.

    Raises:
        InputError: One arm has an image that the other lacks.
    """
    lone = sorted(set(arm) ^ set(base))
    if lone:
        where = "base" if lone[0] in arm else "arm"
        raise InputError(
            f"{medium.folder} must be there in both arms, got none of the {where} for prompt and seed {lone[0]}"
        )
    places = sorted(arm)
    return PairedImages(
        prompt_index=[i for i, _ in places],
        k=[k for _, k in places],
        arm=ImageFiles([arm[place] for place in places], medium.read),
        base=ImageFiles([base[place] for place in places], medium.read),
        medium=medium,
    )


def _chosen(images: Sequence[Tensor], rows: Sequence[int]) -> Sequence[Tensor]:
    if isinstance(images, ImageFiles):
        return ImageFiles([images.files[row] for row in rows], images.read)
    return [images[row] for row in rows]
