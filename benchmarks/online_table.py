"""From finished runs to the online table: benchmarks/online.json, docs/online-results.md and docs/online.png.

Runs of one row differ by training seed only. The prompt is the sampling unit, as in the method table: outcomes against
the base model's image of the same noise are averaged over training seeds, then prompts are resampled.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import method_runs, method_table, online_plot, online_runs, online_start
from benchmarks.method_measures import ERROR_PAIRS, LEVELS, PROMPTS, SAMPLER_STEPS
from benchmarks.method_table import Record, compared, mean_of
from benchmarks.online_measures import ROUND_JUDGES, SCORED
from benchmarks.online_runs import GUIDANCE, OnlineCell, OnlineRow

BEGIN, END = "<!-- table: made by make bench-online, do not edit -->", "<!-- end of table -->"

_COSTS = ("cpu_seconds", "seconds", "sampling_seconds", "update_seconds", "process_peak_bytes")
_LOWER = ("frechet",)
"""Numbers that are better when smaller."""


def summary(row: OnlineRow, model: str, records: Sequence[Record], base: Record) -> dict[str, Any]:
    """All numbers of one row for one model; those without an interval are means over training seeds."""
    rewards = {name: compared(records, base, name) for name in SCORED}
    sets = {name: pooled([record["sets"][name] for record in records]) for name in ("frechet", "vendi")}
    oracle, own = rewards["oracle"], rewards.get(row.reward)
    if own is not None:
        raised = own.difference_low is not None and own.difference_low > 0
    else:
        raised = sets[row.reward]["high"] < 0 if row.reward in _LOWER else sets[row.reward]["low"] > 0
    return {
        "row": row.name,
        "trained_on": row.reward,
        "by_labels": row.people,
        "seeds": [record["seed"] for record in records],
        "rewards": {name: asdict(found) for name, found in rewards.items()},
        "sets": sets,
        "oracle_win_rate_by_seed": [compared([record], base, "oracle").win_rate for record in records],
        "raised": raised,
        "beats_base": oracle.ci_low > 0.5,
        "as_asked": raised and (oracle.ci_low > 0.5 or row.reward not in ("clip", "oracle")),
        "attributes": mean_of([record["attributes"] for record in records]),
        "movement": mean_of([record["movement"] for record in records]),
        "pixel_distance": float(np.mean([record["pixel_distance"] for record in records])),
        "cosine_distance": float(np.mean([record["cosine_distance"] for record in records])),
        "curve": joined(
            [
                online_start.with_start(OnlineCell(model=model, row=row, seed=record["seed"]), record["curve"])
                for record in records
            ],
            (*ROUND_JUDGES, *online_start.NAMES),
        ),
        "cost": {key: float(np.mean([record["cost"][key] for record in records])) for key in _COSTS},
        "method": records[0]["described"]["config"]["method"],
        "lr": records[0]["described"]["config"]["optimizer"]["lr"],
        "tried": row.tried.get(model),
    }


def pooled(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A number of sets over training seeds: means of all, of the ends of the intervals too.

    Seeds are measured on the same captions, so their errors are not independent. The mean of the ends is the interval
    of the mean change if they rose and fell together, which no other dependence makes wider where they are normal.
    """
    return mean_of([{k: one[k] for k in ("value", "base", "change", "low", "high")} for one in found])


def joined(
    curves: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str] = tuple(ROUND_JUDGES)
) -> list[dict[str, Any]]:
    """Rounds of several seeds as one curve: the means of what each has of a round, `names` beside what is its own."""
    found = []
    for rounds in zip(*curves, strict=True):
        own = mean_of([one["own"] for one in rounds]) if all(one["own"] for one in rounds) else {}
        seen = mean_of([{name: one[name] for name in names} for one in rounds])
        found.append({"round": rounds[0]["round"], "images": rounds[0]["images"], "own": own, **seen})
    return found


Summary = Callable[[OnlineRow, str, Sequence[Record], Record], dict[str, Any]]
"""(row, model, its records, the base's) -> numbers."""


