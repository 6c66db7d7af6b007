"""From a Diffusers pipeline's call to a rollout, and from its end to what the caller asked for.

What the pipelines in `pipelines/` share. Texts are encoded and images finished by the stock pipeline's own methods;
between them lies the one loop of rollout.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Shaped
from torch import Tensor

from diffalign.denoisers import Family
from diffalign.denoisers.guided import Guided
from diffalign.errors import InputError, near_match
from diffalign.paths import NoisePath, Prediction
from diffalign.progress import Advancing
from diffalign.sampling import kernels
from diffalign.sampling.kernels import Kernel
from diffalign.sampling.rollout import Keep, initial_noise, rollout
from diffalign.sampling.schedule import Schedule, Table, make_schedule
from diffalign.types import Cond, Denoiser, Trajectory

OUTPUT_TYPES = ("pil", "pt", "np", "latent")

Generators = torch.Generator | list[torch.Generator]
Window = range | tuple[int, int]
"""Moves by their numbers, the last not included."""


@dataclass
class RolloutOutput(BaseOutput):
    """Images, the way to them, and what the log-probs of that way can be computed with again."""

    images: Any
    """As `output_type` says; latents are those of the denoiser, float32."""
    trajectory: Trajectory
    log_probs: Float[Tensor, "b n"]
    """Of every move with noise, averaged over elements, in the kernel's own form."""
    nsfw_content_detected: list[bool] | None
    """By the pipeline's safety checker; None if it has none."""
    denoiser: Denoiser
    """With guidance; with kernel, schedule and trajectory the arguments of `rollout.log_probs`."""
    kernel: Kernel
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How images are to be made, in the words of a pipeline's call."""

    steps: int
    guidance: float | int
    kernel: str | Kernel
    eta: float | int | None = None
    table: Table = "diffusers"
    height: int | None = None
    width: int | None = None
    generator: Generators | None = None
    seeds: Sequence[int] | int | None = None
    latents: Tensor | None = None
    variance_noise: Tensor | None = None
    window: Window | None = None
    keep: Keep | None = None


def roll_out(
    pipeline: Any,
    family: Family,
    cond: Cond,
    uncond: Cond | None,
    ask: Ask,
    *,
    output_type: str,
    denoiser: Denoiser | None = None,
    negative: Denoiser | None = None,
) -> RolloutOutput:
    """Images of conditions, one a row, with the way to them.

    Args:
        denoiser: None is the pipeline's network.
        negative: The model of the unconditional branch; None is `denoiser`.

    Raises:
        InputError: Something that was asked for is wrong.
    """
    check_output(output_type)
    kernel, schedule = choose_walk(ask.kernel, pipeline.scheduler.config, ask.steps, eta=ask.eta, table=ask.table)
    noise = _noise_of(pipeline, family, cond, ask)
    policy = denoiser or denoiser_of(pipeline, family)
    if uncond is not None:
        policy = Guided(denoiser=policy, uncond=uncond, guidance=float(ask.guidance), negative=negative)
    with progress(pipeline, len(schedule)) as shown:
        trajectory = rollout(
            policy,
            kernel,
            schedule,
            cond,
            noise.seeds,
            x_init=noise.x_init,
            variance_noise=ask.variance_noise,
            window=range(*ask.window) if isinstance(ask.window, tuple) else ask.window,
            keep=ask.keep or Keep(levels="all"),
            shown=shown,
        )
    images, flagged = trajectory.x_0, None
    if output_type != "latent":
        images, flagged = decode(pipeline, trajectory.x_0)
        images = finish(pipeline, images, flagged, output_type)
    pipeline.maybe_free_model_hooks()
    return RolloutOutput(
        images=images,
        trajectory=trajectory,
        log_probs=trajectory.log_prob,
        nsfw_content_detected=flagged,
        denoiser=policy,
        kernel=kernel,
        schedule=schedule,
    )


