"""What a run will cost, before it runs: parameters, work, memory, disk, time; and what would make it fit.

FLOPs and bytes are counted on the networks of the model's own configs, without weights (`rehearsal`). Memory of a
device is what stays (weights, adapters, optimizer states) and the most that a step holds at a time beside it: saved
activations, gradients and what kernels need for a moment overlap, so their sum is never reached. A run on its own
images also has a peak of sampling. Seconds are only said where a step was measured.
"""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.bare import Encoding, bare_net, encoding
from diffalign.checks import context_of, method_name, reference_kind, text_dtype_of
from diffalign.costs import Disk, Work, disk_of, flop_of, source_of
from diffalign.denoisers import Family
from diffalign.errors import InputError
from diffalign.leaner import leaner
from diffalign.memory import MemoryUse, memory_of
from diffalign.models.load import detect_family, load_scheduler_config, pipeline_index
from diffalign.own_work import RoundWork, kept_levels, own_evaluations, own_walk, round_work
from diffalign.rehearsal import Rehearsal, rehearse
from diffalign.sampling.walk import KernelWalk
from diffalign.settings import TrainConfig
from diffalign.shipped import MODELS, resolve
from diffalign.timing import Measured, measure
from diffalign.workload import Evaluations, evaluations

GIB = 2**30
CONTEXT = GIB // 2
"""What a GPU's driver and libraries take for themselves."""
SPARE = 0.05
"""Share of a device that is left free: allocators leave gaps."""

BEFORE_STEPS = ("data.encode_batch_size=1", "train.offload=true")
"""Changes that spare memory while the cache is built alone."""

