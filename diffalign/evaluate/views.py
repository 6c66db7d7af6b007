"""What a report shows of an evaluation: rows of win rates, figures on two axes, checks in order, a sweep in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.evaluate.comparison import matrix
from diffalign.evaluate.curves import Chart
from diffalign.evaluate.plots import Cloud, Dot, Path, figure
from diffalign.evaluate.results import (
    ROLES,
    Check,
    Comparison,
    Measured,
    Rating,
    Results,
    RewardResult,
    Role,
    SetDifference,
    SetResult,
    Sweep,
)
from diffalign.evaluate.score import Table
from diffalign.evaluate.stats import per_prompt
from diffalign.evaluate.wording import number, percent, spread

ARM_COLOURS = 6
_ROLE_STYLES: dict[Role, str] = {"labeller": "arm3", "held_out": "arm1", "trained_on": "arm2"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A win rate with a name."""

    name: str
    measured: Measured
    role: Role | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Win rates that are read together; without a title each row names itself."""

    title: str | None
    rows: tuple[Row, ...]
    role: Role | None = None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The checks of a comparison, by what they found."""

    title: str
    flagged: tuple[Check, ...]
    passed: tuple[Check, ...]
    unmeasured: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """An arm against another at equal guidance, by one reward."""

    reward: str
    title: str
    """The arm, and its opponent unless that is the base."""
    cells: Mapping[float, Measured]


def by_role(comparison: Comparison) -> dict[str, RewardResult]:
    """Rewards by role, the most telling first."""
    order = list(ROLES)
    return dict(sorted(comparison.rewards.items(), key=lambda item: order.index(item[1].role)))


def of_role(comparison: Comparison, role: Role) -> dict[str, RewardResult]:
    """Rewards of one role."""
    return {name: reward for name, reward in comparison.rewards.items() if reward.role == role}


def judge(comparison: Comparison) -> str:
    """The first held-out reward, by which pictures are chosen; of none, the most telling one."""
    return next(iter({**of_role(comparison, "held_out"), **by_role(comparison)}))


def roles(results: Results) -> dict[str, Role | None]:
    """The role of each reward; None where arms differ, since what one was trained on another never saw."""
    found: dict[str, set[Role]] = {}
    for comparison in results.comparisons:
        for name, reward in by_role(comparison).items():
            found.setdefault(name, set()).add(reward.role)
    return {name: next(iter(said)) if len(said) == 1 else None for name, said in found.items()}


def name_of(results: Results, comparison: Comparison) -> str:
    """A comparison among others: the arm, and its opponent unless that is the base."""
    return comparison.arm if comparison.against == results.arms[0] else f"{comparison.arm} against {comparison.against}"


def versus_base(results: Results) -> list[Comparison]:
    """The comparisons of an arm with the base."""
    return [c for c in results.comparisons if c.against == results.arms[0]]


def forest(results: Results) -> list[Rows]:
    """The win rates of every reward in every comparison."""
    if len(results.comparisons) == 1:
        first = by_role(results.comparisons[0])
        return [Rows(title=None, rows=tuple(Row(name=n, measured=r.total, role=r.role) for n, r in first.items()))]
    return [
        Rows(
            title=name,
            role=role,
            rows=tuple(
                Row(
                    name=name_of(results, c),
                    measured=c.rewards[name].total,
                    role=c.rewards[name].role if role is None else None,
                )
                for c in results.comparisons
                if name in c.rewards
            ),
        )
        for name, role in roles(results).items()
    ]


def grouped(results: Results, reward: str, label: str) -> list[Rows]:
    """The win rates of a reward by the values of a label of the prompts, such as `Category`."""
    found = {name_of(results, c): c.rewards[reward].groups.get(label, {}) for c in versus_base(results)}
    values = sorted({value for groups in found.values() for value in groups})
    if len(found) == 1:
        [groups] = found.values()
        return [Rows(title=None, rows=tuple(Row(name=value, measured=groups[value]) for value in values))]
    return [
        Rows(title=v, rows=tuple(Row(name=arm, measured=groups[v]) for arm, groups in found.items() if v in groups))
        for v in values
    ]


