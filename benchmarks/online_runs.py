"""One cell of the online table: a run of one method on its own images, and everything that is measured of it.

All runs start from the same weights and see the same training captions; their configs say how many images they make.
Where people judge, the oracle takes their place: it looks at the images of a round that waits, and writes their label
file.
"""

import importlib
import json
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import method_measures, method_runs, online_measures
from benchmarks.method_runs import CACHE, Planned, clocks, digest, locked
from benchmarks.scene_pictures import draw_pictures
from diffalign import rewards
from diffalign.checkpoint import write_atomic
from diffalign.config import dump, load
from diffalign.environment import describe
from diffalign.errors import RunError
from diffalign.evaluate.score import read_image
from diffalign.models.load import (
    ModelSource,
    detect_family,
    load_context,
    load_net,
    load_pipeline,
    load_scheduler_config,
)
from diffalign.settings import TrainConfig
from diffalign.shipped import configs
from diffalign.types import RewardBatch

training: Any = importlib.import_module("diffalign.train")  # the package's own name `train` is the function

RUNS = Path(__file__).parent / "online"
"""Finished cells, one file each."""
TRIALS = CACHE / "online-trials"
PICTURES = CACHE / "pictures"
"""The reference of rewards of sets."""
GUIDANCE = 1.0
"""Of all images: models draw as they were trained, without guidance. With it the base model is already much better."""
GRADES = 10
"""The oracle grades as people do, in whole numbers: its score in [0, 1] times this."""


@dataclass(frozen=True, kw_only=True)
class OnlineRow:
    """One line of the table: which config, and what it is trained on."""

    name: str
    config: str
    """End of the config's name: `tiny_sd_<config>` and `tiny_sd3_<config>`."""
    reward: str = "clip"
    """Which of the measured numbers training raises, or lowers where it is a distance."""
    people: bool = False
    """Labels come by the label file."""
    changes: tuple[str, ...] = ()
    """`section.key=value`, for all models."""
    tried: dict[str, str] = field(default_factory=dict)
    """By model, what was tried where the row does not do what it should."""


@dataclass(frozen=True, kw_only=True)
class OnlineCell:
    """One run of the table."""

    model: str
    row: OnlineRow
    seed: int
    trial: str | None = None
    """Name of a trial, which is kept apart from the table."""
    changes: tuple[str, ...] = ()
    """Of a trial."""

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def root(self) -> Path:
        """Where cells of its table lie, or of its trial."""
        return RUNS if self.trial is None else TRIALS / self.trial

    @property
    def file(self) -> Path:
        return self.root / self.model / f"{self.row.name}-{self.seed}.json"

    @property
    def seed_of_prompts(self) -> int:
        """Trials have captions of their own."""
        return method_measures.PROMPT_SEED if self.trial is None else method_measures.TRIAL_SEED

    @property
    def config(self) -> str:
        return f"{self.model.replace('-', '_')}_{self.row.config}"

    def exists(self) -> bool:
        """Whether the model has a config of the row."""
        return (configs() / f"{self.config}.toml").is_file()

    def settings(self) -> TrainConfig:
        """The config of the run; its folders are filled in when it starts."""
        return load(self.config, [f"seed={self.seed}", "train.device=cpu", *self.row.changes, *self.changes])

    def without_folders(self) -> dict[str, Any]:
        """The config as a table."""
        table = dump(self.settings())
        table["data"].pop("cache")
        del table["output"]
        return table

    def described(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        labels = f"the oracle's, 0 to {GRADES}" if self.row.people else "none"
        return {"config": self.without_folders(), "labels": labels, "protocol": protocol(self.seed_of_prompts)}


def protocol(prompt_seed: int = method_measures.PROMPT_SEED) -> dict[str, Any]:
    """What is the same for all cells."""
    same = {**method_runs.protocol(prompt_seed), "guidance": GUIDANCE}
    return {**same, "judges": online_measures.SCORED, "sets": "tiny-clip, true pictures"}


def base_file(model: str, prompt_seed: int = method_measures.PROMPT_SEED) -> Path:
    """Where the base model's scores are kept."""
    return (RUNS if prompt_seed == method_measures.PROMPT_SEED else TRIALS) / model / "base.json"


def base_images(model: str, prompt_seed: int) -> method_measures.Images:
    """What the base model drew of the captions, as `prepare_base` left it."""
    return np.load(_images_file(model, prompt_seed))["images"]


def _images_file(model: str, prompt_seed: int) -> Path:
    return CACHE / model / f"online-base-{digest(protocol(prompt_seed))}.npz"


def prepare_base(model: str, prompt_seed: int) -> None:
    """Images of the base model, their scores, held-out pairs and true pictures, made once a model."""
    method_runs.prepare_base(model, prompt_seed)
    draw_pictures(PICTURES)
    wanted, file = digest(protocol(prompt_seed)), base_file(model, prompt_seed)
    known = method_runs.read(file)
    if known is not None and known["digest"] == wanted and _images_file(model, prompt_seed).is_file():
        return
    prompts = method_measures.captions(prompt_seed)
    images = method_measures.make_images(ModelSource(path=model), prompts, guidance=GUIDANCE)
    scores, attributes = online_measures.judge(images, prompts)
    embedded = method_measures.embed(images)
    numbers = online_measures.set_numbers(online_measures.reference(PICTURES))
    found = {
        "digest": wanted,
        "scores": scores,
        "attributes": {name: float(np.mean(values)) for name, values in attributes.items()},
        "sets": {name: number(embedded) for name, number in numbers.items()},
    }
    np.savez_compressed(_images_file(model, prompt_seed), images=images)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(found) + "\n")


