"""Folders of published pipelines with their true configs, small tokenizers and no weights: what a plan reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_worlds import WORLDS
from benchmarks.worlds import _VAE
from tests import worlds

CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_BIG_G = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
T5_XXL_BYTES = 2 * 4_762_310_656
"""In 16 bits."""


def sdxl(folder: Path) -> Path:
    """stable-diffusion-xl-base-1.0."""
    parts = {
        "unet": ("diffusers", "UNet2DConditionModel", WORLDS["sdxl"].net),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_BIG_G),
    }
    vae = {"scaling_factor": 0.13025}
    return _folder(
        folder, "StableDiffusionXLPipeline", "sdxl", parts, vae, {"tokenizer": "clip", "tokenizer_2": "clip"}
    )


def flux(folder: Path) -> Path:
    """FLUX.1-dev."""
    parts = {
        "transformer": ("diffusers", "FluxTransformer2DModel", {**WORLDS["flux"].net, "in_channels": 64}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", T5_XXL),
    }
    vae = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16, "use_quant_conv": False}
    return _folder(folder, "FluxPipeline", "flux", parts, vae, {"tokenizer": "clip", "tokenizer_2": "t5"})


def _folder(
    folder: Path,
    pipeline: str,
    world: str,
    parts: Mapping[str, tuple[str, str, Mapping[str, Any]]],
    vae: Mapping[str, Any],
    tokenizers: Mapping[str, str],
) -> Path:
    scheduler = {"_class_name": "EulerDiscreteScheduler", **WORLDS[world].scheduler}
    every = {
        **parts,
        "vae": ("diffusers", "AutoencoderKL", {**_VAE, "sample_size": 1024, **vae}),
        "scheduler": ("diffusers", scheduler["_class_name"], scheduler),
    }
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, (library, cls, table) in every.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": cls, **table}))
        index[name] = [library, cls]
    for name, kind in tokenizers.items():
        made = worlds.tokenizer() if kind == "clip" else worlds.t5(16)[1]
        made.model_max_length = 77 if kind == "clip" else 512
        made.save_pretrained(folder / name)
        index[name] = ["transformers", "CLIPTokenizer" if kind == "clip" else "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
