"""What rewards and encoders of two towers share: score = factor · cos of an image's and its prompt's embeddings.

Rows are matched one by one, never as a square of all images and all prompts, and are float32 whatever the dtype of the
network: at a scale of 20 the numbers of bfloat16 lie 1/8 apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError, near_match
from diffalign.rewards.frontend import FrontEnd, check_pixels
from diffalign.rewards.inputs import images_of
from diffalign.types import RewardBatch, RewardOutput

NEEDS = frozenset({"images", "prompts"})

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of a network, by the name that an option takes."""


@runtime_checkable
class TwoTowers(Protocol):
    """An encoder of images and prompts into one space."""

    @property
    def version(self) -> str: ...

    def logits(self, cos: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Cosines times exp of the model's learned log temperature."""
        ...

    def to(self, device: torch.device | str) -> "TwoTowers": ...

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...

    def embed_images_with_graph(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]: ...

    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]: ...


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a cosine is multiplied by."""

    factor: float = 1.0
    learned: bool = False
    """Times the model's own exp(logit_scale)."""


SCALES = {"x100": Scale(factor=100.0), "cos": Scale(), "logit": Scale(learned=True)}


@dataclass(frozen=True, kw_only=True)
class CosineScore:
    """The score of a reward by its encoder and the name of its scale, one of `scales`."""

    reward: str
    encoder: TwoTowers
    scale: str
    scales: Mapping[str, Scale]

    def __post_init__(self) -> None:
        if self.scale not in self.scales:
            known = ", ".join(self.scales)
            raise InputError(f"reward {self.reward}: scale must be one of {known}, got {self.scale!r}")

    @property
    def version(self) -> str:
        return f"{self.encoder.version}, {self.scale}"

    @property
    def range(self) -> tuple[float, float]:
        """Of any cosine on this scale; not bounded where the factor is the model's."""
        chosen = self.scales[self.scale]
        bound = math.inf if chosen.learned else chosen.factor
        return (-bound, bound)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """By the reference front end, on the images' device; `raw` holds `cos`."""
        cos = self._cos(batch, self.encoder.embed_images)
        return RewardOutput(scores=self._scaled(cos), raw={"cos": cos})

    def differentiable(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """By the tensor front end, with gradient to the images."""
        return self._scaled(self._cos(batch, self.encoder.embed_images_with_graph))

    def _scaled(self, cos: Tensor) -> Tensor:
        chosen = self.scales[self.scale]
        return chosen.factor * (self.encoder.logits(cos) if chosen.learned else cos)

    def _cos(self, batch: RewardBatch, embed: Callable[[Tensor], Tensor]) -> Tensor:
        images = images_of(batch, self.reward, NEEDS)
        if not len(images):
            return images.new_zeros(0)
        rows = embed(images)
        return (rows * self.encoder.embed_texts(batch.prompts or []).to(rows.device)).sum(1)


@torch.no_grad()
def image_rows(
    images: Float[Tensor, "b 3 h w"], front: FrontEnd, features: Callable[[Tensor], Tensor], batch_size: int
) -> Float[Tensor, "b d"]:
    """Unit embeddings of images by the reference front end; 0 where the network's embedding is 0."""
    return unit(torch.cat([features(_checked(front.reference(part), front)) for part in images.split(batch_size)]))


def image_rows_with_graph(
    images: Float[Tensor, "b 3 h w"], front: FrontEnd, features: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b d"]:
    """Unit embeddings of images by the tensor front end, with gradient to the images."""
    return unit(features(_checked(front.differentiable(images), front)))


@torch.no_grad()
def text_rows(prompts: Sequence[str], features: Callable[[list[str]], Tensor], batch_size: int) -> Float[Tensor, "b d"]:
    """Unit embeddings of prompts; equal prompts are encoded once."""
    unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = list(unique)
    rows = [features(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    return unit(torch.cat(rows))[[unique[prompt] for prompt in prompts]]


def unit(embeddings: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Rows of length 1; rows of 0 stay 0."""
    norm = embeddings.norm(dim=1, keepdim=True)
    return embeddings / torch.where(norm == 0, 1, norm)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name of `DTYPES`.

    Raises:
        InputError: Another name.
    """
    if name not in DTYPES:
        raise InputError(f"dtype must be a known name, got {name!r}{near_match(name, DTYPES)}")
    return DTYPES[name]


def place(net: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Moves and casts a network of two towers, to be used and not trained.

    `logit_scale` stays float32: rounded to bfloat16 its exp would be 1 % off.
    """
    logit_scale = net.logit_scale.detach().float().to(device)
    net.eval().requires_grad_(False).to(device=device, dtype=dtype)
    net.logit_scale.data = logit_scale


def named(model: str, revision: str | None, dtype: str) -> str:
    """A model's version: id, revision if one is pinned, dtype if it is not float32."""
    return model + (f"@{revision}" if revision else "") + (f" in {dtype}" if dtype != "float32" else "")


def _checked(pixels: Tensor, front: FrontEnd) -> Tensor:
    check_pixels(pixels, front)
    return pixels
