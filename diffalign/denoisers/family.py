"""What one family of pipelines must tell: how it is recognised, loaded, conditioned, adapted and sampled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.denoisers.kohya import Adapter
from diffalign.errors import InputError
from diffalign.paths import DDPMPath, Distribution, Prediction, TimestepSampling
from diffalign.types import Cond, Denoiser, Modality

DDPM_PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


VAE_IN_FILE = ("first_stage_model.", "vae.")
"""How names of a VAE's weights start in a checkpoint of one file."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a denoiser must know beside its network and its schedule: how large what it makes is."""

    vae_factor: int = 8
    """Pixels of an image per latent, along a side; samples of a clip per frame of latents."""
    resolution: int = 512
    """Side in pixels of the images that are trained on."""
    guidance: float | None = None
    """What a network with a guidance embedding is told; None is the family's own."""
    seconds: float | None = None
    """Length of a clip; None where images are made."""
    sample_rate_hz: int | None = None
    """Of a clip."""
    channels: int | None = None
    """Of a clip's waveform; None where images are made."""
    latents: tuple[int, int, int] = (4, 64, 64)
    """Channels, height and width; of a clip channels, frames and 1."""


PLAIN = Context()


@runtime_checkable
class MakeDenoiser(Protocol):
    """From a network to a denoiser along the path of its scheduler's config."""

    def __call__(
        self,
        net: nn.Module,
        scheduler: Mapping[str, Any],
        timesteps: TimestepSampling | None,
        context: Context = PLAIN,
    ) -> Denoiser:
        """`timesteps` None takes the family's own sampling of t."""
        ...


Configs = Callable[[str], Mapping[str, Any]]
"""Config of a component, by its name in the pipeline."""


@runtime_checkable
class Size(Protocol):
    """From what a config asks for to the size of what is made, by the configs of the model's components."""

    def __call__(
        self,
        family: "Family",
        configs: Configs,
        *,
        resolution: int | None,
        seconds: float | None,
        where: str = "config.data.",
    ) -> Context:
        """None is the model's own; what the family does not have, or cannot make, is an InputError.

        Args:
            where: What stands before the name of a size in a message.
        """
        ...


