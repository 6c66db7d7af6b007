"""Statistics of a paired comparison; the prompt is the sampling unit.

Scores come as [n, K]: n prompts, K seeds, arm and opponent from the same initial noise, NaN in both where one is
invalid. Outcome w = 1 where the arm scores higher, 0 where lower, 1/2 where equal; win rate = mean over prompts of the
mean over seeds. Everything here is float64 and draws from a numpy generator seeded by the caller.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
_CHUNK = 200_000
"""Resampled values that are held at a time; more would not fit a core's cache and take thrice as long."""


def outcomes(
    arm: Float[np.ndarray, "n k"], against: Float[np.ndarray, "n k"], *, tau: float = 0.0
) -> Float[np.ndarray, "n k"]:
    """1 for a win by more than `tau`, 0 for a loss by more than `tau`, 1/2 for a tie; NaN where either score is NaN."""
    difference = arm - against
    won = np.where(difference > tau, 1.0, np.where(difference < -tau, 0.0, 0.5))
    return np.where(np.isnan(difference), np.nan, won)


def per_prompt(values: Float[np.ndarray, "n k"]) -> tuple[Float[np.ndarray, " m"], list[int]]:
    """(mean over the valid seeds of each prompt that has one, places of those prompts)."""
    valid = ~np.isnan(values)
    kept = valid.any(axis=1)
    sums = np.where(valid, values, 0.0).sum(axis=1, dtype=np.float64)
    return sums[kept] / valid.sum(axis=1)[kept], np.flatnonzero(kept).tolist()


def win_rate(outcome: Float[np.ndarray, "n k"]) -> float:
    """Mean over prompts of the mean outcome over seeds."""
    return float(per_prompt(outcome)[0].mean())


def wilson(rate: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion `rate` out of `n` trials.

    Paper: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p that wins and losses are equally likely; ties are left out, and nothing but ties is p = 1."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def cross_seed_win_rate(arm: Float[np.ndarray, "n k"], against: Float[np.ndarray, "n k"]) -> float:
    """Mean over prompts of the outcome over all pairs of seeds: the chance to win from independent noise."""
    k = arm.shape[1]
    return win_rate(outcomes(np.repeat(arm, k, axis=1), np.tile(against, k)))


def bootstrap_means(
    values: Float[np.ndarray, "m n"],
    *,
    seed: int,
    strata: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, "m r"]:
    """Means of resampled prompts (with all their seeds), drawn with replacement: the same draws for all m rows.

    Args:
        values: Rows of one number per prompt, its mean over seeds.
        strata: A label per prompt; draws stay within a label, so that the labels' shares stay fixed.
    """
    rng = np.random.default_rng(seed)
    sums = np.zeros((len(values), resamples))
    for members in _strata(values.shape[1], strata):
        own, start = np.ascontiguousarray(values[:, members]), 0
        for count in _chunks(resamples, len(members)):
            drawn = rng.integers(0, len(members), (count, len(members)))
            for row, total in zip(own, sums, strict=True):
                total[start : start + count] += row.take(drawn).sum(axis=1)
            start += count
    return sums / values.shape[1]


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    *,
    seed: int,
    strata: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    method: Literal["percentile", "bca"] = "percentile",
) -> tuple[float, float]:
    """Interval of a mean over prompts by the bootstrap over prompts, as `bootstrap_means` draws them."""
    means = bootstrap_means(values[None], seed=seed, strata=strata, resamples=resamples)[0]
    if method == "bca":
        return bca_interval(values, means, strata=strata, confidence=confidence)
    return percentile_interval(means, confidence=confidence)


