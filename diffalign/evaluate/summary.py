"""summary.md: an evaluation in a screenful of Markdown, for a model card."""

from collections.abc import Sequence
from pathlib import Path

from diffalign.evaluate import views
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.results import PROTOCOL, ROLES, Comparison, Results, SetDifference, verdict
from diffalign.evaluate.wording import between, difference, number, p_value, percent, rating, spread

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#"})


def write_summary(results: Results, folder: Path, medium: Medium = PICTURES) -> Path:
    """Writes summary.md into an evaluation's folder."""
    file = folder / "summary.md"
    file.write_text(summary(results, medium), encoding="utf-8")
    return file


def summary(results: Results, medium: Medium = PICTURES) -> str:
    """The headline, held-out rewards first; every reward with its interval; flags; the protocol."""
    parts = ["## Evaluation"]
    for comparison in results.comparisons:
        if len(results.comparisons) > 1:
            parts.append(f"### {_plain(views.name_of(results, comparison))}")
        parts += [_headline(comparison, results.set_differences), _table(comparison)]
        parts += _flags(comparison)
    if results.ratings:
        parts.append(_ratings(results))
    if results.sets:
        parts.append(_sets(results, medium))
    parts.append(_protocol(results, medium))
    return "\n\n".join(parts) + "\n"


def _headline(comparison: Comparison, sets: Sequence[SetDifference]) -> str:
    said, held = verdict(comparison, sets), views.of_role(comparison, "held_out")
    if not held:
        return "\n\n".join(_plain(line) for line in (said.sentence, *said.notes))
    rates = ", ".join(f"{percent(r.total.win_rate)} ({spread(r.total)}) by {name}" for name, r in held.items())
    opening = f"By rewards that training never saw, {comparison.arm} wins against {comparison.against}: {rates}."
    if next(iter(views.by_role(comparison))) in held:  # then the verdict's sentence speaks of them
        opening = said.sentence
    notes = [note for note in said.notes if not any(note.startswith(f"{name} (") for name in held)]
    others = [line for line in (said.sentence, *notes) if line != opening]
    return "\n\n".join([f"**{_plain(opening)}**", *(_plain(line) for line in others)])


def _table(comparison: Comparison) -> str:
    rows = [
        ["Reward", "Role", comparison.against, comparison.arm, "Difference (95 %)", "Win rate (95 %)", "p (Holm)"],
        ["---", "---", "---:", "---:", "---:", "---:", "---:"],
    ]
    for name, reward in views.by_role(comparison).items():
        t = reward.total
        rows.append(
            [
                name,
                ROLES[reward.role] + ("" if reward.role_declared else " (assumed)"),
                number(t.mean_against),
                number(t.mean_arm),
                difference(t),
                f"{percent(t.win_rate)} ({spread(t)})",
                p_value(reward.p_holm),
            ]
        )
    return _rows(rows)


def _flags(comparison: Comparison) -> list[str]:
    """What the checks say; nothing where none was asked for."""
    if not comparison.checks:
        return []
    flagged = [check for check in comparison.checks if check.flagged]
    made = [check for check in comparison.checks if check.flagged is not None]
    opening = f"Checks for reward hacking: {len(made)} made, {len(flagged)} flagged."
    listed = "\n".join(f"- **{_plain(c.name)}**: {_plain(c.sentence)}" for c in flagged)
    return [opening, listed] if flagged else [opening]


def _ratings(results: Results) -> str:
    rows = [["Elo (95 %) by", *results.arms], ["---", *["---:"] * len(results.arms)]]
    for reward, found in views.ratings(results).items():
        rows.append([reward, *(rating(found.get(arm)) for arm in results.arms)])
    return _rows(rows)


def _sets(results: Results, medium: Medium) -> str:
    rows = [
        [
            f"Whole sets of {medium.folder}, higher is better",
            *results.arms,
            "Difference (95 %)",
            medium.folder.capitalize(),
        ],
        ["---", *["---:"] * (len(results.arms) + 2)],
    ]
    for found in views.whole_sets(results):
        scores = [number(found.by_arm[arm].score) if arm in found.by_arm else "-" for arm in results.arms]
        apart = "; ".join(
            f"{between(d)}{'' if len(found.differences) == 1 else f' {d.arm}'}" for d in found.differences
        )
        rows.append([found.name, *scores, apart or "-", found.samples])
    return _rows(rows)


def _protocol(results: Results, medium: Medium) -> str:
    """One line: enough to see whether two evaluations may be compared."""
    settings, sampler = results.settings, views.sampler(results)
    seeds = f"one {medium.one} each" if results.n_seeds == 1 else f"{results.n_seeds} {medium.folder} each"
    noise = " from the same noise in all arms" if results.latents_sha256 else ""
    parts = [
        f"{results.n_prompts:,} prompts ({results.prompt_set['name']}, sha256 {results.prompt_set['sha256'][:12]}), "
        f"{seeds}{noise}"
    ]
    if sampler:
        parts.append(f"{sampler.removesuffix('Scheduler')}, {settings['steps']} steps, guidance {settings['guidance']}")
    parts += [medium.size(settings), "intervals are 95 % over prompts"]
    version = results.environment["packages"]["diffalign"]
    return _plain(f"Protocol {PROTOCOL}: {'; '.join(parts)}; diffalign {version}.")


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells if number == 1 else [_plain(cell) for cell in cells]) + " |"
        for number, cells in enumerate(rows)
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return " ".join(text.translate(_SPECIAL).split())
