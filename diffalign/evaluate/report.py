"""One report.html that a person can read: verdict first, then the numbers, then pictures that nobody chose.

Everything is inline: no scripts, no fonts, nothing fetched.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.prompts import by_hash
from diffalign.evaluate import charts
from diffalign.evaluate.curves import read_training
from diffalign.evaluate.results import ROLES, Comparison, Measured, Results, direction, verdict
from diffalign.evaluate.score import Table

GALLERY_PROMPTS = 48
LARGEST_CHANGES = 6

_INLINE_SIDE = 384
"""Larger images are shrunk to this side for the page."""
_PIXELATED_SIDE = 128
"""Images up to this side are shown enlarged, pixel by pixel."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image in the page."""

    arm: str
    uri: str
    width: int | None
    """Shown width of a small image, a whole multiple of its own; None lets the page decide."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A prompt with its image from either arm."""

    prompt: str
    k: int
    pictures: tuple[Picture, ...]
    scores: tuple[tuple[str, float, float], ...]
    """(reward, score against, score of the arm)."""


def write_report(results: Results, table: Table, folder: Path) -> Path:
    """Writes report.html into an evaluation's folder; images are read from there.

    Args:
        table: The raw scores: columns arm, prompt, prompt_index, k, file_name and those of the rewards.
    """
    from jinja2 import Environment, StrictUndefined, select_autoescape
    from markupsafe import Markup

    comparison = results.comparisons[0]
    said = verdict(comparison)
    chief = next(iter(_by_role(comparison)))
    pictures = album(comparison, table, folder)
    run = results.models[comparison.arm].get("run")
    environment = Environment(autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=_percent, number=_number, p_value=_p_value, signed=_signed, tied=_tied)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        results=results,
        comparison=comparison,
        rewards=_by_role(comparison),
        verdict=said,
        words={"won": "better", "lost": "worse", "undecided": "no difference shown", "mixed": "judges disagree"},
        roles=ROLES,
        chief=chief,
        detailed={name: r for name, r in _by_role(comparison).items() if len(r.attributes) > 1},
        grouped=comparison.rewards[chief].groups,
        training=read_training(Path(run)) if run else None,
        gallery=pictures.unselected(),
        changes=pictures.largest_changes(chief),
        schedulers=_schedulers(results),
        reproduce=results.settings["command"] or python_call(results, folder),
        direction=direction,
        interval=lambda m: Markup(charts.interval(m.ci_low, m.win_rate, m.ci_high, direction(m))),
        change=lambda m, every: Markup(charts.change(m.mean_against, m.mean_arm, *_span(every))),
        drawn=Markup,
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


@dataclass(frozen=True, kw_only=True)
class Album:
    """The images of an evaluation with their scores, as cards of an arm beside its opponent."""

    comparison: Comparison
    table: Table
    folder: Path
    partners: dict[int, int]
    """Row of the opponent's image of the same prompt and seed, by row of the arm's."""

    def unselected(self) -> list[Card]:
        """The first image of at most 48 prompts, by ascending sha256 of the prompt."""
        rows = [row for row in self.partners if self.table["k"][row] == 0]
        order = by_hash([self.table["prompt"][row] for row in rows])[:GALLERY_PROMPTS]
        return [self.card(rows[i]) for i in order]

    def largest_changes(self, reward: str) -> dict[str, list[Card]]:
        """The six images that gained most by a reward and the six that lost most, at most one a prompt."""
        scores = self.table[reward]
        strongest: dict[int, tuple[float, int]] = {}
        for row, other in self.partners.items():
            gain, index = scores[row] - scores[other], self.table["prompt_index"][row]
            if abs(gain) > abs(strongest.get(index, (0.0, 0))[0]):  # False for NaN
                strongest[index] = (gain, row)
        ordered = sorted(strongest.values())
        gained = [row for gain, row in reversed(ordered) if gain > 0][:LARGEST_CHANGES]
        lost = [row for gain, row in ordered if gain < 0][:LARGEST_CHANGES]
        return {"Largest gains": [self.card(r) for r in gained], "Largest losses": [self.card(r) for r in lost]}

    def card(self, row: int) -> Card:
        other = self.partners[row]
        places = [(self.table["arm"][r], self.table["file_name"][r]) for r in (other, row)]
        return Card(
            prompt=self.table["prompt"][row],
            k=self.table["k"][row],
            pictures=tuple(_picture(arm, self.folder / "images" / arm / name) for arm, name in places),
            scores=tuple((name, self.table[name][other], self.table[name][row]) for name in _by_role(self.comparison)),
        )


