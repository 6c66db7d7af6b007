"""From finished runs to the method table: benchmarks/methods.json, docs/methods.md and docs/methods.png.

Runs of one row differ by training seed only. The prompt is the sampling unit: outcomes against the base model's image
of the same noise are averaged over training seeds, then prompts are resampled.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import method_runs
from benchmarks.method_measures import ERROR_PAIRS, JUDGES, LEVELS, PROMPTS, SAMPLER_STEPS
from benchmarks.method_runs import BATCH, STEPS, Cell, Row
from diffalign.evaluate.comparison import measure
from diffalign.evaluate.results import Measured
from diffalign.tiny.build import GUIDANCE

BEGIN, END = "<!-- table: made by make bench-methods, do not edit -->", "<!-- end of table -->"

_COSTS = ("cpu_seconds", "seconds", "step_peak_bytes", "process_peak_bytes")

_WINS, _OPEN, _CONTROL = "#2563a8", "#c2571a", "#8a8a8a"

Record = Mapping[str, Any]


def compared(records: Sequence[Record], base: Record, reward: str) -> Measured:
    """How runs of one row score against the base model, over their training seeds."""
    arm = np.array([record["scores"][reward] for record in records], dtype=np.float64).T  # [n, seeds]
    against = np.repeat(np.array(base["scores"][reward], dtype=np.float64)[:, None], len(records), axis=1)
    return measure(arm, against, seed=0)


def summary(row: Row, model: str, records: Sequence[Record], base: Record) -> dict[str, Any]:
    """All numbers of one row for one model; those that are not win rates are means over training seeds."""
    rewards = {name: compared(records, base, name) for name in JUDGES}
    by_seed = [compared([record], base, "oracle").win_rate for record in records]
    return {
        "row": row.name,
        "control": row.control,
        "seeds": [record["seed"] for record in records],
        "rewards": {name: asdict(found) for name, found in rewards.items()},
        "oracle_win_rate_by_seed": by_seed,
        "beats_base": rewards["oracle"].ci_low > 0.5,
        "attributes": mean_of([record["attributes"] for record in records]),
        "movement": mean_of([record["movement"] for record in records]),
        "pixel_distance": float(np.mean([record["pixel_distance"] for record in records])),
        "diversity": mean_of([record["diversity"] for record in records]),
        "evaluations_a_pair": mean_of([record["cost"]["evaluations_a_pair"] for record in records]),
        "cost": {key: float(np.mean([record["cost"][key] for record in records])) for key in _COSTS},
        "method": records[0]["described"]["config"]["method"],
        "lr": records[0]["described"]["config"]["optimizer"]["lr"],
        "tried": row.tried.get(model),
    }


def finished(cells: Sequence[Any]) -> tuple[dict[str, tuple[Any, list[Record]]], list[str], list[str]]:
    """(row and records by its name, what is missing, what is of another config than now) of one model's cells."""
    rows: dict[str, tuple[Any, list[Record]]] = {}
    missing, stale = [], []
    for cell in cells:
        record = method_runs.read(cell.file)
        if record is None:
            missing.append(f"{cell.name}, seed {cell.seed}")
        elif not method_runs.is_current(cell, record):
            stale.append(f"{cell.name}, seed {cell.seed}")
        else:
            rows.setdefault(cell.name, (cell.row, []))[1].append(record)
    return rows, missing, stale


def collect(cells: Sequence[Cell]) -> dict[str, Any]:
    """The table by model, rows by falling oracle win rate, with what is missing or stale."""
    models: dict[str, Any] = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        base = method_runs.read(method_runs.base_file(model))
        if base is None:
            continue
        rows, missing, stale = finished([cell for cell in cells if cell.model == model])
        found = [summary(row, model, records, base) for row, records in rows.values()]
        models[model] = {
            "base": {
                "diversity": base["diversity"],
                "attributes": base["attributes"],
                "scores": {name: float(np.mean(values)) for name, values in base["scores"].items()},
            },
            "rows": sorted(found, key=lambda row: -row["rewards"]["oracle"]["win_rate"]),
            "missing": missing,
            "stale": stale,
            "environment": next((r["environment"] for _, rs in rows.values() for r in rs), None),
        }
    return models


def write(cells: Sequence[Cell], absent: Sequence[str], *, root: Path) -> None:
    """Writes the table under `root`: numbers, text and picture."""
    models = collect(cells)
    content = {"version": 1, "steps": STEPS, "pairs_an_update": BATCH, "protocol": method_runs.protocol()}
    file = root / "benchmarks" / "methods.json"
    file.write_text(json.dumps({**content, "no_config": list(absent), "models": models}, indent=1) + "\n")
    page = root / "docs" / "methods.md"
    page.write_text(between(page.read_text() if page.is_file() else _PAGE, markdown(models, absent)))
    if any(model["rows"] for model in models.values()):
        draw(models, root / "docs" / "methods.png")


