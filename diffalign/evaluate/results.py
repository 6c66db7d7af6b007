"""What an evaluation found, and its verdict in words; docs/results.md describes the results.json made of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.evaluate.set_results import SetDifference as SetDifference
from diffalign.evaluate.set_results import SetResult as SetResult
from diffalign.evaluate.store import write_whole

VERSION = 2
PROTOCOL = "p2-paired-v1"

Role = Literal["labeller", "trained_on", "held_out"]
"""Whose labels the pairs carry; what training optimised; what training never saw."""

Tier = Literal["full", "quick"]
"""All prompts, four seeds each; or 96 prompts, one seed each."""

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
    difference_low: float | None = None
    difference_high: float | None = None
    """95 % bootstrap interval of the mean difference."""
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
    wins: int = 0
    ties: int = 0
    losses: int = 0
    """Pairs of images."""
    cross_seed_win_rate: float | None = None
    """Over all pairs of seeds of a prompt: the chance to win from independent noise. None with one seed."""
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
    role_reason: str = "declared"
    """Who says so: the caller, or the config and data card of a run."""
    spec: str
    version: str
    p_holm: float = 1.0
    """`p` with Holm's correction for the number of rewards of the same role."""
    attributes: dict[str, Measured] = field(default_factory=dict)
    """The same for each raw component of the reward; exploratory."""
    groups: dict[str, dict[str, Measured]] = field(default_factory=dict)
    """The same by label of a prompt, such as `Category`; exploratory."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check for reward hacking or regression."""

    name: str
    statistic: str
    """What was measured, in words."""
    value_arm: float | None
    value_base: float | None
    """None where it belongs to both arms together, as a ratio or a distance does."""
    bound: str
    """What raises the flag, in words."""
    flagged: bool | None
    """None: not measured."""
    sentence: str
    """What a reader must know; true whether flagged or not."""


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How different the images of one prompt are from each other."""

    metric: str
    """`vendi` (1 to the number of seeds), or a mean distance between pairs of images."""
    encoder: str
    """Version of what images were embedded with."""
    value_arm: float
    value_base: float
    ratio: float
    """Arm to base; below 0.9 is flagged."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """95 % interval by the bootstrap over prompts."""
    n: int
    """Prompts that count."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far an arm's images are from its opponent's from the same noise."""

    metric: str
    encoder: str
    mean: float
    low: float | None = None
    high: float | None = None
    """95 % interval by the bootstrap over prompts."""
    n: int


@dataclass(frozen=True, kw_only=True)
class Correlations:
    """Which rewards rise together: Pearson correlation over prompts of the mean differences d_i."""

    rewards: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    """None where a reward does not vary."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another."""

    arm: str
    against: str
    rewards: dict[str, RewardResult]
    correlations: Correlations | None = None
    """None with a single reward."""
    diversity: tuple[Diversity, ...] = ()
    drift: tuple[Drift, ...] = ()
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rating:
    """An arm's place among more than two, by one reward: Bradley-Terry in Elo points, the base at 1000."""

    reward: str
    arm: str
    rating: float | None
    low: float | None
    high: float | None
    """95 % interval by the bootstrap over prompts."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """An arm's mean score at one guidance."""

    arm: str
    guidance: float
    reward: str
    mean: float


@dataclass(frozen=True, kw_only=True)
class SweepComparison:
    """Two arms within a sweep: at the same guidance, or each at its own best."""

    arm: str
    against: str
    reward: str
    kind: Literal["same", "best"]
    guidance_arm: float
    guidance_against: float
    measured: Measured


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All arms over several guidances, on the quick tier's prompts, one seed each."""

    guidances: tuple[float, ...]
    n_prompts: int
    points: tuple[SweepPoint, ...]
    comparisons: tuple[SweepComparison, ...]
    """The best guidance is chosen on these very prompts, so best against best flatters both arms a little."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation, whole."""

    arms: tuple[str, ...]
    """The base first."""
    n_prompts: int
    n_seeds: int
    comparisons: tuple[Comparison, ...]
    """Every arm against the base; then, if asked for, every later arm against every earlier one."""
    tier: Tier = "full"
    ratings: tuple[Rating, ...] = ()
    """With more than two arms."""
    sets: tuple[SetResult, ...] = ()
    set_differences: tuple[SetDifference, ...] = ()
    sweep: Sweep | None = None
    prompt_set: Mapping[str, Any]
    """name, sha256, duplicates_dropped."""
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    """By arm: spec, where it was loaded from, digest, scheduler."""
    latents_sha256: str | None
    """Hash over the hashes of all initial latents, equal in all arms; None where finished images do not say."""
    environment: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What the images depend on, as manifest.json holds it: protocol, prompts, sampling, digests of the arms."""


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
    for point in (table["sweep"] or {}).get("comparisons", ()):
        point |= point.pop("measured")
    table["verdicts"] = [asdict(verdict(one, results.set_differences)) for one in results.comparisons]
    return table


def write_results(results: Results, file: Path) -> None:
    """Writes results.json, whole or not at all."""
    write_whole(file, (json.dumps(to_table(results), indent=1, allow_nan=False) + "\n").encode())


def direction(measured: Measured) -> Literal["better", "worse", "open"]:
    """On which side of one half the whole interval of the win rate lies."""
    if measured.ci_low > 0.5:
        return "better"
    return "worse" if measured.ci_high < 0.5 else "open"


def verdict(comparison: Comparison, sets: Sequence[SetDifference] = ()) -> Verdict:
    """What the comparison shows, by the rewards of the most telling role; the others are notes.

    Args:
        sets: Differences of rewards of whole sets, those of other arms among them.
    """
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
            *(_note_of_sets(d) for d in sets if (d.arm, d.against) == (comparison.arm, comparison.against)),
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
        rates = [f"{100 * r.total.win_rate:.1f} % by {name}" for name, r in main.items()]
        said = ", ".join(rates).replace(" %", " % of comparisons", 1)
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


def _note_of_sets(found: SetDifference) -> str:
    words, apart = "has no interval", f"{found.difference:+.3g}"
    if found.low is not None and found.high is not None:
        words = "is better" if found.low > 0 else "fell" if found.high < 0 else "shows no difference"
        apart += f" (95 % interval {found.low:+.3g} to {found.high:+.3g})"
    said = f"{found.spec} of all {found.samples} together {words}: {apart}, above 0 is better."
    return f"{said} Training optimised it, or heard or saw through its encoder." if found.optimised else said


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
