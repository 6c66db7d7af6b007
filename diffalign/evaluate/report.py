"""One report.html that a person can read: verdict first, then what is wrong, the numbers, and pictures nobody chose.

Everything is inline: no scripts, no fonts, nothing fetched. A section that has nothing to show is not there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.evaluate import charts, plots, views, wording
from diffalign.evaluate.album import album
from diffalign.evaluate.curves import read_training
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.results import PROTOCOL, ROLES, Measured, Results, direction, verdict
from diffalign.evaluate.score import Table
from diffalign.evaluate.watched import read_watch

WORDS = {"won": "better", "lost": "worse", "undecided": "no difference shown", "mixed": "judges disagree"}
"""Outcomes in words."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    id: str
    title: str
    template: str
    about: Any = True
    """What it shows; the section is left out where that is empty."""


def write_report(
    results: Results,
    table: Table,
    folder: Path,
    labels: Mapping[str, Sequence[str]] | None = None,
    medium: Medium = PICTURES,
) -> Path:
    """Writes report.html into an evaluation's folder; images or clips are read from there.

    Args:
        table: The raw scores: columns arm, prompt, prompt_index, k, file_name and those of the rewards.
        labels: Labels of the prompts by their name, such as `Category`; the gallery shows as many of each value of the
            first.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda share: wording.tied(wording.percent(share)),
        number=wording.number,
        signed=wording.signed,
        difference=wording.difference,
        p_value=wording.p_value,
        rating=wording.rating,
        tied=wording.tied,
        json=lambda thing: json.dumps(thing, indent=1, default=str, ensure_ascii=False),
    )
    comparison = results.comparisons[0]
    sections = [section for section in _sections(results, table, folder, labels or {}, medium) if section.about]
    page = environment.get_template("report.html.j2").render(
        results=results,
        medium=medium,
        comparison=comparison,
        several=len(results.comparisons) > 1,
        verdicts=[(views.name_of(results, c), c, verdict(c, results.set_differences)) for c in results.comparisons],
        words=WORDS,
        roles=ROLES,
        protocol=PROTOCOL,
        sections=sections,
        flags=[(part.title, check) for part in views.checked(results) for check in part.flagged],
        schedulers=_schedulers(results),
        sampler=views.sampler(results),
        rewards=views.by_role(comparison),
        judge=views.judge(comparison),
        by_role=views.by_role,
        shared=views.roles(results),
        of_role=views.of_role,
        name_of=lambda c: views.name_of(results, c),
        direction=direction,
        reach=plots.reach,
        interval_row=lambda m, width: Markup(plots.interval_row(m, width)),
        bar_row=lambda m, width: Markup(plots.bar_row(m, width)),
        change=lambda m, every: Markup(charts.change(m.mean_against, m.mean_arm, *_span(every))),
        drawn=Markup,
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def _sections(
    results: Results, table: Table, folder: Path, labels: Mapping[str, Sequence[str]], medium: Medium
) -> list[Section]:
    """All parts of the page, those with nothing to show among them."""
    comparison, sweep = results.comparisons[0], results.sweep
    rewards = views.by_role(comparison)
    chief = next(iter(rewards))
    pictures = album(results.arms, list(rewards), table, folder, next(iter(labels.values()), None), medium)
    judged = [(c, views.judge(c)) for c in views.versus_base(results)]
    changes = [(views.name_of(results, c), name, pictures.largest_changes(c, name)) for c, name in judged]
    swept = sweep and {
        "figures": views.sweep_charts(sweep, views.styles(results)),
        "words": views.sweep_words(sweep),
        "rows": views.sweep_rows(results, sweep),
    }
    parts = [
        Section(id="win-rates", title="Win rates", template="win_rates", about=views.forest(results)),
        Section(id="numbers", title="Numbers", template="numbers"),
        Section(id="ratings", title="Ratings", template="ratings", about=views.ratings(results)),
        Section(id="checks", title="Checks", template="checks", about=views.checked(results)),
    ]
    for label in comparison.rewards[chief].groups:
        found = {name: views.grouped(results, name, label) for name in rewards}
        parts.append(Section(id=f"by-{label.lower()}", title=f"By {label.lower()}", template="groups", about=found))
    parts += [
        Section(id="components", title="What changed", template="components", about=_detailed(results)),
        Section(
            id="trade-off",
            title="What training saw against what it never saw",
            template="figures",
            about=views.trade_offs(results, table),
        ),
        Section(id="drift", title="Reward against drift", template="drift", about=views.drifts(results, medium.one)),
        Section(id="guidance", title="Guidance", template="guidance", about=swept),
        Section(
            id="diversity",
            title=f"Diversity of a prompt's {medium.folder}",
            template="diversity",
            about=[c for c in results.comparisons if c.diversity],
        ),
        Section(id="sets", title="Whole sets", template="sets", about=views.whole_sets(results)),
        Section(
            id="outliers",
            title=f"{medium.folder.capitalize()} that help and hurt a set most",
            template="outliers",
            about=[(s.arm, views.set_name(results, s), pictures.outliers(s)) for s in results.sets if s.best],
        ),
        Section(
            id="correlations",
            title="Which rewards rise together",
            template="correlations",
            about=[c for c in views.versus_base(results) if c.correlations],
        ),
        *_of_training(results),
        Section(id="gallery", title=medium.gallery, template="gallery", about=pictures.unselected()),
        Section(
            id="changes",
            title="Largest changes, by " + " and ".join(dict.fromkeys(name for _, name, _ in changes)),
            template="changes",
            about=changes,
        ),
        Section(id="settings", title="Settings and environment", template="settings", about=_left_out(results, medium)),
        Section(
            id="reproduce",
            title="How to reproduce",
            template="reproduce",
            about=results.settings["command"] or python_call(results, folder),
        ),
    ]
    return parts


def _of_training(results: Results) -> list[Section]:
    """What the runs of the arms left behind of their training, and what was watched during it."""
    runs = {arm: model.get("run") for arm, model in results.models.items()}
    trained = {arm: read_training(Path(run)) for arm, run in runs.items() if run}
    watched = {arm: read_watch(Path(run)) for arm, run in runs.items() if run}
    return [
        Section(
            id="training",
            title="Training",
            template="training",
            about={arm: found for arm, found in trained.items() if found},
        ),
        Section(
            id="guard",
            title="Guard of the training",
            template="guard",
            about={arm: found for arm, found in watched.items() if found},
        ),
    ]


def python_call(results: Results, folder: Path) -> str:
    """The call that makes this evaluation again."""
    rewards = results.comparisons[0].rewards
    roles = {name: r.role for name, r in rewards.items() if r.role_declared}
    known = ("images_per_prompt", "steps", "guidance", "batch_size", "device", "dtype", "seed")
    chosen = ("tier", "sweep", "pairwise", "reference", "seconds", "heard_hz", "heard_hz_of", "mono")
    names = [*known, *(name for name in chosen if results.settings.get(name))]
    settings = ", ".join(f"{name}={results.settings[name]!r}" for name in names)
    base, *others = (results.models[arm]["spec"] for arm in results.arms)
    aligned = others[0] if len(others) == 1 else dict(zip(results.arms[1:], others, strict=True))
    return "\n".join(
        [
            "from diffalign.evaluate import EvaluationSettings, evaluate",
            "",
            "evaluate(",
            f"    {base!r},",
            f"    {aligned!r},",
            f"    {str(folder / 'prompts.jsonl')!r},",
            f"    rewards={[*(r.spec for r in rewards.values()), *dict.fromkeys(s.spec for s in results.sets)]!r},",
            f"    roles={roles!r},",
            f"    settings=EvaluationSettings({settings}),",
            f"    output={str(folder) + '-again'!r},",
            ")",
        ]
    )


def _detailed(results: Results) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, comparison, rewards of several components) of each comparison that has such rewards."""
    found = []
    for comparison in results.comparisons:
        several = {name: r for name, r in views.by_role(comparison).items() if len(r.attributes) > 1}
        found += [(views.name_of(results, comparison), comparison, several)] if several else []
    return found


