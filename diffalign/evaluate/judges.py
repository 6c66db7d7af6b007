"""How well a judge agrees with people, people with each other, and judges with judges.

A label says which of two images a person chose: 1 the first, 0 the second, 1/2 neither. How ties are counted moves a
published accuracy by ten points, so each way has its own name.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from diffalign.errors import InputError
from diffalign.evaluate import stats

Ties = Literal["drop", "half"]
"""What a person's tie is worth: nothing, the pair is left out; or 1/2 whatever the judge says."""

THRESHOLDS = tuple(i / 10 for i in range(11))
"""Gaps of probability among which PickScore's protocol chooses."""


def accuracy(
    score_first: Float[np.ndarray, " n"],
    score_second: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    *,
    ties: Ties,
) -> float:
    """Share of people's choices that a judge's scores agree with; equal scores get half credit; NaN without a pair.

    Raises:
        InputError: A label that is not 0, 1/2 or 1.
    """
    labels = _checked(labels)
    says = stats.outcomes(score_first[:, None], score_second[:, None])[:, 0]
    credit = np.where(labels == 0.5, 0.5, 1 - np.abs(says - labels))
    credit = credit[labels != 0.5] if ties == "drop" else credit
    return float(credit.mean()) if len(credit) else float("nan")


def three_way_accuracy(
    score_first: Float[np.ndarray, " n"],
    score_second: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    *,
    threshold: float,
) -> float:
    """Accuracy where a judge may say that neither is better: credit 1 for a match, 1/2 if one of the two says tie.

    The judge says tie where the probabilities of its two choices, sigmoid(difference of scores) and the rest, are at
    most `threshold` apart; scores must be logits, as PickScore's are.

    Paper: Kirstain et al., "Pick-a-Pic", arXiv 2305.01569; as in the evaluation script of its repository.
    """
    labels = _checked(labels)
    gap = np.tanh((score_first - score_second) / 2)  # sigmoid(d) - sigmoid(-d)
    says = np.where(np.abs(gap) <= threshold, 0.5, np.where(gap > 0, 1.0, 0.0))
    return float((1 - np.abs(says - labels)).mean())


def choose_threshold(
    score_first: Float[np.ndarray, " n"],
    score_second: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> float:
    """The threshold of greatest three-way accuracy, the least of equals; to be chosen on other pairs than reported."""
    return max(
        thresholds,
        key=lambda t: (three_way_accuracy(score_first, score_second, labels, threshold=t), -t),
    )


def pairwise_agreement(votes: Sequence[Sequence[Hashable | None]]) -> float:
    """Mean over items of the share of pairs of voters that gave one label; None is no vote.

    Args:
        votes: By item, the label of each voter. Items with fewer than two votes are left out; NaN if none is left.
    """
    shares = []
    for counts in _counts(votes):
        m = counts.total()
        shares.append(sum(c * (c - 1) for c in counts.values()) / (m * (m - 1)))
    return float(np.mean(shares)) if shares else float("nan")


def krippendorff_alpha(votes: Sequence[Sequence[Hashable | None]]) -> float:
    """Krippendorff's alpha for nominal labels: 1 is full agreement, 0 what chance gives; NaN where only one label is.

    Args:
        votes: By item, the label of each voter; None is no vote, and items with fewer than two votes are left out.

    Paper: Krippendorff, "Computing Krippendorff's Alpha-Reliability", University of Pennsylvania (2011).
    """
    items = _counts(votes)
    totals: Counter[Hashable] = sum(items, Counter())
    n = totals.total()
    expected = n * n - sum(c * c for c in totals.values())
    if expected == 0:
        return float("nan")
    unlike = [(c.total() ** 2 - sum(v * v for v in c.values())) / (c.total() - 1) for c in items]
    return 1 - (n - 1) * sum(unlike) / expected


def reward_correlations(
    differences: Mapping[str, Float[np.ndarray, " n"]],
) -> tuple[tuple[str, ...], Float[np.ndarray, "r r"]]:
    """(names of rewards, Pearson correlations of their differences per prompt).

    Args:
        differences: By reward, the mean over seeds of arm - base for each prompt, NaN where there is none. Two rewards
            are compared on the prompts that both judged; NaN with fewer than 3 of them or without spread.
    """
    names = tuple(differences)
    matrix = np.full((len(names), len(names)), np.nan)
    for i, one in enumerate(names):
        for j, other in enumerate(names[: i + 1]):
            matrix[i, j] = matrix[j, i] = _correlation(differences[one], differences[other])
    return names, matrix


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    both = ~np.isnan(one + other)
    one, other = one[both], other[both]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _checked(labels: np.ndarray) -> np.ndarray:
    wrong = sorted(set(np.unique(labels).tolist()) - {0.0, 0.5, 1.0})
    if wrong:
        raise InputError(f"labels must be 1, 0 or 0.5 (first, second, tie), got {wrong[0]}")
    return labels


def _counts(votes: Sequence[Sequence[Hashable | None]]) -> list[Counter[Hashable]]:
    """Votes by label of each item that has two of them."""
    counted = [Counter(v for v in item if v is not None) for item in votes]
    return [counts for counts in counted if counts.total() >= 2]