Device = Literal["cpu", "cuda"]
Unit = Literal["pair", "image", "move", "pair of moves"]
"""What a method is called with; a micro-batch has `batch_size` of them."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Keys to set so that the run fits."""

    overrides: tuple[str, ...]
    """As `diffalign train CONFIG` takes them."""
    costs: str
    peak: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known of a run before it runs."""

    method: str
    family: str
    device: Device
    unit: Unit
    batch_size: int
    """Per device and forward."""
    accumulate: int
    steps: int
    shared_by: int
    """Processes that a sharded run's weights are shared out over; 1 where each has all of them."""
    work: Evaluations
    rehearsal: Rehearsal
    encoding: Encoding
    flop: Work
    memory: MemoryUse
    disk: Disk
    available: int | None
    """Bytes of the device; None if it is not known."""
    own: RoundWork | None = None
    """A round of own images; None for runs on data."""
    measured: Measured | None = None
    change: Change | None = None

    @property
    def fits(self) -> bool | None:
        """None where nobody said how much memory there is."""
        return None if self.available is None else self.memory.peak <= usable(self.available, self.device)

    @property
    def seconds_a_step(self) -> float | None:
        """From the measured micro-batch; None if none was."""
        return None if self.measured is None else self.measured.seconds * self.accumulate

    @property
    def seconds_a_round(self) -> float | None:
        """To sample a round's images on all processes and to compute log-probs again; None if none was measured."""
        seen = None if self.measured is None else self.measured.sampled
        if self.own is None or seen is None:
            return None
        one = (seen.move * self.own.moves + seen.decoding) / seen.images
        evaluation = seen.move * self.own.images * self.own.moves / (self.own.sampling * seen.images)
        more = self.own.again + self.own.under_reference
        return (self.own.images * one + more * evaluation) / self.own.processes

    @property
    def hours(self) -> float | None:
        """Of all steps on one device, and of the rounds before them."""
        if self.seconds_a_step is None:
            return None
        rounds = 0.0 if self.own is None else self.own.rounds * (self.seconds_a_round or 0.0)
        return (self.seconds_a_step * self.steps + rounds) / 3600

    def table(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = asdict(self)
        found["encoding"]["cond"] = {k: [list(s), str(d)] for k, (s, d) in self.encoding.cond.items()}
        found["memory"] |= {name: getattr(self.memory, name) for name in ("stays", "workspace", "peak")}
        found["disk"]["cache"] = self.disk.cache
        del found["rehearsal"]["trained"]
        seconds = {"seconds_a_step": self.seconds_a_step, "seconds_a_round": self.seconds_a_round}
        return found | seconds | {"fits": self.fits, "hours": self.hours}


def plan(cfg: TrainConfig, *, memory: int | None = None, timed: bool = False, processes: int | None = None) -> Plan:
    """The plan of a run, and where it does not fit the cheapest change that would make it fit.

    Args:
        memory: Bytes of a GPU that is planned for; None takes this machine's device.
        timed: Take three real steps on random weights on the device, and a few moves of a sampler.
        processes: How many the run will have; None is as many as it was started in, or as there are GPUs here.

    Raises:
        InputError: The model's configs or the device to measure on are not there, or rounds do not come out even on so
            many processes.
    """
    device = planned_device(cfg, memory)
    many = planned_processes(processes)
    _check_shard(cfg, many, timed=timed)
    if timed:
        _need_device(cfg, device)
    family = _family(cfg)
    shell = bare_net(cfg, family)
    denoiser = family.make_denoiser(shell, load_scheduler_config(cfg.model), cfg.timesteps, context_of(cfg, family))
    compared = reference_kind(cfg) != "none" and cfg.train.fixed_draws is None
    walk = None if cfg.online is None else own_walk(cfg, family)
    if walk is None:
        work = evaluations(cfg.method, denoiser, reference=compared)
    else:
        work = own_evaluations(cfg, denoiser, walk, reference=compared)
        round_work(cfg, walk, work, many)  # before anything else is run: whether rounds come out even
    inputs = encoding(cfg, family, pipeline_index(cfg.model, weights=False), device=device)
    available = device_memory(device) if memory is None else memory

    def of(config: TrainConfig) -> Plan:
        kinds = [(c.data.encode_batch_size, c.online, text_dtype_of(c, device)) for c in (cfg, config)]
        same = kinds[0] == kinds[1]
        own = inputs if same else encoding(config, family, pipeline_index(cfg.model, weights=False), device=device)
        return _plan(config, family, own, work, walk, device, available, many)

    first = of(cfg)
    if first.fits is False:
        return replace(first, change=_cheapest(cfg, of, many))
    return replace(first, measured=measure(cfg, family, inputs)) if timed else first


def remedy(cfg: TrainConfig) -> str:
    """What to say when a run has run out of memory: the cheapest change that the plan, or else its order, names."""
    change = plan(cfg).change
    offered = [
        (keys, costs)
        for keys, costs, _ in leaner(cfg, processes=planned_processes(None))
        if keys[0] not in BEFORE_STEPS
    ]
    keys, costs = (change.overrides, change.costs) if change is not None else next(iter(offered), ((), ""))
    if not keys:
        return "no change that is known here needs less"
    return f"the cheapest change is {' '.join(keys)} ({costs}); diffalign plan says what fits"


def planned_device(cfg: TrainConfig, memory: int | None) -> Device:
    """The kind of device that a run is planned for: a GPU where one is here, asked for, or needed."""
    if cfg.train.device == "auto":
        gpu = memory is not None or cfg.train.precision == "fp16" or torch.cuda.is_available()
        return "cuda" if gpu else "cpu"
    return cfg.train.device


def planned_processes(processes: int | None) -> int:
    """How many processes a run is planned for: those that were said, that are running, or one a GPU that is here."""
    return processes or int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count() or 1


def device_memory(device: Device) -> int | None:
    """Bytes of this machine's device; None for a GPU that is not here."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def usable(available: int, device: Device) -> int:
    """What a run may take of a device."""
    return int(available * (1 - SPARE)) - (CONTEXT if device == "cuda" else 0)


def parse_memory(text: str) -> int:
    """Bytes of "24GB": as graphics cards are sold, a GB is 2^30 bytes here.

    Raises:
        InputError: Anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|G|M)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--memory must be a size such as 24GB, got {text!r}")
    return int(float(match[1]) * (GIB if match[2].upper().startswith("G") else GIB // 1024))


def _check_shard(cfg: TrainConfig, processes: int, *, timed: bool) -> None:
    if cfg.train.shard and processes < 2:
        raise InputError(
            f"--processes must be at least 2 with train.shard, got {processes}; say how many will share the weights"
        )
    if cfg.train.shard and timed:
        raise InputError("--measure must be left out with train.shard, whose steps take several processes")


def _need_device(cfg: TrainConfig, device: Device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--measure must have the planned device here, got train.device {cfg.train.device!r} and no GPU is there"
        )


def _family(cfg: TrainConfig) -> Family:
    try:
        return detect_family(cfg.model, weights=False)
    except InputError as error:
        place = cfg.model.config or cfg.model.path
        if Path(resolve(place, MODELS)).exists():
            raise
        raise InputError(
            f"{error}; a plan needs the configs and tokenizers alone: hf download {place} "
            "--include '*.json' '*.txt' 'tokenizer*/*'"
        ) from error


def _plan(
    cfg: TrainConfig,
    family: Family,
    inputs: Encoding,
    work: Evaluations,
    walk: KernelWalk | None,
    device: Device,
    available: int | None,
    processes: int,
) -> Plan:
    r = rehearse(cfg, family, inputs, work, device=device)
    source = source_of(cfg)
    own = None if walk is None else round_work(cfg, walk, work, processes)
    kept = 0 if walk is None else kept_levels(cfg, walk)
    return Plan(
        method=method_name(cfg.method),
        family=family.name,
        device=device,
        unit=_unit(cfg),
        batch_size=cfg.train.batch_size,
        accumulate=cfg.train.accumulate,
        steps=cfg.train.steps,
        shared_by=processes if cfg.train.shard else 1,
        work=work,
        rehearsal=r,
        encoding=inputs,
        flop=flop_of(cfg, r, inputs, work, source, own),
        memory=memory_of(cfg, r, inputs, device, processes, kept=kept),
        disk=disk_of(cfg, r, inputs, source, own, kept),
        available=available,
        own=own,
    )


def _unit(cfg: TrainConfig) -> Unit:
    kinds: dict[str, Unit] = {"pairs": "pair", "transitions": "move", "transition_pairs": "pair of moves"}
    needs = cfg.method.needs
    return kinds.get(needs.items or needs.batches, "image")


def _cheapest(cfg: TrainConfig, of: Callable[[TrainConfig], Plan], processes: int) -> Change | None:
    """The first change, by what it costs, that makes a run fit; all of them together if none does alone."""
    least: TrainConfig = cfg
    together: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for overrides, costs, config in leaner(cfg, processes=processes):
        found = of(config)
        if found.fits:
            return Change(overrides=overrides, costs=costs, peak=found.memory.peak)
    for overrides, costs, config in leaner(cfg, gathered=True, processes=processes):
        least = config
        together.append(overrides)
        reasons.append(costs)
        found = of(least)
        if found.fits:
            words = tuple(word for part in together for word in part)
            return Change(overrides=words, costs="; ".join(reasons), peak=found.memory.peak)
    return None
