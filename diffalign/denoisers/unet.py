"""Stable Diffusion 1.x and 2.x: a U-Net on a discrete DDPM schedule, with one CLIP text encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from diffalign.denoisers.family import PLAIN, VAE_IN_FILE, Context, Family, ddpm_path
from diffalign.denoisers.features import captured
from diffalign.denoisers.kohya import by_converter
from diffalign.errors import InputError
from diffalign.paths import DDPMPath, Prediction, TimestepSampling
from diffalign.types import Cond


@dataclass(frozen=True, kw_only=True)
class UNetDenoiser:
    """A `UNet2DConditionModel` along its DDPM path."""

    net: nn.Module
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: DDPMPath
    prediction: Prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        return self.net(x_t, t, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0].float()

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Outputs of the first convolution and of every down block, and with `mid` of the middle block too.

        Raises:
            InputError: `blocks` is set; the encoder of a U-Net is its whole down path.
            RuntimeError: Inputs or weights are narrower than float32.
        """
        return encoder_maps(self.net, x_t, mid, blocks, timestep=t, encoder_hidden_states=cond["prompt_embeds"])


def encoder_maps(
    net: Any, x_t: Float[Tensor, "b c h w"], mid: bool, blocks: int | None, **inputs: Any
) -> list[Float[Tensor, "b _c _h _w"]]:
    """Outputs of a U-Net's first convolution and of every down block, and with `mid` of the middle block too."""
    if blocks is not None:
        raise InputError(
            "method.perception.blocks must be left out with a U-Net, whose encoder is its whole down path; "
            f"got {blocks}"
        )
    modules = [net.conv_in, *net.down_blocks, *([net.mid_block] if mid else [])]
    outputs = captured(net, modules, x_t, **inputs)
    return [out[0] if isinstance(out, tuple) else out for out in outputs]  # a down block also returns its skips


def make_denoiser(
    net: nn.Module,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
) -> UNetDenoiser:
    """A denoiser whose path and prediction type come from the folder's scheduler config."""
    path, prediction = ddpm_path("sd", scheduler, timesteps)
    return UNetDenoiser(net=net, path=path, prediction=prediction)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """Last hidden states of the text encoder, as the pipeline itself computes them."""
    embeds, _ = pipeline.encode_prompt(list(prompts), pipeline._execution_device, 1, False)
    return Cond({"prompt_embeds": embeds})


def use_sampler(pipeline: Any) -> None:
    """DDIM without noise, on the model's own schedule."""
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)


def save_lora(folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a LoRA so that `load_lora_weights` of the pipeline reads it back with its alpha."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)


def _net_class() -> type:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


SD = Family(
    name="sd",
    pipelines=("StableDiffusionPipeline",),
    net="unet",
    text=("text_encoder", "tokenizer"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    net_class=_net_class,
    blocks=("BasicTransformerBlock", "ResnetBlock2D"),
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    save_lora=save_lora,
    to_kohya=by_converter,
    in_file={"unet": ("model.diffusion_model.",), "vae": VAE_IN_FILE, "text_encoder": ("cond_stage_model.",)},
    steps=50,
    guidance=7.5,
)
