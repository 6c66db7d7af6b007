"""What an evaluation found, and its verdict in words; docs/results.md describes the results.json made of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

VERSION = 1
PROTOCOL = "p2-paired-v1"

Role = Literal["labeller", "trained_on", "held_out"]
"""Whose labels the pairs carry; what training optimised; what training never saw."""

Outcome = Literal["won", "undecided", "lost", "mixed"]

ROLES: dict[Role, str] = {"labeller": "labeller", "held_out": "held out", "trained_on": "trained on"}
"""Roles in words, the most telling first: the headline speaks of the first role that an evaluation has."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How one score differs between two arms; the prompt is the sampling unit. None is undefined."""

    n: int
    """Prompts that count."""
    excluded: int
    """Pairs of images left out of both arms because one of them could not be judged."""
    mean_arm: float
    mean_against: float
    mean_difference: float
    difference_se: float | None
    """Paired standard error of the mean difference."""
    d_z: float | None
    """Cohen's d of the differences per prompt."""
    win_rate: float
    """Ties count half."""
    ci_low: float
    ci_high: float
    """95 % interval of the win rate."""
    ci_method: Literal["bootstrap", "stratified bootstrap", "wilson"]
    strict_win_share: float
    tie_share: float
    p: float
    """Two-sided, of no difference."""
    test: Literal["sign", "sign-flip permutation"]
    elo: float | None


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """One reward's word on a comparison."""

    total: Measured
    role: Role
    role_declared: bool
    """False where nobody said so and `held_out` was taken."""
    spec: str
    version: str
    p_holm: float = 1.0
    """`p` with Holm's correction for the number of rewards of the same role."""
    attributes: dict[str, Measured] = field(default_factory=dict)
    """The same for each raw component of the reward; exploratory."""
    groups: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """The same by label of a prompt, such as `Category`; exploratory."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another."""

    arm: str
    against: str
    rewards: dict[str, RewardResult]


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation, whole."""

    arms: tuple[str, ...]
    n_prompts: int
    n_seeds: int
    comparisons: tuple[Comparison, ...]
    prompt_set: Mapping[str, Any]
    """name, sha256, duplicates_dropped."""
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    """By arm: spec, where it was loaded from, scheduler."""
    latents_sha256: str
    """Hash over the hashes of all initial latents, equal in both arms."""
    environment: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A comparison in words."""

    outcome: Outcome
    """Of the rewards of the most telling role."""
    sentence: str
    notes: tuple[str, ...]
    """What must be said beside it: rewards of other roles, and what the sentence cannot claim."""
    regressed: tuple[str, ...]
    """Held-out rewards whose whole interval lies below one half."""


def to_table(results: Results) -> dict[str, Any]:
    """results.json as a table."""
    table: dict[str, Any] = {"version": VERSION, "protocol": PROTOCOL, **asdict(results)}
    for comparison in table["comparisons"]:
        for name, reward in comparison["rewards"].items():
            comparison["rewards"][name] = {**reward.pop("total"), **reward}
    table["verdicts"] = [asdict(verdict(comparison)) for comparison in results.comparisons]
    return table


def write_results(results: Results, file: Path) -> None:
    """Writes results.json."""
    file.write_text(json.dumps(to_table(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def direction(measured: Measured) -> Literal["better", "worse", "open"]:
    """On which side of one half the whole interval of the win rate lies."""
    if measured.ci_low > 0.5:
        return "better"
    return "worse" if measured.ci_high < 0.5 else "open"


def verdict(comparison: Comparison) -> Verdict:
    """What the comparison shows, by the rewards of the most telling role; the others are notes."""
    rewards = comparison.rewards
    role = next(role for role in ROLES if any(r.role == role for r in rewards.values()))
    main = {name: r for name, r in rewards.items() if r.role == role}
    directions = {direction(r.total) for r in main.values()}
    regressed = tuple(n for n, r in rewards.items() if r.role == "held_out" and direction(r.total) == "worse")
    outcome: Outcome = "undecided"
    if directions >= {"better", "worse"}:
        outcome = "mixed"
    elif "better" in directions:
        outcome = "won"
    elif "worse" in directions:
        outcome = "lost"
    return Verdict(
        outcome=outcome,
        sentence=_sentence(comparison, main, outcome),
        notes=(
            *(_note(name, r) for name, r in rewards.items() if r.role != role or len(main) > 1),
            *_limits(comparison, role),
        ),
        regressed=regressed,
    )


def _sentence(comparison: Comparison, main: Mapping[str, RewardResult], outcome: Outcome) -> str:
    """The headline: of one judge with its interval, of several without, which the notes give."""
    arm, against = comparison.arm, comparison.against
    opening = {
        "won": f"{arm} beats {against}",
        "lost": f"{arm} is worse than {against}",
        "undecided": f"no difference between {arm} and {against} is shown",
        "mixed": f"the judges of {arm} against {against} disagree",
    }[outcome]
    n = max(r.total.n for r in main.values())
    if len(main) == 1:
        [(name, only)] = main.items()
        said = f"{_rate(only.total)} by {name} ({ROLES[only.role]})"
    else:
        said = "of comparisons " + ", ".join(f"{100 * r.total.win_rate:.1f} % by {name}" for name, r in main.items())
    return f"{opening[0].upper()}{opening[1:]}: on {n} prompts {arm} wins {said}."


def _rate(measured: Measured) -> str:
    low, high = 100 * measured.ci_low, 100 * measured.ci_high
    return f"{100 * measured.win_rate:.1f} % of comparisons (95 % interval {low:.1f} to {high:.1f})"


def _note(name: str, reward: RewardResult) -> str:
    words = {"better": "is better", "worse": "fell", "open": "shows no difference"}[direction(reward.total)]
    if reward.role == "trained_on":
        words = {"better": "rose", "worse": "fell", "open": "did not move"}[direction(reward.total)]
        return f"{name}, which training optimised, {words}: {_rate(reward.total)}. By itself this proves nothing."
    return f"{name} ({ROLES[reward.role]}) {words}: {_rate(reward.total)}."


def _limits(comparison: Comparison, role: Role) -> list[str]:
    """What the headline cannot claim."""
    limits = []
    if role == "trained_on":
        limits.append(
            "Only rewards that training optimised were measured; a held-out reward is needed to claim a gain."
        )
    guessed = [name for name, r in comparison.rewards.items() if not r.role_declared]
    if guessed:
        limits.append(f"Nobody declared whether training saw {', '.join(guessed)}; held out is assumed.")
    return limits
