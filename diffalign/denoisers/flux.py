"""FLUX.1: a transformer on rectified flow whose image tokens are squares of 2 x 2 latents; CLIP pooled, T5 tokens.

FLUX.1-dev was distilled from guided sampling: it is told the guidance and needs one pass. In training policy and
reference are told the same value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.denoisers.family import PLAIN, VAE_IN_FILE, Context, Family, flow_config, flow_sampling
from diffalign.denoisers.features import captured, first_blocks, token_maps
from diffalign.denoisers.kohya import Adapter, by_table
from diffalign.errors import InputError
from diffalign.paths import FlowPath, Prediction, TimestepSampling
from diffalign.sampling.schedule import even_levels, shift_at
from diffalign.types import Cond

SIDE = 128
"""Latents along a side of the images that the model was made for, 1024 pixels."""
PATCH = 2
GUIDANCE = 3.5


@dataclass(frozen=True, kw_only=True)
class FluxDenoiser:
    """A `FluxTransformer2DModel` along the straight path from data to noise, on unpacked latents."""

    net: nn.Module
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: FlowPath
    guidance: float | None
    """What the network is told; None for one without a guidance embedding (schnell)."""
    prediction: Prediction = "velocity"

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        out = self.net(pack(x_t), **self._told(x_t, t, cond), return_dict=False)[0]
        return unpack(out, *x_t.shape[-2:]).float()

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Image tokens as maps: embedded, and after each of the first `blocks` two-stream blocks (None: half).

        Raises:
            InputError: `mid` is set, or there are fewer blocks.
            RuntimeError: Inputs or weights are narrower than float32.
        """
        net: Any = self.net
        modules = [net.x_embedder, *first_blocks(net, mid=mid, blocks=blocks)]
        first, *outputs = captured(net, modules, pack(x_t), **self._told(x_t, t, cond))
        tokens = [first, *(image for _, image in outputs)]  # a block returns (text tokens, image tokens)
        return token_maps(tokens, x_t, PATCH)

    def _told(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond) -> dict[str, Any]:
        """Text, time and places; the network itself multiplies t by 1000."""
        text = cond["prompt_embeds"]
        return {
            "encoder_hidden_states": text,
            "pooled_projections": cond["pooled_prompt_embeds"],
            "timestep": t,
            "guidance": None if self.guidance is None else torch.full_like(t, self.guidance),
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": image_ids(x_t),
        }


def pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _n _d"]:
    """Latents as tokens: squares of 2 x 2 row by row, the channels of each joined."""
    b, c, h, w = latents.shape
    squares = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH**2)


def unpack(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Float[Tensor, "b _c _h _w"]:
    """Tokens as latents of this height and width; undoes `pack`."""
    b, _, d = tokens.shape
    squares = tokens.reshape(b, height // PATCH, width // PATCH, d // PATCH**2, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(b, d // PATCH**2, height, width)


def image_ids(x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "n 3"]:
    """Place of each image token: 0, its row, its column."""
    h, w = (side // PATCH for side in x_t.shape[-2:])
    rows, columns = torch.arange(h, device=x_t.device), torch.arange(w, device=x_t.device)
    places = [torch.zeros_like(rows)[:, None].expand(h, w), rows[:, None].expand(h, w), columns.expand(h, w)]
    return torch.stack(places, dim=-1).reshape(-1, 3).to(x_t.dtype)


def make_denoiser(
    net: Any,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
) -> FluxDenoiser:
    """A denoiser whose shift is the scheduler's own for images of the side trained on.

    Raises:
        InputError: The scheduler is not one of a flow, or a guidance is given to a network without a place for it.
    """
    config = flow_config("flux", scheduler)
    if context.guidance is not None and not net.config.guidance_embeds:
        raise InputError(
            "config.train.guidance must be left out with this model, which has no guidance embedding; "
            f"got {context.guidance}"
        )
    told = (GUIDANCE if context.guidance is None else context.guidance) if net.config.guidance_embeds else None
    tokens = (context.resolution // (context.vae_factor * PATCH)) ** 2
    path = FlowPath(shift=shift_of(config, tokens), timesteps=flow_sampling(timesteps))
    return FluxDenoiser(net=net, path=path, guidance=told)


def shift_of(config: Any, tokens: int) -> float:
    """The scheduler's shift for images of so many tokens: exp of a line through its two points, or its constant."""
    if not config.use_dynamic_shifting:
        return float(config.shift)
    mu = shift_at(config, tokens)
    return mu if config.time_shift_type == "linear" else math.exp(mu)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """Token states of T5 and the pooled state of CLIP, as the pipeline itself computes them."""
    texts = list(prompts)
    embeds, pooled, _ = pipeline.encode_prompt(
        prompt=texts, prompt_2=texts, device=pipeline._execution_device, **call_options(pipeline)
    )
    return Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


def call_options(pipeline: Any) -> dict[str, Any]:
    """512 tokens for dev and 256 for schnell, as each was trained with."""
    if pipeline.transformer is not None:
        config = pipeline.transformer.config
    else:
        cls: Any = _net_class()
        config = cls.load_config(pipeline.config._name_or_path, subfolder="transformer")
    return {"max_sequence_length": 512 if config["guidance_embeds"] else 256}


def use_sampler(pipeline: Any) -> None:
    """The pipeline's own Euler sampler of the flow, which is deterministic already."""


def save_lora(folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a LoRA so that `load_lora_weights` of the pipeline reads it back with its alpha."""
    from diffusers import FluxPipeline

    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata)


_AUTHORS = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
    "double_blocks.{}.img_attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks.{}.img_mod.lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.{}.txt_attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks.{}.txt_mod.lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks.{}.linear1": [
        *[f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
        "single_transformer_blocks.{}.proj_mlp",
    ],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.proj_out"],
    "single_blocks.{}.modulation.lin": ["single_transformer_blocks.{}.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
"""Modules as the authors of FLUX.1 name them, and those of Diffusers that are their rows."""


def to_kohya(net: Any, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """A LoRA in the authors' names."""
    return by_table(net, adapters, _AUTHORS, swapped=("norm_out.linear",))


def _net_class() -> type:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel


FLUX = Family(
    name="flux",
    pipelines=("FluxPipeline",),
    net="transformer",
    text=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    text_depends_on=("guidance_embeds",),
    lora_targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    ),
    net_class=_net_class,
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    call_options=call_options,
    save_lora=save_lora,
    to_kohya=to_kohya,
    in_file={
        "transformer": ("model.diffusion_model.double_blocks.", "double_blocks."),
        "vae": VAE_IN_FILE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
    latent_shape=lambda config: (config["in_channels"] // PATCH**2, SIDE, SIDE),
    levels=even_levels,
    patch=PATCH,
    pack=pack,
    unpack=unpack,
    told_guidance=True,
    steps=28,
    guidance=GUIDANCE,
)