def checked(results: Results) -> list[Checked]:
    """The checks of each comparison that has any."""
    return [
        Checked(
            title=name_of(results, c),
            flagged=tuple(check for check in c.checks if check.flagged),
            passed=tuple(check for check in c.checks if check.flagged is False),
            unmeasured=tuple(check for check in c.checks if check.flagged is None),
        )
        for c in results.comparisons
        if c.checks
    ]


def ratings(results: Results) -> dict[str, dict[str, Rating]]:
    """Ratings by reward, then by arm."""
    found: dict[str, dict[str, Rating]] = {}
    for one in results.ratings:
        found.setdefault(one.reward, {})[one.arm] = one
    return found


def sampler(results: Results) -> str | None:
    """The first sampler that is known."""
    return next((str(scheduler["class"]) for scheduler in schedulers(results).values()), None)


def schedulers(results: Results) -> dict[str, Mapping[str, Any]]:
    """Class and config of the sampler by arm; finished images do not say what made them."""
    return {arm: m["scheduler"] for arm, m in results.models.items() if m.get("scheduler") and not m.get("images")}


def styles(results: Results) -> dict[str, str]:
    """The colour of each arm."""
    return {arm: f"arm{number % ARM_COLOURS}" for number, arm in enumerate(results.arms)}


def trade_offs(results: Results, table: Table) -> list[Chart]:
    """Change per prompt by what training saw, against change by each held-out reward."""
    charts = []
    for comparison in versus_base(results):
        seen = of_role(comparison, "trained_on") or of_role(comparison, "labeller")
        for target in list(seen)[:1]:
            for judge in of_role(comparison, "held_out"):
                found = _trade_off(table, comparison, target, judge)
                title = judge if len(results.arms) == 2 else f"{comparison.arm}, {judge}"
                charts += [] if found is None else [Chart(title=title, about=found[0], legend=(), svg=found[1])]
    return charts


def _trade_off(table: Table, comparison: Comparison, target: str, judge: str) -> tuple[str, str] | None:
    """(what it shows, drawing) of two rewards; None where fewer than two prompts have both."""
    both = np.stack([_changes(table, comparison, name) for name in (target, judge)])
    both = both[:, ~np.isnan(both).any(axis=0)]
    if both.shape[1] < 2:
        return None
    x, y = both
    about = f"each dot a prompt; on {percent(float(((x > 0) & (y < 0)).mean()))} {target} rose and {judge} fell"
    if x.std() > 0 and y.std() > 0:
        about += f"; correlation {number(float(np.corrcoef(x, y)[0, 1]))}"
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    drawn = figure(
        f"Change by {judge} against change by {target}, {comparison.arm} against {comparison.against}",
        [Cloud(points=points, style="arm1")],
        x_name=f"change by {target}",
        y_name=f"change by {judge}",
        x_mark=0.0,
        y_mark=0.0,
    )
    return about, drawn


def _changes(table: Table, comparison: Comparison, reward: str) -> np.ndarray:
    """Mean change over seeds by prompt, NaN where there is none."""
    change = matrix(table, comparison.arm, reward) - matrix(table, comparison.against, reward)
    means, kept = per_prompt(change)
    out = np.full(len(change), np.nan)
    out[kept] = means
    return out


def drifts(results: Results, one: str = "image") -> list[Chart]:
    """Win rates by every reward against how far an arm's samples moved from the base's."""
    found = versus_base(results)
    metrics = dict.fromkeys(d.metric for c in found for d in c.drift)
    roles = [role for role in ROLES if any(of_role(c, role) for c in found)]
    legend = tuple((ROLES[role], _ROLE_STYLES[role]) for role in roles)
    return [
        Chart(
            title=metric,
            about="win rate by each reward in percent, base at 50",
            legend=legend,
            svg=_drift(found, metric, one),
        )
        for metric in metrics
    ]


