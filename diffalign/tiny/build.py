"""Makes the tiny world from seeds: `python -m diffalign.tiny build` writes everything that lies in `assets/tiny/`.

A stage whose result is there is not made again.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.tiny import build_sounds, pretrain, scenes, sounds
from diffalign.tiny.pretrain import CATALOGUE, CLIP_MEAN, CLIP_STD, PAINTER

BASES = ("sd", "sd3")
"""Base models, by folder and family."""
STEPS, GUIDANCE = 20, 2.0
"""How the world's images are sampled."""
PAIRS, IMAGES_PER_PAIR = 1500, 4
"""Preference pairs a base model, and the images among which each is chosen."""


def build(out: Path, only: str | None = None) -> None:
    """Makes the stages that are missing under `out`, or the one named `only`."""
    for name, (made, make) in STAGES.items():
        if only in (None, name) and not (out / made).exists():
            make(out)


def make_vae(out: Path) -> None:
    vae = pretrain.train_vae(pretrain.draw(12000, seed=11, split="train", care=PAINTER))
    vae.register_to_config(scaling_factor=1.0)
    unit = pretrain.encode(vae, pretrain.draw(2000, seed=12, split="train", care=PAINTER), torch.zeros(0, 1).long())
    spread = (unit.mean**2 + unit.std**2).mean() - unit.mean.mean() ** 2
    vae.register_to_config(scaling_factor=round(float(spread**-0.5), 4), shift_factor=0.0)
    vae.half().save_pretrained(out / "sd" / "vae")


