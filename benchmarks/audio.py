"""DRAGON on the tiny world's sounds by its kinds of rewards, against the base model: `make bench-audio`.

Each finished run is a file under benchmarks/audio/ that is not made again, so the table goes on after a cut; a run
whose config has changed since is made again. Seed 0 of all rows comes first. Writes benchmarks/audio.json,
docs/audio-results.md and docs/audio.png.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import audio_runs, audio_table, method_runs, methods, online
from benchmarks.audio_measures import PROMPTS, SAMPLER_STEPS
from benchmarks.audio_runs import MODELS, AudioCell
from benchmarks.online_runs import OnlineRow

ROWS = (
    OnlineRow(name="dragon_fad", config="dragon", reward="fad_clap"),
    OnlineRow(name="dragon_per_clip", config="dragon_per_clip", reward="per_clip"),
    OnlineRow(name="dragon_clap", config="dragon_clap", reward="clap"),
    OnlineRow(name="dragon_vendi", config="dragon_vendi", reward="vendi"),
)
"""The table's rows: DRAGON by a distance of sets, by one of single clips, by a score of single clips, by diversity."""
SEEDS = methods.SEEDS


def plan(
    models: Sequence[str],
    rows: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    trial: str | None = None,
    changes: Sequence[str] = (),
) -> list[AudioCell]:
    """The cells of this table, as `online.cells_of` orders them."""

    def make(model: str, row: OnlineRow, seed: int) -> AudioCell:
        return AudioCell(model=model, row=row, seed=seed, trial=trial, changes=tuple(changes))

    return online.cells_of(make, ROWS, models, rows, seeds)


def run_one(cell: AudioCell) -> None:
    """Makes one cell in this process, and prints how its rewards changed."""
    import torch

    torch.set_num_threads(1)
    record = audio_runs.run(cell)
    base = method_runs.read(audio_runs.base_file(cell.model, cell.seed_of_prompts))
    assert base is not None, "a cell is measured against its base"
    print(online.told(record, base), flush=True)


def write_table() -> None:
    """The table of every finished run."""
    audio_table.write(plan(list(MODELS), None, SEEDS), root=Path(__file__).parent.parent)


def main() -> None:
    """Makes what is not there, then the table."""
    work = f"their own clips, then {PROMPTS} clips of {SAMPLER_STEPS} steps each"
    methods.drive(
        __doc__,
        plan,
        run_one,
        write_table,
        module="benchmarks.audio",
        work=work,
        trials=audio_runs.TRIALS,
        models=tuple(MODELS),
    )


if __name__ == "__main__":
    main()