def run(cell: OnlineCell) -> dict[str, Any]:
    """Trains and measures one cell, and writes its file."""
    with locked(cell.model):
        prepare_base(cell.model, cell.seed_of_prompts)

    def look(cfg: TrainConfig, result: Any) -> dict[str, Any]:
        found = measure(cfg, result.export, cell.seed_of_prompts)
        return {"curve": online_measures.curve(result.folder), **found}

    return make(cell, place=placed, train=play if cell.row.people else training.run, look=look)


def make(
    cell: Planned,
    *,
    place: Callable[[TrainConfig, Path], TrainConfig],
    train: Callable[[TrainConfig], Any],
    look: Callable[[TrainConfig, Any], dict[str, Any]],
) -> dict[str, Any]:
    """Trains and measures a cell of any table of runs on own samples, and writes its file.

    Args:
        place: (config, folder) -> the config with its run in the folder, and with what is on this machine.
        train: Config -> what the finished run leaves.
        look: (config, that) -> what is measured of it.
    """
    began = clocks()
    with tempfile.TemporaryDirectory() as folder:
        cfg = place(cell.settings(), Path(folder) / "run")
        result = train(cfg)
        wall, cpu = clocks() - began
        record = {
            "model": cell.model,
            "row": cell.name,
            "seed": cell.seed,
            "digest": digest(cell.described()),
            "described": cell.described(),
            "environment": describe(torch.device("cpu")),
            "cost": {
                "seconds": round(wall, 2),
                "cpu_seconds": round(cpu, 2),
                "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                **online_measures.seconds(result.folder),
            },
            **look(cfg, result),
        }
    record["seconds_in_all"], record["cpu_seconds_in_all"] = (clocks() - began).round(1).tolist()
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(cell.file, json.dumps(record) + "\n")
    return record


def placed(cfg: TrainConfig, folder: Path) -> TrainConfig:
    """The config with its run in a folder, and with the pictures that are here."""
    assert cfg.online is not None, "a run on own images"
    here = None if cfg.online.set_reference is None else str(PICTURES)
    return replace(cfg, output=str(folder), online=replace(cfg.online, set_reference=here))


def play(cfg: TrainConfig) -> Any:
    """A run that asks people round by round, with the oracle's labels; returns what the finished run leaves."""
    while True:
        try:
            return training.run(cfg)
        except RunError as error:
            waiting = [p for p in Path(cfg.output).glob("rounds/round-*") if awaits_labels(p)]
            if "waits for people" not in str(error) or not waiting:
                raise
            for folder in waiting:
                label(folder)
            cfg = replace(cfg, resume="latest")


def awaits_labels(folder: Path) -> bool:
    """Whether a round has a template of labels and no labels."""
    return (folder / "labels-template.jsonl").is_file() and not (folder / "labels.jsonl").is_file()


def label(folder: Path) -> None:
    """Writes the oracle's grades of a round's images, as a person would."""
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    images = torch.stack([read_image(folder / entry["image"]) for entry in entries])
    batch = RewardBatch(images=images, prompts=[entry["prompt"] for entry in entries])
    grades = (rewards.load("oracle").score(batch).scores * GRADES).round().int().tolist()
    rows = [{"id": e["id"], "label": g, "annotator": "oracle"} for e, g in zip(entries, grades, strict=True)]
    write_atomic(folder / "labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def measure(cfg: TrainConfig, export: Path, prompt_seed: int) -> dict[str, Any]:
    """Everything about the exported LoRA, loaded as a user would."""
    source, model = cfg.model, cfg.model.path
    prompts, family = method_measures.captions(prompt_seed), detect_family(source)
    net = load_pipeline(replace(source, lora=str(export))).components[family.net]
    told, schedule = load_context(source, family), load_scheduler_config(source)
    policy, base = (family.make_denoiser(n, schedule, None, told) for n in (net, load_net(source, family).eval()))
    held = method_measures.pair_batch(load_file(CACHE / model / "pairs.safetensors"))
    moved = method_measures.movement(policy, base, held)
    images = method_measures.make_images(source, prompts, net=net, guidance=GUIDANCE)
    before = base_images(model, prompt_seed)
    scores, attributes = online_measures.judge(images, prompts)
    numbers = online_measures.set_numbers(online_measures.reference(PICTURES))
    embedded = method_measures.embed(images)
    return {
        "scores": scores,
        "attributes": {name: float(np.mean(values)) for name, values in attributes.items()},
        "movement": moved,
        "pixel_distance": method_measures.pixel_distance(images, before),
        "cosine_distance": method_measures.diversity(embedded)["cosine_distance"],
        "sets": online_measures.set_changes(embedded, method_measures.embed(before), numbers),
    }
