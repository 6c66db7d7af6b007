"""Every method on the same pairs, updates and prompts, against the base model: `make bench-methods`.

Each finished run is a file under benchmarks/methods/ that is not made again, so the table goes on after a cut; a run
whose config has changed since is made again. Seed 0 of all rows comes first. Writes benchmarks/methods.json,
docs/methods.md and docs/methods.png.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from benchmarks import method_runs, method_table
from benchmarks.method_measures import PROMPTS, SAMPLER_STEPS
from benchmarks.method_runs import BATCH, CACHE, MODELS, STEPS, Cell, Planned, Row
from diffalign.cli import quiet_libraries
from diffalign.errors import InputError, near_match

ROWS = (
    Row(name="sft", config="sft", control=True),
    Row(name="shuffled", config="diffusion_dpo", by_lot=True, control=True),
    Row(name="diffusion_dpo", config="diffusion_dpo"),
    Row(name="dpo_fixed_draws", config="diffusion_dpo", changes=("train.fixed_draws=1",)),
    Row(name="diffusion_sdpo", config="diffusion_sdpo"),
    Row(name="linear_dpo", config="linear_dpo"),
    Row(name="cpo", config="cpo"),
    Row(name="mapo", config="mapo"),
    Row(name="dmpo", config="dmpo"),
    Row(name="diffusion_kto", config="diffusion_kto"),
    Row(name="spin", config="spin"),
    Row(name="seppo", config="seppo"),
    Row(
        name="inpo",
        config="inpo",
        tried={
            "tiny-sd3": "inverted by the policy, beta 150 won 53.8 % (49.4 to 58.1) of the table's captions, in trials "
            "of one seed beta 50 won 47.8 %, 500 won 51.0 %, and 300 with 10 levels 53.4 %; inverted by the reference, "
            "beta 150 won 58.1 % of a trial and 400 with half the learning rate 55.3 %."
        },
    ),
    Row(name="smpo", config="smpo"),
    Row(name="ncp_dpo", config="ncp_dpo"),
    Row(name="ncp_cpo", config="ncp_cpo"),
    Row(name="ncp_sft", config="ncp_sft"),
)
"""The table's rows; one that has no config for a model does not apply to it."""
SEEDS = (0, 1, 2)

C = TypeVar("C", bound=Planned)


def plan(
    models: Sequence[str],
    rows: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    trial: str | None = None,
    changes: Sequence[str] = (),
) -> list[Cell]:
    """The cells in the order in which they are made: the first seed of everything, then the next.

    Args:
        rows: Names of rows, all of which must have a config; None takes every row that has one.

    Raises:
        InputError: A row that is not in the table, or that has no config for a model.
    """
    known = {row.name: row for row in ROWS}
    for name in rows or ():
        if name not in known:
            raise InputError(f"--methods must name rows of the table, got {name!r}{near_match(name, known)}")
    cells = [
        Cell(model=model, row=known[name], seed=seed, trial=trial, changes=tuple(changes))
        for seed in seeds
        for name in rows or known
        for model in models
    ]
    missing = sorted({cell.config for cell in cells if not cell.exists()})
    if rows and missing:
        raise InputError(f"--methods must have a config for each model, missing: {', '.join(missing)}")
    return [cell for cell in cells if cell.exists()]


def open_cells(cells: Sequence[C], *, again: bool) -> list[C]:
    """Those that are not finished, or whose config has changed since they were; all of them with `again`."""
    left = []
    for cell in cells:
        record = method_runs.read(cell.file)
        if record is not None and not again and method_runs.is_current(cell, record):
            continue
        if record is not None and not again:
            print(f"stale, made again: {cell.model}, {cell.name}, seed {cell.seed}", flush=True)
        left.append(cell)
    return left


