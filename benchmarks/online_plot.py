"""The picture of the online table: rewards against generated images, and drift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 5
"""Rounds that a point of a line is the mean of."""

_PANELS = {
    "clip": "tiny-clip of rounds, above base",
    "oracle": "oracle of rounds, above base",
    "jpeg": "JPEG of rounds, kB above base",
}


def draw(models: Mapping[str, Any], file: Path) -> None:
    """A row of panels a model: tiny-clip, oracle and file size against generated images, drift against oracle."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["row"] for found in models.values() for row in found["rows"]))
    colour = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    with pyplot.rc_context({"font.size": 8.5, "axes.titlesize": 9.5}):
        figure, axes = pyplot.subplots(
            len(models), len(_PANELS) + 1, figsize=(15, 3.6 * len(models) + 0.6), squeeze=False, layout="constrained"
        )
        for line, (model, found) in zip(axes, models.items(), strict=True):
            for axis, (panel, title) in zip(line, _PANELS.items(), strict=False):
                for row in found["rows"]:
                    images, values = points(row, panel)
                    if images:
                        axis.plot(images, values, color=colour[row["row"]], linewidth=1.6)
                if not axis.lines:
                    axis.set_axis_off()
                    continue
                axis.set_title(f"{model}: {title}", loc="left")
                axis.axhline(0, color="#333333", linewidth=0.8)
                axis.set_xlabel("generated images")
            _drift(line[-1], found["rows"], colour)
            line[-1].set_title(f"{model}: held-out captions", loc="left")
            for axis in line:
                axis.grid(color="#e6e6e6", linewidth=0.7)
                axis.set_axisbelow(True)
                axis.spines[["top", "right"]].set_visible(False)
        handles = [pyplot.Line2D([], [], color=colour[name], linewidth=2, label=name) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(file, dpi=130, metadata={"Software": None})
        pyplot.close(figure)


def points(row: Mapping[str, Any], panel: str) -> tuple[list[int], list[float]]:
    """(generated images, means over `WINDOW` rounds of what a round has above base) of a row's line in a panel.

    Nothing where it has none: rows on file sizes have a panel of their own.
    """
    if (panel == "jpeg") is not (row["trained_on"] == "jpeg"):
        return [], []
    sign = -1 if panel == "jpeg" else 1  # the reward is minus the size
    values = [sign * ((one["own"]["score/jpeg"] if panel == "jpeg" else one[panel]) - one[f"start_{panel}"])
              for one in row["curve"]]  # fmt: skip
    return [one["images"] for one in row["curve"]], smoothed(values)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with the `WINDOW - 1` before it, as many as there are."""
    return [float(np.mean(values[max(0, i - WINDOW + 1) : i + 1])) for i in range(len(values))]


def _drift(axis: Any, rows: Sequence[Mapping[str, Any]], colour: Mapping[str, Any]) -> None:
    """How far each row's model went, and what the oracle says of it."""
    for row in rows:
        oracle = row["rewards"]["oracle"]
        bounds = [[100 * (oracle["win_rate"] - oracle["ci_low"])], [100 * (oracle["ci_high"] - oracle["win_rate"])]]
        x, y = [row["movement"]["prediction_drift"]], [100 * oracle["win_rate"]]
        axis.errorbar(
            x, y, yerr=np.clip(bounds, 0, None), fmt="o", markersize=5, color=colour[row["row"]], linewidth=1.2
        )
    axis.axhline(50, color="#333333", linewidth=0.8)
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel("drift of predictions from base")
    axis.set_ylabel("oracle win rate over base, %")
