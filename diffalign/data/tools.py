"""What can be made of comparisons and scores before training: filters, new labels, single images with labels.

A comparison is one row of preference data: two images of one prompt, by name, and which of them won. Names are
anything that is equal for equal images. Nothing here reads files; `data.rewrite` does.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Group = Literal["exclusive_win", "exclusive_lose", "mixed"]


class Comparison(NamedTuple):
    """Two images of a prompt; with `tie`, `winner` and `loser` only say which is which."""

    prompt: str
    winner: str
    loser: str
    tie: bool = False


def absolute_winners(comparisons: Sequence[Comparison], *, all_losers: bool = False) -> list[int]:
    """Places of the comparisons that are kept: those won by an image that wins and never loses or ties.

    Args:
        comparisons: In the order of the data; wins and losses count within a prompt.
        all_losers: Keep every comparison of such an image, not only its latest.

    Paper: Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636: 87 687
    pairs of Pick-a-Pic v2 remain, and train better than all of them.
    Departs: one win is enough, as in the authors' code; the paper's text asks for more than one.
    """
    beaten = {(c.prompt, c.loser) for c in comparisons} | {(c.prompt, c.winner) for c in comparisons if c.tie}
    won = [i for i, c in enumerate(comparisons) if (c.prompt, c.winner) not in beaten]
    if all_losers:
        return won
    latest = {(comparisons[i].prompt, comparisons[i].winner): i for i in won}
    return sorted(latest.values())


def image_groups(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], Group]:
    """The group of every (prompt, image) that won or lost: only won, only lost, or some of both. Ties say nothing.

    Paper: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", arXiv 2404.04465, whose code has the
    groups exclusive_win, exclusive_lose and intersections.
    """
    won = {(c.prompt, c.winner) for c in comparisons if not c.tie}
    lost = {(c.prompt, c.loser) for c in comparisons if not c.tie}
    groups: dict[tuple[str, str], Group] = {}
    for c in comparisons:
        for image in ((c.prompt, c.winner), (c.prompt, c.loser)):
            if image in won or image in lost:
                both = image in won and image in lost
                groups[image] = "mixed" if both else "exclusive_win" if image in won else "exclusive_lose"
    return groups


def image_label(group: Group, mixed: Literal["good", "bad", "drop"] = "good") -> bool | None:
    """Whether an image of a group is good; None leaves it out.

    Args:
        mixed: What an image that won some and lost some is. Diffusion-KTO's code counts it as good (`gt_label_wi_l`).
    """
    if group == "mixed":
        return {"good": True, "bad": False, "drop": None}[mixed]
    return group == "exclusive_win"


def label_by(score_0: float | None, score_1: float | None) -> float | None:
    """1 where the first image scores higher, 0 where the second does, 0.5 for a tie, None where a score is missing."""
    if score_0 is None or score_1 is None or not (math.isfinite(score_0) and math.isfinite(score_1)):
        return None
    return 0.5 if score_0 == score_1 else float(score_0 > score_1)


def relabel(scores: Sequence[tuple[float | None, float | None]]) -> list[float | None]:
    """Labels of pairs by the scores of their two images; see `label_by`."""
    return [label_by(first, second) for first, second in scores]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two labellings of the same pairs; labels that are None, or not 0, 0.5 or 1, are undecided."""

    changed: int
    """Pairs whose label differs."""
    decided: int
    """Pairs with a winner by both."""
    agree: int
    """Of these, with the same one."""

    @property
    def share(self) -> float:
        """agree / decided; NaN where no pair has a winner by both."""
        return self.agree / self.decided if self.decided else math.nan


def agreement(before: Sequence[float | None], after: Sequence[float | None]) -> Agreement:
    """How far two labellings of the same pairs agree."""
    pairs = Counter(zip(before, after, strict=True))
    agree = pairs[0.0, 0.0] + pairs[1.0, 1.0]
    return Agreement(
        changed=sum(n for (a, b), n in pairs.items() if a != b),
        decided=agree + pairs[0.0, 1.0] + pairs[1.0, 0.0],
        agree=agree,
    )
