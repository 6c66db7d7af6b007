"""CLIP models of the open_clip package, by architecture and pretrained tag or file.

Weights trained with QuickGELU (all of OpenAI's, some of others) give other embeddings under plain GELU, and open_clip
only warns when a plain architecture is asked for them. Here the tag decides; of a file nobody knows, so its
architecture's name has to say it ("ViT-L-14-quickgelu").
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError, near_match
from diffalign.progress import loading
from diffalign.rewards.cosine import CosineReward
from diffalign.rewards.frontend import FrontEnd, Resize
from diffalign.rewards.networks import reading
from diffalign.rewards.towers import TwoTowers

DEFAULT_MODEL = "ViT-H-14/laion2b_s32b_b79k"

_RESIZES: dict[str, Resize] = {"shortest": "shortest", "longest": "longest", "squash": "stretch"}


@dataclass(frozen=True, kw_only=True)
class OpenCLIPParts:
    """A loaded open_clip model, its tokenizer and what is done to images."""

    net: Any
    """An `open_clip.CLIP` or its like, in eval mode."""
    tokenizer: Any
    front: FrontEnd


class OpenCLIPEncoder(TwoTowers):
    """Unit embeddings of images and prompts by a model of open_clip; weights are read at the first use."""

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: str = "float32",
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        parts: OpenCLIPParts | None = None,
        load: Callable[[], OpenCLIPParts] | None = None,
    ) -> None:
        """Names a model, or takes loaded `parts`, whose network is cast and moved in place.

        Args:
            model: "<architecture>/<tag>" of `open_clip.list_pretrained()`, or "<architecture>/<file of weights>".
            dtype: Of the network: "float32", or "bfloat16" or "float16" for training; embeddings are float32.
            batch_size: Images, or prompts, of one pass without gradient.
            device: Where the network works.
            parts: In place of what `model` names, which stays the version's name.
            load: How the parts are read at the first use, for weights that open_clip does not know.
        """
        self._load = load or partial(load_parts, model)
        self._open(model, dtype=dtype, batch_size=batch_size, device=device, parts=parts)

    @cached_property
    def width(self) -> int:
        """Elements of an embedding."""
        return int(self.embed_texts([""]).shape[1])

    def _read(self) -> OpenCLIPParts:
        return self._load()

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.parts.net.encode_image(pixels).float()

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.parts.net.encode_text(self.parts.tokenizer(texts).to(self.device)).float()


class OpenCLIPReward(CosineReward):
    """Cosine of an open_clip model's image and prompt embeddings; 100 x cosine unless `scale` says otherwise.

    The default is LAION's ViT-H/14, which several papers' tables call "CLIP". `scale` is "x100", "cos", or "logit"
    (times the model's own exp(logit_scale); a SigLIP model's bias is not added). `raw` holds `cos`. It counts and
    places badly, as all CLIP models do.

    Paper: Cherti et al., "Reproducible scaling laws for contrastive language-image learning", arXiv 2212.07143.
    """

    name = "openclip"
    licence = "MIT (LAION's and OpenAI's weights; others: see the tag's model card)"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        scale: str = "x100",
        encoder: OpenCLIPEncoder | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a model, or takes an `encoder` as it is."""
        options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "device": device}
        self._open(encoder or OpenCLIPEncoder(model, **options), scale)


def open_clip() -> Any:
    """The package.

    Raises:
        InputError: It is not installed.
    """
    try:
        import open_clip as package
    except ImportError as error:
        raise InputError(f"reward must have open_clip: {error}; pip install 'diffalign[openclip]'") from error
    return package


def load_parts(model: str) -> OpenCLIPParts:
    """A model, its tokenizer and front end by "<architecture>/<tag or file>", with the tag's own activation.

    Raises:
        InputError: An unknown architecture or tag, or weights that cannot be had or do not fit.
    """
    package = open_clip()
    name, _, weights = model.partition("/")
    if name not in package.list_models():
        hint = near_match(name, package.list_models())
        raise InputError(f"open_clip model must be <architecture>/<tag or file>, got {model!r}{hint}")
    if not package.is_pretrained_cfg(name, weights) and not Path(weights).is_file():
        hint = near_match(weights, package.list_pretrained_tags_by_model(name))
        raise InputError(f"open_clip model {name} must get a known tag or a file of weights, got {weights!r}{hint}")
    with reading("open_clip model must have weights that can be read", model), loading(model):
        quick = wants_quick_gelu(name, weights)
        net = package.create_model(name, weights, force_quick_gelu=quick, require_pretrained=True)
        tokenizer = package.get_tokenizer(name)
    return OpenCLIPParts(net=net, tokenizer=tokenizer, front=front_of(package.get_model_preprocess_cfg(net)))


def wants_quick_gelu(name: str, weights: str) -> bool:
    """Whether a tag's weights were trained with QuickGELU; False says that the architecture's own activation is it."""
    return bool(open_clip().get_pretrained_cfg(name, weights).get("quick_gelu", False))


def front_of(config: dict[str, Any]) -> FrontEnd:
    """The front end that open_clip's preprocessing config describes.

    Raises:
        InputError: Its images are not square or its padding not black.
    """
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or config.get("fill_color", 0) != 0:
        raise InputError(f"open_clip model must take square images with black padding, got {config}")
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (config["mean"], config["std"]))
    resize = _RESIZES[config["resize_mode"]]
    return FrontEnd(height, resize, mean=mean, std=std, filter=config["interpolation"], odd_margin="even")