def collect(
    cells: Sequence[OnlineCell],
    base_file: Callable[[str], Path] = online_runs.base_file,
    summary: Summary = summary,
) -> dict[str, Any]:
    """The table by model, rows in the order of the plan, with what is missing or stale.

    Args:
        base_file: Of a model: where the base's numbers are.
        summary: Of a row's records, for one model.
    """
    models: dict[str, Any] = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        base = method_runs.read(base_file(model))
        if base is None:
            continue
        rows, missing, stale = method_table.finished([cell for cell in cells if cell.model == model])
        models[model] = {
            "base": {
                "scores": {name: float(np.mean(values)) for name, values in base["scores"].items()},
                "attributes": base["attributes"],
                "sets": base["sets"],
            },
            "rows": [summary(row, model, records, base) for row, records in rows.values()],
            "missing": missing,
            "stale": stale,
            "environment": next((r["environment"] for _, rs in rows.values() for r in rs), None),
        }
    return models


def write(cells: Sequence[OnlineCell], absent: Sequence[str], *, root: Path) -> None:
    """Writes the table under `root`: numbers, text and picture."""
    models = collect(cells)
    content = {"version": 1, "protocol": online_runs.protocol(), "no_config": list(absent), "models": models}
    (root / "benchmarks" / "online.json").write_text(json.dumps(content, indent=1) + "\n")
    page = root / "docs" / "online-results.md"
    text = page.read_text() if page.is_file() else _PAGE
    name = "docs/online-results.md"
    page.write_text(method_table.between(text, markdown(models, absent), name=name, begin=BEGIN, end=END))
    if any(model["rows"] for model in models.values()):
        online_plot.draw(models, root / "docs" / "online.png")


def markdown(models: Mapping[str, Any], absent: Sequence[str]) -> str:
    """Tables of all models, with what they say."""
    parts = [_HOW, "| column | what |\n|---|---|"]
    parts[-1] += "".join(f"\n| {name} | {what} |" for name, what in _COLUMNS.items()) + "\n"
    for model, found in models.items():
        parts.append(f"## {model}\n")
        parts.append("| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|")
        parts[-1] += "".join("\n| " + " | ".join(_cells(row)) + " |" for row in found["rows"])
        scores, sets = found["base"]["scores"], found["base"]["sets"]
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        parts.append(f"\nBase: {said}; Fréchet {sets['frechet']:.4f}, Vendi {sets['vendi']:.2f}.")
        parts += [
            f"\nNot as asked. {row['row']}: {row['tried'] or 'nothing else was tried yet.'}"
            for row in found["rows"]
            if not row["as_asked"]
        ]
        parts += [
            f"\n{word} runs: {method_table.grouped(found[word.lower()])}."
            for word in ("Missing", "Stale")
            if found[word.lower()]
        ]
        parts.append("")
    if absent:
        parts.append(f"No config, so no row: {'; '.join(absent)}.\n")
    return "\n".join(parts)


def _cells(row: Mapping[str, Any]) -> list[str]:
    rewards, sets, cost = row["rewards"], row["sets"], row["cost"]
    oracle, seeds = rewards["oracle"], row["oracle_win_rate_by_seed"]
    if row["trained_on"] in rewards:
        own = rewards[row["trained_on"]]
        gain = f"{own['mean_against']:.3f} to {own['mean_arm']:.3f} {changed(own, 'mean_difference', 'difference_')}"
    else:
        own = sets[row["trained_on"]]
        gain = f"{own['base']:.4f} to {own['value']:.4f} {changed(own, 'change', '', 4)}"
    return [
        f"{row['row']}{'' if row['as_asked'] else ' ✗'}",
        row["trained_on"] + (", by labels" if row["by_labels"] else ""),
        gain,
        f"**{100 * oracle['win_rate']:.1f}** ({100 * oracle['ci_low']:.1f} to {100 * oracle['ci_high']:.1f})",
        f"{100 * min(seeds):.1f} to {100 * max(seeds):.1f} ({len(seeds)})",
        *(
            f"{100 * r['win_rate']:.1f} ({100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f})"
            for r in (rewards["clip"], rewards["aesthetic"])
        ),
        f"{row['movement']['prediction_drift']:.4f}",
        f"{row['pixel_distance']:.3f}",
        f"{sets['vendi']['value']:.2f} {changed(sets['vendi'], 'change', '', 2)}",
        f"{sets['frechet']['value']:.4f} {changed(sets['frechet'], 'change', '', 4)}",
        f"{row['curve'][-1]['images'] if row['curve'] else 0}",
        f"{cost['sampling_seconds']:.0f}",
        f"{cost['update_seconds']:.0f}",
    ]