def _left_out(results: Results, medium: Medium) -> str:
    """Pairs of samples that a reward could not judge."""
    counts = [
        f"{name} {reward.total.excluded}" + ("" if len(results.comparisons) == 1 else f" ({views.name_of(results, c)})")
        for c in results.comparisons
        for name, reward in c.rewards.items()
        if reward.total.excluded
    ]
    return ", ".join(counts) + f" {medium.one} pairs that could not be judged" if counts else f"no {medium.one}"


def _schedulers(results: Results) -> list[str]:
    """Keys in which the arms' samplers differ, as words; equal samplers are the protocol."""
    known = views.schedulers(results)
    names = sorted({name for scheduler in known.values() for name in scheduler})
    found = {name: {arm: scheduler.get(name) for arm, scheduler in known.items()} for name in names}
    return [
        f"{name}: "
        + " and ".join(f"{value!r}" if len(known) == 2 else f"{value!r} ({arm})" for arm, value in of.items())
        for name, of in found.items()
        if any(value != next(iter(of.values())) for value in of.values())
    ]


def _span(measured: Sequence[Measured]) -> tuple[float, float]:
    """Ends of a common axis: [0, 1] if every mean lies there."""
    means = [v for m in measured for v in (m.mean_arm, m.mean_against)]
    low, high = min(means), max(means)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low - 0.1 * (high - low), high + 0.1 * (high - low))