def image_size(
    family: "Family",
    configs: Configs,
    *,
    resolution: int | None,
    seconds: float | None,
    where: str = "config.data.",
) -> Context:
    """Squares of pixels.

    Raises:
        InputError: The side is no whole number of tokens, or a length is asked for.
    """
    if seconds is not None:
        raise InputError(
            f"{where}seconds must be left out with the family {family.name!r}, which makes images; got {seconds}"
        )
    factor = int(2 ** (len(configs("vae")["block_out_channels"]) - 1))
    channels, native, _ = family.latent_shape(configs(family.net))
    side = resolution or native * factor
    if side % (factor * family.patch):
        token = f", {factor} pixels a latent and {family.patch} latents a token" if family.patch > 1 else ""
        raise InputError(
            f"{where}resolution must be a multiple of {factor * family.patch} with this model{token}; got {side}"
        )
    return Context(vae_factor=factor, resolution=side, latents=(channels, side // factor, side // factor))


def decode_images(vae: Any, z: Float[Tensor, "b c h w"], context: Context) -> Float[Tensor, "b 3 _h _w"]:
    """RGB in [0, 1]."""
    return (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)


def native_latents(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the latents that a denoiser with this config was made for."""
    size = config["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config["in_channels"], height, width


def load_by_pipeline(pipeline: Any, place: str, file: str | None, adapter: str | None) -> None:
    """A LoRA by the pipeline's own loader."""
    pipeline.load_lora_weights(place, weight_name=file, adapter_name=adapter)


def ddpm_path(
    name: str, scheduler: Mapping[str, Any], timesteps: TimestepSampling | None, **changes: Any
) -> tuple[DDPMPath, Prediction]:
    """The discrete path of a scheduler's config, and what its network predicts.

    Args:
        name: Of the family, for messages.
        changes: Entries of the config that are other than the folder says.

    Raises:
        InputError: The scheduler is one of a flow, or predicts what this family does not.
    """
    from diffusers import DDPMScheduler

    cls = str(scheduler.get("_class_name", ""))
    if cls.startswith("FlowMatch"):
        raise InputError(f"model.path must have a DDPM schedule for the family {name!r}, got the scheduler {cls}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in DDPM_PREDICTIONS:
        raise InputError(
            f"scheduler.prediction_type must be {', '.join(DDPM_PREDICTIONS[:-1])} or {DDPM_PREDICTIONS[-1]} for the "
            f"family {name!r}, got {prediction!r}"
        )
    ddpm = DDPMScheduler.from_config({**scheduler, **changes})
    sampling = (timesteps or TimestepSampling()).resolved("uniform")
    return DDPMPath(alpha_bar=ddpm.alphas_cumprod, timesteps=sampling), prediction


def flow_config(name: str, scheduler: Mapping[str, Any]) -> Any:
    """The whole config of a folder's flow scheduler.

    Raises:
        InputError: The scheduler is not one of a flow.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    cls = str(scheduler.get("_class_name", ""))
    if not cls.startswith("FlowMatch"):
        raise InputError(f"model.path must have a flow-matching scheduler for the family {name!r}, got {cls}")
    return FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler)).config


def flow_sampling(timesteps: TimestepSampling | None, default: Distribution = "logit_normal") -> TimestepSampling:
    """t by the family's own distribution where nothing else is named.

    Raises:
        InputError: A number of levels, which only discrete schedules have.
    """
    if timesteps is not None and timesteps.levels is not None:
        raise InputError(f"timesteps.levels must be left out on a flow, whose t is continuous; got {timesteps.levels}")
    return (timesteps or TimestepSampling()).resolved(default)


@runtime_checkable
class EncodePrompts(Protocol):
    """From prompts to conditions, one row a prompt, without gradient."""

    def __call__(self, pipeline: Any, prompts: Sequence[str], context: Context = PLAIN) -> Cond:
        """`pipeline` holds its text components."""
        ...


@runtime_checkable
class Make(Protocol):
    """Sampling for pipelines whose call is not that of a pipeline of images."""

    def __call__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        latents: Tensor,
        *,
        steps: int,
        guidance: float,
        decoded: bool,
        context: Context,
    ) -> Tensor:
        """What the pipeline makes of standard normal noise: media, or latents as the denoiser has them."""
        ...


@runtime_checkable
class OwnLoop(Protocol):
    """Sampling for pipelines whose call takes no noise."""

    def __call__(
        self, pipeline: Any, prompts: Sequence[str], latents: Tensor, *, steps: int, guidance: float
    ) -> Tensor:
        """Latents of images, from standard normal noise."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that differs between families; the only place where a family's names are known."""

    name: str
    pipelines: tuple[str, ...]
    """Class names of Diffusers pipelines, as `model_index.json` says them."""
    net: str
    """Component of the pipeline that is trained."""
    text: tuple[str, ...]
    """Components that turn prompts into conditions."""
    optional: tuple[str, ...] = ()
    """Those of `text` that a pipeline may lack."""
    text_depends_on: tuple[str, ...] = ()
    """Entries of the trained network's config that decide how prompts are encoded."""
    lora_targets: tuple[str, ...]
    """Default modules that get a LoRA, by the end of their name."""
    net_class: Callable[[], type]
    """Class of the trained network; imported when asked."""
    blocks: tuple[str, ...]
    """Classes of its modules that hold most of its weights and are many: what is sharded block by block."""
    make_denoiser: MakeDenoiser
    encode_prompts: EncodePrompts
    use_sampler: Callable[[Any], None]
    """Puts the deterministic sampler of the evaluation protocol into a pipeline."""
    call_options: Callable[[Any], dict[str, Any]] = lambda pipeline: {}
    """What a pipeline must be called with to see the conditions of `encode_prompts`."""
    save_lora: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]
    """(folder, adapter weights in peft's names, adapter metadata) -> a file that the pipeline loads."""
    load_lora: Callable[[Any, str, str | None, str | None], None] = load_by_pipeline
    """(pipeline, folder or hub id, name of the file if known, name of the adapter or None) -> the LoRA in it."""
    lora_recipe: str = (
        'pipeline.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")'
    )
    """How others load an exported LoRA into `pipeline`, for the model card."""
    to_kohya: Callable[[Any, Mapping[str, Adapter]], dict[str, Tensor]] | None = None
    """(adapted network, its LoRA by module) -> the file of kohya-ss/sd-scripts; None where it has no such models."""
    in_file: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Component -> how names of its weights start in a checkpoint of one file, as the model's authors lay it out."""
    modality: Modality = "image"
    """What its samples are."""
    size: Size = image_size
    decode: Callable[[Any, Tensor, Context], Tensor] = decode_images
    """(VAE, its latents, their size) -> samples: RGB in [0, 1], or waveforms in [-1, 1]."""
    levels: Callable[[int], Sequence[float]] | None = None
    """Moves -> levels of noise of the stock sampler before its scheduler's shift, where the pipeline has its own."""
    make: Make | None = None
    """In place of the call of a pipeline of images."""
    latent_shape: Callable[[Mapping[str, Any]], tuple[int, int, int]] = native_latents
    """Config of the trained network -> (channels, height, width) of the latents it was made for."""
    patch: int = 1
    """Side of the square of latents that is one token; an image's side is a multiple of it in latents."""
    pack: Callable[[Tensor], Tensor] = lambda latents: latents
    """Latents [B, C, H, W] as the pipeline takes them."""
    unpack: Callable[[Tensor, int, int], Tensor] = lambda latents, height, width: latents
    """(latents as the pipeline gives them, H, W) -> [B, C, H, W]."""
    own_loop: OwnLoop | None = None
    """In place of the pipeline's call, where that takes no noise."""
    zero_empty: bool = False
    """Its pipelines put zeros in place of an empty negative prompt, so zeros may stand for a dropped prompt too."""
    told_sizes: bool = False
    """Its network is told an image's original size and crop."""
    square: bool = False
    """Its network takes square latents alone."""
    told_guidance: bool = False
    """Its network may have a guidance embedding."""
    steps: int
    """Sampling steps where nobody chose, as the evaluation protocol has them."""
    guidance: float
    """Weight w in uncond + w (cond - uncond) where nobody chose."""

    def sample(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        latents: Float[Tensor, "b c h w"],
        *,
        steps: int,
        guidance: float,
        decoded: bool = True,
        context: Context = PLAIN,
    ) -> Float[Tensor, " b *rest"]:
        """Samples of prompts from given noise, by the pipeline: media, or latents as the denoiser has them.

        Args:
            pipeline: With its sampler in place.
            latents: Standard normal noise, on the pipeline's device.
            context: Says how long a clip is; where it does not, all frames of the noise are heard.
        """
        if self.make is not None:
            return self.make(
                pipeline, prompts, latents, steps=steps, guidance=guidance, decoded=decoded, context=context
            )
        if self.own_loop is not None:
            made = self.own_loop(pipeline, prompts, latents, steps=steps, guidance=guidance)
            if not decoded:
                return made
            pixels = pipeline.vae.decode(made / pipeline.vae.config.scaling_factor).sample
            return (pixels / 2 + 0.5).clamp(0, 1)
        height, width = latents.shape[-2:]
        made = pipeline(
            prompt=list(prompts),
            latents=self.pack(latents),
            height=height * pipeline.vae_scale_factor,
            width=width * pipeline.vae_scale_factor,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt" if decoded else "latent",
            **self.call_options(pipeline),
        ).images
        return made if decoded else self.unpack(made, height, width)
