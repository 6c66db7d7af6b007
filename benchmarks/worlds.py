"""Worlds that a step is measured in: Stable Diffusion's true classes at three sizes, with pixels and token ids.

`tiny` is the shipped model, or random weights of its shape; `fifth` is SD 1.5 with every width divided by five, the
world in which the published scripts were measured; `sd15` is the true size. Speed, memory and FLOPs do not depend on
what the weights are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.models.load import ModelSource, load_pipeline, load_scheduler_config
from diffalign.shipped import MODELS, resolve


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One world's networks and batch; what is not named is as in SD 1.5."""

    pairs: int
    """Pairs a step."""
    pixels: int
    """Side of an image."""
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    shipped: str | None = None
    """Shipped model that is taken instead, if it is there."""
    gpu: bool = False
    """Whether the world is measured on a GPU."""
    flop: int
    """FLOPs of one step of the plain loop, exactly: it may not get lazier or busier unseen."""
    encoder_flop: int
    """Those of its VAE and text encoder, which a cache saves."""
    published_gflop: float | None = None
    """What the published script itself was counted at in this world."""


TINY = Sizes(
    pairs=16,
    pixels=64,
    unet={
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    },
    vae={"block_out_channels": (16, 32, 64, 96), "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 8},
    text={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    shipped="tiny-sd",
    flop=26431455232,
    encoder_flop=6290407424,
)

FIFTH = Sizes(
    pairs=4,
    pixels=256,
    unet={"sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 152},
    vae={"block_out_channels": (24, 48, 96, 96), "norm_num_groups": 8},
    text={"hidden_size": 152, "intermediate_size": 608, "num_attention_heads": 4},
    flop=307537576448,
    encoder_flop=82187903488,
    published_gflop=307.5,
)

SD15 = Sizes(pairs=8, pixels=512, gpu=True, flop=59264334675968, encoder_flop=17972923498496)

SIZES = {"tiny": TINY, "fifth": FIFTH, "sd15": SD15}

_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, kw_only=True)
class World:
    """Frozen float32 networks on the CPU and one batch of pairs; loops take copies."""

    sizes: Sizes
    unet: Any
    vae: Any
    text: Any
    scheduler: Mapping[str, Any]
    pixels: Float[Tensor, "2b 3 h w"]
    """In [-1, 1], winners first, decoded and cropped beforehand."""
    ids: Int[Tensor, "b l"]
    """Tokenised prompts, one a pair."""


def build(sizes: Sizes, *, seed: int = 0, random: bool = False) -> World:
    """A world, the same each time; with random weights even where a trained model is shipped, if `random`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae, text, scheduler = (None if random else _shipped(sizes)) or _random(sizes)
        for net in (unet, vae, text):
            net.eval().requires_grad_(False)
        tokens = text.config.max_position_embeddings
        return World(
            sizes=sizes,
            unet=unet,
            vae=vae,
            text=text,
            scheduler=scheduler,
            pixels=torch.rand(2 * sizes.pairs, 3, sizes.pixels, sizes.pixels) * 2 - 1,
            ids=torch.randint(0, text.config.vocab_size, (sizes.pairs, tokens)),
        )


def _shipped(sizes: Sizes) -> tuple[Any, Any, Any, Mapping[str, Any]] | None:
    if sizes.shipped is None or not (Path(resolve(sizes.shipped, MODELS)) / "model_index.json").is_file():
        return None
    source = ModelSource(path=sizes.shipped)
    pipeline = load_pipeline(source)
    return pipeline.unet, pipeline.vae, pipeline.text_encoder, load_scheduler_config(source)


def _random(sizes: Sizes) -> tuple[Any, Any, Any, Mapping[str, Any]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    return (
        UNet2DConditionModel(**{**_UNET, **sizes.unet}),
        AutoencoderKL(**{**_VAE, "sample_size": sizes.pixels, **sizes.vae}),
        CLIPTextModel(CLIPTextConfig(**{**_TEXT, **sizes.text})),
        _SCHEDULER,
    )
