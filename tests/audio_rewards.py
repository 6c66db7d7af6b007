"""Rewards and an encoder of sound for tests of online runs, found by `tests.audio_rewards:Name`."""

from dataclasses import dataclass

import torch

from diffalign.rewards.audio import mono_clips
from diffalign.types import Embedded, Modality, RewardBatch, RewardOutput

RATE = 16_000


@dataclass(frozen=True)
class Loudness:
    """Root of the mean square."""

    name: str = "loudness"
    version: str = "loudness/1"
    modality: Modality = "audio"
    requires: frozenset[str] = frozenset({"audio"})
    range: tuple[float, float] = (0.0, 1.0)
    differentiable: bool = False
    licence: str = "-"

    def score(self, batch: RewardBatch) -> RewardOutput:
        clips = mono_clips(batch, self.name, rate_hz=RATE, shortest=RATE // 10)
        return RewardOutput(scores=torch.stack([clip.square().mean().sqrt() for clip in clips]))


@dataclass(frozen=True)
class Fast(Loudness):
    """The same of clips at another rate."""

    name: str = "fast"

    def score(self, batch: RewardBatch) -> RewardOutput:
        clips = mono_clips(batch, self.name, rate_hz=8_000, shortest=1)
        return RewardOutput(scores=torch.stack([clip.square().mean().sqrt() for clip in clips]))


@dataclass(frozen=True)
class Bands:
    """Log energies of three bands, of every quarter of a second."""

    version: str = "bands/1"
    modality: Modality = "audio"

    def embed(self, batch: RewardBatch) -> Embedded:
        with torch.no_grad():
            return self.embed_with_graph(batch)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        rows, counts = [], []
        for clip in mono_clips(batch, "bands", rate_hz=RATE, shortest=RATE // 4):
            frames = clip[: len(clip) // (RATE // 4) * (RATE // 4)].reshape(-1, RATE // 4)
            power = torch.fft.rfft(frames).abs().square()
            edges = [(1, 60), (60, 400), (400, power.shape[1])]
            rows.append(torch.stack([(power[:, a:b].mean(1) + 1e-6).log() for a, b in edges], dim=1))
            counts.append(len(frames))
        return Embedded(rows=torch.cat(rows), counts=tuple(counts))


@dataclass(frozen=True)
class Ears(Loudness):
    """How many channels there are to hear."""

    name: str = "ears"

    def score(self, batch: RewardBatch) -> RewardOutput:
        assert batch.audio is not None
        return RewardOutput(scores=torch.tensor([float(len(clip)) for clip in batch.audio]))
