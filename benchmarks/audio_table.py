"""From finished runs to the audio table: benchmarks/audio.json, docs/audio-results.md and docs/audio.png.

Runs of one row differ by training seed only. The caption is the sampling unit: scores against the base model's clip of
the same noise are averaged over training seeds, then captions are resampled; of numbers of sets the ends of the seeds'
intervals are averaged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import audio_runs, method_table, online_table
from benchmarks.audio_measures import (
    DRIFT_CLIPS,
    ENCODERS,
    EXEMPLARS,
    GUIDANCE,
    LOOKED,
    PROMPTS,
    SAMPLER_STEPS,
    SCORED,
    SETS,
)
from benchmarks.audio_runs import AudioCell
from benchmarks.method_measures import LEVELS
from benchmarks.method_table import Record, compared, mean_of
from benchmarks.online_plot import smoothed
from benchmarks.online_runs import OnlineRow
from benchmarks.online_table import changed, joined, pooled

BEGIN, END = "<!-- table: made by make bench-audio, do not edit -->", "<!-- end of table -->"

_COSTS = ("cpu_seconds", "seconds", "sampling_seconds", "update_seconds", "process_peak_bytes")
_DISTANCES = tuple(f"fad_{name}" for name in ENCODERS)
_PANELS = {
    "fad_clap": "FAD of the round's clips, tiny-clap",
    "fad_log_mel": "FAD of the round's clips, log-mel",
    "oracle": "oracle of the round's clips",
}


def summary(row: OnlineRow, model: str, records: Sequence[Record], base: Record) -> dict[str, Any]:
    """All numbers of one row; those without an interval are means over training seeds."""
    rewards = {name: compared(records, base, name) for name in SCORED}
    sets = {name: pooled([record["sets"][name] for record in records]) for name in SETS}
    if row.reward in _DISTANCES:
        as_asked = all(sets[name]["high"] < 0 for name in _DISTANCES)
    elif row.reward in sets:
        as_asked = sets[row.reward]["low"] > 0
    else:
        low = rewards[row.reward].difference_low
        as_asked = low is not None and low > 0
    return {
        "row": row.name,
        "trained_on": row.reward,
        "seeds": [record["seed"] for record in records],
        "rewards": {name: asdict(found) for name, found in rewards.items()},
        "sets": sets,
        "sets_by_seed": {name: [record["sets"][name] for record in records] for name in SETS},
        "as_asked": as_asked,
        "attributes": mean_of([record["attributes"] for record in records]),
        "movement": mean_of([record["movement"] for record in records]),
        "curve": joined([record["curve"] for record in records], LOOKED),
        "cost": {key: float(np.mean([record["cost"][key] for record in records])) for key in _COSTS},
        "method": records[0]["described"]["config"]["method"],
        "lr": records[0]["described"]["config"]["optimizer"]["lr"],
        "tried": row.tried.get(model),
    }


def write(cells: Sequence[AudioCell], *, root: Path) -> None:
    """Writes the table under `root`: numbers, text and picture."""
    models = online_table.collect(cells, audio_runs.base_file, summary)
    content = {"version": 1, "protocol": audio_runs.protocol(), "models": models}
    (root / "benchmarks" / "audio.json").write_text(json.dumps(content, indent=1) + "\n")
    page, name = root / "docs" / "audio-results.md", "docs/audio-results.md"
    text = page.read_text() if page.is_file() else _PAGE
    page.write_text(method_table.between(text, markdown(models), name=name, begin=BEGIN, end=END))
    if any(model["rows"] for model in models.values()):
        draw(models, root / "docs" / "audio.png")


def markdown(models: Mapping[str, Any]) -> str:
    """Tables of all models, with what they say."""
    parts = [_HOW, "| column | what |\n|---|---|"]
    parts[-1] += "".join(f"\n| {name} | {what} |" for name, what in _COLUMNS.items()) + "\n"
    for model, found in models.items():
        parts.append(f"## {model}\n")
        parts.append("| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|")
        parts[-1] += "".join("\n| " + " | ".join(_cells(row)) + " |" for row in found["rows"])
        parts.append(f"\nBase: {_said(found['base']['scores'] | found['base']['sets'])}.")
        parts.append(_fidelity(found))
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
    return "\n".join(parts)


def draw(models: Mapping[str, Any], file: Path) -> None:
    """A row of panels a model: distances and oracle against generated clips, and changes on held-out captions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["row"] for found in models.values() for row in found["rows"]))
    colour = {name: pyplot.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    with pyplot.rc_context({"font.size": 8.5, "axes.titlesize": 9.5}):
        size = (15, 3.6 * len(models) + 0.6)
        figure, axes = pyplot.subplots(len(models), len(_PANELS) + 1, figsize=size, squeeze=False, layout="constrained")
        for line, (model, found) in zip(axes, models.items(), strict=True):
            for axis, (panel, title) in zip(line, _PANELS.items(), strict=False):
                for row in found["rows"]:
                    clips = [one["images"] for one in row["curve"]]
                    values = smoothed([one[panel] for one in row["curve"]])
                    axis.plot(clips, values, color=colour[row["row"]], linewidth=1.6)
                axis.set_title(f"{model}: {title}", loc="left")
                axis.set_xlabel("generated clips")
            _falls(line[-1], found, colour)
            line[-1].set_title(f"{model}: held-out captions", loc="left")
            for axis in line:
                axis.grid(color="#e6e6e6", linewidth=0.7)
                axis.set_axisbelow(True)
                axis.spines[["top", "right"]].set_visible(False)
        handles = [pyplot.Line2D([], [], color=colour[name], linewidth=2, label=name) for name in names]
        handles += [
            pyplot.Line2D([], [], color="#333333", marker=mark, linewidth=0, label=f"FAD by {name}")
            for name, mark in zip(ENCODERS, "os", strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(file, dpi=130, metadata={"Software": None})
        pyplot.close(figure)


def _falls(axis: Any, found: Mapping[str, Any], colour: Mapping[str, Any]) -> None:
    """Changes of both distances in shares of the base model's, with their intervals."""
    for place, row in enumerate(found["rows"]):
        for shift, (name, mark) in zip((0.14, -0.14), zip(_DISTANCES, "os", strict=True), strict=True):
            one = row["sets"][name]
            x, low, high = (100 * one[key] / one["base"] for key in ("change", "low", "high"))
            bounds = np.clip([[x - low], [high - x]], 0, None)
            axis.errorbar([x], [place + shift], xerr=bounds, fmt=mark, markersize=5, color=colour[row["row"]])
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set_yticks([])
    axis.set_xlabel("change of FAD, % of base")


def _cells(row: Mapping[str, Any]) -> list[str]:
    rewards, sets, cost = row["rewards"], row["sets"], row["cost"]
    oracle = rewards["oracle"]
    return [
        f"{row['row']}{'' if row['as_asked'] else ' ✗'}",
        f"`{row['trained_on']}` ({len(row['seeds'])})",
        *(f"{sets[name]['value']:.4f} {changed(sets[name], 'change', '', 4)}" for name in _DISTANCES),
        f"{sets['vendi']['value']:.2f} {changed(sets['vendi'], 'change', '', 2)}",
        *(
            f"{rewards[name]['mean_arm']:.3f} {changed(rewards[name], 'mean_difference', 'difference_')}"
            for name in ("per_clip", "clap", "oracle")
        ),
        f"{100 * oracle['win_rate']:.1f} ({100 * oracle['ci_low']:.1f} to {100 * oracle['ci_high']:.1f})",
        f"{row['movement']['prediction_drift']:.4f}",
        f"{row['curve'][-1]['images'] if row['curve'] else 0}",
        f"{cost['cpu_seconds']:.0f}",
    ]


def _fidelity(found: Mapping[str, Any]) -> str:
    """What became of the captions' attributes, by the oracle."""
    names = list(found["base"]["attributes"])
    lines = ["\nWhat the oracle hears of what captions ask, in [0, 1]:\n", f"| | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for title, attributes in [("base", found["base"]["attributes"])] + [
        (row["row"], row["attributes"]) for row in found["rows"]
    ]:
        lines.append(f"| {title} | " + " | ".join(f"{attributes[name]:.3f}" for name in names) + " |")
    return "\n".join(lines)


def _said(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


_COLUMNS = {
    "method": "row of the plan; its config is `tiny_audio_<row>`, of `dragon_fad` `tiny_audio_dragon`",
    "trained on": "which of these numbers training was told to better (number of training seeds)",
    "FAD, tiny-clap": f"of {PROMPTS} clips to {EXEMPLARS['count']} clean ones, in the encoder that `fad_clap` trains "
    "on (change with a 95 % paired interval of the basic bootstrap over captions, the means of the ends of the seeds')",
    "FAD, log-mel": "the same in an encoder without weights that no run has seen",
    "Vendi": "Vendi score of the clips in tiny-clap's space (change, interval)",
    "per clip": "minus the FAD of each clip's own frames to the frames of the clean ones, log-mel (change, interval)",
    "CLAP": "tiny-clap's score of clip and caption (change, interval)",
    "oracle": "how well a clip sounds like what its caption asks, in [0, 1] (change, interval)",
    "oracle win %": "share of captions where the oracle scores the clip above the base model's from the same noise, "
    "ties half, with a 95 % bootstrap interval over captions",
    "drift": f"mean squared difference between the predictions of policy and base, {DRIFT_CLIPS} clips of the base "
    f"model, {len(LEVELS)} noise levels",
    "clips": "clips that training made of its own",
    "CPU s": "seconds of one core for training",
}
"""Columns and what they say."""

_HOW = f"""\
![distances and oracle against generated clips, and changes on held-out captions](audio.png)

Every run starts from the same base model, makes its own clips of the 512 training captions, and trains a LoRA on them
as its config says (`configs/tiny_audio_*.toml`). Then each model plays one clip for each of {PROMPTS} held-out
captions, whose combinations of pitch, timbre and rhythm no training caption has, in {SAMPLER_STEPS} deterministic steps
with guidance {GUIDANCE:g}, from the base model's noise. Both sets of a comparison have {PROMPTS} clips.

What was asked: the row on `fad_clap` lowers FAD by both encoders; the rows on `per_clip`, `clap` and `vendi` raise
theirs; each with an interval that excludes no change, else the row is marked ✗. The oracle had no part in training: it
says what became of the captions.

In the plot, numbers of a round are those of the clips that training made, all rounds of one size.
"""

_PAGE = f"""\
# DRAGON on sounds of the tiny world

`make bench-audio` trains `tiny-audio` by DRAGON's kinds of rewards and writes this page, `docs/audio.png` and
`benchmarks/audio.json`. Each finished run is a file under `benchmarks/audio/`; what is there is not run again unless
its config has changed. `python -m benchmarks.audio --help` lists the options; `--table-only` makes the table alone.
Notes outside the two markers stay.

{BEGIN}
{END}
"""