def _drift(comparisons: Sequence[Comparison], metric: str, one: str) -> str:
    moved = [(c, d) for c in comparisons for d in c.drift if d.metric == metric]
    dots = [
        Dot(
            x=d.mean,
            y=100 * r.total.win_rate,
            style=_ROLE_STYLES[r.role],
            x_range=None if d.low is None or d.high is None else (d.low, d.high),
            y_range=(100 * r.total.ci_low, 100 * r.total.ci_high),
            aside=8.0 * (place - (len(c.rewards) - 1) / 2),
        )
        for c, d in moved
        for place, r in enumerate(by_role(c).values())
    ]
    return figure(
        f"Win rate against {metric}",
        dots,
        x_name=f"{metric}, to the base's {one} of the same noise",
        y_name="win rate, %",
        x_mark=0.0,  # where an arm that did not move would be
        y_mark=50.0,
        columns=[(d.mean, c.arm) for c, d in moved],
    )


@dataclass(frozen=True, kw_only=True)
class WholeSet:
    """What a reward of whole sets says of all arms."""

    name: str
    version: str
    by_arm: Mapping[str, SetResult]
    differences: tuple[SetDifference, ...]

    @property
    def samples(self) -> str:
        return ", ".join(dict.fromkeys(str(one.samples) for one in self.by_arm.values()))


def whole_sets(results: Results) -> list[WholeSet]:
    """By reward, in the order in which they were asked for."""
    found = []
    for spec in dict.fromkeys(one.spec for one in results.sets):
        mine = {one.arm: one for one in results.sets if one.spec == spec}
        first = next(iter(mine.values()))
        found.append(
            WholeSet(
                name=set_name(results, first),
                version=first.version,
                by_arm=mine,
                differences=tuple(d for d in results.set_differences if d.spec == spec),
            )
        )
    return found


def set_name(results: Results, found: SetResult) -> str:
    """A reward of whole sets among others: its name, or its spec where two have one name."""
    return found.reward if len({s.spec for s in results.sets if s.reward == found.reward}) == 1 else found.spec


def sweep_charts(sweep: Sweep, colours: Mapping[str, str]) -> list[Chart]:
    """Mean score against guidance, a line an arm, a chart a reward."""
    charts = []
    for reward in dict.fromkeys(p.reward for p in sweep.points):
        lines: dict[str, list[tuple[float, float]]] = {}
        for p in sorted((p for p in sweep.points if p.reward == reward), key=lambda p: p.guidance):
            lines.setdefault(p.arm, []).append((p.guidance, p.mean))
        drawn = figure(
            f"Mean {reward} against guidance",
            [Path(points=points, style=colours[arm]) for arm, points in lines.items()],
            x_name="guidance",
            y_name=f"mean {reward}",
        )
        legend = tuple((arm, colours[arm]) for arm in lines)
        charts.append(Chart(title=reward, about="mean score by guidance", legend=legend, svg=drawn))
    return charts


def sweep_words(sweep: Sweep) -> dict[str, list[str]]:
    """Equal guidance and best against best: by reward, a sentence for each comparison."""
    sentences: dict[str, list[str]] = {}
    for arm, against, reward in dict.fromkeys((c.arm, c.against, c.reward) for c in sweep.comparisons):
        mine = [c for c in sweep.comparisons if (c.arm, c.against, c.reward) == (arm, against, reward)]
        said = []
        rates = [c.measured.win_rate for c in mine if c.kind == "same"]
        if rates:
            low, high = f"{100 * min(rates):.1f}", percent(max(rates))
            share = f"between {low} and {high}" if len(rates) > 1 else high
            said.append(f"at the same guidance {arm} wins {share} of comparisons with {against}")
        said += [
            f"each at its own best guidance ({arm} at {c.guidance_arm:g}, {against} at {c.guidance_against:g}) "
            f"{'it' if rates else arm} wins {percent(c.measured.win_rate)} (95 % interval {spread(c.measured)})"
            for c in mine
            if c.kind == "best"
        ]
        sentences.setdefault(reward, []).append(f"By {reward}, {'; '.join(said)}.")
    return sentences


def sweep_rows(results: Results, sweep: Sweep) -> list[SweepRow]:
    """The comparisons at equal guidance."""
    rows: dict[tuple[str, str], dict[float, Measured]] = {}
    for c in sweep.comparisons:
        if c.kind == "same":
            title = c.arm if c.against == results.arms[0] else f"{c.arm} against {c.against}"
            rows.setdefault((c.reward, title), {})[c.guidance_arm] = c.measured
    return [SweepRow(reward=reward, title=title, cells=cells) for (reward, title), cells in rows.items()]
