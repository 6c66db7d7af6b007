"""How different the images of one prompt are from each other, averaged over prompts.

Over different prompts diversity measures the prompts, so it is taken within each and needs several images of each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError, RunError
from diffalign.evaluate import stats
from diffalign.evaluate.lazy import stacked
from diffalign.rewards.lpips import PerceptualDistance
from diffalign.rewards.vendi import vendi
from diffalign.types import MediaEncoder, RewardBatch

MIN_IMAGES = 4
"""Images of each prompt below which diversity is not measured; 8 are better."""


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """One measure of diversity in two arms, or why there is none."""

    arm: Float[np.ndarray, " p"] | None = None
    """By prompt."""
    base: Float[np.ndarray, " p"] | None = None
    reason: str | None = None
    """Why it was not measured."""

    @property
    def ratio(self) -> float | None:
        """Mean of the arm over mean of the base: below 1 the arm varies less; None without, or with nothing to lose."""
        if self.arm is None or self.base is None or self.base.mean() <= 0:
            return None
        return float(self.arm.mean() / self.base.mean())

    def interval(self, *, seed: int, resamples: int = stats.RESAMPLES) -> tuple[float, float] | None:
        """95 % interval of the ratio, by drawing prompts with replacement; None where there is no ratio."""
        if self.arm is None or self.base is None or self.ratio is None:
            return None
        rng, n = np.random.default_rng(seed), len(self.arm)
        weights = (rng.multinomial(n, np.full(n, 1 / n)) for _ in range(resamples))
        sums = np.array([(w @ self.arm, w @ self.base) for w in weights])
        low, high = np.quantile(sums[:, 0] / np.where(sums[:, 1] == 0, np.nan, sums[:, 1]), [0.025, 0.975])
        return float(low), float(high)


def embed_images(images: Iterable[Float[Tensor, "3 _ _"]], encoder: MediaEncoder, *, batch_size: int = 16) -> Tensor:
    """Unit embeddings of images, read lazily, float32 on the CPU, [n, d].

    Raises:
        InputError: No image, or an encoder that gives several rows an image.
        RunError: An embedding is not finite or 0, so that it has no direction.
    """
    rows = [unit_rows(encoder, RewardBatch(images=batch)) for batch in stacked(images, batch_size)]
    if not rows:
        raise InputError("images must hold at least one image to embed, got none")
    return torch.cat(rows)


def unit_rows(encoder: MediaEncoder, batch: RewardBatch) -> Float[Tensor, "b d"]:
    """One unit row an image, on the CPU; of a clip the unit mean of its rows."""
    embedded = encoder.embed(batch)
    if batch.images is not None and set(embedded.counts) - {1}:
        raise InputError(f"encoder {encoder.version!r} must give one row an image, got {max(embedded.counts)}")
    rows = embedded.rows.float().cpu()
    if set(embedded.counts) - {1}:
        rows = torch.stack([own.mean(0) for own in rows.split(list(embedded.counts))])
    norms = rows.norm(dim=1, keepdim=True)
    if not (norms.isfinite().all() and (norms > 0).all()):
        raise RunError(f"encoder {encoder.version!r} gave an embedding that is not finite or is 0")
    return rows / norms


def vendi_diversity(
    arm: Float[Tensor, "n d"], base: Float[Tensor, "n d"], prompt_index: Sequence[int], *, q: float = 1.0
) -> Diversity:
    """Vendi score of each prompt's images, 1 (all alike) to their number (nothing in common).

    Args:
        arm, base: Unit embeddings, row by row of the same prompts.
    """

    def measure(rows: Float[Tensor, "n d"]) -> Float[np.ndarray, " p"]:
        return np.array([float(vendi(rows[places].double(), q)) for places in groups])

    groups, reason = _groups(prompt_index)
    return Diversity(reason=reason) if reason else Diversity(arm=measure(arm), base=measure(base))


def cosine_diversity(arm: Float[Tensor, "n d"], base: Float[Tensor, "n d"], prompt_index: Sequence[int]) -> Diversity:
    """Mean 1 - cosine over the pairs of each prompt's images; for unit embeddings."""

    def measure(rows: Float[Tensor, "n d"]) -> Float[np.ndarray, " p"]:
        return np.array([_mean_distance(rows[places].double()) for places in groups])

    groups, reason = _groups(prompt_index)
    return Diversity(reason=reason) if reason else Diversity(arm=measure(arm), base=measure(base))


@torch.no_grad()
def perceptual_diversity(
    arm: Sequence[Tensor], base: Sequence[Tensor], prompt_index: Sequence[int], distance: PerceptualDistance
) -> Diversity:
    """Mean perceptual distance over the pairs of each prompt's images, which are read one prompt at a time."""

    def measure(images: Sequence[Tensor]) -> Float[np.ndarray, " p"]:
        return np.array([pairwise(torch.stack([images[i] for i in places]), distance) for places in groups])

    groups, reason = _groups(prompt_index)
    return Diversity(reason=reason) if reason else Diversity(arm=measure(arm), base=measure(base))


def pairwise(images: Float[Tensor, "k 3 h w"], distance: PerceptualDistance) -> float:
    """Mean distance over the k (k - 1) / 2 pairs of images."""
    one, other = zip(*combinations(range(len(images)), 2), strict=True)
    features = distance.features(images)
    return float(distance.between([f[list(one)] for f in features], [f[list(other)] for f in features]).mean())


def _mean_distance(rows: Float[Tensor, "k d"]) -> float:
    k = len(rows)
    cosines = rows @ rows.T
    return float(1 - (cosines.sum() - cosines.trace()) / (k * (k - 1)))


def _groups(prompt_index: Sequence[int]) -> tuple[list[list[int]], str | None]:
    """(rows of each prompt, why they are too few)."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompt_index):
        groups.setdefault(prompt, []).append(row)
    fewest = min(map(len, groups.values()), default=0)
    if fewest < MIN_IMAGES:
        return [], f"diversity needs at least {MIN_IMAGES} samples of each prompt, got {fewest}"
    return [groups[prompt] for prompt in sorted(groups)], None
