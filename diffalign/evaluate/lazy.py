"""Images of two arms side by side, read from disk when they are looked at and not before."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.evaluate.score import read_image


class ImageFiles(Sequence[Tensor]):
    """A sequence of images, RGB in [0, 1], [3, H, W], each read anew when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...

    def __getitem__(self, index: int | slice) -> "Tensor | ImageFiles":
        if isinstance(index, slice):
            return ImageFiles(self.files[index])
        return read_image(self.files[index])


@dataclass(frozen=True, kw_only=True)
class PairedImages:
    """Images of an arm and of its base, row by row from the same prompt and the same initial noise."""

    prompt_index: Sequence[int]
    """Place of the prompt of each row."""
    k: Sequence[int]
    """Number of the seed of each row."""
    arm: Sequence[Tensor]
    base: Sequence[Tensor]

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
        )

    def batches(self, size: int) -> Iterator[tuple[range, Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]]]:
        """(rows, the arm's images, the base's) of at most `size` neighbours of one height and width.

        Raises:
            InputError: An arm's image differs in size from the base's.
        """
        start = 0
        for both in stacked(self._pairs(), size):
            yield range(start, start + len(both)), both[:, 0], both[:, 1]
            start += len(both)

    def _pairs(self) -> Iterator[Float[Tensor, "2 3 _ _"]]:
        for row, (arm, base) in enumerate(zip(self.arm, self.base, strict=True)):
            if arm.shape != base.shape:
                raise InputError(
                    f"images of both arms must have one size, got {tuple(arm.shape)} against {tuple(base.shape)} "
                    f"for prompt {self.prompt_index[row]}, seed {self.k[row]}"
                )
            yield torch.stack([arm, base])


def stacked(images: Iterable[Float[Tensor, "*a 3 _ _"]], size: int) -> Iterator[Float[Tensor, "b *a 3 h w"]]:
    """Batches of at most `size` neighbours of one height and width."""
    for _, run in itertools.groupby(images, key=lambda image: image.shape):
        while chunk := list(itertools.islice(run, size)):
            yield torch.stack(chunk)


def paired_files(arm: Mapping[tuple[int, int], Path], base: Mapping[tuple[int, int], Path]) -> PairedImages:
    """Images of two arms by (prompt's place, seed number), in that order.

    Raises:
        InputError: One arm has an image that the other lacks.
    """
    lone = sorted(set(arm) ^ set(base))
    if lone:
        where = "base" if lone[0] in arm else "arm"
        raise InputError(f"images must be there in both arms, got none of the {where} for prompt and seed {lone[0]}")
    places = sorted(arm)
    return PairedImages(
        prompt_index=[i for i, _ in places],
        k=[k for _, k in places],
        arm=ImageFiles([arm[place] for place in places]),
        base=ImageFiles([base[place] for place in places]),
    )


def _chosen(images: Sequence[Tensor], rows: Sequence[int]) -> Sequence[Tensor]:
    if isinstance(images, ImageFiles):
        return ImageFiles([images.files[row] for row in rows])
    return [images[row] for row in rows]
