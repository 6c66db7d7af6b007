"""Stable Diffusion 3 and 3.5: a multi-modal transformer on rectified flow; two CLIP text encoders, and T5 if there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from diffalign.types import Cond


@dataclass(frozen=True, kw_only=True)
class DiTDenoiser:
    """An `SD3Transformer2DModel` along the straight path from data to noise."""

    net: nn.Module
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: FlowPath
    timestep_scale: float
    """What the network multiplies t in [0, 1] by: the scheduler's `num_train_timesteps`."""
    prediction: Prediction = "velocity"

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        return self.net(
            x_t,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            timestep=t * self.timestep_scale,
            return_dict=False,
        )[0].float()

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Image tokens as maps: of the patch embedding and after each of the first `blocks` blocks (None: half).

        Raises:
            InputError: `mid` is set, or there are fewer blocks.
            RuntimeError: Inputs or weights are narrower than float32.
        """
        net: Any = self.net
        patches, *outputs = captured(
            net,
            [net.pos_embed, *first_blocks(net, mid=mid, blocks=blocks)],
            x_t,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            timestep=t * self.timestep_scale,
        )
        tokens = [patches, *(image for _, image in outputs)]  # a block returns (text tokens, image tokens)
        return token_maps(tokens, x_t, net.config.patch_size)


def make_denoiser(
    net: nn.Module,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
) -> DiTDenoiser:
    """A denoiser whose shift and timestep scale come from the folder's scheduler config."""
    config = flow_config("sd3", scheduler)
    if config.use_dynamic_shifting:
        raise InputError("scheduler.use_dynamic_shifting must be false for the family 'sd3', got true")
    path = FlowPath(shift=float(config.shift), timesteps=flow_sampling(timesteps))
    return DiTDenoiser(net=net, path=path, timestep_scale=float(config.num_train_timesteps))


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """Joined token states and pooled states of the text encoders, as the pipeline itself computes them."""
    texts = list(prompts)
    options = {"device": pipeline._execution_device, "do_classifier_free_guidance": False, **call_options(pipeline)}
    with _width_known(pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt=texts, prompt_2=texts, prompt_3=texts, **options)
    return Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


@contextmanager
def _width_known(pipeline: Any) -> Iterator[None]:
    """Without T5 the pipeline asks its transformer for the text width: a transformer without weights will do."""
    if pipeline.transformer is not None:
        yield
        return
    cls: Any = _net_class()
    with torch.device("meta"):
        shell = cls.from_config(cls.load_config(pipeline.config._name_or_path, subfolder="transformer"))
    pipeline.register_modules(transformer=shell)
    try:
        yield
    finally:
        pipeline.register_modules(transformer=None)


def call_options(pipeline: Any) -> dict[str, Any]:
    """Where T5 is left out, as many zeros in its place as CLIP has tokens.

    That is what the model was trained with (Esser et al., arXiv 2403.03206: 77 and 77 tokens); the pipeline's default
    of 256 costs time and asks for something that training never saw.
    """
    return {"max_sequence_length": pipeline.tokenizer_max_length} if pipeline.text_encoder_3 is None else {}


def use_sampler(pipeline: Any) -> None:
    """The pipeline's own Euler sampler of the flow, which is deterministic already."""


def save_lora(folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a LoRA so that `load_lora_weights` of the pipeline reads it back with its alpha."""
    from diffusers import StableDiffusion3Pipeline

    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
    )


_AUTHORS = {
    "joint_blocks.{}.x_block.attn.qkv": [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
    "joint_blocks.{}.x_block.attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "joint_blocks.{}.x_block.attn2.qkv": [f"transformer_blocks.{{}}.attn2.to_{x}" for x in "qkv"],
    "joint_blocks.{}.x_block.attn2.proj": ["transformer_blocks.{}.attn2.to_out.0"],
    "joint_blocks.{}.x_block.mlp.fc1": ["transformer_blocks.{}.ff.net.0.proj"],
    "joint_blocks.{}.x_block.mlp.fc2": ["transformer_blocks.{}.ff.net.2"],
    "joint_blocks.{}.x_block.adaLN_modulation.1": ["transformer_blocks.{}.norm1.linear"],
    "joint_blocks.{}.context_block.attn.qkv": [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"],
    "joint_blocks.{}.context_block.attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "joint_blocks.{}.context_block.mlp.fc1": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "joint_blocks.{}.context_block.mlp.fc2": ["transformer_blocks.{}.ff_context.net.2"],
    "joint_blocks.{}.context_block.adaLN_modulation.1": ["transformer_blocks.{}.norm1_context.linear"],
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
"""Modules as the authors of SD3 name them, and those of Diffusers that are their rows."""


def to_kohya(net: Any, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """A LoRA in the authors' names; the last block's text side ends in shift and scale, as the final layer does."""
    last = f"transformer_blocks.{net.config.num_layers - 1}.norm1_context.linear"
    return by_table(net, adapters, _AUTHORS, swapped=("norm_out.linear", last))


def _net_class() -> type:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel


SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    net="transformer",
    text=("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_3", "tokenizer_3"),
    patch=2,
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
    blocks=("JointTransformerBlock",),
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    call_options=call_options,
    save_lora=save_lora,
    to_kohya=to_kohya,
    in_file={
        "transformer": ("model.diffusion_model.joint_blocks.", "joint_blocks."),
        "vae": VAE_IN_FILE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    steps=28,
    guidance=7.0,
)