def roll_out_parts(
    pipeline: Any,
    family: Family,
    cond: Cond,
    uncond: Cond | None,
    ask: Ask,
    *,
    size: int | None,
    output_type: str,
    denoiser: Denoiser | None = None,
    negative: Denoiser | None = None,
) -> Iterator[RolloutOutput]:
    """The images of `roll_out`, at most `size` at once (None: all), from the same noise whatever it is."""
    images = len(cond["prompt_embeds"])
    noise = _noise_of(pipeline, family, cond, ask)
    for start in range(0, images, size or images):
        part = slice(start, start + (size or images))
        yield roll_out(
            pipeline,
            family,
            cond.rows(part),
            None if uncond is None else uncond.rows(part),
            replace(ask, generator=None, seeds=noise.seeds[part], latents=noise.x_init[part]),
            output_type=output_type,
            denoiser=denoiser,
            negative=negative,
        )


def check_output(output_type: str) -> None:
    """Checks what images are asked for as.

    Raises:
        InputError: Unknown.
    """
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be a known one, got {output_type!r}{near_match(output_type, OUTPUT_TYPES)}")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What the images of a call start from, and the seeds of their moves."""

    x_init: Float[Tensor, "b c h w"]
    seeds: tuple[int, ...]


def encode(
    pipeline: Any,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    *,
    guided: bool,
    images: int,
    options: Mapping[str, Any],
) -> tuple[Cond, Cond | None]:
    """Conditions of every image, and those of the unconditional branch if there is one.

    Args:
        images: Of each prompt; those of one prompt lie together.
        options: What else `encode_prompt` of the pipeline takes.

    Raises:
        InputError: No prompts, prompts and conditions made of them together, or fewer than one image for each.
    """
    if (prompt is None) == (options.get("prompt_embeds") is None):
        raise InputError("prompt must be given, or prompt_embeds in its place, got both or none")
    if prompt is not None and not prompt and not isinstance(prompt, str):
        raise InputError(f"prompt must hold one prompt or more, got {prompt!r}")
    if images < 1:
        raise InputError(f"num_images_per_prompt must be at least 1, got {images}")
    if isinstance(prompt, list) and isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt] * len(prompt)
    made = pipeline.encode_prompt(
        prompt=prompt,
        negative_prompt=negative_prompt,
        do_classifier_free_guidance=guided,
        num_images_per_prompt=images,
        **options,
    )
    names = ("prompt_embeds", "pooled_prompt_embeds")[: len(made) // 2]
    cond, uncond = (dict(zip(names, made[branch::2], strict=True)) for branch in (0, 1))
    return Cond(cond), Cond(uncond) if guided else None


def latent_shape(pipeline: Any, family: Family, height: int | None, width: int | None) -> tuple[int, int, int]:
    """[C, H, W] of the latents of an image of this size in pixels; None is the size that the model was made for.

    Raises:
        InputError: A side is no whole number of the network's tokens.
    """
    channels, *sides = family.latent_shape(pipeline.components[family.net].config)
    factor = pipeline.vae_scale_factor
    for place, (name, pixels) in enumerate((("height", height), ("width", width))):
        if pixels is None:
            continue
        if pixels < 1 or pixels % (factor * family.patch):
            raise InputError(f"{name} must be a multiple of {factor * family.patch}, got {pixels}")
        sides[place] = pixels // factor
    return channels, sides[0], sides[1]


def draw_noise(
    shape: tuple[int, int, int, int],
    *,
    generator: Generators | None,
    seeds: Sequence[int] | int | None,
    latents: Float[Tensor, "..."] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Noise:
    """Initial noise of a call, float32, and a seed for the moves of every image.

    From `seeds`, one for each image, an image's noise is that of `rollout` with this seed, whatever the batch. A
    generator gives the initial noise that it gives in the stock pipeline and then a seed for each image; a list of them
    one image each. `latents` are taken in place of the initial noise.

    Args:
        dtype: In which the stock pipeline draws.

    Raises:
        InputError: Both seeds and generator, one too many or too few of them, or latents of another shape.
    """
    images = shape[0]
    if generator is not None and seeds is not None:
        raise InputError("seeds must be left out beside a generator, got both")
    if isinstance(generator, list) and len(generator) != images:
        raise InputError(f"generator must be one, or a list of one for each of {images} images, got {len(generator)}")
    if latents is not None and latents.shape != shape:
        raise InputError(
            f"latents must have shape {shape} for {images} images of this size, got {tuple(latents.shape)}; images of "
            "another size need height and width"
        )
    if seeds is not None:
        own = (seeds,) if isinstance(seeds, int) else tuple(seeds)
        if len(own) != images or not all(isinstance(seed, int) for seed in own):
            raise InputError(f"seeds must be one integer for each of {images} images, got {seeds!r}")
        x_init = initial_noise(own, shape[1:]) if latents is None else latents
    else:
        x_init = randn_tensor(shape, generator=generator, device=device, dtype=dtype) if latents is None else latents
        each = generator if isinstance(generator, list) else [generator] * images
        own = tuple(_seed(one) for one in each)
    return Noise(x_init=x_init.to(device=device, dtype=torch.float32), seeds=own)


def _noise_of(pipeline: Any, family: Family, cond: Cond, ask: Ask) -> Noise:
    text = cond["prompt_embeds"]
    return draw_noise(
        (len(text), *latent_shape(pipeline, family, ask.height, ask.width)),
        generator=ask.generator,
        seeds=ask.seeds,
        latents=ask.latents,
        device=text.device,
        dtype=text.dtype,
    )


def choose_walk(
    kernel: str | Kernel,
    config: Mapping[str, Any],
    steps: int,
    *,
    eta: float | int | None = None,
    table: Table = "diffusers",
) -> tuple[Kernel, Schedule]:
    """A kernel and its walk over a model whose scheduler config this is.

    Args:
        eta: None is the kernel's published value. A walk on which it leaves no noise ends where the stock sampler does.

    Raises:
        InputError: An unknown kernel or one of another kind of model, a wrong eta or number of steps.
    """
    if isinstance(kernel, Kernel):
        if eta is not None:
            raise InputError(f"eta must be left out beside a made kernel, which has its own, got {eta}")
        chosen = kernel
    else:
        chosen = kernels.kernel(kernel) if eta is None else kernels.kernel(kernel, eta=eta)
    schedule = make_schedule(chosen.name, config, steps, table=table)
    if schedule.moves.kind == "vp" and not chosen.stds(schedule).any():
        schedule = make_schedule("ode", config, steps, table=table)
    return chosen, schedule


@dataclass(frozen=True, kw_only=True)
class _AtDtype:
    """A denoiser whose network takes latents in its own, smaller type; what comes out is float32 as ever."""

    denoiser: Denoiser
    dtype: torch.dtype

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        return self.denoiser(x_t.to(self.dtype), t, cond)


def denoiser_of(pipeline: Any, family: Family) -> Denoiser:
    """The pipeline's network as a denoiser along the path of its scheduler's config."""
    net = pipeline.components[family.net]
    denoiser = family.make_denoiser(net, pipeline.scheduler.config, None)
    return denoiser if net.dtype == torch.float32 else _AtDtype(denoiser=denoiser, dtype=net.dtype)


@dataclass(frozen=True)
class _Stepping:
    """A pipeline's own bar, as the loop moves it."""

    bar: Any

    def advance(self) -> None:
        self.bar.update()


@contextmanager
def progress(pipeline: Any, moves: int) -> Iterator[Advancing]:
    """The pipeline's own bar, shown or not as it was configured."""
    with pipeline.progress_bar(total=moves) as bar:
        yield _Stepping(bar)


def decode(pipeline: Any, x_0: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b 3 _h _w"], list[bool] | None]:
    """Pixels in [-1, 1] as the pipeline's image processor takes them, and what its safety checker, if any, found."""
    vae = pipeline.vae
    z = x_0 / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = vae.decode(z.to(vae.dtype), return_dict=False)[0]
    if pipeline.components.get("safety_checker") is None:
        return pixels, None
    return pipeline.run_safety_checker(pixels, pixels.device, pixels.dtype)


def finish(pipeline: Any, pixels: Float[Tensor, "b 3 h w"], flagged: list[bool] | None, output_type: str) -> Any:
    """Images as the caller wants them, by the pipeline's image processor; what was flagged stays black."""
    clean = None if flagged is None else [not found for found in flagged]
    return pipeline.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=clean)


def _seed(generator: torch.Generator | None) -> int:
    """One number from a stream; None is torch's own."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))
