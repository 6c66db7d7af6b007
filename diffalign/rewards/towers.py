"""What encoders of two towers share: unit rows of images, by two roads, and of prompts, in one space.

Rows are float32 whatever the dtype of the network: at a scale of 20 the numbers of bfloat16 lie 1/8 apart.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from diffalign.errors import InputError, near_match
from diffalign.rewards.frontend import FrontEnd, check_pixels
from diffalign.rewards.inputs import images_of
from diffalign.types import Embedded, Modality, RewardBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of a network, by the name that an option takes."""


@runtime_checkable
class Parts(Protocol):
    """A loaded model: the network, its tokenizer and what is done to images."""

    @property
    def net(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def front(self) -> FrontEnd: ...


class TwoTowers(ABC):
    """An encoder of images and prompts into one space, whose weights are read at the first use; never made itself."""

    modality: Modality = "image"
    version: str
    """Model, revision or file, and dtype if it is not float32."""
    dtype: torch.dtype
    batch_size: int
    device: torch.device

    @abstractmethod
    def _read(self) -> Parts:
        """The parts of the model that was named."""

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """The network's embeddings of what the front end gives, of any length, float32."""

    @abstractmethod
    def _text_features(self, texts: list[str]) -> Tensor:
        """The network's embeddings of texts, cut to its context, of any length, float32."""

    @cached_property
    def parts(self) -> Parts:
        """The loaded model."""
        parts = self._read()
        self._place(parts)
        return parts

    @property
    def logit_scale(self) -> float:
        """exp of the model's learned log temperature."""
        return float(self.parts.net.logit_scale.exp())

    def to(self, device: torch.device | str) -> "TwoTowers":
        self.device = torch.device(device)
        if "parts" in self.__dict__:
            self.parts.net.to(self.device)
        return self

    def embed(self, batch: RewardBatch) -> Embedded:
        """One unit row an image."""
        images = images_of(batch, self.version, frozenset())
        return Embedded(rows=self.embed_images(images), counts=(1,) * len(images))

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """One unit row an image, by the tensor front end."""
        images = images_of(batch, self.version, frozenset())
        return Embedded(rows=self.embed_images_with_graph(images), counts=(1,) * len(images))

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings by the reference front end, without gradient; 0 where the model's embedding is 0."""
        reference = self.parts.front.reference
        rows = [self._features_of(reference(chunk)) for chunk in images.split(self.batch_size)]
        return unit(torch.cat(rows)).to(images.device)

    def embed_images_with_graph(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings by the tensor front end, with gradient to the images."""
        pixels = self.parts.front.differentiable(images.to(self.device))
        return unit(self._features_of(pixels)).to(images.device)

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of prompts, cut to the model's context; equal prompts are encoded once."""
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = list(unique)
        rows = [self._text_features(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        return unit(torch.cat(rows))[[unique[prompt] for prompt in prompts]]

    def _open(
        self, name: str, *, dtype: str, batch_size: int, device: torch.device | str, parts: Parts | None = None
    ) -> None:
        """Says how the network works, and takes loaded parts."""
        self.version = name if dtype == "float32" else f"{name} in {dtype}"
        self.dtype = dtype_of(dtype)
        self.batch_size = batch_size
        self.device = torch.device(device)
        if parts is not None:
            self.parts = parts
            self._place(parts)

    def _place(self, parts: Parts) -> None:
        """Moves and casts the network in place, to be used and not trained.

        `logit_scale` stays float32: rounded to bfloat16 its exp would be 1 % off.
        """
        net = parts.net
        logit_scale = net.logit_scale.detach().float().to(self.device)
        net.eval().requires_grad_(False).to(device=self.device, dtype=self.dtype)
        net.logit_scale.data = logit_scale

    def _features_of(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self.parts.front)
        return self._image_features(pixels.to(self.device, self.dtype))


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
