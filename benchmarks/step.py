"""Samples a second and memory of a Diffusion-DPO step, with and without each saving: `make bench`.

Every variant runs in the same process and in turn with the plain loop, one step each, so that a noisy machine disturbs
all alike; what is reported is the median over rounds of the ratio to the plain loop of the same round. Memory is
measured in a process of its own for each. Writes benchmarks/step.json; with `--worlds` or `--loops` a part of it, and
the rest stays as it is there.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.ours import Ours, Variant, encode
from benchmarks.overhead import share_outside, switching
from benchmarks.plain import Plain
from benchmarks.worlds import SIZES, Sizes, World, build
from diffalign.cli import quiet_libraries
from diffalign.counting import count_flop, fake_mode, saved_bytes
from diffalign.environment import describe
from diffalign.progress import bar

OUT = Path(__file__).with_name("step.json")
PLAIN = "plain loop"
CACHED = {"latent_cache": True, "text_cache": True}
OURS = {**CACHED, "reference": "flags"}
"""What `diffalign train` does when nothing is said."""
VARIANTS = (
    Variant(name="ours, no saving"),
    Variant(name="+ latent cache", latent_cache=True),
    Variant(name="+ text cache", **CACHED),
    Variant(name="+ adapter-off reference by flags (default)", **OURS),
    Variant(name="default, reference known at 4 fixed draws a pair", **OURS, fixed_draws=4),
    Variant(name="default, reference as a second network", **{**OURS, "reference": "copy"}),
    Variant(name="default, winners and losers apart", **OURS, joined=False),
    Variant(name="default, channels-last", **OURS, channels_last=True),
    Variant(name="default, bf16", **OURS, precision="bf16"),
    Variant(name="default, compiled", **OURS, compile=True),
    Variant(name="default, selective recompute", **OURS, recompute="selective"),
    Variant(name="default, gradient checkpointing", **OURS, recompute=True),
)
DEFAULT = VARIANTS[3]


class Loop(Protocol):
    """Something that takes one optimizer step at a time."""

    @property
    def net(self) -> Any:
        """The network that is trained."""
        ...

    def step(self) -> object: ...


def makers(world: World, device: torch.device) -> dict[str, Callable[[], Loop]]:
    """The plain loop and our variants, by name, each made when called; on a GPU the plain loop also in bf16."""
    cache = encode(world, device)
    made: dict[str, Callable[[], Loop]] = {PLAIN: lambda: Plain(world, device)}  # first, as all are compared with it
    if device.type == "cuda":
        made[f"{PLAIN}, bf16"] = lambda: Plain(world, device, "bf16")
    for variant in VARIANTS:
        made[variant.name] = lambda variant=variant: Ours(world, variant, device, cache)
    return made


def pinned_flop(sizes: Sizes) -> tuple[int, int]:
    """(one step of the plain loop, its VAE and text encoder alone), counted without computing anything."""
    plain = Plain(build(sizes, random=True), torch.device("cpu"))
    with fake_mode():
        return count_flop(plain.backward), count_flop(lambda: (plain.latents(), plain.embeddings()))


def time_in_turn(loops: dict[str, Loop], *, rounds: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step of every loop, one step each a round, after `warmup` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    with bar("steps in turn", (rounds + warmup) * len(loops)) as shown:
        for i in range(rounds + warmup):
            for name, loop in loops.items():
                begin = time.perf_counter()
                loop.step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if i >= warmup:
                    seconds[name].append(time.perf_counter() - begin)
                shown.advance(note=name)
    return seconds


def measure_memory(world_name: str, loop_name: str, threads: int) -> dict[str, int]:
    """Bytes that a step needs above networks and optimizer states: saved for the backward pass, and at its peak."""
    torch.set_num_threads(threads)
    quiet_libraries()
    sizes = SIZES[world_name]
    device = torch.device("cuda" if sizes.gpu else "cpu")
    loop = makers(build(sizes), device)[loop_name]()
    with saved_bytes([*loop.net.parameters(), *loop.net.buffers()]) as saved:
        loop.step()
    return {"saved_activations": saved(), "peak_of_a_step": peak_of(loop.step, device)}


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a piece of work has allocated at its peak, above what was there before it: torch's own count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def measure_world(
    name: str, *, rounds: int, warmup: int, threads: int, chosen: Sequence[int] = range(len(VARIANTS))
) -> dict[str, Any]:
    """One world's table: for the plain loop and the chosen variants time, ratio and memory."""
    sizes = SIZES[name]
    device = torch.device("cuda" if sizes.gpu else "cpu")
    torch.compiler.reset()  # what was compiled for another world is not this one's
    left_out = {variant.name for i, variant in enumerate(VARIANTS) if i not in chosen}
    made = {n: make for n, make in makers(build(sizes), device).items() if n not in left_out}
    seconds = time_in_turn({n: make() for n, make in made.items()}, rounds=rounds, warmup=warmup, device=device)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {n: pool.apply(measure_memory, (name, n, threads)) for n in made}
    rows = []
    for loop, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds[PLAIN], times, strict=True)]
        rows.append(
            {
                "loop": loop,
                "seconds_a_step": statistics.median(times),
                "pairs_a_second": sizes.pairs / statistics.median(times),
                "times_plain": statistics.median(ratios),
                "times_plain_range": [min(ratios), max(ratios)],
                **memory[loop],
            }
        )
    flop = {"plain_step": sizes.flop, "plain_encoders": sizes.encoder_flop, "published_gflop": sizes.published_gflop}
    table = {"world": name, "environment": describe(device), "pairs_a_step": sizes.pairs, "rounds": rounds}
    if device.type == "cpu" and DEFAULT.name in made:
        table["outside_networks"] = share_outside(made[DEFAULT.name]())
    return {**table, "flop": flop, "loops": rows}


