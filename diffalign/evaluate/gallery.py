"""Which pictures a report shows, chosen by rules that nobody can bend, and on which side a voter sees which arm."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from diffalign.data.prompts import by_hash
from diffalign.errors import InputError

PROMPTS = 48
"""Prompts of the unselected gallery."""
PER_CATEGORY = 4
CHANGED = 12
"""Prompts of each part of the page of largest changes."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LargestChange:
    """Places of prompts, chosen by what a held-out judge said: a page that must be labelled as selected."""

    best: tuple[int, ...]
    """Most gained first."""
    worst: tuple[int, ...]
    """Most lost first."""
    median: tuple[int, ...]
    """From the middle of all prompts, most gained first."""


def unselected(prompts: Sequence[str], categories: Sequence[str] | None = None, *, most: int = PROMPTS) -> list[int]:
    """Places of the gallery's prompts: 4 of each category by ascending sha256, at most `most`; without, `most`.

    Args:
        categories: Of each prompt. A category of fewer than 4 prompts gives what it has; with more than 12 categories
            each gives fewer, in rounds of one each.

    Returns:
        Places, by category in the order of the file, then by hash; the images to show are those of seed 0.
    """
    labels = [""] * len(prompts) if categories is None else list(categories)
    if len(labels) != len(prompts):
        raise InputError(f"categories must have one entry per prompt, {len(prompts)}, got {len(labels)}")
    members: dict[str, list[int]] = {label: [] for label in labels}
    for place in by_hash(list(prompts)):
        members[labels[place]].append(place)
    each = most if categories is None else PER_CATEGORY
    rounds = itertools.zip_longest(*(places[:each] for places in members.values()))
    chosen = [place for places in rounds for place in places if place is not None][:most]
    return [place for places in members.values() for place in places if place in chosen]


def largest_change(
    differences: Float[np.ndarray, " n"], prompts: Sequence[str], *, count: int = CHANGED
) -> LargestChange:
    """The prompts that gained most, lost most, and lie in the middle; no prompt twice.

    Args:
        differences: By prompt, a held-out judge's mean over seeds of arm - base; NaN is left out.
        count: Of each; a third of the prompts where they are fewer.
    """
    rank = {place: position for position, place in enumerate(by_hash(list(prompts)))}
    judged = [place for place in range(len(prompts)) if not np.isnan(differences[place])]
    order = sorted(judged, key=lambda place: (-differences[place], rank[place]))
    count = min(count, len(order) // 3)
    start = (len(order) - count) // 2
    return LargestChange(
        best=tuple(order[:count]),
        worst=tuple(reversed(order[len(order) - count :])),
        median=tuple(order[start : start + count]),
    )


def sides(prompt: str, arms: tuple[T, T]) -> tuple[T, T]:
    """(left, right): the arms in their order where sha256 of the prompt and "side" is even, else exchanged."""
    digest = hashlib.sha256((prompt + "side").encode()).digest()
    return arms if digest[-1] % 2 == 0 else (arms[1], arms[0])
