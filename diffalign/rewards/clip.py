"""CLIP score: the cosine between the embeddings of an image and of its prompt.

Scores go through the reference front end: rounded to 8 bit, resized by Pillow (bicubic, shorter side), centre crop, so
that numbers compare with published ones. Gradients go through a tensor version of it (bicubic with antialiasing,
clamped), which agrees with the reference to about 0.002 in the cosine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.progress import loading
from diffalign.rewards.inputs import images_of
from diffalign.shipped import MODELS, resolve
from diffalign.types import Embedded, Modality, RewardBatch, RewardOutput

DEFAULT_MODEL = "openai/clip-vit-large-patch14"

SCALES: dict[str, float | None] = {"x100": 100.0, "cos": 1.0, "logit": None}
"""What the cosine is multiplied by; None is the model's own exp(logit_scale)."""

_INTERPOLATION = {2: "bilinear", 3: "bicubic"}
"""Pillow's number of a filter, and torch's name of it."""


@dataclass(frozen=True, kw_only=True)
class CLIPParts:
    """A loaded CLIP model and its two front ends."""

    net: Any
    """A transformers `CLIPModel` in eval mode."""
    processor: Any
    """A `CLIPImageProcessorPil`."""
    tokenizer: Any


class CLIPEncoder:
    """Unit embeddings of images and prompts; weights are read at the first use, from safetensors only."""

    modality: Modality = "image"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        parts: CLIPParts | None = None,
    ) -> None:
        """Names a model: a shipped name ("tiny-clip"), a folder or a hub id; or takes loaded `parts` as they are."""
        self.model, self.revision = model, revision
        self.batch_size = batch_size
        self.device = torch.device(device)
        if parts is not None:
            self.parts = parts
            self.to(device)

    @cached_property
    def parts(self) -> CLIPParts:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        path = resolve(self.model, MODELS)
        try:
            with loading(path):
                net = CLIPModel.from_pretrained(path, revision=self.revision, use_safetensors=True, dtype=torch.float32)
            processor = CLIPImageProcessorPil.from_pretrained(path, revision=self.revision)
            tokenizer = CLIPTokenizer.from_pretrained(path, revision=self.revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"reward model must be a CLIP model in safetensors, got {self.model!r}: {reason}"
            ) from error
        net.eval().requires_grad_(False).to(self.device)
        return CLIPParts(net=net, processor=processor, tokenizer=tokenizer)

    @property
    def version(self) -> str:
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    @property
    def width(self) -> int:
        """Elements of an embedding."""
        return int(self.parts.net.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        """exp of the model's learned log temperature."""
        return float(self.parts.net.logit_scale.exp())

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

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings by the reference front end, without gradient; 0 where the model's embedding is 0."""
        rows = [self._image_features(self._pixels(chunk)) for chunk in images.split(self.batch_size)]
        return _unit(torch.cat(rows)).to(images.device)

    def embed_images_with_graph(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings by the tensor front end, with gradient to the images."""
        pixels = differentiable_pixels(images.to(self.device), self.parts.processor)
        return _unit(self._image_features(pixels)).to(images.device)

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit embeddings of prompts, cut to the model's context; equal prompts are encoded once."""
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = list(unique)
        rows = [self._text_features(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        return _unit(torch.cat(rows))[[unique[prompt] for prompt in prompts]]

    def _pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 r r"]:
        from PIL import Image

        bytes_ = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return self.parts.processor([Image.fromarray(array) for array in bytes_], return_tensors="pt")["pixel_values"]

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.parts.net.get_image_features(pixel_values=pixels.to(self.device))).float()

    def _text_features(self, texts: list[str]) -> Tensor:
        length = self.parts.net.config.text_config.max_position_embeddings
        tokens = self.parts.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _pooled(self.parts.net.get_text_features(**tokens.to(self.device))).float()


class CLIPReward:
    """Cosine of CLIP's image and prompt embeddings; 100 x cosine unless `scale` says otherwise.

    `scale` is "x100" (most papers' tables), "cos", or "logit" (times the model's own exp(logit_scale)). `raw` holds
    `cos`.

    Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
    Departs: No clamp at 0, which would stop the gradient.
    """

    name = "clip"
    requires = frozenset({"images", "prompts"})
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
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a model, or takes an `encoder` as it is."""
        if scale not in SCALES:
            raise InputError(f"reward clip: scale must be one of {', '.join(SCALES)}, got {scale!r}")
        self.encoder = encoder or CLIPEncoder(model, revision=revision, batch_size=batch_size, device=device)
        self.scale = scale

    @property
    def version(self) -> str:
        return f"{self.encoder.version}, {self.scale}"

    @property
    def range(self) -> tuple[float, float]:
        """Of any cosine on this scale; not bounded for "logit", whose factor is the model's."""
        factor = SCALES[self.scale] or math.inf
        return (-factor, factor)

    def to(self, device: torch.device | str) -> "CLIPReward":
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device."""
        images = images_of(batch, self.name, self.requires)
        cos = self._cos(self.encoder.embed_images(images), batch)
        return RewardOutput(scores=self._factor * cos, raw={"cos": cos})

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images."""
        images = images_of(batch, self.name, self.requires)
        return self._factor * self._cos(self.encoder.embed_images_with_graph(images), batch)

    @property
    def _factor(self) -> float:
        return SCALES[self.scale] or self.encoder.logit_scale

    def _cos(self, embedded: Float[Tensor, "b d"], batch: RewardBatch) -> Float[Tensor, " b"]:
        return (embedded * self.encoder.embed_texts(batch.prompts or []).to(embedded.device)).sum(1)


def differentiable_pixels(images: Float[Tensor, "b 3 h w"], processor: Any) -> Float[Tensor, "b 3 r r"]:
    """The processor's resize of the shorter side, centre crop and normalisation, on float tensors with their graph."""
    if processor.do_resize:
        images = _resize(images, processor)
    if processor.do_center_crop:
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        images = images[:, :, top : top + height, left : left + width]
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (images - mean) / std


def _resize(images: Tensor, processor: Any) -> Tensor:
    side, mode = processor.size["shortest_edge"], _INTERPOLATION.get(int(processor.resample))
    if side is None or mode is None:
        raise InputError(
            "reward model must resize the shorter side, bilinear or bicubic, to be differentiated, got "
            f"size {processor.size} and filter {processor.resample}"
        )
    height, width = images.shape[2:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    return F.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def _pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it, older ones return it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(embeddings: Tensor) -> Tensor:
    norm = embeddings.norm(dim=1, keepdim=True)
    return embeddings / torch.where(norm == 0, 1, norm)
