"""Statistics of a paired comparison; the prompt is the sampling unit.

Scores come as [n, K]: n prompts, K seeds, arm and opponent from the same initial noise, NaN in both where one is
invalid. Outcome w = 1 where the arm scores higher, 0 where lower, 1/2 where equal; win rate = mean over prompts of the
mean over seeds. Everything here is float64 and draws from a numpy generator seeded by the caller.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
_CHUNK = 2_000_000
"""Resampled values that are held at a time."""


def outcomes(
    arm: Float[np.ndarray, "n k"], against: Float[np.ndarray, "n k"], *, tau: float = 0.0
) -> Float[np.ndarray, "n k"]:
    """1 for a win by more than `tau`, 0 for a loss by more than `tau`, 1/2 for a tie; NaN where either score is NaN."""
    difference = arm - against
    won = np.where(difference > tau, 1.0, np.where(difference < -tau, 0.0, 0.5))
    return np.where(np.isnan(difference), np.nan, won)


def per_prompt(values: Float[np.ndarray, "n k"]) -> tuple[Float[np.ndarray, " m"], list[int]]:
    """(mean over the valid seeds of each prompt that has one, places of those prompts)."""
    kept = [i for i, row in enumerate(values) if not np.isnan(row).all()]
    return np.array([np.nanmean(values[i]) for i in kept], dtype=np.float64), kept


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


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    *,
    seed: int,
    strata: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a mean over prompts, by drawing prompts (with all their seeds) with replacement.

    Args:
        values: One number per prompt, its mean over seeds.
        strata: A label per prompt; draws stay within a label, so that the labels' shares stay fixed.
    """
    rng = np.random.default_rng(seed)
    labels = list(strata) if strata is not None else [None] * len(values)
    groups: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    sums = np.zeros(resamples)
    for members in groups.values():
        sums += _resampled_sums(values[members], rng, resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(sums / len(values), [tail, 1 - tail])
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


def _resampled_sums(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    draws = [
        values[rng.integers(0, len(values), (count, len(values)))].sum(axis=1)
        for count in _chunks(resamples, len(values))
    ]
    return np.concatenate(draws)


def _chunks(total: int, width: int) -> list[int]:
    """Sizes of blocks that add up to `total`, each of at most `_CHUNK` values."""
    size = max(1, _CHUNK // max(1, width))
    return [min(size, total - start) for start in range(0, total, size)]