def changed(of: Mapping[str, Any], key: str, prefix: str, digits: int = 3) -> str:
    """A change with its interval."""
    low, high = of[f"{prefix}low"], of[f"{prefix}high"]
    return f"({of[key]:+.{digits}f}: {low:+.{digits}f} to {high:+.{digits}f})"


_COLUMNS = {
    "method": "row of the plan: end of its config's name, or a change of it",
    "trained on": "`clip` is tiny-clip's score, `jpeg` minus the kB of a JPEG, `frechet` a Fréchet distance in "
    "tiny-clip's space, `vendi` the Vendi score there, `oracle` the taste of the world's simulated person",
    "its reward": "that number on held-out captions, base to aligned (change with a 95 % paired bootstrap interval "
    "over captions, training seeds averaged; of a number of sets with the means of the ends of the seeds' intervals)",
    "oracle win %": "share of captions where the oracle scores the image above the base model's from the same noise, "
    "ties half; pooled over training seeds, with a 95 % bootstrap interval over captions",
    "by training seed": "lowest and highest oracle win rate of single runs (number of runs)",
    "tiny-clip win %": "the same by tiny-clip",
    "tiny-aesthetic win %": "the same by tiny-aesthetic",
    "drift": f"mean squared difference between the predictions of policy and base, {ERROR_PAIRS} held-out pairs, "
    f"{len(LEVELS)} noise levels",
    "pixels": "mean absolute distance to the base model's image from the same noise, in shares of the range",
    "Vendi": f"Vendi score of the {PROMPTS} images in tiny-clip's space (change, interval)",
    "Fréchet": "Fréchet distance of the same to true pictures of training captions (change, interval)",
    "images": "images that training made of its own",
    "s sampling": "seconds of rounds, sampling and judging, by the wall",
    "s updates": "seconds of updates, by the wall",
}
"""Columns and what they say."""

_HOW = f"""\
![rewards against generated images, and drift](online.png)

Every run starts from the same base model, makes its own images of the 512 training captions, and trains a LoRA on them
as its config says (`configs/tiny_*.toml`). Then each model draws one image for each of {PROMPTS} held-out captions,
each with a combination of shape, colour and place that no training caption has, in {SAMPLER_STEPS} deterministic steps
with guidance {GUIDANCE:g}, as it sampled in training, from the base model's noise.

What was asked: rows on `clip` and `oracle` raise it on held-out captions and beat base by the oracle; rows on `jpeg`
raise it; the row on `frechet` lowers it, that on `vendi` raises it; each with an interval that excludes no change.
Where that is not so the row is marked ✗. For rows on `clip` the oracle and tiny-aesthetic had no part in training; for
rows on `oracle` tiny-clip and tiny-aesthetic had none. A row "by labels" stopped in every round, and the oracle's
grades, 0 to 10, came by the label file.

In the plot, lines are means over a round's images, which have the noise that a method samples with, minus what the base
model makes of the same captions from the same initial noise ({online_start.PER_CAPTION} images of each caption, sampled
alike). Each point is the mean of {online_plot.WINDOW} rounds and of the training seeds.
"""

_PAGE = f"""\
# Methods on own images, on the tiny world

`make bench-online` trains every online method on `tiny-sd` and `tiny-sd3` and writes this page, `docs/online.png` and
`benchmarks/online.json`. Each finished run is a file under `benchmarks/online/`; what is there is not run again unless
its config has changed. `python -m benchmarks.online --help` lists the options; `--table-only` makes the table alone.
Notes outside the two markers stay.

{BEGIN}
{END}
"""