def between(page: str, text: str, *, name: str = "docs/methods.md", begin: str = BEGIN, end: str = END) -> str:
    """The page of this name with the text between its markers; whatever else is on it stays.

    Raises:
        ValueError: The page has no such markers.
    """
    head, first, rest = page.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{name} must hold the lines {begin!r} and {end!r}, got a page without them")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def markdown(models: Mapping[str, Any], absent: Sequence[str]) -> str:
    """Tables of all models, with what they say."""
    parts = [_HOW, "| column | what |\n|---|---|"]
    parts[-1] += "".join(f"\n| {name} | {what} |" for name, what in _COLUMNS.items()) + "\n"
    for model, found in models.items():
        parts.append(f"## {model}\n")
        parts.append("| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|")
        parts[-1] += "".join("\n| " + " | ".join(_cells(row)) + " |" for row in found["rows"])
        diversity = found["base"]["diversity"]
        parts.append(
            f"\nBase: oracle {found['base']['scores']['oracle']:.3f}, diversity {diversity['cosine_distance']:.3f} "
            f"(Vendi {diversity['vendi']:.1f})."
        )
        parts += [f"\nDoes not beat base. {line}" for line in _beaten(found["rows"])]
        parts += [
            f"\n{word} runs: {grouped(found[word.lower()])}." for word in ("Missing", "Stale") if found[word.lower()]
        ]
        parts.append("")
    if absent:
        parts.append(f"No config, so no row: {'; '.join(absent)}.\n")
    return "\n".join(parts)


def draw(models: Mapping[str, Any], file: Path) -> None:
    """Oracle win rates with their intervals, one panel a model."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = {name: found["rows"] for name, found in models.items() if found["rows"]}
    most = max(len(rows) for rows in shown.values())
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(1 + 4.6 * len(shown), 1.6 + 0.3 * most), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False, sharex=True)[0]
        for axis, (name, rows) in zip(axes, shown.items(), strict=True):
            for place, row in enumerate(reversed(rows)):
                _dot(axis, place, row)
            axis.axvline(50, color="#333333", linewidth=1, zorder=1)
            axis.set_yticks(range(len(rows)), [row["row"] for row in reversed(rows)])
            axis.set_ylim(len(rows) - most - 0.6, len(rows) - 0.4)
            axis.set_title(name, loc="left", fontweight="bold")
            axis.set_xlabel("oracle win rate over base, % (95 % interval)")
            axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(length=0)
        names = {_WINS: "interval above 50 %", _OPEN: "interval not above 50 %", _CONTROL: "control"}
        handles = [Line2D([], [], color=colour, marker="o", linewidth=2, label=name) for colour, name in names.items()]
        handles.append(Line2D([], [], color="#333333", marker="|", linewidth=0, label="one training seed"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(file, dpi=150, metadata={"Software": None})


def _dot(axis: Any, place: int, row: Mapping[str, Any]) -> None:
    """One row of the plot: interval, pooled rate, and a small mark for each training seed."""
    oracle = row["rewards"]["oracle"]
    colour = _CONTROL if row["control"] else _WINS if row["beats_base"] else _OPEN
    axis.plot([100 * oracle["ci_low"], 100 * oracle["ci_high"]], [place, place], color=colour, linewidth=2)
    axis.plot(100 * oracle["win_rate"], place, "o", color=colour, markersize=6)
    by_seed = [100 * rate for rate in row["oracle_win_rate_by_seed"]]
    axis.plot(by_seed, [place - 0.24] * len(by_seed), "|", color=colour, markersize=5, alpha=0.8)


def _cells(row: Mapping[str, Any]) -> list[str]:
    oracle, clip, aesthetic = (row["rewards"][name] for name in JUDGES)
    moved, passes, seeds = row["movement"], row["evaluations_a_pair"], row["oracle_win_rate_by_seed"]
    partial = passes["partial_with_gradient"], passes["partial_without_gradient"]
    with_gradient, without = (
        f"{whole:.3g}" + (f" + {part:.3g}p" if part else "")
        for whole, part in zip((passes["with_gradient"], passes["without_gradient"]), partial, strict=True)
    )
    mark = "" if row["beats_base"] else " ✗"
    return [
        f"{row['row']}{' (control)' if row['control'] else ''}",
        f"**{100 * oracle['win_rate']:.1f}** ({100 * oracle['ci_low']:.1f} to {100 * oracle['ci_high']:.1f}){mark}",
        f"{100 * min(seeds):.1f} to {100 * max(seeds):.1f} ({len(seeds)})",
        *(
            f"{100 * r['win_rate']:.1f} ({100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f})"
            for r in (clip, aesthetic)
        ),
        f"{moved['winner']:+.4f}",
        f"{moved['loser']:+.4f}",
        f"{moved['prediction_drift']:.4f}",
        f"{row['pixel_distance']:.3f}",
        f"{row['diversity']['cosine_distance']:.3f} ({row['diversity']['vendi']:.1f})",
        with_gradient,
        without,
        f"{row['cost']['cpu_seconds']:.0f}",
        f"{row['cost']['step_peak_bytes'] / 1e6:.0f}",
    ]


def _beaten(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is said of each row that learns from pairs and whose interval does not lie above one half."""
    return [
        f"{row['row']}: {row['tried'] or 'nothing else was tried yet.'}"
        for row in rows
        if not row["beats_base"] and row["row"] != "shuffled"
    ]


