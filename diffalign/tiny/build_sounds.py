"""Makes the tiny world's sound models; the stages `sound-vae`, `clap`, `audio` and what is measured of them."""

import json
from pathlib import Path
from typing import Any

import torch

from diffalign.tiny import pretrain_sounds


def make_sound_vae(out: Path) -> None:
    clips, code = learned_code()
    vae = pretrain_sounds.train_autoencoder(clips, code)
    vae.half().save_pretrained(out / "audio" / "vae")


def make_clap(out: Path) -> None:
    clips = pretrain_sounds.draw(4000, seed=73, split="train", care=None)
    tokenizer, extractor = pretrain_sounds.make_roberta_tokenizer(clips.captions), pretrain_sounds.make_extractor()
    clap = pretrain_sounds.train_clap(clips, tokenizer, extractor)
    for part in (clap, tokenizer, extractor):
        part.save_pretrained(out / "clap")


def make_audio(out: Path) -> None:
    _, code = learned_code()
    clips = pretrain_sounds.draw(12000, seed=75, split="train", care=pretrain_sounds.PLAYER)
    tokenizer = pretrain_sounds.make_gemma_tokenizer(clips.captions)
    waves = torch.from_numpy(clips.waves)
    values = torch.cat([code.of(waves[i : i + 64]) for i in range(0, len(waves), 64)])
    latents = pretrain_sounds.Latents(values, *pretrain_sounds.tokenize(tokenizer, clips.captions))
    save_pipeline(out, tokenizer, *pretrain_sounds.train_transformer(latents, len(tokenizer)))


def save_pipeline(out: Path, tokenizer: Any, net: Any, text: Any, length: Any) -> None:
    """Writes the parts as a `StableAudio3Pipeline`, beside the autoencoder that is there."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableAudio3Pipeline

    from diffalign.tiny.build import forget_paths

    pipeline = StableAudio3Pipeline(
        vae=load_sound_vae(out).half(),
        text_encoder=text,
        tokenizer=tokenizer,
        duration_embedder=length,
        transformer=net.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )
    pipeline.save_pretrained(out / "audio")
    forget_paths(out / "audio")


def make_sound_model_measurements(out: Path) -> None:
    from diffalign.tiny.measure_sounds import measure

    (out / "sound-models-measured.json").write_text(json.dumps(measure(out), indent=1) + "\n")


def learned_code() -> tuple[pretrain_sounds.Clips, pretrain_sounds.Code]:
    """(the exact clips that the autoencoder learns from, the code that says most of them)."""
    clips = pretrain_sounds.draw(3000, seed=71, split="train", care=None)
    return clips, pretrain_sounds.make_code(clips)


def load_sound_vae(out: Path) -> Any:
    """The tiny sound autoencoder in float32."""
    from diffusers import AutoencoderSAME

    return AutoencoderSAME.from_pretrained(out / "audio" / "vae", torch_dtype=torch.float32).eval()
