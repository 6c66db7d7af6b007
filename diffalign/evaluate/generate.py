"""From prompts to images by the stock Diffusers pipeline, from initial noise that belongs to (prompt, seed number).

The noise of an image depends on nothing else: not on batch size, order, device or arm. So two arms are compared on
equal noise, and an image can be made again alone.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.denoisers import FAMILIES, Family
from diffalign.errors import InputError, RunError, near_match
from diffalign.evaluate.score import Table, write_image
from diffalign.models.load import ModelSource, load_pipeline
from diffalign.progress import Bar
from diffalign.shipped import MODELS, resolve


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One image and where it came from."""

    prompt_index: int
    k: int
    """Number of the seed of this prompt, 0 first."""
    seed: int
    latent_sha256: str
    """Of the initial noise, as little-endian float32."""
    image: Float[Tensor, "3 h w"]
    """RGB in [0, 1], rounded to 8 bit."""


def prompt_seed(prompt: str, k: int) -> int:
    """Seed of a prompt's k-th image: the first 8 bytes of sha256(prompt, 0, k in decimal), big-endian, modulo 2^63."""
    digest = hashlib.sha256(prompt.encode() + b"\0" + str(k).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def latent_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the noise that a denoiser with this config starts from, at its native size."""
    size = config["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config["in_channels"], height, width


def initial_latents(net: nn.Module, seeds: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Standard normal noise of a denoiser's latent shape, float32, drawn on the CPU by one generator per seed."""
    shape = latent_shape(net.config)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def generate(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    *,
    images_per_prompt: int = 1,
    steps: int = 50,
    guidance: float = 7.5,
    batch_size: int = 8,
) -> Iterator[Generated]:
    """Images of every prompt, seed by seed, at the model's native size, by the family's deterministic sampler.

    Args:
        pipeline: On its device and in its dtype; its scheduler is replaced.
        guidance: Weight w in uncond + w (cond - uncond); 1 is off.

    Raises:
        RunError: An image is not finite.
    """
    family.use_sampler(pipeline)
    net = pipeline.components[family.net]
    places = [(i, k) for i in range(len(prompts)) for k in range(images_per_prompt)]
    for start in range(0, len(places), batch_size):
        chunk = places[start : start + batch_size]
        seeds = [prompt_seed(prompts[i], k) for i, k in chunk]
        latents = initial_latents(net, seeds)
        images = pipeline(
            prompt=[prompts[i] for i, _ in chunk],
            latents=latents.to(net.device, net.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            **family.call_options(pipeline),
        ).images
        for (i, k), seed, latent, image in zip(chunk, seeds, latents, images.float().cpu(), strict=True):
            if not image.isfinite().all():
                raise RunError(
                    f"image {k} of prompt {i} is not finite; use float32 if the VAE overflows in a smaller type"
                )
            digest = hashlib.sha256(latent.numpy().astype("<f4").tobytes()).hexdigest()
            rounded = (image.clamp(0, 1) * 255).round() / 255
            yield Generated(prompt_index=i, k=k, seed=seed, latent_sha256=digest, image=rounded)


def save_images(made: Iterable[Generated], prompts: Sequence[str], folder: Path, shown: Bar) -> Table:
    """Writes images as `<prompt's place>-<k>.png`, and metadata.jsonl with what is returned: one row per image.

    Args:
        shown: A bar to advance by each image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table: Table = {name: [] for name in ("file_name", "prompt", "prompt_index", "k", "seed", "latent_sha256")}
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for item in made:
            name = f"{item.prompt_index:05d}-{item.k}.png"
            write_image(item.image, folder / name)
            values = (name, prompts[item.prompt_index], item.prompt_index, item.k, item.seed, item.latent_sha256)
            row = dict(zip(table, values, strict=True))
            for column, value in row.items():
                table[column].append(value)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            shown.advance()
    return table


def load_arm(spec: str, base: ModelSource) -> Any:
    """The pipeline of an arm; see `arm_source`."""
    return load_pipeline(arm_source(spec, base))


def arm_source(spec: str, base: ModelSource) -> ModelSource:
    """Which model an arm is.

    Args:
        spec: A pipeline (folder, hub id or shipped name), a LoRA (folder or .safetensors file), a denoiser (its
            component folder, or a folder that holds `unet/` or `transformer/`), or the folder of a run of ours.
        base: The pipeline under a LoRA or a denoiser. A run's folder names its own.

    Raises:
        InputError: It is none of these.
    """
    place = Path(resolve(spec, MODELS))
    if place.is_file():
        return _with_file(place, base)
    if not place.is_dir():
        if spec in MODELS or (spec.count("/") == 1 and not spec.startswith((".", "/", "~"))):
            return ModelSource(path=spec)
        raise InputError(
            "model must be a folder, a .safetensors file, a hub id or a shipped name, "
            f"got {spec!r}{near_match(spec, MODELS)}"
        )
    if (place / "model_index.json").is_file():
        return ModelSource(path=spec)
    if (place / "config.toml").is_file():
        return _of_run(place)
    nets = {family.net for family in FAMILIES.values()}
    if (place / "config.json").is_file() or any((place / net).is_dir() for net in nets):
        return replace(base, denoiser=str(place), lora=None)
    if any(place.glob("*.safetensors")):
        return replace(base, lora=str(place))
    raise InputError(
        f"model must hold model_index.json (a pipeline), config.toml (a run), {', '.join(sorted(nets))} or config.json "
        f"(a denoiser), or a .safetensors file (a LoRA), got {spec!r} with none of them"
    )


def run_folder(spec: str) -> Path | None:
    """The folder of the run that an arm is, if it is one."""
    place = Path(spec)
    return place if (place / "config.toml").is_file() and not (place / "model_index.json").is_file() else None


def _with_file(file: Path, base: ModelSource) -> ModelSource:
    if file.suffix == ".safetensors":
        return replace(base, lora=str(file))
    raise InputError(f"model must be a folder or a .safetensors file of a LoRA, got the file {str(file)!r}")


def _of_run(folder: Path) -> ModelSource:
    """The run's own base with its export on top."""
    if not (folder / "export").is_dir():
        raise InputError(f"model must be a finished run, got {str(folder)!r} without export/; go on with it first")
    try:
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        base = ModelSource(**table["model"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.toml'} must be the config of a run, got {error}") from error
    return arm_source(str(folder / "export"), base)
