"""What an evaluation leaves on a terminal, in 80 columns: a table and verdict per comparison, flags, ratings, sets."""

import textwrap
from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from diffalign.evaluate import views
from diffalign.evaluate.results import ROLES, Comparison, Results, direction, verdict
from diffalign.evaluate.wording import between, number, p_value, percent, rating, tied

_SHORT = 10
"""Longest name of an arm that heads a column."""
_COLOURS = {"better": "green", "worse": "red", "open": ""}


def lines(results: Results, width: int = 80) -> Iterator[RenderableType]:
    """Everything to print, in order."""
    for comparison in results.comparisons:
        yield _table(comparison)
        yield Text(_wrapped(verdict(comparison).sentence, width))
        for check in comparison.checks:
            if check.flagged:
                yield Text(_wrapped(f"flag: {check.sentence} ({check.name})", width), style="red")
    if results.ratings:
        yield _ratings(results)
    if results.sets:
        yield _sets(results)


def _table(comparison: Comparison) -> Table:
    table = _titled(f"{comparison.arm} against {comparison.against}")
    table.add_column("reward", overflow="fold")
    table.add_column("role", no_wrap=True)
    short = max(len(comparison.against), len(comparison.arm)) <= _SHORT
    for name in (comparison.against, comparison.arm) if short else ("opponent", "arm"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for name in ("win rate", "95 %", "p (Holm)"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, reward in views.by_role(comparison).items():
        total = reward.total
        table.add_row(
            Text(name),
            ROLES[reward.role],
            _plain(number(total.mean_against)),
            _plain(number(total.mean_arm)),
            Text(percent(total.win_rate), style=_COLOURS[direction(total)]),
            f"{100 * total.ci_low:.1f}-{100 * total.ci_high:.1f}",
            p_value(reward.p_holm),
        )
    return table


def _ratings(results: Results) -> Table:
    table = _titled("Elo, 95 % interval")
    table.add_column("reward", overflow="fold")
    for arm in results.arms:
        table.add_column(Text(arm), justify="right", overflow="fold")
    for reward, found in views.ratings(results).items():
        table.add_row(Text(reward), *(_plain(rating(found.get(arm))) for arm in results.arms))
    return table


def _sets(results: Results) -> Table:
    table = _titled("Rewards of sets, higher is better")
    table.add_column("reward", overflow="fold")
    for arm in results.arms:
        table.add_column(Text(arm), justify="right", overflow="fold")
    apart = bool(results.set_differences) and len(results.arms) == 2
    if apart:
        table.add_column("difference, 95 %", justify="right", overflow="fold")
    table.add_column("samples", justify="right", no_wrap=True)
    for found in views.whole_sets(results):
        scores = [number(found.by_arm[arm].score) if arm in found.by_arm else "-" for arm in results.arms]
        said = [" ".join(map(between, found.differences)) or "-"] if apart else []
        table.add_row(Text(found.name), *map(_plain, (*scores, *said)), found.samples)
    return table


def _titled(title: str) -> Table:
    """A table with its title above it."""
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width`; a percent sign stays with its number, which rich would not keep together."""
    return textwrap.fill(tied(text), width).replace("\N{NO-BREAK SPACE}", " ")


def _plain(text: str) -> str:
    """A number that can be pasted into a program."""
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
