"""Every method that trains on its own images, on the tiny world, against the base model: `make bench-online`.

Each finished run is a file under benchmarks/online/ that is not made again, so the table goes on after a cut; a run
whose config has changed since is made again. Seed 0 of all rows comes first. Writes benchmarks/online.json,
docs/online-results.md and docs/online.png.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import method_runs, method_table, methods, online_runs, online_table
from benchmarks.method_measures import PROMPTS, SAMPLER_STEPS
from benchmarks.method_runs import MODELS
from benchmarks.method_table import Record
from benchmarks.methods import C
from benchmarks.online_runs import OnlineCell, OnlineRow
from diffalign.errors import InputError, near_match

PEOPLE = "d3po_people"
ROWS = (
    OnlineRow(name="d3po", config="d3po"),
    OnlineRow(name="ddpo", config="ddpo"),
    OnlineRow(name="flow_grpo", config="flow_grpo"),
    OnlineRow(name="diffusion_nft", config="diffusion_nft"),
    OnlineRow(name="awm", config="awm"),
    OnlineRow(name="dgpo", config="dgpo"),
    OnlineRow(name="crd", config="crd"),
    OnlineRow(name="online_dpo", config="online_dpo"),
    OnlineRow(name="dragon", config="dragon"),
    OnlineRow(
        name="curated",
        config="curated",
        tried={
            "tiny-sd": "One seed each, other captions, change of tiny-clip: lr 2e-4 -3.0; six steps without noise "
            "-1.1, at lr 2e-4 -9.6, and -13.8 with a random choice in place of the best of eight."
        },
    ),
    OnlineRow(name="d3po_jpeg", config="d3po_jpeg", reward="jpeg"),
    OnlineRow(name="ddpo_jpeg", config="ddpo_jpeg", reward="jpeg"),
    OnlineRow(name="dragon_frechet", config="dragon_frechet", reward="frechet"),
    OnlineRow(name="dragon_vendi", config="dragon_vendi", reward="vendi"),
    OnlineRow(name=PEOPLE, config=PEOPLE, reward="oracle", people=True),
    OnlineRow(name="d3po_oracle", config=PEOPLE, reward="oracle", changes=('online.rewards=["oracle"]',)),
)
"""The table's rows; one that has no config for a model does not apply to it. `d3po_oracle` is `d3po_people` with the
oracle as a reward, in the place of its grades."""
SEEDS = methods.SEEDS


def plan(
    models: Sequence[str],
    rows: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    trial: str | None = None,
    changes: Sequence[str] = (),
) -> list[OnlineCell]:
    """The cells of this table, as `cells_of` orders them."""

    def make(model: str, row: OnlineRow, seed: int) -> OnlineCell:
        return OnlineCell(model=model, row=row, seed=seed, trial=trial, changes=tuple(changes))

    return cells_of(make, ROWS, models, rows, seeds)


def cells_of(
    make: Callable[[str, OnlineRow, int], C],
    table: Sequence[OnlineRow],
    models: Sequence[str],
    rows: Sequence[str] | None,
    seeds: Sequence[int],
) -> list[C]:
    """Cells in the order in which they are made: the first seed of everything, then the next.

    Args:
        make: (model, row, seed) -> a cell.
        table: All rows.
        rows: Names of rows, all of which must have a config for one of the models; None takes every row that has one.

    Raises:
        InputError: A row that is not in the table, or that has no config for any of the models.
    """
    known = {row.name: row for row in table}
    for name in rows or ():
        if name not in known:
            raise InputError(f"--methods must name rows of the table, got {name!r}{near_match(name, known)}")
    cells = [make(model, known[name], seed) for seed in seeds for name in rows or known for model in models]
    there = [cell for cell in cells if cell.exists()]
    missing = sorted(set(rows or ()) - {cell.name for cell in there})
    if missing:
        raise InputError(f"--methods must have a config for one of the models, missing: {', '.join(missing)}")
    return there


def run_one(cell: OnlineCell) -> None:
    """Makes one cell in this process, and prints how its rewards changed."""
    import torch

    torch.set_num_threads(1)
    record = online_runs.run(cell)
    base = method_runs.read(online_runs.base_file(cell.model, cell.seed_of_prompts))
    assert base is not None, "a cell is measured against its base"
    print(told(record, base), flush=True)


def told(record: Record, base: Record) -> str:
    """How a cell's rewards and sets changed, and what it cost, in a line."""
    said = []
    for reward in record["scores"]:
        won = method_table.compared([record], base, reward)
        bounds = f"{won.difference_low:+.3f} to {won.difference_high:+.3f}"
        said.append(f"{reward} {won.mean_difference:+.3f} ({bounds}), win rate {won.win_rate:.3f}")
    said += [
        f"{name} {one['change']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})" for name, one in record["sets"].items()
    ]
    cost, drift = record["cost"], record["movement"]["prediction_drift"]
    seconds = f"{cost['cpu_seconds']:.0f} CPU s training, {record['cpu_seconds_in_all']:.0f} CPU s in all"
    return f"{'; '.join(said)}; drift {drift:.4f}; {seconds}"


def write_table() -> None:
    """The table of every finished run."""
    absent = sorted({f"{m}, {r.name}" for m in MODELS for r in ROWS if not OnlineCell(model=m, row=r, seed=0).exists()})
    online_table.write(plan(list(MODELS), None, SEEDS), absent, root=Path(__file__).parent.parent)


def main() -> None:
    """Makes what is not there, then the table."""
    work = f"their own images, then {PROMPTS} images of {SAMPLER_STEPS} steps each"
    methods.drive(__doc__, plan, run_one, write_table, module="benchmarks.online", work=work, trials=online_runs.TRIALS)


if __name__ == "__main__":
    main()
