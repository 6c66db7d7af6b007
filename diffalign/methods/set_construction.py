"""Two sets of a round's images with the same prompts, D+ and D-: by exchanging images of a prompt until r(D+) is high.

D+ starts as the better of two whole sets, D- as the other. In each pass every prompt is looked at once: its two images
change places if that raises r(D+). So r(D+) never falls, and the images of a prompt stay the prompt's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import RunError
from diffalign.rewards.sets import exchanged
from diffalign.types import Embedded, SetReward, SetTally, TalliedReward

_SLACK = 1e-12
"""Of r(D+): what an exchange must raise it by to be more than rounding."""

Tallying = Callable[[Sequence[int]], SetTally]
"""Samples of a pool, by place -> what they are worth as a set."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """D+ and D-."""

    places: Int[Tensor, "p 2"]
    """A row for each two images that could change places: the one in D+, the one in D-."""
    trail: tuple[float, ...]
    """r(D+) at the start, and after each exchange."""
    worse: float
    """r(D-)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recount:
    """A set's number by any function, counted anew after every exchange."""

    function: Callable[[tuple[int, ...]], float]
    members: tuple[int, ...]

    @cached_property
    def score(self) -> float:
        return self.function(self.members)

    def exchange(self, out: int, into: int) -> "Recount":
        return replace(self, members=exchanged(self.members, out, into))


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """`weight` times a set's number, plus the mean of its samples' own scores."""

    tally: SetTally
    weight: float
    scores: Sequence[float]
    """Of every sample of the pool."""
    mean: float
    size: int

    @property
    def score(self) -> float:
        return self.weight * self.tally.score + self.mean

    def exchange(self, out: int, into: int) -> "Mixed":
        gained = (self.scores[into] - self.scores[out]) / self.size
        return replace(self, tally=self.tally.exchange(out, into), mean=self.mean + gained)


def tallying(reward: SetReward, pool: Embedded, *, weight: float, scores: Float[Tensor, " n"]) -> Tallying:
    """How a set of the pool is measured: by `weight` times a set reward plus the mean of its samples' own scores."""
    own = scores.tolist()

    def of(members: Sequence[int]) -> SetTally:
        made: SetTally
        if isinstance(reward, TalliedReward):
            made = reward.tally(pool, members)
        else:
            made = Recount(function=lambda chosen: reward.of_rows(pool.take(chosen)).score, members=tuple(members))
        mean = sum(own[i] for i in members) / len(members)
        return Mixed(tally=made, weight=weight, scores=own, mean=mean, size=len(members))

    return of


def halves(places: Int[Tensor, " k"]) -> Int[Tensor, "h 2"]:
    """The images of a prompt as one for either set: those of the first half beside those of the second.

    The last of an odd number is left out.
    """
    half = len(places) // 2
    return torch.stack([places[:half], places[half : 2 * half]], dim=1)


def build_sets(pairs: Int[Tensor, "p 2"], of: Tallying, orders: Iterable[Sequence[int]]) -> Sets:
    """D+ and D- out of two whole sets.

    Args:
        pairs: The two sets, as columns; the images of a row may change places.
        of: What a set is worth.
        orders: Of the rows, for each pass.

    Raises:
        RunError: A set's number is not finite.
    """
    first, second = (of(column) for column in pairs.T.tolist())
    ahead = _finite(first) >= _finite(second)
    found = swap(pairs if ahead else pairs.flip(1), first if ahead else second, orders)
    return replace(found, worse=_finite(of(found.places[:, 1].tolist())))


def swap(pairs: Int[Tensor, "p 2"], tally: SetTally, orders: Iterable[Sequence[int]]) -> Sets:
    """Greedy passes over the rows, until one of them exchanges nothing.

    Args:
        pairs: The image that is in the set, and the one that may take its place.
        tally: Of the first column.
        orders: Of the rows, for each pass.

    Raises:
        RunError: A set's number is not finite.
    """
    inside, outside = pairs.T.tolist()
    trail = [_finite(tally)]
    for order in orders:
        before = len(trail)
        for row in order:
            trial = tally.exchange(inside[row], outside[row])
            if _finite(trial) - trail[-1] <= _SLACK * abs(trail[-1]):
                continue
            tally = trial
            trail.append(trial.score)
            inside[row], outside[row] = outside[row], inside[row]
        if len(trail) == before:
            break
    return Sets(places=torch.tensor([inside, outside]).T, trail=tuple(trail), worse=math.nan)


def _finite(tally: SetTally) -> float:
    if not math.isfinite(tally.score):
        raise RunError(f"a set reward must give finite numbers, got {tally.score}; check the round's images")
    return tally.score
