"""What rewards of two towers share: score = factor · cos of an image's and its prompt's embeddings.

Rows are matched one by one, never as a square of all images and all prompts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.inputs import images_of
from diffalign.rewards.towers import TwoTowers
from diffalign.types import Modality, RewardBatch, RewardOutput


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a cosine is multiplied by."""

    factor: float = 1.0
    learned: bool = False
    """Times the model's own exp(logit_scale)."""

    @property
    def range(self) -> tuple[float, float]:
        """Of any cosine on this scale; not bounded where the factor is the model's."""
        bound = math.inf if self.learned else self.factor
        return (-bound, bound)


SCALES = {"x100": Scale(factor=100.0), "cos": Scale(), "logit": Scale(learned=True)}


def scale_of(reward: str, name: str, scales: Mapping[str, Scale]) -> Scale:
    """The scale of that name.

    Raises:
        InputError: Another name.
    """
    if name not in scales:
        raise InputError(f"reward {reward}: scale must be one of {', '.join(scales)}, got {name!r}")
    return scales[name]


class CosineReward(ABC):
    """A reward whose score is factor · cos of an image and its prompt; never made itself."""

    requires = frozenset({"images", "prompts"})
    modality: Modality = "image"
    differentiable = True
    encoder: TwoTowers
    version: str
    """The encoder's, and the name of the scale."""
    _scale: Scale

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def licence(self) -> str: ...

    @property
    def range(self) -> tuple[float, float]:
        """Of any cosine on this scale; not bounded where the factor is the model's."""
        return self._scale.range

    def to(self, device: torch.device | str) -> "CosineReward":
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device; `raw` holds `cos`."""
        cos = self._cos(batch, self.encoder.embed_images)
        return RewardOutput(scores=self._scaled(cos), raw={"cos": cos})

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images."""
        return self._scaled(self._cos(batch, self.encoder.embed_images_with_graph))

    def _open(self, encoder: TwoTowers, scale: str, scales: Mapping[str, Scale] = SCALES) -> None:
        self._scale = scale_of(self.name, scale, scales)
        self.encoder, self.version = encoder, f"{encoder.version}, {scale}"

    def _scaled(self, cos: Tensor) -> Tensor:
        return self._scale.factor * (self.encoder.logit_scale * cos if self._scale.learned else cos)

    def _cos(self, batch: RewardBatch, embed: Callable[[Tensor], Tensor]) -> Tensor:
        images = images_of(batch, self.name, self.requires)
        if not len(images):
            return images.new_zeros(0)
        rows = embed(images)
        return (rows * self.encoder.embed_texts(batch.prompts or []).to(rows.device)).sum(1)
