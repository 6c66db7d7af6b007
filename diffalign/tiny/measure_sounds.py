"""How good the tiny world's sound models are: the numbers of `assets/tiny/README.md`, measured from the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.data.prompts import read_prompts
from diffalign.denoisers import FAMILIES
from diffalign.denoisers.family import Context
from diffalign.models.load import ModelSource, load_context, load_pipeline
from diffalign.progress import over
from diffalign.rewards.clap import CLAPEncoder
from diffalign.tiny import hearing, pretrain_sounds, sounds
from diffalign.tiny.build_sounds import load_sound_vae
from diffalign.types import RewardBatch

FAMILY = FAMILIES["stable_audio_3"]
SECONDS = sounds.SAMPLES / sounds.RATE_HZ
STEPS, GUIDANCE = 10, 3.0
"""How the world's clips are sampled."""


def measure(out: Path) -> dict[str, Any]:
    """All numbers by part."""
    prompts = {
        "train": pretrain_sounds.draw_captions(256, seed=98, split="train"),
        "held_out": read_prompts(str(out / "sound-prompts.jsonl")).prompts,
    }
    base = {}
    for split, texts in prompts.items():
        made = sample(out / "audio", texts, seed=0)
        base[split] = heard(made, texts)
        base[split]["total_of_another_caption"] = heard(made, [*texts[1:], texts[0]])["total"]
    return {
        "autoencoder": autoencoder_quality(out),
        "clap": clap_quality(out),
        "audio": {"clips": len(prompts["held_out"]), "steps": STEPS, "guidance": GUIDANCE, **base},
    }


@torch.no_grad()
def autoencoder_quality(out: Path, count: int = 256) -> dict[str, Any]:
    """What the ear hears of exact held-out clips, and of what the autoencoder makes of them."""
    vae = load_sound_vae(out)
    clips = pretrain_sounds.draw(count, seed=96, split="held_out", care=None)
    waves = torch.from_numpy(clips.waves)[:, None]
    made = [vae(part).sample[:, 0].clamp(-1, 1) for part in over(waves.split(64), "reconstructing", -(-count // 64))]
    return {"clips": count, **heard(torch.cat(made), clips.captions), "clean": heard(waves[:, 0], clips.captions)}


def clap_quality(out: Path, count: int = 512) -> dict[str, float]:
    """Share of clips whose own caption is the nearest of 32 of other sounds, on held-out captions."""
    clips = pretrain_sounds.draw(count, seed=97, split="held_out", care=None)
    encoder = CLAPEncoder(str(out / "clap"), batch_size=64)
    batch = RewardBatch(audio=list(torch.from_numpy(clips.waves)[:, None]), sample_rate=sounds.RATE_HZ)
    near = encoder.embed(batch).rows @ encoder.embed_texts(clips.captions).T
    parsed = [sounds.parse(text) for text in clips.captions]
    hits = []
    for start in range(0, count, 32):
        some = near[start : start + 32, start : start + 32].argmax(1).tolist()
        hits += [parsed[start + found] == parsed[start + row] for row, found in enumerate(some)]
    return {"top1_of_32": float(np.mean(hits))}


def heard(waves: Float[Tensor, "n s"], captions: Sequence[str]) -> dict[str, Any]:
    """The share of clips whose attributes the ear names as the caption does, and the oracle's mean scores."""
    named, scores = [], []
    for wave, caption in zip(waves.double().numpy(), captions, strict=True):
        asked, found = sounds.parse(caption), hearing.measure(wave)
        nearest = found.nearest
        named.append([getattr(nearest, name, None) == getattr(asked, name) for name in hearing.ATTRIBUTES])
        scores.append(hearing.compare(found, asked))
    shares = np.mean(named, axis=0).round(4).tolist()
    means = {name: round(float(np.mean([row[name] for row in scores])), 4) for name in scores[0]}
    return {"named": dict(zip(hearing.ATTRIBUTES, shares, strict=True)), "scores": means, "total": means["total"]}


def context_of(folder: Path) -> Context:
    """Of clips of the world's length."""
    return load_context(ModelSource(path=str(folder)), FAMILY, seconds=SECONDS)


def sample(
    folder: Path, prompts: Sequence[str], *, seed: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> Float[Tensor, "n s"]:
    """Clips by the base model, one a prompt, by the pipeline's own sampler."""
    pipeline, context = load_pipeline(ModelSource(path=str(folder))), context_of(folder)
    FAMILY.use_sampler(pipeline)
    assert context.latents is not None  # clips have a length
    noise = torch.randn(len(prompts), *context.latents, generator=torch.Generator().manual_seed(seed))
    made = []
    for start in over(range(0, len(prompts), 32), f"sampling {folder.name}", -(-len(prompts) // 32)):
        some = slice(start, start + 32)
        made.append(
            FAMILY.sample(pipeline, prompts[some], noise[some], steps=steps, guidance=guidance, context=context)[:, 0]
        )
    return torch.cat(made)
