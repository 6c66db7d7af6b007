"""One cell of the method table: a training run of one method, model and seed, and everything that is measured of it.

All methods get the same number of updates and of pairs an update, the same held-out pairs and captions, and start from
the same weights. Learning rate, beta and what else a method has are its config's.
"""

import fcntl
import hashlib
import importlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import method_measures as measures
from benchmarks.shuffled_labels import shuffle_labels
from benchmarks.step import peak_of
from diffalign.assemble import Parts, assemble, claim_folder
from diffalign.checkpoint import write_atomic
from diffalign.config import dump, load, parse
from diffalign.data.batches import Collator
from diffalign.data.cache import Share
from diffalign.data.prepare import vae_scale
from diffalign.environment import describe
from diffalign.errors import InputError
from diffalign.logbook import Logbook
from diffalign.models.load import detect_family, load_net
from diffalign.placing import make_accelerator
from diffalign.rows import prepare_rows
from diffalign.settings import TrainConfig
from diffalign.shipped import DATASETS, assets, configs
from diffalign.tiny.build import GUIDANCE

training: Any = importlib.import_module("diffalign.train")  # the package's own name `train` is the function

STEPS = 150
"""Updates of every run."""
BATCH = 32
"""Pairs an update: 32 winners for a method that takes winners alone, 64 images for one that takes images singly."""
HELD_OUT = 0.06
"""Share of the prompts that no method trains on; their first pairs are measured."""
VALIDATION_PAIRS = 8
"""Of the run's own validation; errors are measured apart, on more pairs and in the same way for all."""
COIN = 0
"""Seed of the labels drawn by lot."""

HERE = Path(__file__).parent
RUNS = HERE / "methods"
"""Finished cells, one file each."""
CACHE = HERE / ".cache"
MODELS = {"tiny-sd": "tiny_sd", "tiny-sd3": "tiny_sd3"}
"""Start of a config's name, by model."""


