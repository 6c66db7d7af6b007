"""`diffalign plan`: what a run will cost, and whether it fits, in tables of 80 columns."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from diffalign.plan import Plan

out = Console(emoji=False)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plan(
    config: Annotated[str, typer.Argument(help="A TOML file, or the bare name of a shipped config.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    memory: Annotated[str | None, typer.Option(help="Of the GPU that is planned for, such as 24GB.")] = None,
    timed: Annotated[bool, typer.Option("--measure", help="Time a step on the device, with random weights.")] = False,
    processes: Annotated[int | None, typer.Option(help="How many the run will have, where they share weights.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan to a .json file.")] = None,
) -> None:
    """Say what a run will cost, whether it fits, and what would make it fit."""
    from diffalign.config import load
    from diffalign.errors import InputError
    from diffalign.plan import parse_memory
    from diffalign.plan import plan as plan_run

    if json_file is not None and json_file.suffix != ".json":
        raise InputError(f"--json must be a .json file, got {str(json_file)!r}")
    if processes is not None and processes < 1:
        raise InputError(f"--processes must be at least 1, got {processes}")
    cfg = load(config, overrides or [])
    size_there = None if memory is None else parse_memory(memory)
    found = plan_run(cfg, memory=size_there, timed=timed, processes=processes)
    out.print(verdict(found), highlight=False)
    out.print(tables(found))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found.table(), indent=1) + "\n", encoding="utf-8")
        out.print(f"plan: {json_file}", highlight=False, soft_wrap=True)


def verdict(found: "Plan") -> str:
    """Whether it fits, in a line or two."""
    need = size(found.memory.peak)
    if found.available is None:
        return f"needs {need} of a GPU, and none is here; --memory 24GB says whether it fits one of that size"
    there = f"{size(found.available)} of the {'GPU' if found.device == 'cuda' else 'machine'}"
    if found.fits:
        return f"fits: needs {need} of {there}"
    if found.change is None:
        return f"does not fit: needs {need} of {there}; no change that is known here makes it fit"
    return (
        f"does not fit: needs {need} of {there}\n"
        f"cheapest change ({found.change.costs}), with which it needs {size(found.change.peak)}:\n"
        f"  {' '.join(found.change.overrides)}"
    )


def tables(found: "Plan") -> Table:
    """Everything that the plan knows, by section."""
    table = Table("what", "value", "of what", title_justify="left", width=78)
    for section in (_work, _round, _memory, _disk):
        rows = section(found)
        for i, row in enumerate(rows):
            table.add_row(*row, end_section=i + 1 == len(rows))
    return table


def _work(found: "Plan") -> list[tuple[str, str, str]]:
    r, flop = found.rehearsal, found.flop
    micro = f"{found.batch_size} x {found.accumulate} {many(found.unit)} a device"
    rows = [
        ("parameters", millions(r.parameters), f"of the denoiser, family {found.family}"),
        ("trainable", millions(r.trainable), f"method {found.method}"),
        (f"evaluations a {found.unit}", found.work.words(), "samples through the denoiser"),
        (f"work a {found.unit}", tflop(flop.per_unit), "forward and backward passes"),
        ("work a step", tflop(flop.per_step), micro),
        ("work in all", tflop(flop.total), f"{found.steps} steps, a device"),
    ]
    if found.shared_by > 1:
        rows.insert(2, ("shared out over", str(found.shared_by), "processes: weights, gradients, states"))
    if found.measured is None:
        return [*rows, ("time", "not measured", "--measure times a step where the device is")]
    rows.append(("seconds a step", f"{found.seconds_a_step:.3g}", "measured, with random weights"))
    rows.append(("hours", f"{found.hours:.3g}", f"{found.steps} steps"))
    if found.measured.peak is not None:
        rows.append(("measured peak", size(found.measured.peak), "by torch, of such a step"))
    return rows


def _round(found: "Plan") -> list[tuple[str, str, str]]:
    own = found.own
    if own is None:
        return []
    kinds = f"{own.of_old:,} of them of the old policy" if own.of_old else "of the reference"
    guided = ", guided" if own.sampling > own.images * own.moves else ""
    rows = [
        ("rounds", f"{own.rounds:,}", f"{own.images:,} images each, on {own.processes} processes"),
        ("sampling a round", f"{own.sampling:,}", f"evaluations, {own.moves} moves an image{guided}"),
        ("log-probs again", f"{own.again:,}", "evaluations, of the policy that sampled") if own.again else None,
        ("under the reference", f"{own.under_reference:,}", "evaluations, for the KL in the reward")
        if own.under_reference
        else None,
        (f"{many(found.unit)} a round", f"{own.items:,}", _noisy_words(found)),
        ("training a round", f"{own.with_gradient:,}", "evaluations with gradient"),
        ("without gradient", f"{own.without_gradient:,}", kinds) if own.without_gradient else None,
        ("work to sample", tflop(found.flop.sampling), "a round, all processes, without judges"),
    ]
    if found.seconds_a_round is not None:
        rows.append(("seconds to sample", f"{found.seconds_a_round:.3g}", "a round, from measured moves"))
    return [row for row in rows if row is not None]


def _noisy_words(found: "Plan") -> str:
    own = found.own
    if own is None or "move" not in found.unit:
        return "that updates go over"
    return f"that updates go over; {own.noisy} of {own.moves} have noise"


def _memory(found: "Plan") -> list[tuple[str, str, str]]:
    m = found.memory
    rows = [
        ("weights", m.weights, "of the denoiser"),
        ("adapters", m.adapters, ""),
        ("second network", m.second_network, "frozen copy, as reference"),
        ("optimizer states", m.optimizer, ""),
        ("moving average", m.ema, "of trained weights"),
        ("VAE, text encoders", m.encoders, "data.cache = false" if found.own is None else "between rounds too"),
        ("saved activations", m.activations, "for the backward pass"),
        ("gradients", m.gradients, ""),
        ("gathered weights", m.gathered, "of two blocks, and gradients of one"),
        ("reference forward", m.reference_forward, "before the policy's"),
        ("most in a step", m.step, "the last ones, and workspace, overlap"),
        ("while training", m.stays + m.step, "what stays, and most in a step"),
        ("building the cache", m.building_cache, "before training"),
        ("while sampling", m.sampling, "without the judges"),
        ("peak", m.peak, "of a device"),
    ]
    return [(name, size(value), words) for name, value, words in rows if value]


def _disk(found: "Plan") -> list[tuple[str, str, str]]:
    d = found.disk
    rows = []
    if d.cache_per_row:
        rows.append(("cache a row", size(d.cache_per_row), "latent moments, text embeddings"))
    if d.cache:
        rows.append(("cache", size(d.cache), f"at most, {d.rows} rows; repeats are kept once"))
    own = [
        ("a round", d.round, "states, latents; until the next begins"),
        ("own images", d.images, "at most, of all rounds, as files"),
        ("earlier policies", d.policies, "references, slow copies"),
    ]
    return [
        *rows,
        ("checkpoint", size(d.checkpoint), f"{size(d.kept_checkpoints)} for those that are kept"),
        ("export", size(d.export), ""),
        *[(name, size(value), words) for name, value, words in own if value],
    ]


def many(unit: str) -> str:
    """Its plural."""
    first, *rest = unit.split(" ")
    return " ".join([f"{first}s", *rest])


def size(count: int) -> str:
    """Bytes in a unit that keeps the number below 1024."""
    value, unit = float(count), 0
    while value >= 1024 and unit + 1 < len(_UNITS):
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_UNITS[unit]}" if value < 1000 else f"{value:.0f} {_UNITS[unit]}"


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:.4g} M"


def tflop(count: int) -> str:
    """A number of FLOPs."""
    return f"{count / 1e12:.4g} TFLOP"
