"""Rows whose losers are images that a round has sampled: their moments on disk by row, beside the data's winners."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign.data.batches import Rows, Sized
from diffalign.errors import InputError, RunError
from diffalign.types import Cond

Split = Literal["train", "held"]


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """Rounds of sampling and training, for methods whose losers are images of an earlier policy."""

    count: int
    """Rounds, all of train.steps / count optimizer steps; may grow on resume, in step with train.steps."""
    steps: int = 50
    """Sampler steps of an image."""
    guidance: float = 7.5
    batch_size: int = 8
    """Images that are sampled at a time, per device."""

    def __post_init__(self) -> None:
        for key, value in (("count", self.count), ("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise InputError(f"rounds.{key} must be at least 1, got {value}")
        if self.guidance < 1:
            raise InputError(f"rounds.guidance must be at least 1, which is off, got {self.guidance}")


class Images:
    """A round's images of one split on disk, as moments by row."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.places: dict[int, tuple[Path, int]] = {}
        """File and place in it of every row's image."""
        self._files = {file: _open(file) for file in sorted(folder.glob(f"{split}-*.safetensors"))}
        for file, content in self._files.items():
            for place, row in enumerate(json.loads(content.metadata()["rows"])):
                self.places[row] = (file, place)

    def moments(self, rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and std of the images of rows, float32."""
        found = [self.places[row] for row in rows]
        mean, std = (
            torch.stack([self._files[file].get_slice(name)[place] for file, place in found]).float()
            for name in ("mean", "std")
        )
        return mean, std


@dataclass(frozen=True, kw_only=True)
class SelfSampled:
    """Rows of the data whose losers are a round's images."""

    rows: Rows
    images: Images

    @property
    def marks(self) -> None:
        """The data's scores are not of these losers."""
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def latents(
        self, rows: Sequence[int], samples: Sequence[int], member: Literal["w", "l"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        return self.images.moments(rows) if member == "l" else self.rows.latents(rows, samples, "w")

    def cond(self, rows: Sequence[int], dropped: Sequence[bool]) -> Cond:
        return self.rows.cond(rows, dropped)

    def origin(self, rows: Sequence[int], samples: Sequence[int]) -> Int[Tensor, "b 4"]:
        if not isinstance(self.rows, Sized):
            raise ValueError(f"rows must know the sizes of images, got {type(self.rows).__name__}")
        return self.rows.origin(rows, samples)

    def prompt(self, row: int) -> str:
        return self.rows.prompt(row)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt").__enter__()
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{file} must be as it was written, got {reason}; remove it, and it is made again") from error
