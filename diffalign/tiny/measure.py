"""How good the tiny world is: every number of `assets/tiny/README.md`, measured from the files themselves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.data.prompts import read_prompts
from diffalign.denoisers import FAMILIES
from diffalign.evaluate.generate import generate
from diffalign.models.load import ModelSource, load_pipeline
from diffalign.progress import over
from diffalign.tiny import aesthetic, oracle, preferences, pretrain, scenes
from diffalign.tiny.build import BASES, GUIDANCE, STEPS, load_clip, load_vae


def measure(out: Path) -> dict[str, Any]:
    """All numbers by part."""
    found: dict[str, Any] = {"oracle_on_renders": renders_score(), "vae": vae_quality(out), "clip": clip_quality(out)}
    found["aesthetic"] = {"correlation": aesthetic_quality(out)}
    for name in BASES:
        found[name] = {split: base_score(out / name, name, texts) for split, texts in _prompts(out).items()}
        found[f"{name}-pairs"] = preferences.agreement(preferences.read_rows(out / "preferences" / f"{name}.parquet"))
    return found


def renders_score(count: int = 500) -> float:
    """The oracle's mean total on exact renders: its ceiling."""
    rng = np.random.default_rng(91)
    totals = []
    for _ in range(count):
        scene = scenes.draw_scene(rng, "held_out")
        pixels = np.asarray(scenes.render(scene)) / 255
        totals.append(oracle.judge(pixels, scenes.caption(scene, rng))["total"])
    return float(np.mean(totals))


@torch.no_grad()
def vae_quality(out: Path, count: int = 500) -> dict[str, float]:
    """PSNR of reconstructions, the oracle's total on them, and the share of colours that stay nearest to their name."""
    vae = load_vae(out)
    pictures = pretrain.draw(count, seed=92, split="held_out", care=None)
    psnr, totals, kept = [], [], []
    for rows in torch.arange(count).split(64):
        x = pictures.batch(rows)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(-10 * ((y - x) / 2).square().mean((1, 2, 3)).log10())
        for row, image in zip(rows.tolist(), (y.permute(0, 2, 3, 1).numpy() + 1) / 2, strict=True):
            scene = scenes.parse(pictures.captions[row])
            totals.append(oracle.judge(image, pictures.captions[row])["total"])
            kept += _colours_kept(image, scene)
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "oracle": float(np.mean(totals)),
        "colours_kept": float(np.mean(kept)),
    }


@torch.no_grad()
def clip_quality(out: Path, count: int = 1024) -> dict[str, float]:
    """Share of pictures whose own caption is the nearest of 32, on held-out captions."""
    clip, tokenizer = load_clip(out)
    pictures = pretrain.draw(count, seed=93, split="held_out", care=pretrain.CATALOGUE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pretrain.CLIP_MEAN, pretrain.CLIP_STD))
    ids = pretrain.tokenize(tokenizer, pictures.captions)
    hits = []
    for rows in torch.arange(count).split(32):
        seen = clip(input_ids=ids[rows], pixel_values=((pictures.batch(rows) + 1) / 2 - mean) / std)
        near = (seen.image_embeds @ seen.text_embeds.T).argmax(1)
        hits.append((near == torch.arange(len(rows))).float().mean())
    return {"top1_of_32": float(torch.stack(hits).mean())}


@torch.no_grad()
def aesthetic_quality(out: Path) -> float:
    """Correlation of the head's scores with the true ratings, on pictures that it did not learn from."""
    from safetensors.torch import load_file

    clip, _ = load_clip(out)
    embeddings, ratings = aesthetic.rated_embeddings(clip, 1000, seed=94)
    head = aesthetic.Head(embeddings.shape[1]).eval()
    head.load_state_dict(load_file(out / "aesthetic" / "head.safetensors"))
    return float(torch.corrcoef(torch.stack([head(embeddings), ratings.float()]))[0, 1])


def base_score(folder: Path, family: str, prompts: Sequence[str]) -> dict[str, float]:
    """The oracle's mean per attribute on a base model's samples, one image a prompt."""
    images = sample(folder, family, prompts, per_prompt=1)[:, 0]
    scores = [oracle.judge(image, text) for image, text in zip(images, prompts, strict=True)]
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


def sample(folder: Path, family: str, prompts: Sequence[str], *, per_prompt: int) -> Float[np.ndarray, "n k h w 3"]:
    """Images in [0, 1] by a base model at the world's own sampling settings."""
    pipeline = load_pipeline(ModelSource(path=str(folder)))
    made = generate(
        pipeline,
        FAMILIES[family],
        prompts,
        images_per_prompt=per_prompt,
        steps=STEPS,
        guidance=GUIDANCE,
        batch_size=64,
    )
    total = len(prompts) * per_prompt
    flat = [_pixels(one.image) for one in over(made, f"sampling {folder.name}", total)]
    return np.stack(flat).reshape(len(prompts), per_prompt, scenes.SIDE, scenes.SIDE, 3)


def _pixels(image: Float[Tensor, "3 h w"]) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _prompts(out: Path) -> dict[str, list[str]]:
    return {
        "train": preferences.training_captions(256, seed=95),
        "held_out": read_prompts(str(out / "prompts.jsonl")).prompts,
    }


def _colours_kept(image: np.ndarray, scene: scenes.Scene) -> list[bool]:
    """For the background and every thing: is the colour that is there still nearest to its own name?"""
    background, blobs = oracle.measure(image)
    kept = [oracle.nearest_colour(background) == scene.background]
    for thing in scene.things:
        x, y = scenes.PLACES[thing.place]
        near = min(blobs, key=lambda b: (b.x - x) ** 2 + (b.y - y) ** 2, default=None)
        kept.append(near is not None and oracle.nearest_colour(near.colour) == thing.colour)
    return kept
