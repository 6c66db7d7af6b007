"""One cell of the audio table: a run of one method on its own clips, and everything that is measured of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import audio_measures, method_measures, method_runs, online_measures, online_runs
from benchmarks.audio_measures import Ear, Waves
from benchmarks.method_runs import CACHE, digest, locked
from benchmarks.online_runs import OnlineCell
from diffalign.checkpoint import write_atomic
from diffalign.data.prepare import Encoders
from diffalign.models.load import ModelSource, detect_family, load_context, load_net, load_pipeline
from diffalign.models.load import load_scheduler_config as scheduler_of
from diffalign.settings import TrainConfig

RUNS = Path(__file__).parent / "audio"
"""Finished cells, one file each."""
TRIALS = CACHE / "audio-trials"
MODELS = ("tiny-audio",)


@dataclass(frozen=True, kw_only=True)
class AudioCell(OnlineCell):
    """One run of the table."""

    @property
    def root(self) -> Path:
        """Where cells of its table lie, or of its trial."""
        return RUNS if self.trial is None else TRIALS / self.trial

    def described(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {"config": self.without_folders(), "protocol": protocol(self.seed_of_prompts)}


def protocol(prompt_seed: int = method_measures.PROMPT_SEED) -> dict[str, Any]:
    """What is the same for all cells."""
    return {
        "captions": audio_measures.CAPTIONS,
        "prompts": audio_measures.PROMPTS,
        "prompt_seed": prompt_seed,
        "sampler_steps": audio_measures.SAMPLER_STEPS,
        "guidance": audio_measures.GUIDANCE,
        "reference": audio_measures.EXEMPLARS,
        "encoders": {name: audio_measures.encoder(name).version for name in (*audio_measures.ENCODERS, "per_clip")},
        "judges": audio_measures.JUDGES,
        "levels": list(method_measures.LEVELS),
    }


def base_file(model: str, prompt_seed: int = method_measures.PROMPT_SEED) -> Path:
    """Where the base model's numbers are kept."""
    return (RUNS if prompt_seed == method_measures.PROMPT_SEED else TRIALS) / model / "base.json"


def base_arrays(model: str, prompt_seed: int) -> dict[str, torch.Tensor]:
    """Clips of the base model, and latents of some, as `prepare_base` left them."""
    held = np.load(CACHE / model / f"base-{digest(protocol(prompt_seed))}.npz")
    return {"clips": torch.from_numpy(held["clips"]).float() / 2**15, "latents": torch.from_numpy(held["latents"])}


def prepare_base(source: ModelSource, model: str, prompt_seed: int) -> None:
    """Clips of the base model and their numbers, made once a model; and the reference clips."""
    wanted, file, folder = digest(protocol(prompt_seed)), base_file(model, prompt_seed), CACHE / model
    known, arrays = method_runs.read(file), folder / f"base-{wanted}.npz"
    if known is not None and known["digest"] == wanted and arrays.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    prompts, ear = audio_measures.captions(prompt_seed), Ear()
    clips = audio_measures.make_clips(source, prompts)
    latents = audio_measures.make_clips(source, prompts[: audio_measures.DRIFT_CLIPS], decoded=False)
    np.savez_compressed(arrays, clips=(clips * 2**15).round().short().numpy(), latents=latents.numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"digest": wanted, **_judged(ear, clips, prompts), "sets": ear.sets(clips)}) + "\n")


def run(cell: AudioCell) -> dict[str, Any]:
    """Trains and measures one cell, and writes its file."""
    with locked(cell.model):
        prepare_base(cell.settings().model, cell.model, cell.seed_of_prompts)

    def look(cfg: TrainConfig, result: Any) -> dict[str, Any]:
        ear = Ear()
        found = measure(cfg, cell.model, result.export, cell.seed_of_prompts, ear)
        return {"curve": online_measures.curve(result.folder, ear.look), **found}

    return online_runs.make(cell, place=placed, train=online_runs.training.run, look=look)


def placed(cfg: TrainConfig, folder: Path) -> TrainConfig:
    """The config with its run in a folder, and with the reference that is here."""
    online = cfg.online
    assert online is not None, "a run on own clips"
    if online.set_reference is not None:
        online = replace(online, set_reference=str(audio_measures.clips_folder()))
    specs = tuple(
        f"{spec.rpartition('@')[0]}@{audio_measures.reference_file('per_clip')}" if "@" in spec else spec
        for spec in online.rewards
    )
    return replace(cfg, output=str(folder), online=replace(online, rewards=specs))


def measure(cfg: TrainConfig, model: str, export: Path, prompt_seed: int, ear: Ear) -> dict[str, Any]:
    """Everything about the exported LoRA, loaded as a user would."""
    source, prompts, base = cfg.model, audio_measures.captions(prompt_seed), base_arrays(model, prompt_seed)
    family = detect_family(source)
    context = load_context(source, family, seconds=audio_measures.SECONDS)
    net = load_pipeline(replace(source, lora=str(export))).components[family.net]
    cond = Encoders(source, family, torch.device("cpu"), context=context).prompts(prompts[: len(base["latents"])])
    policy, start = (
        family.make_denoiser(n, scheduler_of(source), None, context) for n in (net, load_net(source, family).eval())
    )
    clips = audio_measures.make_clips(source, prompts, net=net)
    return {
        **_judged(ear, clips, prompts),
        "movement": {"prediction_drift": audio_measures.drift(policy, start, base["latents"], cond)},
        "sets": ear.set_changes(clips, base["clips"]),
    }


def _judged(ear: Ear, clips: Waves, prompts: tuple[str, ...]) -> dict[str, Any]:
    scores, attributes = ear.judge(clips, prompts)
    return {"scores": scores, "attributes": {name: float(np.mean(values)) for name, values in attributes.items()}}