def run_all(cells: Sequence[C], *, jobs: int, module: str = "benchmarks.methods") -> list[C]:
    """Makes cells, `jobs` at a time, each in a process of its own on one thread; returns those that failed.

    Args:
        module: What makes one, with `--one MODEL ROW SEED`.
    """
    began = time.monotonic()
    done: list[C] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def make(cell: C) -> bool:
        command = [sys.executable, "-m", module, "--one", cell.model, cell.name, str(cell.seed)]
        command += ["--trial", cell.trial] if cell.trial else []
        command += ["--set", *cell.changes] if cell.changes else []
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        done.append(cell)
        name = f"[{len(done)}/{len(cells)}, {(time.monotonic() - began) / 60:.1f} min] {cell.model}, {cell.name}"
        lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines() or ["nothing said"]
        outcome = lines[-1] if result.returncode == 0 else f"FAILED: {lines[-1]}"
        print(f"{name}, seed {cell.seed}: {outcome}", flush=True)
        return result.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return [cell for cell, good in zip(cells, pool.map(make, cells), strict=True) if not good]


def run_one(cell: Cell) -> None:
    """Makes one cell in this process, and prints its oracle win rate."""
    import torch

    torch.set_num_threads(1)
    record = method_runs.run(cell)
    base = method_runs.read(method_runs.base_file(cell.model, cell.seed_of_prompts))
    assert base is not None, "a cell is measured against its base"
    rates = []
    for reward in record["scores"]:
        won = method_table.compared([record], base, reward)
        rates.append(f"{reward} {won.win_rate:.3f} ({won.ci_low:.3f} to {won.ci_high:.3f})")
    seconds = f"{record['cost']['cpu_seconds']:.0f} CPU s training, {record['cpu_seconds_in_all']:.0f} CPU s in all"
    print(f"{', '.join(rates)}; {seconds}", flush=True)


def drive(
    about: str | None,
    plan: Callable[..., list[C]],
    run_one: Callable[[C], None],
    write: Callable[[], None],
    *,
    module: str,
    work: str,
    trials: Path,
    models: Sequence[str] = tuple(MODELS),
) -> None:
    """The command line of a table: makes the cells that are not there, then the table; ends the process.

    Args:
        about: What `--help` says.
        plan: (models, rows or None, seeds, trial, changes) -> cells.
        run_one: Makes one cell in this process.
        write: Writes the table.
        module: Of this table, to run one cell of it in a process of its own.
        work: What a run is.
        trials: Folder in which trials are kept apart.
        models: Which there are.
    """
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=models, default=list(models))
    options.add_argument("--methods", nargs="+", help="rows of the table; all that have a config if left out")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side, one thread each")
    options.add_argument("--again", action="store_true", help="also what is finished")
    options.add_argument("--table-only", action="store_true")
    options.add_argument("--trial", help="keep the runs apart under this name, on captions of their own; no table")
    options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of a trial's configs")
    options.add_argument("--one", nargs=3, metavar=("MODEL", "ROW", "SEED"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    quiet_libraries()
    if asked.set and not asked.trial:
        options.error("--set goes with --trial: the table is of the configs as they are")
    try:
        if asked.one:
            model, row, seed = asked.one
            [cell] = plan([model], [row], [int(seed)], trial=asked.trial, changes=asked.set)
            run_one(cell)
            return
        cells = plan(asked.models, asked.methods, asked.seeds, trial=asked.trial, changes=asked.set)
    except InputError as error:
        sys.exit(str(error))
    failed: list[C] = []
    if not asked.table_only:
        left = open_cells(cells, again=asked.again)
        print(f"{len(left)} of {len(cells)} runs to make, {asked.jobs} at a time: {work}", flush=True)
        failed = run_all(left, jobs=asked.jobs, module=module)
    if asked.trial:
        print(f"kept under {trials / asked.trial}")
    else:
        write()
    sys.exit(f"{len(failed)} runs failed" if failed else 0)


def write_table() -> None:
    """The table of every finished run."""
    absent = sorted({f"{m}, {r.name}" for m in MODELS for r in ROWS if not Cell(model=m, row=r, seed=0).exists()})
    method_table.write(plan(list(MODELS), None, SEEDS), absent, root=Path(__file__).parent.parent)


def main() -> None:
    """Makes what is not there, then the table."""
    work = f"{STEPS} updates of {BATCH} pairs, {PROMPTS} images of {SAMPLER_STEPS} steps each"
    drive(__doc__, plan, run_one, write_table, module="benchmarks.methods", work=work, trials=CACHE / "trials")


if __name__ == "__main__":
    main()
