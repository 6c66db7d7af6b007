"""Stable Audio 3: a transformer on rectified flow over frames of sound, told the text by T5Gemma and the clip's length.

Latents are [B, C, frames, 1] here and [B, C, frames] in the network. The pipeline's velocity is eps - x_0 and its sigma
is t, both as everywhere in this package; the network is told t times the scheduler's `num_train_timesteps`, which is 1
in published folders. Prompts are padded to one length, and the network puts a learned vector in place of the padding.
The length is told twice: as a token behind the text, and to every block.

Why this one of Diffusers' audio pipelines: its base checkpoints (music and sound effects, 0.4 and 1.4 billion weights)
are published to be fine-tuned, and length is a condition of its own. LongCat-AudioDiT walks from t = 0 to data at
t = 1, with zeros behind the prompt's own mask for an empty prompt; ACE-Step wants lyrics, a reference and a second
encoder. Stable Audio Open predicts v along a cosine path, alpha = cos(pi t / 2), whose t is continuous: neither of the
paths in paths.py, and its stock sampler is a stochastic multistep one that no walk here equals.

Checkpoints distilled to 8 steps (`stochastic_sampling` in their scheduler) are for sampling; train their base, and the
LoRA fits both. The authors' trainers tell the network of a mask to fill in that is all ones; the pipeline tells it of
none, and so does this denoiser, so that what is trained is what is sampled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.denoisers.family import PLAIN, Configs, Context, Family, flow_config, flow_sampling
from diffalign.denoisers.features import captured, first_blocks, token_maps
from diffalign.denoisers.peft_files import RECIPE, load_peft, save_peft
from diffalign.errors import InputError
from diffalign.paths import FlowPath, Prediction, TimestepSampling
from diffalign.types import Cond

NAME = "stable_audio_3"
LOG_SNR = (-6.2, 2.0)
"""Between which the stock sampler's levels lie evenly: the pipeline's defaults."""


@dataclass(frozen=True, kw_only=True)
class StableAudio3Denoiser:
    """A `StableAudio3DiTModel` along the straight path from data to noise."""

    net: Any
    """The diffusers model; DDP, compile and LoRA wrap this, never the adapter."""
    path: FlowPath
    timestep_scale: float
    """What the network is told t times: the scheduler's `num_train_timesteps`."""
    prediction: Prediction = "velocity"

    def __call__(
        self, x_t: Float[Tensor, "b c frames 1"], t: Float[Tensor, " b"], cond: Cond
    ) -> Float[Tensor, "b c frames 1"]:
        out = self.net(x_t.squeeze(-1), **self._told(t, cond), return_dict=False)[0]
        return out.unsqueeze(-1).float()

    def features(
        self,
        x_t: Float[Tensor, "b c frames 1"],
        t: Float[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _d frames 1"]]:
        """Frames as maps: embedded, and after each of the first `blocks` blocks (None: half), without memory tokens.

        Raises:
            InputError: `mid` is set, or there are fewer blocks.
            RuntimeError: Inputs or weights are narrower than float32.
        """
        net = self.net
        modules = [net.proj_in, *first_blocks(net, mid=mid, blocks=blocks)]
        first, *outputs = captured(net, modules, x_t.squeeze(-1), **self._told(t, cond))
        tokens = [first, *(out[:, net.config.num_memory_tokens :] for out in outputs)]
        return token_maps(tokens, x_t, 1)

    def _told(self, t: Float[Tensor, " b"], cond: Cond) -> dict[str, Any]:
        return {
            "timestep": t * self.timestep_scale,
            "encoder_hidden_states": cond["prompt_embeds"],
            "encoder_attention_mask": cond["prompt_attention_mask"],
            "global_hidden_states": cond["duration_embeds"],
        }


def make_denoiser(
    net: Any,
    scheduler: Mapping[str, Any],
    timesteps: TimestepSampling | None,
    context: Context = PLAIN,
) -> StableAudio3Denoiser:
    """A denoiser whose shift and timestep scale come from the folder's scheduler config; t is uniform.

    Weights for a region to fill in are frozen: without one they are not run, and would wait for a gradient.

    Raises:
        InputError: The scheduler is not one of a flow, or bends its levels in a way that this family does not.

    Departs: the authors' trainers shift t by the clip's length too, which the published folder says nothing of; name
        [timesteps] for another distribution.
    """
    config = flow_config(NAME, scheduler)
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if config[name]:
            raise InputError(f"scheduler.{name} must be false for the family {NAME!r}, got true")
    if net.config.patch_size != 1:
        raise InputError(
            f"transformer.patch_size must be 1 for the family {NAME!r}, as in published models, got "
            f"{net.config.patch_size}"
        )
    for block in net.transformer_blocks:
        block.to_local_embed.requires_grad_(False)
    path = FlowPath(shift=float(config.shift), timesteps=flow_sampling(timesteps, "uniform"))
    return StableAudio3Denoiser(net=net, path=path, timestep_scale=float(config.num_train_timesteps))


def clip_size(
    family: Family,
    configs: Configs,
    *,
    resolution: int | None,
    seconds: float | None,
    where: str = "config.data.",
) -> Context:
    """Clips of so many seconds, in whole frames, the last of which is cut.

    Raises:
        InputError: No length, one that the model cannot be told, one below a frame, or a side in pixels.
    """
    if resolution is not None:
        raise InputError(
            f"{where}resolution must be left out with the family {family.name!r}, which makes clips of sound; got "
            f"{resolution}"
        )
    vae, longest = configs("vae"), float(configs("duration_embedder").get("max_val", 384.0))
    rate_hz, factor = int(vae["sampling_rate"]), int(vae["patch_size"] * math.prod(vae["encoder_strides"]))
    if seconds is None:
        raise InputError(
            f"{where}seconds must be there with the family {family.name!r}, whose clips may have any length up to "
            f"{longest:g} s, got none"
        )
    if not 0 < seconds <= longest:
        raise InputError(f"{where}seconds must be in (0, {longest:g}] with this model, got {seconds}")
    if seconds * rate_hz < factor:
        raise InputError(
            f"{where}seconds must be at least a frame of the model, {factor / rate_hz:.4g} s, got {seconds}"
        )
    frames = math.ceil(seconds * rate_hz / factor)
    channels = int(configs(family.net)["io_channels"])
    return Context(
        vae_factor=factor,
        seconds=seconds,
        sample_rate_hz=rate_hz,
        channels=int(vae.get("audio_channels", 2)),
        latents=(channels, frames, 1),
    )


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
    """Token states of T5Gemma with their mask, and the clip's length, as the pipeline itself computes them.

    Raises:
        InputError: The context is not that of clips.
    """
    if context.seconds is None:
        raise InputError(
            f"context.seconds must be known to condition the family {NAME!r}, got none; load_context(source, family, "
            "seconds=...) has it"
        )
    states, mask = pipeline.encode_prompt(list(prompts), pipeline.device, 1)
    length = pipeline.encode_duration(context.seconds, pipeline.device, 1, len(prompts))
    states, mask = pipeline.prepare_cross_attention(states, mask, length)
    return Cond({"prompt_embeds": states, "prompt_attention_mask": mask, "duration_embeds": length})


def decode(vae: Any, z: Float[Tensor, "b c frames 1"], context: Context) -> Float[Tensor, "b _channels _s"]:
    """Waveforms in [-1, 1], float32, at the model's rate; of the context's length, or of all frames."""
    waves = vae.decode(z.squeeze(-1)).sample
    if context.seconds is not None:
        waves = waves[:, :, : int(context.seconds * vae.config.sampling_rate)]
    return waves.float().clamp(-1, 1)


def levels(steps: int) -> list[float]:
    """The stock sampler's: evenly spaced in log-SNR, the first of them pure noise."""
    from diffusers.pipelines.stable_audio_3.pipeline_stable_audio_3 import logsnr_sigma_schedule

    return logsnr_sigma_schedule(steps, *LOG_SNR)


@torch.no_grad()
def make(
    pipeline: Any,
    prompts: Sequence[str],
    latents: Float[Tensor, "b c frames 1"],
    *,
    steps: int,
    guidance: float,
    decoded: bool,
    context: Context,
) -> Float[Tensor, "b _c _s *rest"]:
    """The pipeline's call, from given noise."""
    vae = pipeline.vae
    whole = latents.shape[2] * vae.downsampling_ratio / vae.config.sampling_rate
    made = pipeline(
        prompt=list(prompts),
        duration=whole if context.seconds is None else context.seconds,
        latents=latents.squeeze(-1),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt" if decoded else "latent",
    ).audios
    return made if decoded else made.unsqueeze(-1)


def use_sampler(pipeline: Any) -> None:
    """The pipeline's own Euler sampler of the flow, without the noise of distilled models."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, stochastic_sampling=False
    )


def no_images(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Refuses to say how large images are.

    Raises:
        InputError: Always.
    """
    raise InputError(f"the model must make images here, got one of the family {NAME!r}, which makes clips of sound")


def _net_class() -> type:
    from diffusers import StableAudio3DiTModel

    return StableAudio3DiTModel


STABLE_AUDIO_3 = Family(
    name=NAME,
    pipelines=("StableAudio3Pipeline",),
    net="transformer",
    text=("text_encoder", "tokenizer", "duration_embedder"),
    lora_targets=("to_qkv", "to_q", "to_kv", "to_out"),
    blocks=("StableAudio3DiTBlock",),
    net_class=_net_class,
    make_denoiser=make_denoiser,
    encode_prompts=encode_prompts,
    use_sampler=use_sampler,
    save_lora=save_peft,
    load_lora=load_peft,
    lora_recipe=RECIPE,
    modality="audio",
    size=clip_size,
    decode=decode,
    levels=levels,
    make=make,
    latent_shape=no_images,
    steps=50,
    guidance=7.0,
)
