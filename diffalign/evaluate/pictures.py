"""Images as files, as rewards see them, and in a report: see `media`."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.data.images import decode
from diffalign.errors import InputError
from diffalign.evaluate import low_level
from diffalign.evaluate.drift import pixel_distance
from diffalign.evaluate.perturb import PERTURBATIONS
from diffalign.evaluate.score import IMAGES, batches, image_files, png, read_image
from diffalign.evaluate.showing import Shown, show_picture
from diffalign.types import Modality, RewardBatch

EXEMPLARS = 16
"""Files of a reference set that are embedded at a time."""
_SIDES = {2: 384, 3: 320}
"""Larger images are shrunk to this side for a page, by the number of arms."""
_SIDE = 256
"""The same with more arms than that."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """RGB in [0, 1], 8 bits on disk."""

    modality: Modality = "image"
    folder: str = "images"
    one: str = "image"
    suffix: str = ".png"
    accepts: frozenset[str] = frozenset(IMAGES)
    fields: frozenset[str] = frozenset({"images"})
    digest: str = "image_sha256"
    hearing: tuple[object, ...] = ()
    checks: frozenset[str] = frozenset(
        {"held_out", "alignment", "skill", "diversity", "drift", "low_level", "style_collapse", "prompt_insensitivity",
         "texture", "prior_damage", "safety"}
    )  # fmt: skip
    words: Mapping[str, str] = field(default_factory=lambda: low_level.WORDS)
    difference: str = "mean absolute difference of pixels"
    perturbations: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=lambda: PERTURBATIONS)
    gallery: str = "Pictures that nobody chose"
    prompts_shown: int = 48
    changes_shown: int = 12
    note: str = ""

    def stored(self, samples: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return ((samples.clamp(0, 1) * 255).round() / 255).contiguous()  # in one layout, as from disk

    def encoded(self, sample: Float[Tensor, "3 h w"]) -> bytes:
        return png(sample)

    def read(self, file: Path) -> Float[Tensor, "3 h w"]:
        return read_image(file)

    def taken(self, file: Path) -> bytes:
        """Its bytes, of another format those of a PNG with the same pixels."""
        data = file.read_bytes()
        try:
            image = decode(data)
        except OSError as error:
            raise InputError(f"{str(file)!r} must be a readable image: {error}") from error
        if file.suffix.lower() == ".png":
            return data
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    def asked(
        self,
        samples: Float[Tensor, "b 3 h w"],
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, object]] | None = None,
    ) -> RewardBatch:
        return RewardBatch(images=samples, prompts=prompts, metadata=metadata)

    def heard_at(self, rate_hz: int) -> "Pictures":
        """Refuses.

        Raises:
            InputError: Always.
        """
        raise InputError(f"heard_hz must be left out with a model of images, got {rate_hz}")

    def exemplars(self, folder: Path) -> Iterator[RewardBatch]:
        for stack in batches((read_image(file) for file in image_files(folder)), EXEMPLARS):
            yield RewardBatch(images=stack)

    def trial(self, shape: Sequence[int]) -> Float[Tensor, "3 h w"]:
        """Gray."""
        return torch.full(tuple(shape), 0.5)

    def statistics(self, samples: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, " b"]]:
        return low_level.low_level(samples)

    def moved(self, one: Float[Tensor, "b 3 h w"], other: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        return pixel_distance(one, other)

    def shown(self, file: Path, arms: int) -> Shown:
        return show_picture(file, _SIDES.get(arms, _SIDE))

    def facts(self, settings: Mapping[str, Any]) -> dict[str, str]:
        return {"Size": f"{settings['width']} \N{MULTIPLICATION SIGN} {settings['height']}"}

    def size(self, settings: Mapping[str, Any]) -> str:
        return f"{settings['width']} x {settings['height']} pixels"


PICTURES = Pictures()
