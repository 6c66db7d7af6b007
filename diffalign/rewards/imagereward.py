"""ImageReward: an affine head on BLIP's feature of an image and its prompt, standardised on its authors' data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import InputError
from diffalign.progress import loading
from diffalign.rewards.aesthetic import AffineHead, fold
from diffalign.rewards.blip import BLIP, BLIPSizes, check_state, load_blip, published_shapes
from diffalign.rewards.frontend import FrontEnd
from diffalign.rewards.inputs import images_of
from diffalign.rewards.networks import pinned, read_state, reading
from diffalign.types import Modality, RewardBatch, RewardOutput

DEFAULT_MODEL = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' data: score = (output - MEAN) / STD."""
LENGTH = 35
"""Word pieces that are read of a prompt, [CLS] and [SEP] among them."""

HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Affine layers of the head: place in the file, and width."""

FILES = ("ImageReward.safetensors", "model.safetensors", "ImageReward.pt")
"""Names of the weights in a folder, the first that is there; on the Hub there is the last."""

_PARTS = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
_UNUSED = ("blip.text_encoder.embeddings.position_ids",)
"""Counts 0, 1, 2, ...; also unread are BLIP's projections for its contrastive loss, outside of `_PARTS`."""


@dataclass(frozen=True, kw_only=True)
class ImageRewardParts:
    """The loaded model."""

    net: BLIP
    head: AffineHead
    tokenizer: Any
    """A BERT tokenizer."""


class ImageRewardReward:
    """How much people would prefer the image for its prompt; about 0 on average, spread 1, from -2.3 to 2.

    Reads the published `ImageReward.pt` (without running code in it) or the same weights as safetensors: a file, a
    folder or a Hub id. `raw` holds `mlp`, the head's output before it is standardised, and `cut`, 1 where a prompt had
    more than 35 word pieces and lost its end: their sum is the number of cut prompts. It sees 224 pixels a side: fine
    detail counts for little, and long prompts are judged by their beginning.

    Hub: THUDM/ImageReward, and google-bert/bert-base-uncased for its word pieces.
    Paper: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv
    2304.05977.
    """

    name = "imagereward"
    requires = frozenset({"images", "prompts"})
    modality: Modality = "image"
    differentiable = True
    licence = "Apache-2.0"
    range = (-math.inf, math.inf)

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 16,
        device: torch.device | str = "cpu",
        parts: ImageRewardParts | None = None,
    ) -> None:
        """Names the weights, and the folder or Hub id of the tokenizer if it lies elsewhere; or takes `parts`."""
        self.model, self.revision, self.tokenizer = model, revision, tokenizer
        self.batch_size = batch_size
        self.device = torch.device(device)
        if parts is not None:
            self.parts = parts
            self.to(device)

    @cached_property
    def parts(self) -> ImageRewardParts:
        file = _locate(self.model, self.revision)
        parts = assemble(read_state(file, "reward imagereward: weights"), _tokenizer(self.tokenizer or _beside(file)))
        parts.net.to(self.device)
        return parts

    @property
    def version(self) -> str:
        return pinned(self.model, self.revision)

    def to(self, device: torch.device | str) -> "ImageRewardReward":
        self.device = torch.device(device)
        if "parts" in self.__dict__:
            self.parts.net.to(self.device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device."""
        images, prompts = images_of(batch, self.name, self.requires), list(batch.prompts or [])
        rows = [
            self._mlp(self._front.reference(images[i : i + self.batch_size]), prompts[i : i + self.batch_size])
            for i in range(0, len(images), self.batch_size)
        ]
        mlp = torch.cat(rows).to(images.device)
        cut = torch.tensor(self.cut(prompts), dtype=torch.float32, device=images.device)
        return RewardOutput(scores=(mlp - MEAN) / STD, raw={"mlp": mlp, "cut": cut})

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images."""
        images = images_of(batch, self.name, self.requires)
        mlp = self._mlp(self._front.differentiable(images), list(batch.prompts or []))
        return ((mlp - MEAN) / STD).to(images.device)

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        """Whether a prompt has more word pieces than are read."""
        return [len(pieces) > LENGTH for pieces in self.parts.tokenizer(list(prompts))["input_ids"]]

    @property
    def _front(self) -> FrontEnd:
        return FrontEnd(self.parts.net.sizes.image_size, odd_margin="even")

    def _mlp(self, pixels: Float[Tensor, "b 3 r r"], prompts: list[str]) -> Float[Tensor, " b"]:
        """The head's output on pairs: row i of the images with prompt i."""
        tokens, mask = self._tokens(prompts)
        return self.parts.head(self.parts.net(pixels.to(self.device), tokens, mask))

    def _tokens(self, prompts: list[str]) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """(word pieces, 0 on padding); always padded to one length, so that neighbours change nothing."""
        read = self.parts.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        return read["input_ids"].to(self.device), read["attention_mask"].to(self.device)


def expected_shapes(sizes: BLIPSizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights that a score is computed from, as in the published file."""
    expected = {f"blip.{name}": shape for name, shape in published_shapes(sizes).items()}
    width = sizes.text_width
    for place, out in HEAD.items():
        expected |= {f"mlp.layers.{place}.weight": (out, width), f"mlp.layers.{place}.bias": (out,)}
        width = out
    return expected


def assemble(state: Mapping[str, Tensor], tokenizer: Any, sizes: BLIPSizes | None = None) -> ImageRewardParts:
    """The model of a published state dict; its head is folded into one affine function.

    Raises:
        InputError: A weight is missing, has another shape, or belongs to another network.
    """
    sizes = sizes or BLIPSizes()
    used = {name: value for name, value in state.items() if name not in _UNUSED}
    check_state(used, expected_shapes(sizes), _PARTS, "reward imagereward: weights")
    net = load_blip({name.removeprefix("blip."): value for name, value in used.items()}, sizes)
    head = fold({name.removeprefix("mlp."): value for name, value in used.items() if name.startswith("mlp.")})
    return ImageRewardParts(net=net, head=head, tokenizer=tokenizer)


def _locate(model: str, revision: str | None) -> Path:
    """The file of the weights, which is fetched if `model` is a Hub id."""
    place = Path(model)
    if place.is_dir():
        held = [place / name for name in FILES if (place / name).is_file()]
        if not held:
            raise InputError(f"reward imagereward: folder must hold one of {', '.join(FILES)}, got {model!r}")
        return held[0]
    if place.is_file():
        return place
    from huggingface_hub import hf_hub_download

    with reading(f"reward imagereward: model must be a file, a folder or a Hub id with {FILES[-1]}", model):
        return Path(hf_hub_download(model, FILES[-1], revision=revision))


def _beside(file: Path) -> str:
    """The weights' own folder if a tokenizer lies in it, else the Hub's."""
    held = any((file.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return str(file.parent) if held else TOKENIZER


def _tokenizer(place: str) -> Any:
    from transformers import BertTokenizer

    with reading("reward imagereward: tokenizer must be BERT's, uncased", place), loading(place):
        return BertTokenizer.from_pretrained(place)