def percentile_interval(means: Float[np.ndarray, " r"], *, confidence: float = 0.95) -> tuple[float, float]:
    """The middle `confidence` of resampled statistics."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bca_interval(
    values: Float[np.ndarray, " n"],
    means: Float[np.ndarray, " r"],
    *,
    strata: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Bias-corrected and accelerated interval of a mean, from its resampled means.

    Where nothing varies it is the percentile interval, whose ends are equal there.

    Paper: Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987); the acceleration is that of the mean of a
    stratified sample, sum d^3 / (6 (sum d^2)^1.5) over deviations d from the mean of their stratum.
    """
    from scipy.special import ndtr, ndtri

    deviations = np.concatenate([values[m] - values[m].mean() for m in _strata(len(values), strata)])
    spread = float((deviations**2).sum())
    centre = values.mean()
    below = float((means < centre).mean() + (means == centre).mean() / 2)
    if spread == 0 or below in (0.0, 1.0):
        return percentile_interval(means, confidence=confidence)
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    bias = ndtri(below)
    z = bias + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def permutation_test(differences: Float[np.ndarray, " n"], *, seed: int, flips: int = RESAMPLES) -> float:
    """Two-sided p that the mean difference per prompt is 0, by flipping signs of whole prompts at random.

    The observed signs count as one of the flips, so p is never 0.
    """
    rng = np.random.default_rng(seed)
    observed = abs(differences.mean())
    extreme = 1
    for count in _chunks(flips, len(differences)):
        signs = rng.integers(0, 2, (count, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences / len(differences)) >= observed * (1 - 1e-12)).sum())
    return extreme / (flips + 1)


def mean_difference(differences: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(mean, its paired standard error, Cohen's d_z = mean / standard deviation); NaN where there is no spread."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, math.nan, math.nan
    sd = float(differences.std(ddof=1))
    return mean, sd / math.sqrt(len(differences)), mean / sd if sd > 0 else math.nan


def elo_difference(rate: float) -> float:
    """Elo points that predict a win rate; infinite at 0 and 1."""
    if rate in (0.0, 1.0):
        return math.copysign(math.inf, rate - 0.5)
    return 400 * math.log10(rate / (1 - rate))


def bradley_terry(wins: Float[np.ndarray, "*r a a"], *, anchor: float = 1000.0) -> Float[np.ndarray, "*r a"]:
    """Elo points of arms by maximum likelihood under Bradley-Terry, the first arm at `anchor`; NaN where undefined.

    P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)). There is a maximum where every group of arms has won something from
    the others (Ford); else ratings run away, and all are NaN.

    Args:
        wins: What arm i won from arm j, a tie being half a win for both; the diagonal does not count.

    Paper: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 39 (1952); by Newton's steps on
    the concave log-likelihood, each no longer than one nat.
    """
    count = wins.shape[-1]
    won = np.where(np.eye(count, dtype=bool), 0.0, wins).reshape(-1, count, count)
    games = won + won.transpose(0, 2, 1)
    strength = np.zeros((len(won), count))
    solvable = _connected(won)
    for _ in range(100):
        p = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))
        slope = (won - games * p).sum(-1)
        weight = games * p * (1 - p)
        bend = np.eye(count) * weight.sum(-1)[:, :, None] - weight
        bend[~solvable] = np.eye(count)
        step = np.zeros_like(strength)
        step[:, 1:] = np.linalg.solve(bend[:, 1:, 1:], slope[:, 1:, None])[..., 0]
        step /= np.maximum(1, np.abs(step).max(-1, keepdims=True))
        strength += step
        if np.abs(step[solvable]).max(initial=0) < 1e-12:
            break
    strength[~solvable] = np.nan
    return (anchor + 400 / math.log(10) * (strength - strength[:, :1])).reshape(wins.shape[:-1])


def macro_mean(values: Float[np.ndarray, " n"], tasks: Sequence[Hashable]) -> float:
    """Unweighted mean of the tasks' means: GenEval's score, where small tasks count as much as large ones."""
    return float(np.mean([np.nanmean(values[members]) for members in _strata(len(values), tasks)]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest of m times m - k + 1, made monotone, at most 1.

    Paper: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


def _strata(n: int, labels: Sequence[Hashable] | None) -> list[list[int]]:
    """Places by label, in the order of first appearance; all in one where there are no labels."""
    groups: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels if labels is not None else [None] * n):
        groups.setdefault(label, []).append(i)
    return list(groups.values())


def _connected(won: np.ndarray) -> np.ndarray:
    """Whether each arm is reached from each other by steps from a loser to one that it won from."""
    reach: np.ndarray = (won > 0) | np.eye(won.shape[-1], dtype=bool)
    for _ in range(won.shape[-1]):
        reach = np.asarray((reach[:, :, :, None] & reach[:, None, :, :]).any(2))
    return np.asarray(reach.all((1, 2)))


def _chunks(total: int, width: int) -> list[int]:
    """Sizes of blocks that add up to `total`, each of at most `_CHUNK` values."""
    size = max(1, _CHUNK // max(1, width))
    return [min(size, total - start) for start in range(0, total, size)]
