"""DiT: a transformer on a discrete DDPM schedule, conditioned on a class instead of a text.

A prompt is the name of a class, or its number; the empty prompt is the class for "none", which guidance uses. Diffusers
has no LoRA loader for these networks, and the pipeline's call takes no noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffalign.denoisers.family import PLAIN, Context, Family, ddpm_path
from diffalign.denoisers.features import captured, first_blocks, token_maps
from diffalign.denoisers.peft_files import RECIPE, load_peft, save_peft
from diffalign.errors import InputError, near_match
from diffalign.paths import DDPMPath, Prediction, TimestepSampling
from diffalign.types import Cond

NONE = 1000
"""Class of an empty prompt: the one after ImageNet's 1000, as the pipeline has it."""


@dataclass(frozen=True, kw_only=True)
class ClassDiTDenoiser:
    """A `DiTTransformer2DModel` along its DDPM path."""

    net: nn.Module
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: DDPMPath
    prediction: Prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        out = self.net(x_t, timestep=t, class_labels=cond["class"], return_dict=False)[0]
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
        tokens = captured(net, modules, x_t, timestep=t, class_labels=cond["class"])
        return token_maps(tokens, x_t, net.config.patch_size)


def make_denoiser(
    net: nn.Module,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
) -> ClassDiTDenoiser:
    """A denoiser whose path and prediction type come from the folder's scheduler config."""
    path, prediction = ddpm_path("dit", scheduler, timesteps)
    return ClassDiTDenoiser(net=net, path=path, prediction=prediction)


def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """Numbers of the classes that prompts name.

    Raises:
        InputError: A prompt is neither the name nor the number of a class.
    """
    return Cond({"class": torch.tensor([_class(pipeline.labels, p) for p in prompts], device=pipeline.device)})


def _class(labels: Mapping[str, int], prompt: str) -> int:
    name = prompt.strip()
    if not name:
        return NONE
    if name in labels:
        return labels[name]
    if name.isdecimal() and int(name) < NONE:
        return int(name)
    raise InputError(
        f"prompts must be names of classes or numbers below {NONE} with the family 'dit', got "
        f"{prompt!r}{near_match(name, labels)}"
    )


@torch.no_grad()
def own_loop(pipeline: Any, prompts: Sequence[str], latents: Tensor, *, steps: int, guidance: float) -> Tensor:
    """The pipeline's own loop, from given noise."""
    names = encode_prompts(pipeline, prompts)["class"].to(latents.device)
    guided = guidance > 1
    labels = torch.cat([names, torch.full_like(names, NONE)]) if guided else names
    pipeline.scheduler.set_timesteps(steps)
    for t in pipeline.scheduler.timesteps.to(latents.device):
        x = torch.cat([latents] * 2) if guided else latents
        x = pipeline.scheduler.scale_model_input(x, t)
        pred = pipeline.transformer(x, timestep=t.expand(len(x)), class_labels=labels).sample[:, : latents.shape[1]]
        if guided:
            cond, uncond = pred.chunk(2)
            pred = uncond + guidance * (cond - uncond)
        latents = pipeline.scheduler.step(pred, t, latents).prev_sample
    return latents


def use_sampler(pipeline: Any) -> None:
    """DDIM without noise, on the model's own schedule."""
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


def _net_class() -> type:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel


DIT = Family(
    name="dit",
    pipelines=("DiTPipeline",),
    net="transformer",
    text=(),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    net_class=_net_class,
    blocks=("BasicTransformerBlock",),
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    save_lora=save_peft,
    load_lora=load_peft,
    lora_recipe=RECIPE,
    patch=2,
    square=True,
    own_loop=own_loop,
    steps=50,
    guidance=4.0,
)