class Planned(Protocol):
    """A cell of any table, as far as making it asks."""

    @property
    def model(self) -> str: ...

    @property
    def name(self) -> str:
        """Of its row."""
        ...

    @property
    def seed(self) -> int: ...

    @property
    def trial(self) -> str | None: ...

    @property
    def changes(self) -> tuple[str, ...]: ...

    @property
    def file(self) -> Path: ...

    def exists(self) -> bool:
        """Whether the model has a config of the row."""
        ...

    def settings(self) -> TrainConfig:
        """The config of the run, before its folders are filled in."""
        ...

    def described(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: which config, and what is changed in it."""

    name: str
    config: str
    """End of the config's name: `tiny_sd_<config>` and `tiny_sd3_<config>`."""
    changes: tuple[str, ...] = ()
    """`section.key=value`, for all models."""
    by_lot: bool = False
    """Whether labels are drawn by lot."""
    control: bool = False
    tried: dict[str, str] = field(default_factory=dict)
    """By model, what was tried where the row does not beat the base model."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of the table."""

    model: str
    row: Row
    seed: int
    trial: str | None = None
    """Name of a trial, which is kept apart from the table."""
    changes: tuple[str, ...] = ()
    """Of a trial."""

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def file(self) -> Path:
        root = RUNS if self.trial is None else CACHE / "trials" / self.trial
        return root / self.model / f"{self.row.name}-{self.seed}.json"

    @property
    def seed_of_prompts(self) -> int:
        """Trials have captions of their own."""
        return measures.PROMPT_SEED if self.trial is None else measures.TRIAL_SEED

    @property
    def config(self) -> str:
        return f"{MODELS[self.model]}_{self.row.config}"

    def exists(self) -> bool:
        """Whether the model has a config of the method."""
        return (configs() / f"{self.config}.toml").is_file()

    def settings(self) -> TrainConfig:
        """The resolved config of the run; its folders are filled in when it starts."""
        fixed = [
            f"seed={self.seed}",
            f"train.steps={STEPS}",
            f"train.batch_size={BATCH}",
            "train.device=cpu",
            f"validation.every={STEPS}",
            f"validation.fraction={HELD_OUT}",
            f"validation.pairs={VALIDATION_PAIRS}",
            f"checkpoint.every={STEPS}",
        ]
        cfg = load(self.config, [*fixed, *self.row.changes, *self.changes])
        singly = cfg.method.needs.data == "labelled"
        return replace(cfg, train=replace(cfg.train, batch_size=2 * cfg.train.batch_size)) if singly else cfg

    def described(self) -> dict[str, Any]:
        """Everything that the result depends on, as a table, without folders."""
        table = dump(self.settings())
        table["data"].pop("cache")
        del table["output"]
        labels = f"by lot, {COIN}" if self.row.by_lot else "true"
        return {"config": table, "labels": labels, "protocol": protocol(self.seed_of_prompts)}


def protocol(prompt_seed: int = measures.PROMPT_SEED) -> dict[str, Any]:
    """What is the same for all cells."""
    return {
        "prompts": measures.PROMPTS,
        "prompt_seed": prompt_seed,
        "sampler_steps": measures.SAMPLER_STEPS,
        "guidance": GUIDANCE,
        "judges": measures.JUDGES,
        "error_pairs": measures.ERROR_PAIRS,
        "levels": list(measures.LEVELS),
    }


def digest(table: Any) -> str:
    """A short hash of a table, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def is_current(cell: Planned, record: dict[str, Any]) -> bool:
    """Whether a finished cell is one of the config as it is now; keys that came later had their default then."""
    held = record["described"]
    try:
        then = dump(parse({**held["config"], "output": "-"}))
    except InputError:  # a key that is no more
        return False
    then["data"].pop("cache")
    del then["output"]
    return {**held, "config": then} == cell.described()


def read(file: Path) -> dict[str, Any] | None:
    """What a finished cell or a base model's file says, None where there is none."""
    return json.loads(file.read_text()) if file.is_file() else None


def base_file(model: str, prompt_seed: int = measures.PROMPT_SEED) -> Path:
    """Where the base model's scores are kept."""
    return (RUNS if prompt_seed == measures.PROMPT_SEED else CACHE / "trials") / model / "base.json"


def prepare_base(model: str, prompt_seed: int) -> None:
    """Images of the base model, their scores, and the held-out pairs, made once a model."""
    wanted, folder = digest(protocol(prompt_seed)), CACHE / model
    file = base_file(model, prompt_seed)
    known = read(file)
    if known is not None and known["digest"] == wanted and (folder / f"base-{wanted}.npz").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    cfg = load(f"{MODELS[model]}_diffusion_dpo", [f"validation.pairs={measures.ERROR_PAIRS}", "train.device=cpu"])
    cfg = replace(cfg, validation=replace(cfg.validation, fraction=HELD_OUT), data=_cached(cfg, model))
    batch = held_out_pairs(cfg)
    save_file({k: v.contiguous() for k, v in measures.pair_tensors(batch).items()}, folder / "pairs.safetensors")
    prompts = measures.captions(prompt_seed)
    images = measures.make_images(cfg.model, prompts)
    scores, attributes = measures.judge(images, prompts)
    found = {
        "digest": wanted,
        "scores": scores,
        "attributes": {name: float(np.mean(values)) for name, values in attributes.items()},
        "diversity": measures.diversity(measures.embed(images)),
    }
    np.savez_compressed(folder / f"base-{wanted}.npz", images=images)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(found) + "\n")


def held_out_pairs(cfg: TrainConfig) -> Any:
    """The first held-out pairs of a run, by the mean of the VAE's posterior and with their prompts."""
    family = detect_family(cfg.model)
    accelerator = make_accelerator(cfg)
    _, held, _ = prepare_rows(cfg, family, Path(cfg.output), Share(), accelerator)
    assert held is not None, "a run of the table holds out pairs"
    collator = Collator(rows=held, kind="pairs", scale=vae_scale(cfg.model), seed=0, latents="mean")
    rows = range(measures.ERROR_PAIRS)
    return collator.batch(rows, rows)


def run(cell: Cell) -> dict[str, Any]:
    """Trains and measures one cell, and writes its file."""
    with locked(cell.model):
        prepare_base(cell.model, cell.seed_of_prompts)
    began = clocks()
    with tempfile.TemporaryDirectory() as place:
        cfg = replace(cell.settings(), output=f"{place}/run")
        with locked(cell.model):
            cfg = replace(cfg, data=_data(cfg, cell))
            parts = assemble(cfg)
        cost = train(parts)
        record = {
            "model": cell.model,
            "row": cell.row.name,
            "seed": cell.seed,
            "digest": digest(cell.described()),
            "described": cell.described(),
            "environment": describe(torch.device("cpu")),
            "cost": cost,
            **measure(parts, cell),
        }
    record["seconds_in_all"], record["cpu_seconds_in_all"] = (clocks() - began).round(1).tolist()
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(cell.file, json.dumps(record) + "\n")
    return record