def make_clip(out: Path) -> None:
    from transformers import CLIPImageProcessorPil

    pictures = pretrain.draw(30000, seed=21, split="train", care=CATALOGUE)
    tokenizer = pretrain.make_tokenizer(pictures.captions)
    clip = pretrain.train_clip(pictures, tokenizer)
    side = {"height": scenes.SIDE, "width": scenes.SIDE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": scenes.SIDE}, crop_size=side, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    for part in (clip, tokenizer, processor):
        part.save_pretrained(out / "clip")


def make_sd(out: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    vae, clip, tokenizer = load_vae(out), *load_clip(out)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    unet, text = pretrain.train_unet(painted_latents(vae, tokenizer), clip, scheduler, lesson=1500, steps=5000)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out / "sd")
    forget_paths(out / "sd")


def make_sd3(out: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    vae, clip, tokenizer = load_vae(out), *load_clip(out)
    net, learned = pretrain.train_transformer(painted_latents(vae, tokenizer), clip, steps=4000)
    pipeline = StableDiffusion3Pipeline(
        vae=vae.half(),
        text_encoder=pretrain._text_encoder(clip, projected=True).eval(),
        tokenizer=tokenizer,
        text_encoder_2=learned,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=net.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.save_pretrained(out / "sd3")
    forget_paths(out / "sd3")


def make_aesthetic(out: Path) -> None:
    from safetensors.torch import save_file

    from diffalign.tiny.aesthetic import train_head

    clip, _ = load_clip(out)
    folder = out / "aesthetic"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in train_head(clip).state_dict().items()}, folder / "head.safetensors")
    (folder / "config.json").write_text(json.dumps({"encoder": "tiny-clip"}, indent=1) + "\n")


def make_prompts(out: Path) -> None:
    """256 distinct held-out captions to judge by, and 512 to train on, labelled by how many things they ask for."""
    _write_prompts(out / "prompts.jsonl", "held_out", 256, seed=51)
    _write_prompts(out / "train-prompts.jsonl", "train", 512, seed=52)


def make_sound_prompts(out: Path) -> None:
    """256 distinct held-out captions of sounds, and 512 to train on, labelled by how many notes they ask for."""
    _write_sound_prompts(out / "sound-prompts.jsonl", "held_out", 256, seed=53)
    _write_sound_prompts(out / "sound-train-prompts.jsonl", "train", 512, seed=54)


def _write_sound_prompts(file: Path, split: sounds.Split, count: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        sound = sounds.draw_sound(rng, split)
        notes = sound.rhythm.partition(" ")[0]
        found[sounds.caption(sound, rng)] = "one note" if notes == "one" else f"{notes} notes"
    _write_captions(file, found)


def _write_prompts(file: Path, split: scenes.Split, count: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found: dict[str, str] = {}
    words = {1: "one thing", 2: "two things", 3: "three things"}
    while len(found) < count:
        scene = scenes.draw_scene(rng, split)
        found[scenes.caption(scene, rng)] = words[len(scene.things)]
    _write_captions(file, found)


def _write_captions(file: Path, found: dict[str, str]) -> None:
    """A line for each caption and its category."""
    lines = [json.dumps({"prompt": prompt, "category": category}) for prompt, category in found.items()]
    file.write_text("\n".join(lines) + "\n")


def make_preferences(out: Path, family: str) -> None:
    from diffalign.data.cards import card_file
    from diffalign.data.pairs import PairReader
    from diffalign.data.rewrite import score_pairs
    from diffalign.data.sources import PairSource
    from diffalign.rewards.clip import CLIPReward
    from diffalign.tiny import measure, preferences

    captions = preferences.training_captions(PAIRS, seed=61)
    images = measure.sample(out / family, family, captions, per_prompt=IMAGES_PER_PAIR)
    rows = preferences.make_rows(captions, images, model=f"tiny-{family}", person=preferences.Person(), seed=62)
    file = out / "preferences" / f"{family}.parquet"
    with tempfile.TemporaryDirectory() as place:
        unscored = Path(place) / "pairs.parquet"
        preferences.write_rows(rows, unscored)
        file.parent.mkdir(parents=True, exist_ok=True)
        score_pairs(PairReader(PairSource(path=str(unscored))), CLIPReward(model=str(out / "clip")), file)
    card = {"labels": "oracle", "scores": "clip:tiny-clip"}
    card_file(file).write_text(json.dumps(card) + "\n", encoding="utf-8")


def make_measurements(out: Path) -> None:
    from diffalign.tiny import measure

    (out / "measured.json").write_text(json.dumps(measure.measure(out), indent=1) + "\n")


def make_sound_measurements(out: Path) -> None:
    from diffalign.tiny.audition import measure_hearing

    (out / "sounds-measured.json").write_text(json.dumps(measure_hearing(), indent=1) + "\n")


def forget_paths(folder: Path) -> None:
    """Takes out of a pipeline's configs where its parts were read from, which is nobody else's path."""
    for file in folder.glob("*/config.json"):
        table = json.loads(file.read_text())
        table.pop("_name_or_path", None)
        file.write_text(json.dumps(table, indent=2) + "\n")


def load_vae(out: Path) -> Any:
    """The tiny VAE in float32."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(out / "sd" / "vae", torch_dtype=torch.float32).eval()


def load_clip(out: Path) -> tuple[Any, Any]:
    """(tiny-clip, its tokenizer)."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(out / "clip").eval(), CLIPTokenizer.from_pretrained(out / "clip")


def painted_latents(vae: Any, tokenizer: Any) -> pretrain.Latents:
    """What the base models learn from: 40,000 careless pictures of training captions."""
    pictures = pretrain.draw(40000, seed=31, split="train", care=PAINTER)
    return pretrain.encode(vae, pictures, pretrain.tokenize(tokenizer, pictures.captions))


STAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "vae": ("sd/vae/config.json", make_vae),
    "clip": ("clip/config.json", make_clip),
    "aesthetic": ("aesthetic/config.json", make_aesthetic),
    "sd": ("sd/model_index.json", make_sd),
    "sd3": ("sd3/model_index.json", make_sd3),
    "prompts": ("prompts.jsonl", make_prompts),
    "sound-prompts": ("sound-prompts.jsonl", make_sound_prompts),
    "sound-vae": ("audio/vae/config.json", build_sounds.make_sound_vae),
    "clap": ("clap/config.json", build_sounds.make_clap),
    "audio": ("audio/model_index.json", build_sounds.make_audio),
    "sd-pairs": ("preferences/sd.parquet", partial(make_preferences, family="sd")),
    "sd3-pairs": ("preferences/sd3.parquet", partial(make_preferences, family="sd3")),
    "measurements": ("measured.json", make_measurements),
    "sound-measurements": ("sounds-measured.json", make_sound_measurements),
    "sound-model-measurements": ("sound-models-measured.json", build_sounds.make_sound_model_measurements),
}
