"""Rewards of sets as rewards of single samples: each sample a set of its own, of its frames or of its one embedding."""

import hashlib
from pathlib import Path

import torch

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.inputs import check_batch
from diffalign.types import Modality, RewardBatch, RewardOutput, SetReward


class PerSampleReward:
    """Distance of each sample by itself to a reference set: per-song FAD, or CMMD of one image to a style's images.

    For ranking only: its level is that of the variety that one sample cannot have. Distances that need a covariance
    need an encoder with several embeddings a sample (frames of audio); CMMD takes one.

    Paper: Bai et al., "DRAGON: Distributional Rewards Optimize Diffusion Generative Models", arXiv 2504.15217
    (instance-to-distribution rewards).
    """

    name = "per_sample"
    differentiable = False

    def __init__(self, model: str | SetReward) -> None:
        """Names a reward of sets and its reference file, or takes a reward that has its reference.

        Args:
            model: "fad:vggish@good-songs.safetensors": the reward's spec, and after an @ the file that `save_reference`
                has written. Or the reward.

        Raises:
            InputError: A named reward that needs a reference set, without a file.
        """
        if not isinstance(model, str):
            self.of_sets, self._about = model, "reference as given"
            return
        spec, at, file = model.rpartition("@")
        self.of_sets = rewards.load_set(spec if at else model)
        self._about = "no reference"
        if at:
            self.of_sets.load_reference(file)
            self._about = f"reference {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}"
        elif self.of_sets.needs_reference:
            raise InputError(
                f"reward 'per_sample' must get the reference of set reward {model!r}, got none; name its file as "
                f"{model}@FILE.safetensors"
            )

    @property
    def version(self) -> str:
        return f"{self.of_sets.name} of each sample, {self.of_sets.version}, {self._about}"

    @property
    def modality(self) -> Modality:
        return self.of_sets.modality

    @property
    def requires(self) -> frozenset[str]:
        return self.of_sets.requires

    @property
    def range(self) -> tuple[float, float]:
        return self.of_sets.range

    @property
    def licence(self) -> str:
        return self.of_sets.licence

    def to(self, device: torch.device | str) -> "PerSampleReward":
        if isinstance(self.of_sets, rewards.OnDevice):
            self.of_sets.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """The set reward's number of each sample's own embeddings.

        Raises:
            InputError: A sample with fewer embeddings than the reward's estimate needs.
        """
        check_batch(batch, self.name, self.requires)
        return RewardOutput(scores=self.of_sets.credit(batch, mode="self").float())
