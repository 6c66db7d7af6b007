"""Denoisers of the published families at true size, and at about a tenth of every width, and less deep, for a CPU.

Sizes are those of the published configs. Weights are random: speed, memory and FLOPs do not depend on what they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffalign.denoisers import FAMILIES, Context, Family
from diffalign.rehearsal import Encoding
from diffalign.settings import TrainConfig
from diffalign.types import Denoiser

_DDPM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class GpuWorld:
    """A denoiser, its latents, and what it is told with them."""

    family: str
    net: Mapping[str, Any]
    """What differs from the defaults of the network's class."""
    latent: tuple[int, int, int]
    cond: Shapes
    """Of one prompt."""
    scheduler: Mapping[str, Any] = field(default_factory=lambda: _DDPM)
    resolution: int
    small: Mapping[str, Any]
    """What of `net` is other at a tenth of the size."""
    small_cond: Shapes
    parameters: int
    """Of the network at true size."""

    @property
    def of(self) -> Family:
        return FAMILIES[self.family]

    def tenth(self) -> "GpuWorld":
        """The same at about a tenth of every width, on latents of an eighth of the side."""
        channels, height, width = self.latent
        return replace(
            self,
            net={**self.net, **self.small},
            latent=(channels, height // 8, width // 8),
            cond=self.small_cond,
            resolution=self.resolution // 8,
        )

    def encoding(self) -> Encoding:
        """Latents and conditions as a cache would hold them; masks are whole numbers."""
        kinds = {name: torch.int64 if name.endswith("mask") else torch.float32 for name in self.cond}
        return Encoding(
            latent=self.latent,
            cond={name: (shape, kinds[name]) for name, shape in self.cond.items()},
            image_flop=0,
            prompt_flop=0,
            weights=0,
            largest=0,
            peak=0,
        )

    def bare_net(self) -> Any:
        """The network on the meta device, frozen."""
        cls: Any = self.of.net_class()
        with torch.device("meta"):
            return cls(**self.net).eval().requires_grad_(False)

    def denoiser(self, net: Any, cfg: TrainConfig) -> Denoiser:
        """A network along its noise path."""
        context = Context(resolution=self.resolution, latents=self.latent)
        return self.of.make_denoiser(net, self.scheduler, cfg.timesteps, context)


SD15 = GpuWorld(
    family="sd",
    net={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    latent=(4, 64, 64),
    cond={"prompt_embeds": (77, 768)},
    resolution=512,
    small={
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 1,
        "cross_attention_dim": 80,
        "attention_head_dim": 4,
    },
    small_cond={"prompt_embeds": (77, 80)},
    parameters=859_520_964,
)
SDXL = GpuWorld(
    family="sdxl",
    net={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    latent=(4, 128, 128),
    cond={"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
    resolution=1024,
    small={
        "block_out_channels": (32, 64, 128),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 208,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 320,
    },
    small_cond={"prompt_embeds": (77, 208), "pooled_prompt_embeds": (128,)},
    parameters=2_567_463_684,
)
PIXART = GpuWorld(
    family="pixart_sigma",
    net={
        "sample_size": 128,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
    latent=(4, 128, 128),
    cond={"prompt_embeds": (300, 4096), "prompt_attention_mask": (300,)},
    scheduler={**_DDPM, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    resolution=1024,
    small={
        "sample_size": 16,
        "num_attention_heads": 2,
        "num_layers": 3,
        "cross_attention_dim": 144,
        "caption_channels": 64,
    },
    small_cond={"prompt_embeds": (30, 64), "prompt_attention_mask": (30,)},
    parameters=610_856_096,
)
SD35_1024 = GpuWorld(
    family="sd3",
    net={
        "sample_size": 128,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    latent=(16, 128, 128),
    cond={"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
    scheduler=_FLOW,
    resolution=1024,
    small={
        "num_layers": 3,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 48,
        "dual_attention_layers": (0, 1),
    },
    small_cond={"prompt_embeds": (33, 64), "pooled_prompt_embeds": (64,)},
    parameters=2_243_171_520,
)
SD35_512 = replace(SD35_1024, latent=(16, 64, 64), resolution=512)
FLUX = GpuWorld(
    family="flux",
    net={"guidance_embeds": True},
    latent=(16, 128, 128),
    cond={"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    scheduler={
        **_FLOW,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    resolution=1024,
    small={
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    small_cond={"prompt_embeds": (64, 64), "pooled_prompt_embeds": (64,)},
    parameters=11_901_408_320,
)
WORLDS = {"sd15": SD15, "sdxl": SDXL, "pixart": PIXART, "sd35-512": SD35_512, "sd35-1024": SD35_1024, "flux": FLUX}
