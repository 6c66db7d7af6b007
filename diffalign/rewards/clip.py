"""CLIP score: the cosine between the embeddings of an image and of its prompt.

Scores go through the reference front end: rounded to 8 bit, resized by Pillow (bicubic, shorter side), centre crop, so
that numbers compare with published ones. Gradients go through a tensor version of it (bicubic with antialiasing,
clamped), which agrees with the reference to about 0.002 in the cosine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.progress import loading
from diffalign.rewards import cosine
from diffalign.rewards.cosine import NEEDS, SCALES, CosineScore
from diffalign.rewards.frontend import FrontEnd
from diffalign.rewards.inputs import images_of
from diffalign.shipped import MODELS, resolve
from diffalign.types import Embedded, Modality, RewardBatch, RewardOutput

DEFAULT_MODEL = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True)
class CLIPParts:
    """A loaded CLIP model and its two front ends."""

    net: Any
    """A transformers `CLIPModel` in eval mode."""
    processor: Any
    """A `CLIPImageProcessorPil`."""
    tokenizer: Any

    @cached_property
    def front(self) -> FrontEnd:
        """What the processor does."""
        return FrontEnd.of(self.processor)


class CLIPEncoder:
    """Unit embeddings of images and prompts; weights are read at the first use, from safetensors only."""

    modality: Modality = "image"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        processor: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        parts: CLIPParts | None = None,
    ) -> None:
        """Names a model, or takes loaded `parts`, whose network is cast and moved in place.

        Args:
            model: A shipped name ("tiny-clip"), a folder or a hub id.
            revision: Of the model on the hub.
            processor: Folder or hub id of image processor and tokenizer, where they do not lie beside the model.
            dtype: Of the network: "float32", or "bfloat16" or "float16" for training; embeddings are float32.
            batch_size: Images, or prompts, of one pass without gradient.
            device: Where the network works.
            parts: In place of what `model` names.
        """
        self.model, self.revision, self.processor = model, revision, processor
        self.dtype = cosine.dtype_of(dtype)
        self.version = cosine.named(model, revision, dtype)
        """Model id, revision, and dtype if it is not float32."""
        self.batch_size = batch_size
        self.device = torch.device(device)
        if parts is not None:
            self.parts = parts
            cosine.place(parts.net, self.device, self.dtype)

    @cached_property
    def parts(self) -> CLIPParts:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        path = resolve(self.model, MODELS)
        beside, revision = (path, self.revision) if self.processor is None else (self.processor, None)
        try:
            with loading(path):
                net = CLIPModel.from_pretrained(path, revision=self.revision, use_safetensors=True, dtype=torch.float32)
            processor = CLIPImageProcessorPil.from_pretrained(beside, revision=revision)
            tokenizer = CLIPTokenizer.from_pretrained(beside, revision=revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"reward model must be a CLIP model in safetensors, got {self.model!r}: {reason}"
            ) from error
        cosine.place(net, self.device, self.dtype)
        return CLIPParts(net=net, processor=processor, tokenizer=tokenizer)

    @property
    def width(self) -> int:
        """Elements of an embedding."""
        return int(self.parts.net.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        """exp of the model's learned log temperature."""
        return float(self.parts.net.logit_scale.exp())

    def logits(self, cos: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Cosines times `logit_scale`."""
        return self.logit_scale * cos

    def to(self, device: torch.device | str) -> "CLIPEncoder":
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

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings by the reference front end, without gradient; 0 where the model's embedding is 0."""
        return cosine.image_rows(images, self.parts.front, self._image_features, self.batch_size).to(images.device)

    def embed_images_with_graph(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings by the tensor front end, with gradient to the images."""
        moved = images.to(self.device)
        return cosine.image_rows_with_graph(moved, self.parts.front, self._image_features).to(images.device)

    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of prompts, cut to the model's context with the end token kept."""
        return cosine.text_rows(prompts, self._text_features, self.batch_size)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.parts.net.get_image_features(pixel_values=pixels.to(self.device, self.dtype))).float()

    def _text_features(self, texts: list[str]) -> Tensor:
        length = self.parts.net.config.text_config.max_position_embeddings
        tokens = self.parts.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _pooled(self.parts.net.get_text_features(**tokens.to(self.device))).float()


class CLIPReward:
    """Cosine of CLIP's image and prompt embeddings; 100 x cosine unless `scale` says otherwise.

    `scale` is "x100" (most papers' tables), "cos", or "logit" (times the model's own exp(logit_scale)). `raw` holds
    `cos`. As a predictor of what people prefer it is weak (54.8 % to 65.1 % of pairs), and it counts and places badly.

    Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
    Departs: No clamp at 0, which would stop the gradient.
    """

    name = "clip"
    requires = NEEDS
    modality: Modality = "image"
    differentiable = True
    licence = "MIT (weights of OpenAI and LAION)"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        scale: str = "x100",
        encoder: CLIPEncoder | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a model, or takes an `encoder` as it is."""
        options: dict[str, Any] = {"revision": revision, "dtype": dtype, "batch_size": batch_size, "device": device}
        self.encoder = encoder or CLIPEncoder(model, **options)
        self._cosine = CosineScore(reward=self.name, encoder=self.encoder, scale=scale, scales=SCALES)

    @property
    def version(self) -> str:
        return self._cosine.version

    @property
    def range(self) -> tuple[float, float]:
        """Of any cosine on this scale; not bounded for "logit", whose factor is the model's."""
        return self._cosine.range

    def to(self, device: torch.device | str) -> "CLIPReward":
        self.encoder.to(device)
        return self

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device."""
        return self._cosine.score(batch)

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images."""
        return self._cosine.differentiable(batch)


def _pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it, older ones return it."""
    return output if isinstance(output, Tensor) else output.pooler_output