def train(parts: Parts) -> dict[str, Any]:
    """A run as `diffalign train` makes it; returns what it cost, validations left out.

    The first update is profiled, which memory is read from, and timed with it. CPU seconds are those of one core where
    torch has one thread, whatever else the machine does.
    """
    claim_folder(parts)
    parts.accelerator.init_trackers("diffalign")
    peak: list[int] = []
    aside: list[np.ndarray] = []
    with measures.counting(parts.net, measures.ENDS[parts.family.name]) as work:
        look, fit = training.look, training.fit

        def quietly(*inputs: Any, **options: Any) -> Any:
            work.paused, before = True, clocks()
            try:
                return look(*inputs, **options)
            finally:
                work.paused = False
                aside.append(clocks() - before)

        def profiled(*inputs: Any, **options: Any) -> Iterator[Any]:
            reports = fit(*inputs, **options)
            if not peak:
                first: list[Any] = []
                peak.append(peak_of(lambda: first.append(next(reports)), torch.device("cpu")))
                yield from first
            yield from reports

        began = clocks()
        with (
            patch.object(training, "look", quietly),
            patch.object(training, "fit", profiled),
            Logbook(parts.folder / "metrics.jsonl", parts.accelerator, parts.metrics_offset) as book,
        ):
            training.train(parts, book)
        wall, cpu = clocks() - began - sum(aside)
    training.export(parts)
    pairs = parts.cfg.train.steps * BATCH
    return {
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "step_peak_bytes": peak[0],
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "evaluations_a_pair": work.record(pairs),
    }


def measure(parts: Parts, cell: Cell) -> dict[str, Any]:
    """Everything about the exported weights, which the network holds after the export."""
    began = clocks()
    source, model, prompts = parts.cfg.model, cell.model, measures.captions(cell.seed_of_prompts)
    held = measures.pair_batch(load_file(CACHE / model / "pairs.safetensors"))
    base = replace(parts.policy, net=load_net(source, parts.family))
    moved = measures.movement(parts.policy, base, held)
    images = measures.make_images(source, prompts, net=parts.net)
    drawn = clocks() - began
    base_images = np.load(CACHE / model / f"base-{digest(protocol(cell.seed_of_prompts))}.npz")["images"]
    scores, attributes = measures.judge(images, prompts)
    return {
        "scores": scores,
        "attributes": {name: float(np.mean(values)) for name, values in attributes.items()},
        "movement": moved,
        "pixel_distance": measures.pixel_distance(images, base_images),
        "diversity": measures.diversity(measures.embed(images)),
        "cpu_seconds_of_images": round(drawn[1], 1),
        "cpu_seconds_of_evaluation": round((clocks() - began)[1], 1),
    }


def clocks() -> np.ndarray:
    """Seconds by the wall and by this process's use of processors."""
    return np.array([time.monotonic(), time.process_time()])


@contextmanager
def locked(model: str) -> Iterator[None]:
    """Inside, no other process makes what runs of this model share."""
    (CACHE / model).mkdir(parents=True, exist_ok=True)
    with (CACHE / model / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _data(cfg: TrainConfig, cell: Cell) -> Any:
    """The run's data with labels by lot where the row asks for it, and the folder of encodings it can share."""
    if not cell.row.by_lot:
        return _cached(cfg, cell.model)
    file = CACHE / cell.model / f"by-lot-{COIN}.parquet"
    if not file.is_file():
        shuffle_labels(assets() / DATASETS[f"{cell.model}-pairs"], file, seed=COIN)
    return _cached(replace(cfg, data=replace(cfg.data, path=str(file))), cell.model)


def _cached(cfg: TrainConfig, model: str) -> Any:
    """The data section with a folder for encodings of its own for each kind of data."""
    kind = digest([asdict(replace(cfg.data, cache=True)), cfg.method.needs.data])
    return replace(cfg.data, cache=str(CACHE / model / f"latents-{kind}"))