def grouped(runs: Sequence[str]) -> str:
    """Rows by the seeds that they lack, such as "seeds 1, 2: cpo, mapo"."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        row, seed = run.split(", seed ")
        seeds.setdefault(row, []).append(seed)
    rows: dict[str, list[str]] = {}
    for row, lacking in seeds.items():
        rows.setdefault(", ".join(lacking), []).append(row)
    return "; ".join(f"seed{'s' * (',' in which)} {which}: {', '.join(names)}" for which, names in rows.items())


def mean_of(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([table[key] for table in tables])) for key in tables[0]}


_COLUMNS = {
    "method": "end of its config's name",
    "oracle win %": "share of captions where the oracle scores the image above the base model's from the same noise, "
    "ties half; pooled over training seeds, with a 95 % bootstrap interval over captions",
    "by training seed": "lowest and highest oracle win rate of single runs (number of runs), which the interval "
    "knows nothing of",
    "tiny-clip win %": "the same by tiny-clip",
    "tiny-aesthetic win %": "the same by tiny-aesthetic",
    "winner error": f"error - base error on the winners of {ERROR_PAIRS} held-out pairs, {len(LEVELS)} noise levels; "
    "below 0 the model fits them better than before",
    "loser error": "the same on their losers, at the same noise",
    "drift": "mean squared difference between the predictions of policy and base on the same images and noise",
    "pixels": "mean absolute distance to the base model's image from the same noise, in shares of the range",
    "diversity (Vendi)": "mean cosine distance between tiny-clip embeddings of two images (Vendi score: effective "
    "number of different images)",
    "passes with gradient": "images through the denoiser in training, for each pair; `p` are partial passes, which "
    "leave the network early",
    "without": "the same without gradient",
    "s": "seconds of one CPU core for training, validations left out",
    "MB": "peak of what torch allocates in an update",
}
"""Columns and what they say."""

_HOW = f"""\
![oracle win rates with intervals](methods.png)

Every run starts from the same base model and takes {STEPS} updates of {BATCH} pairs, with its config's method
settings and learning rate (`configs/tiny_*.toml`). Each model draws one image for each of {PROMPTS} held-out captions,
each with a combination of shape, colour and place that no training caption has, in {SAMPLER_STEPS} deterministic steps
with guidance {GUIDANCE:g}, from the base model's noise.

Roles: `oracle` is the taste that labelled the pairs; `tiny-clip` and `tiny-aesthetic` had no part in the labels or in
training, but for `smpo`, which weighs pairs by tiny-clip's scores: there it is what was trained on. A row is marked (✗,
orange) where its 95 % interval does not lie above 50 %. Controls: `sft` sees the winners alone;
`shuffled` is `diffusion_dpo` on labels drawn by lot, and must not win. `dpo_fixed_draws` is `diffusion_dpo` with
`train.fixed_draws = 1`: the one timestep and noise that a pair has are drawn before the run.
"""

_PAGE = f"""\
# All methods on the tiny world

`make bench-methods` trains every method on `tiny-sd` and `tiny-sd3` and writes this page, `docs/methods.png` and
`benchmarks/methods.json`. Each finished run is a file under `benchmarks/methods/`; what is there is not run again
unless its config has changed. `python -m benchmarks.methods --help` lists the options; `--table-only` makes the table
alone. Notes outside the two markers stay.

{BEGIN}
{END}
"""
