"""From prompts to samples by the stock Diffusers pipeline, from initial noise that belongs to (prompt, seed number).

The noise of an image depends on nothing else: not on batch size, order, device or arm. So two arms are compared on
equal noise, and an image can be made again alone.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.denoisers import Context, Family
from diffalign.denoisers.family import PLAIN
from diffalign.errors import RunError
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.score import Table, write_image
from diffalign.progress import Bar


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One sample and where it came from."""

    prompt_index: int
    k: int
    """Number of the seed of this prompt, 0 first."""
    seed: int
    latent_sha256: str
    """Of the initial noise, as little-endian float32."""
    image: Float[Tensor, " *rest"]
    """RGB in [0, 1], rounded to 8 bit; of a model of sound the clip, rounded to 16 bit."""


def prompt_seed(prompt: str, k: int) -> int:
    """Seed of a prompt's k-th image: the first 8 bytes of sha256(prompt, 0, k in decimal), big-endian, modulo 2^63."""
    digest = hashlib.sha256(prompt.encode() + b"\0" + str(k).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def initial_latents(shape: tuple[int, int, int], seeds: Sequence[int]) -> Float[Tensor, "b c h w"]:
    """Standard normal noise of a denoiser's latent shape, float32, drawn on the CPU by one generator per seed."""
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
    places = [(i, k) for i in range(len(prompts)) for k in range(images_per_prompt)]
    for start in range(0, len(places), batch_size):
        yield from make_batch(
            pipeline, family, prompts, places[start : start + batch_size], steps=steps, guidance=guidance
        )


@torch.no_grad()
def make_batch(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    places: Sequence[tuple[int, int]],
    *,
    steps: int,
    guidance: float,
    medium: Medium = PICTURES,
    shape: tuple[int, int, int] | None = None,
    context: Context = PLAIN,
) -> list[Generated]:
    """The samples of (prompt, seed number) at `places`, together; the family's sampler is in the pipeline already.

    Args:
        medium: What they are.
        shape: Of the noise of one; None is that of the images that the model was made for.
        context: What the pipeline is told of them.

    Raises:
        RunError: One is not finite.
    """
    net = pipeline.components[family.net]
    seeds = [prompt_seed(prompts[i], k) for i, k in places]
    latents = initial_latents(shape or family.latent_shape(net.config), seeds)
    noise = latents.to(net.device, net.dtype)
    texts = [prompts[i] for i, _ in places]
    found = family.sample(pipeline, texts, noise, steps=steps, guidance=guidance, context=context).float().cpu()
    made = []
    for (i, k), seed, latent, sample, stored in zip(places, seeds, latents, found, medium.stored(found), strict=True):
        if not sample.isfinite().all():
            raise RunError(
                f"{medium.one} {k} of prompt {i} is not finite; use float32 if the VAE overflows in a smaller type"
            )
        digest = hashlib.sha256(latent.numpy().astype("<f4").tobytes()).hexdigest()
        made.append(Generated(prompt_index=i, k=k, seed=seed, latent_sha256=digest, image=stored))
    return made


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
