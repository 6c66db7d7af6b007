"""LAION's aesthetic predictors: an affine function w·e + b of the unit CLIP image embedding e.

v2 is a stack of affine layers with dropouts between them and no activation, so in evaluation it is exactly affine; v1
is one layer. Both are folded into one vector, in float64, which is faster and cannot be put into training mode by
accident.
"""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.clip import DEFAULT_MODEL, CLIPEncoder
from diffalign.rewards.inputs import images_of
from diffalign.rewards.networks import read_state
from diffalign.shipped import MODELS, resolve
from diffalign.types import Modality, RewardBatch, RewardOutput

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.weight")


@dataclass(frozen=True, kw_only=True)
class AffineHead:
    """score = weight · e + bias, float64."""

    weight: Float64[Tensor, " d"]
    bias: Float64[Tensor, ""]

    def __call__(self, embeddings: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        return (embeddings.double() @ self.weight.to(embeddings.device) + self.bias.to(embeddings.device)).float()


class AestheticReward:
    """How well people rated pictures like this one, about 1 to 10 for the published v2 head, whatever the prompt.

    The head is a file in the format of LAION's predictors (.safetensors, or .pth, read without running code), or a
    folder with `head.safetensors` and a `config.json` that names its encoder. Saturated, painterly and centred pictures
    are favoured: not for use as the only measure.
    """

    name = "aesthetic"
    requires = frozenset({"images"})
    modality: Modality = "image"
    differentiable = True
    licence = "Apache-2.0 (v2 head), MIT (v1 head); MIT (CLIP)"

    def __init__(
        self,
        model: str | None = None,
        *,
        encoder: str | CLIPEncoder | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a head, and the CLIP model that it reads: by default its folder's, or else OpenAI's ViT-L/14."""
        if model is None:
            raise InputError(
                "reward aesthetic must get a head: a .safetensors or .pth file in the format of LAION's predictors, "
                'a folder or "tiny-aesthetic", got none; no published head is shipped'
            )
        self.model = model
        self.file, named = _locate(model)
        chosen = encoder or named or DEFAULT_MODEL
        self.encoder = CLIPEncoder(chosen, batch_size=batch_size, device=device) if isinstance(chosen, str) else chosen

    @cached_property
    def head(self) -> AffineHead:
        """The folded head of the file."""
        return fold(read_state(self.file, "reward aesthetic: head"))

    @property
    def version(self) -> str:
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()[:12]
        return f"{self.model} (sha256 {digest}) on {self.encoder.version}"

    @property
    def range(self) -> tuple[float, float]:
        """bias -+ norm of the weight: what a unit embedding can reach, far beyond what people's ratings reach."""
        norm, bias = float(self.head.weight.norm()), float(self.head.bias)
        return (bias - norm, bias + norm)

    def to(self, device: torch.device | str) -> "AestheticReward":
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device."""
        images = images_of(batch, self.name, self.requires)
        return RewardOutput(scores=self._fitting_head()(self.encoder.embed_images(images)))

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images."""
        images = images_of(batch, self.name, self.requires)
        return self._fitting_head()(self.encoder.embed_images_with_graph(images))

    def _fitting_head(self) -> AffineHead:
        if len(self.head.weight) != self.encoder.width:
            raise InputError(
                f"reward aesthetic must have a head for its encoder's {self.encoder.width} elements, got "
                f"{len(self.head.weight)} in {str(self.file)!r} for {self.encoder.version!r}"
            )
        return self.head


def fold(state: dict[str, Tensor]) -> AffineHead:
    """One affine function from a head's state dict: `layers.N.weight/bias` (v2) or `weight/bias` (v1).

    Raises:
        InputError: Other keys, or places left out between two layers that leave room for an activation.
    """
    layers = sorted((int(m[1]), m[0].removesuffix("weight")) for m in map(_LAYER.fullmatch, state) if m)
    if not layers and {"weight", "bias"} <= state.keys():
        layers = [(0, "")]
    if not layers:
        raise InputError(f"reward aesthetic must have a head with layers.N.weight, got {', '.join(sorted(state)[:6])}")
    places = [place for place, _ in layers]
    if any(b - a > 2 for a, b in itertools.pairwise(places)):
        raise InputError(
            f"reward aesthetic must have affine layers with at most a dropout between two, got layers {places}; "
            "heads with activations are not supported"
        )
    weight, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _, prefix in reversed(layers):
        if weight.shape[1] != len(state[prefix + "weight"]):
            raise InputError(f"reward aesthetic must have layers that fit each other and end in 1 score, got {places}")
        bias = bias + weight @ state[prefix + "bias"].double()
        weight = weight @ state[prefix + "weight"].double()
    return AffineHead(weight=weight[0], bias=bias[0])


def _locate(model: str) -> tuple[Path, str | None]:
    """(file of the head, encoder that its folder names)."""
    place = Path(resolve(model, MODELS))
    if place.is_dir():
        head, config = place / "head.safetensors", place / "config.json"
        if not head.is_file() or not config.is_file():
            raise InputError(
                f"reward aesthetic must have head.safetensors and config.json in its folder, got {model!r}"
            )
        try:
            return head, str(json.loads(config.read_text(encoding="utf-8"))["encoder"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{config} must be a JSON object with 'encoder', got {error}") from error
    if not place.is_file():
        raise InputError(
            f"reward aesthetic must have a head that is a file or a folder, got {model!r}, which is missing"
        )
    return place, None
