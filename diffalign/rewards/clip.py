"""CLIP score: the cosine between the embeddings of an image and of its prompt.

Scores go through the reference front end: rounded to 8 bit, resized by Pillow (bicubic, shorter side), centre crop, so
that numbers compare with published ones. Gradients go through a tensor version of it (bicubic with antialiasing,
clamped), which agrees with the reference to about 0.002 in the cosine.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.cosine import CosineReward
from diffalign.rewards.frontend import FrontEnd
from diffalign.rewards.networks import pinned, reading, whole_network
from diffalign.rewards.towers import TwoTowers
from diffalign.shipped import MODELS, resolve

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


class CLIPEncoder(TwoTowers):
    """Unit embeddings of images and prompts; weights are read at the first use, from safetensors only."""

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
        self._open(pinned(model, revision), dtype=dtype, batch_size=batch_size, device=device, parts=parts)

    @property
    def width(self) -> int:
        """Elements of an embedding."""
        return int(self.parts.net.config.projection_dim)

    def _read(self) -> CLIPParts:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        path = resolve(self.model, MODELS)
        beside, revision = (path, self.revision) if self.processor is None else (self.processor, None)
        kind, read = "a CLIP model in safetensors", partial(CLIPModel.from_pretrained, use_safetensors=True)
        net = whole_network(read, path, self.revision, where="reward model", kind=kind)
        with reading(f"reward model must be {kind}", beside):
            processor = CLIPImageProcessorPil.from_pretrained(beside, revision=revision)
            tokenizer = CLIPTokenizer.from_pretrained(beside, revision=revision)
        return CLIPParts(net=net, processor=processor, tokenizer=tokenizer)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.parts.net.get_image_features(pixel_values=pixels)).float()

    def _text_features(self, texts: list[str]) -> Tensor:
        length = self.parts.net.config.text_config.max_position_embeddings
        tokens = self.parts.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _pooled(self.parts.net.get_text_features(**tokens.to(self.device))).float()


class CLIPReward(CosineReward):
    """Cosine of CLIP's image and prompt embeddings; 100 x cosine unless `scale` says otherwise.

    `scale` is "x100" (most papers' tables), "cos", or "logit" (times the model's own exp(logit_scale)). `raw` holds
    `cos`. As a predictor of what people prefer it is weak (54.8 % to 65.1 % of pairs), and it counts and places badly.

    Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
    Departs: No clamp at 0, which would stop the gradient.
    """

    name = "clip"
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
        self._open(encoder or CLIPEncoder(model, **options), scale)


def _pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 5 wraps it, older ones return it."""
    return output if isinstance(output, Tensor) else output.pooler_output
