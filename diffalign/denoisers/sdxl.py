"""Stable Diffusion XL, its refiner and Turbo: a U-Net on a discrete DDPM schedule that is also told sizes.

Beside the tokens of two text encoders and the pooled state of the second, the U-Net sees six numbers: height and width
of the image as it was stored, upper and left edge of the crop, height and width that are wanted. The refiner sees the
second encoder alone, and an aesthetic score of 6 in place of the last two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffalign.denoisers.family import PLAIN, VAE_IN_FILE, Context, Family, ddpm_path
from diffalign.denoisers.kohya import by_converter
from diffalign.denoisers.unet import encoder_maps
from diffalign.errors import InputError
from diffalign.paths import DDPMPath, Prediction, TimestepSampling
from diffalign.types import Cond

AESTHETIC_SCORE = 6.0
"""What the refiner is told, in training as in its pipeline."""
REFINED = 0.2
"""Share of the noise range, from the clean end, that the refiner was made for."""
TURBO_LEVELS = 4


@dataclass(frozen=True, kw_only=True)
class SDXLDenoiser:
    """A `UNet2DConditionModel` with added conditions along its DDPM path."""

    net: nn.Module
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: DDPMPath
    prediction: Prediction
    vae_factor: int
    refiner: bool
    """The last of the sizes is an aesthetic score."""

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        return self.net(
            x_t,
            t,
            encoder_hidden_states=cond["prompt_embeds"],
            added_cond_kwargs=self._added(x_t, cond),
            return_dict=False,
        )[0].float()

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
        added = {name: tensor.to(x_t.dtype) for name, tensor in self._added(x_t, cond).items()}
        text = cond["prompt_embeds"]
        return encoder_maps(self.net, x_t, mid, blocks, timestep=t, encoder_hidden_states=text, added_cond_kwargs=added)

    def _added(self, x_t: Float[Tensor, "b c h w"], cond: Cond) -> dict[str, Float[Tensor, "b _n"]]:
        """Pooled text and sizes; without an `origin` in the conditions the image was stored at the side trained on."""
        pooled = cond["pooled_prompt_embeds"]
        height, width = (side * self.vae_factor for side in x_t.shape[-2:])
        wanted = [AESTHETIC_SCORE] if self.refiner else [height, width]
        told = wanted if "origin" in cond.tensors else [height, width, 0, 0, *wanted]
        columns = [torch.full_like(pooled[:, :1], number) for number in told]  # filled where they are, never copied
        if "origin" in cond.tensors:
            columns.insert(0, cond["origin"].to(pooled.dtype))
        return {"text_embeds": pooled, "time_ids": torch.cat(columns, dim=1)}


def make_denoiser(
    net: Any,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
    *,
    refiner: bool = False,
) -> SDXLDenoiser:
    """A denoiser whose path and prediction type come from the folder's scheduler config.

    Where nobody chose how t is drawn, Turbo (an ancestral sampler with trailing steps) trains at 249, 499, 749 and 999
    on its schedule without signal at the end, and the refiner below 200, as Diffusion-DPO's script has it.
    """
    if net.config.addition_embed_type != "text_time":
        raise InputError(
            "model.path must have a U-Net with addition_embed_type 'text_time' for the family 'sdxl', got "
            f"{net.config.addition_embed_type!r}"
        )
    turbo = (scheduler.get("_class_name"), scheduler.get("timestep_spacing")) == (
        "EulerAncestralDiscreteScheduler",
        "trailing",
    )
    if timesteps is None:
        timesteps = TimestepSampling(high=REFINED if refiner else 1.0, levels=TURBO_LEVELS if turbo else None)
    changes = {"rescale_betas_zero_snr": True} if turbo else {}
    path, prediction = ddpm_path("sdxl", scheduler, timesteps, **changes)
    return SDXLDenoiser(net=net, path=path, prediction=prediction, vae_factor=context.vae_factor, refiner=refiner)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """States before the last layer of both text encoders, joined, and the pooled state of the second."""
    texts = list(prompts)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=texts, prompt_2=texts, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    return Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


def use_sampler(pipeline: Any) -> None:
    """The Euler sampler without noise on the model's own schedule, and no watermark in the pixels."""
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.watermark = None


def refuse_sampling(pipeline: Any) -> None:
    """The refiner finishes images and starts none."""
    raise InputError(
        "model.path must make images from noise to be sampled, got the SDXL refiner, which only finishes the images of "
        "another model; leave [samples] out, and evaluate finished images of both as arms"
    )


def save_lora(folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a LoRA so that `load_lora_weights` of the pipeline reads it back with its alpha."""
    from diffusers import StableDiffusionXLPipeline

    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)


def _net_class() -> type:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


SDXL = Family(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    net="unet",
    text=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    net_class=_net_class,
    blocks=("BasicTransformerBlock", "ResnetBlock2D"),
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    save_lora=save_lora,
    to_kohya=by_converter,
    in_file={
        "unet": ("model.diffusion_model.",),
        "vae": VAE_IN_FILE,
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
    zero_empty=True,
    told_sizes=True,
    steps=50,
    guidance=5.0,
)

SDXL_REFINER = replace(
    SDXL,
    name="sdxl_refiner",
    pipelines=("StableDiffusionXLImg2ImgPipeline",),
    optional=("text_encoder", "tokenizer"),
    in_file={
        "unet": ("model.diffusion_model.",),
        "vae": VAE_IN_FILE,
        "text_encoder_2": ("conditioner.embedders.0.model.",),
    },
    make_denoiser=partial(make_denoiser, refiner=True),
    use_sampler=refuse_sampling,
)
