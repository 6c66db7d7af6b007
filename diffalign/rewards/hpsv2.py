"""HPS v2 and v2.1: open_clip's ViT-H/14 fine-tuned on people's rankings; the score is a cosine.

The front end is a letterbox: longer side to 224, zeros around. Numbers of v2.0 and of v2.1 do not compare, nor do those
of two prompts.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError, near_match
from diffalign.progress import loading
from diffalign.rewards.cosine import SCALES, CosineReward
from diffalign.rewards.frontend import FrontEnd
from diffalign.rewards.networks import pinned, read_file, reading
from diffalign.rewards.openclip import OpenCLIPEncoder, OpenCLIPParts, open_clip

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""Of the repository, by version."""
ARCHITECTURE = "ViT-H-14"
FRONT = FrontEnd(224, "longest", resized_as="floats")

BLOCKS, BLOCK = 10, 80
"""Of the benchmark's 800 prompts a style."""


class HPSv2Reward(CosineReward):
    """How well people rank this image for this prompt, v2.1 or v2.0; 100 x cosine, mostly 15 to 35.

    Only images of one prompt compare, and only under one version. `scale` is "x100" (the benchmark's) or "cos". `raw`
    holds `cos`. It likes saturated, glossy, detailed pictures.

    Weights: HPS_v2_compressed.pt and HPS_v2.1_compressed.pt of xswu/HPSv2 on the Hub.
    Paper: Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
        Synthesis", arXiv 2306.09341.
    Departs: Float32, where the authors' code autocasts to half; the resize of its float tensor is antialiased, as
        torchvision does it since 0.17; an image whose longer side is 224 already is padded too, which that code
        forgets.
    """

    name = "hpsv2"
    licence = "Apache-2.0"

    def __init__(
        self,
        model: str | None = None,
        *,
        hps_version: str = "v2.1",
        revision: str | None = None,
        scale: str = "x100",
        encoder: OpenCLIPEncoder | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a version, and with `model` its file (.pt or .safetensors) where it is not to come from the Hub."""
        if hps_version not in FILES:
            raise InputError(
                f"reward hpsv2: hps_version must be one of {', '.join(FILES)}, got {hps_version!r}"
                f"{near_match(hps_version, FILES)}"
            )
        other = [version for version, name in FILES.items() if model and Path(model).name == name != FILES[hps_version]]
        if other:
            raise InputError(f"reward hpsv2: hps_version must be {other[0]!r} for {model!r}, got {hps_version!r}")
        place = model or pinned(f"{REPOSITORY}/{FILES[hps_version]}", revision)
        load = partial(_load, model, hps_version, revision)
        options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size, "device": device}
        self.hps_version = hps_version
        scales = {"x100": SCALES["x100"], "cos": SCALES["cos"]}
        self._open(encoder or OpenCLIPEncoder(place, load=load, **options), scale, scales)
        self.version = f"HPS {hps_version}: {self.version}"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A style's result in the HPS benchmark."""

    mean: float
    """Of the blocks' means."""
    std: float
    """Over the blocks' means, not corrected for their number: not a standard error of prompts."""


def benchmark(scores: Float[Tensor, " n"]) -> Benchmark:
    """What the HPS benchmark prints of a style, from its 800 scores in the prompts' order.

    Raises:
        InputError: Another number of scores.
    """
    if len(scores) != BLOCKS * BLOCK:
        raise InputError(f"scores must be the {BLOCKS * BLOCK} of one style of the HPS benchmark, got {len(scores)}")
    means = scores.double().view(BLOCKS, BLOCK).mean(1)
    return Benchmark(mean=float(means.mean()), std=float(means.std(correction=0)))


def build(architecture: str, state: dict[str, Tensor]) -> Any:
    """An open_clip model around a state dict, whose tensors it takes over.

    Raises:
        InputError: Keys or shapes that are not the architecture's.
    """
    from accelerate import init_empty_weights

    package = open_clip()
    with init_empty_weights(include_buffers=False):
        net = package.CLIP(**package.get_model_config(architecture))
    try:
        net.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"reward hpsv2 must have the weights of an open_clip {architecture}, got {reason}") from error
    return net


def _load(model: str | None, hps_version: str, revision: str | None) -> OpenCLIPParts:
    package = open_clip()
    file = Path(model) if model else _download(hps_version, revision)
    with loading(str(file)):
        net = build(ARCHITECTURE, _read(file))
    return OpenCLIPParts(net=net, tokenizer=package.get_tokenizer(ARCHITECTURE), front=FRONT)


def _download(hps_version: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    must = "reward hpsv2: model must be a file of your own where the Hub's cannot be had"
    with reading(must, f"{REPOSITORY}/{FILES[hps_version]}"):
        return Path(hf_hub_download(REPOSITORY, FILES[hps_version], revision=revision))


def _read(file: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, read without running code."""
    held = read_file(file, "reward hpsv2: checkpoint")
    if file.suffix == ".safetensors":
        return held
    if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict):
        raise InputError(f"reward hpsv2: checkpoint must be one with 'state_dict', got {type(held).__name__}")
    return held["state_dict"]