def album(comparison: Comparison, table: Table, folder: Path) -> Album:
    """The album of a comparison."""
    places = list(zip(table["arm"], table["prompt_index"], table["k"], strict=True))
    opponents = {(i, k): row for row, (arm, i, k) in enumerate(places) if arm == comparison.against}
    partners = {row: opponents[i, k] for row, (arm, i, k) in enumerate(places) if arm == comparison.arm}
    return Album(comparison=comparison, table=table, folder=folder, partners=partners)


def python_call(results: Results, folder: Path) -> str:
    """The call that makes this evaluation again."""
    rewards = results.comparisons[0].rewards
    roles = {name: r.role for name, r in rewards.items() if r.role_declared}
    known = ("images_per_prompt", "steps", "guidance", "batch_size", "device", "dtype", "seed")
    others = [results.models[arm]["spec"] for arm in results.arms[1:]]
    aligned = repr(others[0]) if len(others) == 1 else repr(dict(zip(results.arms[1:], others, strict=True)))
    settings = ", ".join(f"{name}={results.settings[name]!r}" for name in known)
    return "\n".join(
        [
            "from diffalign.evaluate import EvaluationSettings, evaluate",
            "",
            "evaluate(",
            f"    {results.models[results.arms[0]]['spec']!r},",
            f"    {aligned},",
            f"    {str(folder / 'prompts.jsonl')!r},",
            f"    rewards={[r.spec for r in rewards.values()]!r},",
            f"    roles={roles!r},",
            f"    settings=EvaluationSettings({settings}),",
            f"    output={str(folder) + '-again'!r},",
            ")",
        ]
    )


def _picture(arm: str, file: Path) -> Picture:
    """An image inline: its own bytes if it is small, else shrunk, as JPEG."""
    from PIL import Image

    data, kind = file.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        side = max(image.size)
        if side > _INLINE_SIDE:
            image.thumbnail((_INLINE_SIDE, _INLINE_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
        width = image.width * max(1, _PIXELATED_SIDE // side) if side <= _PIXELATED_SIDE else None
    return Picture(arm=arm, uri=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width=width)


def _by_role(comparison: Comparison) -> dict[str, Any]:
    """Rewards by role, the most telling first."""
    order = list(ROLES)
    return dict(sorted(comparison.rewards.items(), key=lambda item: order.index(item[1].role)))


def _schedulers(results: Results) -> list[str]:
    """Keys in which the arms' samplers differ, as words; equal samplers are the protocol."""
    arms = results.comparisons[0].against, results.comparisons[0].arm
    one, two = (results.models[arm]["scheduler"] for arm in arms)
    return [f"{k}: {one.get(k)!r} and {two.get(k)!r}" for k in sorted({*one, *two}) if one.get(k) != two.get(k)]


def _span(measured: Sequence[Measured]) -> tuple[float, float]:
    """Ends of a common axis: [0, 1] if every mean lies there."""
    means = [v for m in measured for v in (m.mean_arm, m.mean_against)]
    low, high = min(means), max(means)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low - 0.1 * (high - low), high + 0.1 * (high - low))


def _tied(text: str) -> str:
    """Keeps percent signs on the line of their number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return (f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}").replace("-", "\N{MINUS SIGN}")


def _signed(value: float | None) -> str:
    if value is None:
        return _number(value)
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + _number(abs(value))


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"
