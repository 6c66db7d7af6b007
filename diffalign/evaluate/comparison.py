"""From the table of raw scores to a comparison of two arms: by reward, by its components, by label of the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from diffalign.evaluate import stats
from diffalign.evaluate.judges import reward_correlations
from diffalign.evaluate.results import Comparison, Correlations, Measured, Rating, RewardResult, Role
from diffalign.evaluate.score import Table, check_valid

_RATED = 2_000
"""Resamples for the intervals of ratings."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A reward's part in an evaluation."""

    name: str
    spec: str
    version: str
    role: Role
    role_declared: bool
    role_reason: str = "declared"


def compare(
    table: Table,
    judges: Sequence[Judge],
    *,
    arm: str,
    against: str,
    labels: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Comparison:
    """What each judge says of `arm` against `against`.

    Args:
        table: Columns arm, prompt_index, k and those of the judges and their components.
        labels: Labels of the prompts by their name, such as `Category`; totals are stratified by the first.
        seed: Of resampling.

    Raises:
        RunError: More than 1 % of the pairs of images have no score by a judge.
    """
    labels = labels or {}
    strata = next(iter(labels.values()), None)
    rewards = {}
    for judge in judges:
        pair = matrix(table, arm, judge.name), matrix(table, against, judge.name)
        _check_judged(judge.name, *pair)
        components = [name for name in table if name.startswith(f"{judge.name}.")]
        rewards[judge.name] = RewardResult(
            total=measure(*pair, seed=seed, strata=strata),
            role=judge.role,
            role_declared=judge.role_declared,
            role_reason=judge.role_reason,
            spec=judge.spec,
            version=judge.version,
            attributes={
                name.removeprefix(f"{judge.name}."): measure(
                    matrix(table, arm, name), matrix(table, against, name), seed=seed, strata=strata
                )
                for name in components
            },
            groups={name: _by_label(*pair, of, seed) for name, of in labels.items()},
        )
    return Comparison(
        arm=arm,
        against=against,
        rewards=_corrected(rewards),
        correlations=correlations(table, [judge.name for judge in judges], arm=arm, against=against),
    )


def correlations(table: Table, rewards: Sequence[str], *, arm: str, against: str) -> Correlations | None:
    """Pearson correlations between rewards of the mean difference per prompt, over the prompts that both judged."""
    if len(rewards) < 2:
        return None
    differences = {}
    for name in rewards:
        d = matrix(table, arm, name) - matrix(table, against, name)
        means, kept = stats.per_prompt(d)
        differences[name] = np.full(len(d), np.nan)
        differences[name][kept] = means
    names, found = reward_correlations(differences)
    return Correlations(rewards=names, matrix=tuple(tuple(_defined(float(v)) for v in row) for row in found))


def ratings(table: Table, arms: Sequence[str], rewards: Sequence[str], *, seed: int = 0) -> tuple[Rating, ...]:
    """Bradley-Terry ratings of all arms by each reward, on the prompts that have a score in every arm."""
    found: list[Rating] = []
    for name in rewards:
        scores = np.stack([matrix(table, arm, name) for arm in arms])  # [A, n, K]
        scores = scores[:, ~np.isnan(scores).any((0, 2))]
        won = np.array([[stats.outcomes(a, b).mean(1) for b in scores] for a in scores])  # [A, A, n]
        flat = won.reshape(len(arms) ** 2, -1)
        draws = stats.bootstrap_means(flat, seed=seed, resamples=_RATED)
        point = stats.bradley_terry(won.mean(-1))
        drawn = stats.bradley_terry(draws.T.reshape(-1, len(arms), len(arms)))
        for i, arm in enumerate(arms):
            low, high = stats.percentile_interval(drawn[:, i]) if not np.isnan(drawn).any() else (np.nan, np.nan)
            found.append(
                Rating(reward=name, arm=arm, rating=_defined(float(point[i])), low=_defined(low), high=_defined(high))
            )
    return tuple(found)


def measure(
    arm: Float[np.ndarray, "n k"],
    against: Float[np.ndarray, "n k"],
    *,
    seed: int,
    strata: Sequence[str] | None = None,
) -> Measured:
    """How two arms' scores differ; a pair with a NaN on either side is left out of both.

    One seed per prompt is tested by signs, more by flipping the signs of whole prompts. Where every prompt was won, or
    every one lost, resampling has no spread and Wilson's interval takes its place.
    """
    invalid = np.isnan(arm - against)
    arm, against = np.where(invalid, np.nan, arm), np.where(invalid, np.nan, against)
    outcome = stats.outcomes(arm, against)
    won, kept = stats.per_prompt(outcome)
    differences, _ = stats.per_prompt(arm - against)
    rate = float(won.mean())
    mean, se, d_z = stats.mean_difference(differences)
    chosen = None if strata is None else [strata[i] for i in kept]
    drawn = stats.bootstrap_means(np.stack([won, differences]), seed=seed, strata=chosen)
    method: Literal["bootstrap", "stratified bootstrap", "wilson"] = (
        "bootstrap" if strata is None else "stratified bootstrap"
    )
    low, high = stats.percentile_interval(drawn[0])
    if rate in (0.0, 1.0):
        method, (low, high) = "wilson", stats.wilson(rate, len(won))
    difference_low, difference_high = stats.percentile_interval(drawn[1])
    single = arm.shape[1] == 1
    p = (
        stats.sign_test(int((won == 1).sum()), int((won == 0).sum()))
        if single
        else stats.permutation_test(differences, seed=seed)
    )
    return Measured(
        n=len(won),
        excluded=int(invalid.sum()),
        mean_arm=float(stats.per_prompt(arm)[0].mean()),
        mean_against=float(stats.per_prompt(against)[0].mean()),
        mean_difference=mean,
        difference_low=difference_low,
        difference_high=difference_high,
        difference_se=_defined(se),
        d_z=_defined(d_z),
        win_rate=rate,
        ci_low=low,
        ci_high=high,
        ci_method=method,
        strict_win_share=stats.win_rate(np.where(np.isnan(outcome), np.nan, outcome == 1)),
        tie_share=stats.win_rate(np.where(np.isnan(outcome), np.nan, outcome == 0.5)),
        wins=int((outcome == 1).sum()),
        ties=int((outcome == 0.5).sum()),
        losses=int((outcome == 0).sum()),
        cross_seed_win_rate=None if single else stats.cross_seed_win_rate(arm, against),
        p=p,
        test="sign" if single else "sign-flip permutation",
        elo=_defined(stats.elo_difference(rate)),
    )


def matrix(table: Table, arm: str, column: str) -> Float[np.ndarray, "n k"]:
    """One arm's scores by prompt and seed, float64."""
    rows = [r for r, name in enumerate(table["arm"]) if name == arm]
    places = [(table["prompt_index"][r], table["k"][r]) for r in rows]
    shape = tuple(max(place) + 1 for place in zip(*places, strict=True))
    out = np.full(shape, np.nan)
    for row, place in zip(rows, places, strict=True):
        out[place] = table[column][row]
    return out


def _corrected(rewards: Mapping[str, RewardResult]) -> dict[str, RewardResult]:
    """The same rewards, each p corrected for how many speak in its role."""
    corrected = dict(rewards)
    for role in {reward.role for reward in rewards.values()}:
        family = [name for name, reward in rewards.items() if reward.role == role]
        adjusted = stats.holm([rewards[name].total.p for name in family])
        corrected |= {n: replace(rewards[n], p_holm=p) for n, p in zip(family, adjusted, strict=True)}
    return corrected


def _check_judged(judge: str, arm: Float[np.ndarray, "n k"], against: Float[np.ndarray, "n k"]) -> None:
    names = [f"prompt {i}, seed {k}" for i in range(arm.shape[0]) for k in range(arm.shape[1])]
    check_valid(judge, (arm - against).ravel().tolist(), names)


def _by_label(
    arm: Float[np.ndarray, "n k"], against: Float[np.ndarray, "n k"], labels: Sequence[str], seed: int
) -> dict[str, Measured]:
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        if not np.isnan(arm[row] - against[row]).all():
            groups.setdefault(label, []).append(row)
    return {label: measure(arm[rows], against[rows], seed=seed) for label, rows in sorted(groups.items())}


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None
