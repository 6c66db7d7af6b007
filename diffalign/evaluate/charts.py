"""Small charts as inline SVG. Colours are classes, so that the page's light and dark styles reach them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_CHANGE = (190, 26, 8)
"""Width, height and margin of a change."""
_LINES = (360, 190, 44, 12, 24)
"""Width, height, and the margins left, right and top (bottom is the same as top)."""
_MOST_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart, with points beside it."""

    name: str
    style: str
    """Class of its colour."""
    line: Sequence[tuple[float, float]]
    """(x, y) of what was measured often; drawn faintly, with its moving average on top."""
    points: Sequence[tuple[float, float]] = ()
    """(x, y) of what was measured now and then; drawn as joined dots."""


def change(before: float, after: float, low: float, high: float) -> str:
    """Two values on an axis from `low` to `high`: hollow before, full after."""
    width, height, margin = _CHANGE
    y = height / 2

    def x(value: float) -> str:
        return f"{margin + (value - low) / ((high - low) or 1) * (width - 2 * margin):.1f}"

    return (
        f'<svg class="change" viewBox="0 0 {width} {height}" role="img" aria-label="{before:.3g} to {after:.3g}">'
        f'<line class="axis" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"/>'
        f'<line class="range arm" x1="{x(before)}" x2="{x(after)}" y1="{y}" y2="{y}"/>'
        f'<circle class="hollow" cx="{x(before)}" cy="{y}" r="4.5"/>'
        f'<circle class="dot arm" cx="{x(after)}" cy="{y}" r="5"/></svg>'
    )


def lines(title: str, series: Sequence[Series], mark: float | None = None) -> str:
    """A line chart over steps; `mark` draws a level that matters, such as 0."""
    width, height, left, right, top = _LINES
    everything = [p for s in series for p in (*_smooth(s.line), *s.points)]
    xs = [p[0] for p in everything]
    ys = [p[1] for p in everything] + ([] if mark is None else [mark])
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    scale = ticks(min(ys), max(ys))
    y_low, y_high = min(scale[0], min(ys)), max(scale[-1], max(ys))

    def at(point: tuple[float, float]) -> str:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - right)
        y = height - top - (point[1] - y_low) / (y_high - y_low) * (height - 2 * top)
        return f"{x:.1f},{y:.1f}"

    out = [f'<svg class="lines" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for tick in scale:
        y = at((x_low, tick)).split(",")[1]
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        out.append(f'<text class="tick" x="{left - 6}" y="{y}" text-anchor="end" dy="0.35em">{tick_label(tick)}</text>')
    for x, anchor in ((x_low, "start"), (x_high, "end")):
        place = at((x, y_low)).split(",")[0]
        out.append(f'<text class="tick" x="{place}" y="{height - 6}" text-anchor="{anchor}">{x:.0f}</text>')
    if mark is not None:
        y = at((x_low, mark)).split(",")[1]
        out.append(f'<line class="half" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
    inner = width - left - right, height - 2 * top
    out.append(  # noise beyond the axis is cut off, not drawn over the ticks
        f'<svg x="{left}" y="{top}" width="{inner[0]}" height="{inner[1]}" '
        f'viewBox="{left} {top} {inner[0]} {inner[1]}">'
    )
    out += [f'<polyline class="raw {s.style}" points="{_path(s.line, at)}"/>' for s in series]
    out.append("</svg>")
    for s in series:
        out.append(f'<polyline class="smooth {s.style}" points="{_path(_smooth(s.line), at)}"/>')
        out.append(f'<polyline class="held {s.style}" points="{_path(s.points, at)}"/>')
        for cx, cy in (at(p).split(",") for p in s.points):
            out.append(f'<circle class="point {s.style}" cx="{cx}" cy="{cy}" r="3"/>')
    return "".join([*out, "</svg>"])


def _smooth(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over a tenth of the points, over what is there at the ends."""
    half = len(line) // 20
    sums = [0.0]
    for _, y in line:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(line):
        first, end = max(0, i - half), min(len(line), i + half + 1)
        out.append((x, (sums[end] - sums[first]) / (end - first)))
    return out


def _path(line: Sequence[tuple[float, float]], at: Callable[[tuple[float, float]], str]) -> str:
    """Points of a polyline, thinned out to what an eye can tell apart."""
    step = max(1, math.ceil(len(line) / _MOST_POINTS))
    kept = [*line[::step], *([line[-1]] if line and (len(line) - 1) % step else [])]
    return " ".join(at(point) for point in kept)


def tick_label(tick: float) -> str:
    """A tick as text, with a true minus sign."""
    return f"{tick:.4g}".replace("-", "\N{MINUS SIGN}")


def ticks(low: float, high: float, steps: int = 3) -> list[float]:
    """Round numbers that cover [low, high], at most `steps` steps and one at either end: three to six by default."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / steps
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
    first = math.floor(low / step)
    count = math.ceil(high / step) - first
    return [round((first + i) * step, 12) for i in range(count + 1)]
