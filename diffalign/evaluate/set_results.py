"""What rewards of whole sets found in an evaluation: of each arm, of two arms, of each sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Endless:
    """The distance of a set of endless size: where a line through distances of subsets over 1 / N meets 0."""

    value: float
    slope: float
    r2: float
    """Share of the distances' variance that the line explains; far from 1 the value is not to be trusted."""
    sizes: tuple[float, ...]
    """Embeddings in the subsets of each point."""
    distances: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """One sample and what it does for its set."""

    prompt_index: int
    k: int
    credit: float
    """The set's number less that of the set without it: above 0 the sample helps."""


@dataclass(frozen=True, kw_only=True)
class SetDifference:
    """How two arms' numbers by a reward of whole sets differ, at equal size."""

    reward: str
    spec: str
    version: str
    arm: str
    against: str
    samples: int
    difference: float
    """Of the scores, arm - against: above 0 the arm is better."""
    low: float | None
    high: float | None
    """95 % interval by the basic bootstrap over prompts, both arms drawn together; None with few prompts."""
    resamples: int
    optimised: bool = False
    """Whether one of the two was trained on it, or through its encoder."""


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """One arm's number by a reward of whole sets."""

    reward: str
    spec: str
    version: str
    arm: str
    score: float
    """Higher is better."""
    raw: Mapping[str, float]
    """Native values, in their native sign."""
    samples: int
    endless: Endless | None = None
    """Of Fréchet audio distances, where there are more embeddings than their width."""
    credit: Literal["loo", "influence", "self"] | None = None
    """How the credit of samples was found: each left out, or to first order."""
    best: tuple[Outlier, ...] = ()
    """Most helpful first."""
    worst: tuple[Outlier, ...] = ()
    """Most harmful first."""
