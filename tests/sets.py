"""For tests of set rewards: the fixture of methods/rewards.md, random rows, and encoders whose embeddings are given."""

import torch
from torch import Tensor

from diffalign.types import Embedded, Modality, RewardBatch


def fixture(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """X_ij = sin(0.1 i j) and Y_ij = cos(0.1 i j) + 0.1 j, i and j from 1, float64."""
    i, k, j = (torch.arange(1, size + 1, dtype=torch.float64) for size in (n, m, d))
    return torch.sin(0.1 * i[:, None] * j), torch.cos(0.1 * k[:, None] * j) + 0.1 * j


def draw(n: int, d: int, seed: int = 0, spread: float = 1.0, shift: float = 0.0) -> Tensor:
    """Rows of a Gaussian with correlated columns of falling size, float64."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    sizes = torch.linspace(1, 0.2, d, dtype=torch.float64)
    return spread * torch.randn(n, d, generator=rng, dtype=torch.float64) * sizes @ mixing / d**0.5 + shift


class PixelEncoder:
    """An encoder of images whose first pixels are the embedding, each image cut into `frames` of them."""

    modality: Modality = "image"

    def __init__(self, width: int = 6, frames: int = 1, name: str = "pixels, 1") -> None:
        self.width, self.frames, self.version = width, frames, name

    def embed(self, batch: RewardBatch) -> Embedded:
        found = self.embed_with_graph(batch)
        return Embedded(rows=found.rows.detach(), counts=found.counts)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        kept = batch.images.flatten(1)[:, : self.frames * self.width]
        return Embedded(rows=kept.reshape(-1, self.width), counts=(self.frames,) * len(batch.images))


class SampleEncoder:
    """An encoder of audio: a row of `width` samples a frame, as many frames as fit."""

    modality: Modality = "audio"
    version = "samples, 1"

    def __init__(self, width: int = 6) -> None:
        self.width = width

    def embed(self, batch: RewardBatch) -> Embedded:
        return self.embed_with_graph(batch)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        parts = [clip[0][: clip.shape[1] // self.width * self.width].reshape(-1, self.width) for clip in batch.audio]
        return Embedded(rows=torch.cat(parts), counts=tuple(map(len, parts)))


def pictures(n: int, seed: int = 0, shift: float = 0.0, side: int = 4) -> Tensor:
    """Images [n, 3, side, side] in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    return (0.5 * torch.rand(n, 3, side, side, generator=rng) + shift).clamp(0, 1)


def batches(images: Tensor, size: int = 7, groups: list[int] | None = None) -> list[RewardBatch]:
    """Images in batches, with their groups."""
    return [
        RewardBatch(images=images[i : i + size], group_ids=None if groups is None else groups[i : i + size])
        for i in range(0, len(images), size)
    ]
