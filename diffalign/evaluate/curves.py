"""What a run's metrics.jsonl says about its training: curves, and the sign of likelihood displacement at its end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.evaluate.charts import Series, lines
from diffalign.validation import Movement, Validation, movement

_ACCURACY = "share of pairs where the model prefers the chosen image; one half is chance"
_GAINS = "denoising error of the reference minus that of the model; above 0 the model became better at an image"

_CHARTS: tuple[tuple[str, str, dict[str, str], float | None], ...] = (
    ("Loss", "the method's own; lower is better", {"loss": "loss"}, None),
    ("Preference accuracy", _ACCURACY, {"rewards/accuracies": "accuracy"}, 0.5),
    (
        "Margin",
        "implicit reward of the chosen image minus that of the rejected one",
        {"rewards/margins": "margin"},
        0.0,
    ),
    ("Gains over the reference", _GAINS, {"winner_gain": "chosen", "loser_gain": "rejected"}, 0.0),
)
"""Title, what it is, name of each series by its metric, level that matters."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One drawn chart."""

    title: str
    about: str
    legend: tuple[tuple[str, str], ...]
    """(name, class of its colour) of each series."""
    svg: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training of a run, drawn."""

    charts: tuple[Chart, ...]
    held_out: bool
    """Whether held-out pairs were measured."""
    displaced: bool
    """Both gains are below 0 at the end: the model became worse at chosen and rejected images alike."""
    end: Mapping[str, float]
    """`winner_gain` and `loser_gain` at the end, where the run has them; without a reference, over the run's start."""
    end_of: str
    """What `end` was measured on."""


def read_training(run: Path) -> Training | None:
    """The training of a run's folder; None where there is no metrics.jsonl, or nothing in it."""
    file = run / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []
    steps = [e for e in entries if "loss" in e]
    held = [{"step": e["step"], **e["validation"]} for e in entries if "validation" in e]
    if not steps:
        return None
    end, end_of, moved = _end(steps, [e for e in entries if "validation" in e])
    return Training(
        charts=(*_of_rounds([e for e in entries if "round" in e]), *_charts(steps, held), *_by_noise(moved)),
        held_out=bool(held),
        displaced=len(end) == 2 and all(value < 0 for value in end.values()),
        end=end,
        end_of=end_of,
    )


def _of_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """What each round of a run on its own images scored, by reward."""
    names = [key for key in rounds[0] if key.startswith("score/") and key.count("/") == 1] if rounds else []
    found = []
    for name in names:
        series = [Series(name=name.removeprefix("score/"), style="one", line=_line(rounds, name), points=())]
        legend = tuple((s.name, s.style) for s in series)
        title = f"Score by {series[0].name}"
        about = "mean over the images of each round, before it is trained on"
        found.append(Chart(title=title, about=about, legend=legend, svg=lines(title, series, None)))
    return found


def _charts(steps: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]) -> list[Chart]:
    found = []
    for title, about, wanted, mark in _CHARTS:
        series = [
            Series(name=name, style=style, line=_line(steps, metric), points=_line(held, metric))
            for (metric, name), style in zip(wanted.items(), ("one", "two"), strict=False)
            if metric in steps[0]
        ]
        if series:
            legend = tuple((s.name, s.style) for s in series)
            found.append(Chart(title=title, about=about, legend=legend, svg=lines(title, series, mark)))
    return found


def _line(entries: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    return [(float(e["step"]), float(e[metric])) for e in entries if metric in e]


def _by_noise(moved: Movement | None) -> list[Chart]:
    """Where between clean and pure noise the model moved."""
    if moved is None:
        return []
    named = (("chosen", "one", moved.deciles["winner"]), ("rejected", "two", moved.deciles["loser"]))
    series = [
        Series(name=name, style=style, line=(), points=[(float(i + 1), v) for i, v in enumerate(row) if v is not None])
        for name, style, row in named
        if any(v is not None for v in row)
    ]
    if not series:
        return []
    legend = tuple((s.name, s.style) for s in series)
    title = "Gains by noise level at the end"
    about = "held-out images, by tenth of the noise range: 1 is almost clean, 10 almost pure noise"
    return [Chart(title=title, about=about, legend=legend, svg=lines(title, series, 0.0))]


def _end(
    steps: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], str, Movement | None]:
    """Gains at the end: of the last validation, or else the mean over the last tenth of the steps."""
    if held:
        first, last = (Validation(metrics=e["validation"], deciles=e.get("deciles", {})) for e in (held[0], held[-1]))
        moved = movement(first, last)
        gains = {} if moved is None else {"winner_gain": moved.winner, "loser_gain": moved.loser}
        end = {name: float(value) for name, value in gains.items() if value is not None}
        return end, f"held-out pairs at step {held[-1]['step']}", moved
    names = [name for name in ("winner_gain", "loser_gain") if name in steps[0]]
    last_steps = steps[-max(1, len(steps) // 10) :]
    end = {n: sum(float(e[n]) for e in last_steps) / len(last_steps) for n in names}
    return end, f"the last {len(last_steps)} training steps", None
