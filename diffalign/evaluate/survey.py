"""One pass over the images or clips of two arms: everything that is measured of one without a reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.evaluate.diversity import unit_rows
from diffalign.evaluate.drift import same_seed_cosine, same_seed_distance
from diffalign.evaluate.findings import Paired, by_prompt
from diffalign.evaluate.lazy import PairedImages
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.progress import Bar
from diffalign.rewards.lpips import PerceptualDistance
from diffalign.types import MediaEncoder


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was measured of each image; rows are those of the images."""

    prompt_index: Sequence[int]
    k: Sequence[int]
    low_level: dict[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]
    """(arm, base) by statistic."""
    pixel: Float[np.ndarray, " n"]
    """How far an image is from its base's, as the medium measures it: mean absolute difference of pixels."""
    embeddings: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]] | None = None
    """(arm, base), unit rows; None without an encoder."""
    encoder: str | None = None
    """Version of the encoder."""
    perceptual: Float[np.ndarray, " n"] | None = None
    """Perceptual distance of an image from its base's; None without such a distance."""
    medium: Medium = PICTURES
    """What was looked at."""

    @property
    def cosine(self) -> Float[np.ndarray, " n"] | None:
        """Cosine of an image's embedding with its base's."""
        return None if self.embeddings is None else same_seed_cosine(*self.embeddings).numpy()

    def per_prompt(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " p"]:
        """Mean of a number an image over each prompt's images: the prompt is what statistics draw."""
        return by_prompt(values, np.zeros_like(values), self.prompt_index, self.k).differences()[0]

    def paired(self, statistic: str) -> Paired:
        """A low-level statistic by prompt and seed."""
        return by_prompt(*self.low_level[statistic], self.prompt_index, self.k)


def survey(
    images: PairedImages,
    *,
    encoder: MediaEncoder | None = None,
    perceptual: PerceptualDistance | None = None,
    batch_size: int = 16,
    shown: Bar | None = None,
) -> Survey:
    """Reads each image once and measures it.

    Args:
        shown: A bar to advance by each pair of images.

    Raises:
        InputError: No images, an unreadable one, or one that differs in size from its base's.
        RunError: An embedding is not finite or 0.
    """
    columns: dict[str, list[Tensor]] = {}
    for rows, arm, base in images.batches(batch_size):
        found = {"pixel": images.medium.moved(arm, base)}
        for side, batch in (("arm", arm), ("base", base)):
            found |= {f"{side}.{name}": values for name, values in images.medium.statistics(batch).items()}
            if encoder is not None:
                found[f"{side}.embedding"] = unit_rows(encoder, images.medium.asked(batch))
        if perceptual is not None:
            found["perceptual"] = same_seed_distance(arm, base, perceptual)
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
        if shown is not None:
            shown.advance(len(rows))
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    embeddings = (joined.pop("arm.embedding"), joined.pop("base.embedding")) if encoder is not None else None
    arrays = {name: values.double().numpy() for name, values in joined.items()}
    names = [name.removeprefix("arm.") for name in arrays if name.startswith("arm.")]
    return Survey(
        prompt_index=images.prompt_index,
        k=images.k,
        low_level={name: (arrays[f"arm.{name}"], arrays[f"base.{name}"]) for name in names},
        pixel=arrays["pixel"],
        embeddings=embeddings,
        encoder=None if encoder is None else encoder.version,
        perceptual=arrays.get("perceptual"),
        medium=images.medium,
    )