def merged(file: Path, tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tables of worlds with what a file has of other worlds, and of other loops in the same world."""
    worlds = {t["world"]: t for t in json.loads(file.read_text())["worlds"]} if file.is_file() else {}
    order = [PLAIN, f"{PLAIN}, bf16", *(variant.name for variant in VARIANTS)]
    for table in tables:
        before = worlds.get(table["world"], {"loops": []})
        rows = {row["loop"]: row for row in (*before["loops"], *table["loops"])}
        worlds[table["world"]] = {**before, **table, "loops": [rows[name] for name in order if name in rows]}
    return [worlds[name] for name in SIZES if name in worlds]


def show(table: dict[str, Any]) -> None:
    """Prints one world's table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("loop", "s/step", "pairs/s", "x plain", "saved MB", "peak MB", title=table["world"])
    for row in table["loops"]:
        shown.add_row(
            row["loop"],
            f"{row['seconds_a_step']:.3f}",
            f"{row['pairs_a_second']:.2f}",
            f"{row['times_plain']:.2f}",
            f"{row['saved_activations'] / 1e6:.0f}",
            f"{row['peak_of_a_step'] / 1e6:.0f}",
        )
    Console().print(shown)


def main() -> None:
    """Measures all worlds that this machine can hold."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--worlds", nargs="+", choices=SIZES, default=list(SIZES))
    options.add_argument(
        "--loops", nargs="+", type=int, choices=range(len(VARIANTS)), default=list(range(len(VARIANTS))),
        help="variants by number, beside the plain loop: "
        + ", ".join(f"{i} {variant.name}" for i, variant in enumerate(VARIANTS)),
    )  # fmt: skip
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--warmup", type=int, default=2)
    options.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is the least noisy")
    options.add_argument("--out", type=Path, default=OUT)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    quiet_libraries()
    tables = []
    for name in asked.worlds:
        if SIZES[name].gpu and not torch.cuda.is_available():
            print(f"{name}: left out, it needs a GPU")
            continue
        table = measure_world(name, rounds=asked.rounds, warmup=asked.warmup, threads=asked.threads, chosen=asked.loops)
        show(table)
        tables.append(table)
    about = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = {"version": 1, "environment": about, "threads": asked.threads, "switching": switching()}
    asked.out.write_text(json.dumps({**found, "worlds": merged(asked.out, tables)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
