"""All arms over several guidances: preference tuning moves the best one, so that one guidance may favour an arm."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from diffalign.evaluate.comparison import matrix, measure
from diffalign.evaluate.results import Sweep, SweepComparison, SweepPoint
from diffalign.evaluate.score import Table

Scores = Mapping[tuple[str, float], np.ndarray]
"""[n, 1] by arm and guidance."""


def summarise(
    tables: Mapping[float, Table],
    pairs: Sequence[tuple[str, str]],
    rewards: Sequence[str],
    *,
    strata: Sequence[str] | None,
    seed: int,
) -> Sweep:
    """Means by arm and guidance, and each pair of arms compared at the same guidance and at the best of each.

    Args:
        tables: Scored tables of all arms by guidance.
        pairs: (arm, against).
    """
    arms = list(dict.fromkeys(arm for pair in pairs for arm in reversed(pair)))
    points, comparisons = [], []
    n = 0
    for reward in rewards:
        scores = {(arm, g): matrix(table, arm, reward) for g, table in tables.items() for arm in arms}
        n = len(next(iter(scores.values())))
        points += [
            SweepPoint(arm=arm, guidance=g, reward=reward, mean=float(np.nanmean(s))) for (arm, g), s in scores.items()
        ]
        best = {arm: max((float(np.nanmean(scores[arm, g])), g) for g in tables)[1] for arm in arms}
        for arm, against in pairs:
            compared = _comparer(scores, arm, against, reward, strata, seed)
            comparisons += [compared("same", g, g) for g in tables]
            comparisons.append(compared("best", best[arm], best[against]))
    return Sweep(guidances=tuple(tables), n_prompts=n, points=tuple(points), comparisons=tuple(comparisons))


def _comparer(
    scores: Scores, arm: str, against: str, reward: str, strata: Sequence[str] | None, seed: int
) -> Callable[..., SweepComparison]:
    def compared(kind: str, of_arm: float, of_against: float) -> SweepComparison:
        found = measure(scores[arm, of_arm], scores[against, of_against], seed=seed, strata=strata)
        return SweepComparison(
            arm=arm,
            against=against,
            reward=reward,
            kind="same" if kind == "same" else "best",
            guidance_arm=of_arm,
            guidance_against=of_against,
            measured=found,
        )

    return compared
