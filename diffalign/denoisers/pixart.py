"""PixArt-alpha and PixArt-Sigma: a transformer on a discrete DDPM schedule, with T5 and a mask over its tokens.

The network predicts noise and, in a second half of its channels, a variance; alignment and sampling use the first half.
Diffusers has no LoRA loader for these networks: adapters are kept in PEFT's own form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffalign.denoisers.family import PLAIN, Context, Family, ddpm_path
from diffalign.denoisers.features import captured, first_blocks, token_maps
from diffalign.denoisers.peft_files import RECIPE, load_peft, save_peft
from diffalign.paths import DDPMPath, Prediction, TimestepSampling
from diffalign.types import Cond


@dataclass(frozen=True, kw_only=True)
class PixArtDenoiser:
    """A `PixArtTransformer2DModel` along its DDPM path."""

    net: nn.Module
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: DDPMPath
    prediction: Prediction
    vae_factor: int
    told_sizes: bool
    """PixArt-alpha at 1024 pixels is told height, width and aspect ratio."""

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        out = self.net(x_t, timestep=t, **self._told(x_t, cond), return_dict=False)[0]
        return out[:, : x_t.shape[1]].float()  # the rest is the variance

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
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
        modules = [net.pos_embed, *first_blocks(net, mid=mid, blocks=blocks)]
        tokens = captured(net, modules, x_t, timestep=t, **self._told(x_t, cond))
        return token_maps(tokens, x_t, net.config.patch_size)

    def _told(self, x_t: Float[Tensor, "b c h w"], cond: Cond) -> dict[str, Any]:
        height, width = (side * self.vae_factor for side in x_t.shape[-2:])
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.told_sizes:
            one = x_t.new_ones(len(x_t), 1)
            sizes = {"resolution": torch.cat([one * height, one * width], dim=1), "aspect_ratio": one * height / width}
        return {
            "encoder_hidden_states": cond["prompt_embeds"],
            "encoder_attention_mask": cond["prompt_attention_mask"],
            "added_cond_kwargs": sizes,
        }


def make_denoiser(
    net: Any,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
) -> PixArtDenoiser:
    """A denoiser whose path and prediction type come from the folder's scheduler config."""
    path, prediction = ddpm_path("pixart", scheduler, timesteps)
    return PixArtDenoiser(
        net=net,
        path=path,
        prediction=prediction,
        vae_factor=context.vae_factor,
        told_sizes=bool(net.use_additional_conditions),
    )


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """Token states of T5 with their mask, 120 tokens for alpha and 300 for Sigma, as the pipeline computes them."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=pipeline._execution_device, **_TEXT
    )
    return Cond({"prompt_embeds": embeds, "prompt_attention_mask": mask})


_TEXT = {"clean_caption": False}
"""Captions are put in lower case and stripped, no more: the pipeline's cleaning needs packages and drops words."""


def call_options(pipeline: Any) -> dict[str, Any]:
    """Prompts as in training, and images of the size of their noise, not of the nearest aspect ratio on a list."""
    return {**_TEXT, "use_resolution_binning": False}


def use_sampler(pipeline: Any) -> None:
    """DPM-Solver++ without noise, which these models are published with."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++"
    )


def _net_class() -> type:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel


PIXART_SIGMA = Family(
    name="pixart_sigma",
    pipelines=("PixArtSigmaPipeline",),
    net="transformer",
    text=("text_encoder", "tokenizer"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    net_class=_net_class,
    blocks=("BasicTransformerBlock",),
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    call_options=call_options,
    save_lora=save_peft,
    load_lora=load_peft,
    lora_recipe=RECIPE,
    patch=2,
    steps=20,
    guidance=4.5,
)

PIXART_ALPHA = replace(PIXART_SIGMA, name="pixart_alpha", pipelines=("PixArtAlphaPipeline",))
