"""Pairs of a round: of the images of one prompt, which is better than which by the weighted sum of the scores."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Winners and losers by place in the round, and what was counted on the way."""

    places: Int[Tensor, "m 2"]
    metrics: Mapping[str, float]


def best_and_worst(total: Float[Tensor, " n"], group: Int[Tensor, " n"], *, margin: float = 0.0) -> Pairs:
    """The best and the worst image of each prompt where they lie more than `margin` apart; of equals the first.

    Raises:
        InputError: No prompt has two images, or a score is not finite.
    """
    check_scores(total)
    ends = [places[torch.stack([total[places].argmax(), total[places].argmin()])] for places in by_prompt(group)]
    return _kept(total, group, torch.stack(ends), margin)


def all_pairs(total: Float[Tensor, " n"], group: Int[Tensor, " n"], *, margin: float = 0.0) -> Pairs:
    """All two images of a prompt that lie more than `margin` apart, the better one first.

    Raises:
        InputError: No prompt has two images, or a score is not finite.
    """
    check_scores(total)
    two = torch.cat([torch.combinations(places) for places in by_prompt(group)])
    turned = total[two[:, 0]] < total[two[:, 1]]
    return _kept(total, group, torch.where(turned[:, None], two.flip(1), two), margin)


def by_prompt(group: Int[Tensor, " n"]) -> list[Int[Tensor, " _"]]:
    """Places of the images of each prompt that has two or more.

    Raises:
        InputError: There is no such prompt.
    """
    company = with_company(group)
    counts = group[company].unique(return_counts=True)[1]
    return list(company[group[company].argsort(stable=True)].split(counts.tolist()))


def with_company(group: Int[Tensor, " n"]) -> Int[Tensor, " k"]:
    """Places of the images whose prompt has another one.

    Raises:
        InputError: There are none.
    """
    _, number, counts = group.unique(return_inverse=True, return_counts=True)
    found = (counts[number] > 1).nonzero()[:, 0]
    if not len(found):
        raise InputError(f"a round must have at least 2 images of a prompt, got 1 of each of {len(counts)} prompts")
    return found


def check_scores(total: Float[Tensor, " n"]) -> None:
    """Raises InputError for scores that are not finite."""
    if not bool(total.isfinite().all()):
        bad = (~total.isfinite()).nonzero()[:, 0].tolist()
        raise InputError(f"scores must be finite, got NaN or infinity for images {bad[:8]} of {len(total)}")


def zero_spread(total: Float[Tensor, " n"], group: Int[Tensor, " n"]) -> float:
    """Share of the prompts with two images or more whose images all have one score."""
    _, number, counts = group.unique(return_inverse=True, return_counts=True)
    low, high = (
        total.new_zeros(len(counts)).scatter_reduce(0, number, total, end, include_self=False)
        for end in ("amin", "amax")
    )
    return float((low == high)[counts > 1].double().mean())


def _kept(total: Tensor, group: Tensor, ordered: Tensor, margin: float) -> Pairs:
    """Pairs above the margin, and what is said of them and of the others."""
    gap = total[ordered[:, 0]] - total[ordered[:, 1]]
    kept = gap > margin
    metrics = {
        "pairs": float(kept.sum()),
        "tie_rate": float((gap == 0).double().mean()),
        "below_margin": float(((gap > 0) & ~kept).double().mean()),
        "zero_std_ratio": zero_spread(total, group),
    }
    if kept.any():
        wide = gap[kept].double()
        metrics["pair_margin"] = float(wide.mean())
        metrics |= {f"pair_margin_p{p}": float(wide.quantile(p / 100)) for p in (10, 50, 90)}
    return Pairs(places=ordered[kept], metrics=metrics)
