"""Figures of an evaluation as inline SVG: win rates in rows that fit any width, and points or lines on two axes.

Colours are classes, so that the page's light and dark styles reach them. Rows are drawn in percent of their width,
without a view box: on a phone they get shorter, not smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from diffalign.evaluate.charts import tick_label, ticks
from diffalign.evaluate.results import Measured, direction

_SIZE = (400, 270)
"""Width and height of a figure on two axes."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 44
_STEPS = 5
"""Steps of an axis, about."""
_ROW = 22
"""Height of a row in pixels."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value on two axes, with intervals where it has them."""

    x: float
    y: float
    style: str
    """Class of its colour."""
    aside: float = 0.0
    """Shift to the right in the drawing, where many dots share an x."""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Path:
    """Joined dots."""

    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Many points, each of no account by itself."""

    points: Sequence[tuple[float, float]]
    style: str


Mark = Dot | Path | Cloud


def reach(measured: Sequence[Measured]) -> float:
    """How far from one half an axis must go to hold all intervals: tenths, at least one and at most five."""
    furthest = max((abs(end - 0.5) for m in measured for end in (m.ci_low, m.ci_high)), default=0.0)
    return next(tenth / 10 for tenth in (1, 2, 3, 4, 5) if furthest <= tenth / 10 + 1e-9)


def interval_row(m: Measured, width: float) -> str:
    """A win rate as a dot in its interval, on an axis of one half plus and minus `width`."""
    low, value, high = (_place(share, width) for share in (m.ci_low, m.win_rate, m.ci_high))
    middle, side = _ROW / 2, direction(m)
    return _row(
        m,
        f'<line class="range {side}" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot {side}" cx="{value}" cy="{middle}" r="5"/>',
    )


def bar_row(m: Measured, width: float) -> str:
    """A win rate as a bar from one half, with its interval as a whisker."""
    low, high = _place(m.ci_low, width), _place(m.ci_high, width)
    ends = sorted((50.0, _percent(m.win_rate, width)))
    middle, side = _ROW / 2, direction(m)
    caps = "".join(
        f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 4}" y2="{middle + 4}"/>' for x in (low, high)
    )
    return _row(
        m,
        f'<rect class="bar {side}" x="{ends[0]:.2f}%" width="{ends[1] - ends[0]:.2f}%" y="4" height="{_ROW - 8}"/>'
        f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>{caps}',
    )


def figure(
    title: str,
    marks: Sequence[Mark],
    *,
    x_name: str,
    y_name: str,
    x_mark: float | None = None,
    y_mark: float | None = None,
    columns: Sequence[tuple[float, str]] = (),
) -> str:
    """Marks on two axes.

    Args:
        x_mark, y_mark: A level that matters; it lies on the axis and is drawn as a line.
        columns: Places on the x axis with a name, written above the figure.
    """
    xs = [x for mark in marks for x in _extent(mark, 0)] + ([] if x_mark is None else [x_mark])
    ys = [y for mark in marks for y in _extent(mark, 1)] + ([] if y_mark is None else [y_mark])
    frame = _Frame(x=ticks(min(xs), max(xs), _STEPS), y=ticks(min(ys), max(ys), _STEPS))
    width, height = _SIZE
    out = [f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" aria-label="{_quoted(title)}">']
    out += frame.grid()
    out.append(f'<text class="tick" x="{width / 2}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text>')
    out.append(f'<text class="tick" x="2" y="11">{escape(y_name)}</text>')
    if y_mark is not None:
        y = frame.at(0.0, y_mark)[1]
        out.append(f'<line class="half" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if x_mark is not None:
        x = frame.at(x_mark, 0.0)[0]
        out.append(f'<line class="half" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    for number, (place, name) in enumerate(sorted(columns)):
        out.append(_column(frame.at(place, 0.0)[0], name, number))
    return "".join([*out, *(_drawn(mark, frame) for mark in marks), "</svg>"])


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Two axes, by their ticks."""

    x: Sequence[float]
    y: Sequence[float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        width, height = _SIZE
        across = (x - self.x[0]) / (self.x[-1] - self.x[0])
        up = (y - self.y[0]) / (self.y[-1] - self.y[0])
        return _LEFT + across * (width - _LEFT - _RIGHT), height - _BOTTOM - up * (height - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        width, height = _SIZE
        out = []
        for tick in self.y:
            y, text = self.at(self.x[0], tick)[1], tick_label(tick)
            out.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text class="tick" x="{_LEFT - 6}" y="{y:.1f}" text-anchor="end" dy="0.35em">{text}</text>')
        for tick in self.x:
            x = self.at(tick, self.y[0])[0]
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{height - _BOTTOM + 15}" text-anchor="middle">'
                f"{tick_label(tick)}</text>"
            )
        return out


def _drawn(mark: Mark, frame: _Frame) -> str:
    if isinstance(mark, Cloud):
        places = "".join("M{:.1f},{:.1f}h0".format(*frame.at(*point)) for point in mark.points)
        return f'<path class="cloud {mark.style}" d="{places}"/>'
    if isinstance(mark, Path):
        joined = [frame.at(*point) for point in mark.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in joined)
        dots = "".join(f'<circle class="point {mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in joined)
        return f'<polyline class="joined {mark.style}" points="{line}"/>{dots}'
    x, y = frame.at(mark.x, mark.y)
    x += mark.aside
    ranges = ""
    if mark.x_range:
        low, high = (frame.at(end, mark.y)[0] + mark.aside for end in mark.x_range)
        ranges += f'<line class="error {mark.style}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if mark.y_range:
        low, high = (frame.at(mark.x, end)[1] for end in mark.y_range)
        ranges += f'<line class="error {mark.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    return f'{ranges}<circle class="point {mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'


def _extent(mark: Mark, axis: int) -> list[float]:
    """Ends of a mark along an axis."""
    if isinstance(mark, Dot):
        value, around = ((mark.x, mark.x_range), (mark.y, mark.y_range))[axis]
        return [value, *(around or ())]
    values = [point[axis] for point in mark.points]
    return [min(values), max(values)]


def _column(x: float, name: str, number: int) -> str:
    """A named place on the x axis; names of neighbours are on different heights."""
    anchor = "start" if x < _SIZE[0] / 4 else "end" if x > _SIZE[0] * 3 / 4 else "middle"
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_SIZE[1] - _BOTTOM}"/>'
        f'<text class="tick name" x="{x:.1f}" y="{_TOP - 5 + 13 * (number % 2)}" text-anchor="{anchor}">'
        f"{escape(name)}</text>"
    )


def _row(m: Measured, drawn: str) -> str:
    label = f"win rate {100 * m.win_rate:.1f} %, interval {100 * m.ci_low:.1f} to {100 * m.ci_high:.1f}"
    return (
        f'<svg class="row" height="{_ROW}" role="img" aria-label="{label}">'
        f'<line class="axis" x1="0%" x2="100%" y1="{_ROW / 2}" y2="{_ROW / 2}"/>'
        f'<line class="half" x1="50%" x2="50%" y1="0" y2="{_ROW}"/>{drawn}</svg>'
    )


def _percent(share: float, width: float) -> float:
    return 50 + (share - 0.5) / width * 48


def _place(share: float, width: float) -> str:
    return f"{_percent(share, width):.2f}%"


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})
