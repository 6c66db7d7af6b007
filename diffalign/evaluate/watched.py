"""What a run's metrics.jsonl says of its guard: rewards, variety and drift from look to look, and what it decided."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.evaluate import plots
from diffalign.evaluate.charts import Series, lines
from diffalign.evaluate.curves import Chart

_ROLES = {"trained_on": "trained", "held_out": "held out"}
_STYLES = ("arm1", "arm2", "arm3", "arm4", "arm5", "arm0")

Entry = Mapping[str, Any]
"""A line of metrics.jsonl that holds a look."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The guard's record of a run."""

    charts: tuple[Chart, ...]
    diverged: bool
    """At some look."""
    sentence: str
    """What it decided, and why."""


def read_watch(run: Path) -> Watched | None:
    """The guard's record in a run's folder; None where no guard has looked."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    looks = [row for row in rows if "guard" in row]
    if not looks:
        return None
    bad = [row for row in looks if row["guard"]["diverged"]]
    charts = (*_rewards(looks), *_diversity(looks), *_drift(looks))
    return Watched(charts=charts, diverged=bool(bad), sentence=decision(looks))


def decision(looks: Sequence[Entry]) -> str:
    """What a guard found and did, in words."""
    bad = [row for row in looks if row["guard"]["diverged"]]
    later, last = sum(row["step"] > 0 for row in looks), looks[-1]
    if not bad:
        return f"The guard looked after {last['step']} steps and found nothing in any of its looks ({later})."
    first, ended = bad[0], last["guard"]["diverged"] and last["guard"]["action"] != "warn"
    if not ended:
        steps = ", ".join(str(row["step"]) for row in bad)
        return (
            f"The guard found that training diverged in {len(bad)} of its looks ({later}), at step {steps}; training "
            f"went on. At step {first['step']}: {first['guard']['reason']}"
        )
    tail = f"the last look that found nothing was at step {last['guard']['whole']}"
    if last["guard"]["action"] == "roll_back":
        tail = f"the weights are those of step {last['guard']['whole']}, the last that was found whole"
    return f"The guard ended training at step {last['step']}; {tail}. {last['guard']['reason']}"


def _rewards(looks: Sequence[Entry]) -> list[Chart]:
    """Win rates against the start, which rewards of any scale have, by step and by how far images drifted."""
    roles = {name: one["role"] for name, one in looks[0]["guard"]["rewards"].items()}
    styles = {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(roles)}
    legend = tuple((f"{name} ({_ROLES[role]})", styles[name]) for name, role in roles.items())
    rates = {name: [100 * row["guard"]["rewards"][name]["measured"]["win_rate"] for row in looks] for name in roles}
    title, about = "Win rate against the start", "percent, by optimizer step; the start is at 50"
    by_step = [
        Series(name=name, style=styles[name], line=(), points=list(zip(_steps(looks), rates[name], strict=True)))
        for name in roles
    ]
    found = [Chart(title=title, about=about, legend=legend, svg=lines(title, by_step, 50.0))]
    moved = looks[0]["guard"]["drift"]
    if moved:
        metric, way = moved[0]["metric"], [row["guard"]["drift"][0]["mean"] for row in looks]
        paths = [plots.Path(points=list(zip(way, rates[name], strict=True)), style=styles[name]) for name in roles]
        drawn = plots.figure(
            "Win rate against drift", paths, x_name=metric, y_name="win rate, %", x_mark=0.0, y_mark=50.0
        )
        about = "a reward that training never saw should not fall as images move away from the start's"
        found.append(Chart(title="Win rate against drift", about=about, legend=legend, svg=drawn))
    return found


def _diversity(looks: Sequence[Entry]) -> list[Chart]:
    """What is left of the start's variety within prompts."""
    names = [one["metric"] for one in looks[0]["guard"]["diversity"]]
    series = []
    for name, style in zip(names, _STYLES, strict=False):
        kept = [(row["step"], one) for row in looks for one in row["guard"]["diversity"] if one["metric"] == name]
        points = [(float(step), float(one["ratio"])) for step, one in kept]
        series.append(Series(name=name, style=style, line=(), points=points))
    if not series:
        return []
    legend = tuple((s.name, s.style) for s in series)
    about = "of a prompt's images, as a share of the start's"
    return [Chart(title="Diversity", about=about, legend=legend, svg=lines("Diversity", series, 1.0))]


def _drift(looks: Sequence[Entry]) -> list[Chart]:
    """How far images went from the start's of the same noise, a chart a measure."""
    found = []
    for place, one in enumerate(looks[0]["guard"]["drift"]):
        points = [(float(row["step"]), float(row["guard"]["drift"][place]["mean"])) for row in looks]
        title, series = f"Drift: {one['metric']}", [Series(name=one["metric"], style="arm1", line=(), points=points)]
        about = "mean over prompts, to the start's image of the same noise"
        found.append(Chart(title=title, about=about, legend=(), svg=lines(title, series, 0.0)))
    return found


def _steps(looks: Sequence[Entry]) -> list[float]:
    return [float(row["step"]) for row in looks]
