"""One reward's scores on a scale that can be added to others'.

A z-score is (score - mean) / std with the population's std, over the judged samples of a group or of a batch; where
all of these are equal it is 0. It does not change under score -> a * score + b, a > 0, so no reward outweighs another
by its scale. A rank is a place among them, from -1 for the lowest to 1 for the highest, ties sharing their mean place.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import InputError, near_match

How = Literal["none", "batch", "group", "fixed", "rank"]
"""As it is; z-score in the batch; z-score in the prompt's group; by a given mean and std; place in the group, or in
the batch where there are no groups."""


def normalise(
    scores: Float[Tensor, " b"],
    how: str,
    *,
    group_ids: Sequence[int] | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> Float[Tensor, " b"]:
    """Scores on a scale that can be added to others'.

    A score that is not finite becomes NaN and has no part in the others' mean, std or rank.

    Args:
        how: One of `How`.
        group_ids: Samples of one prompt share a number; "group" needs them.
        mean, std: Of "fixed", and of it alone.

    Raises:
        InputError: An unknown `how`, or arguments that do not belong to it.
    """
    check_how(how, mean, std, "normalise")
    if how == "group" and group_ids is None:
        raise InputError("normalise 'group' must get group_ids, got none")
    x, judged = scores.double(), scores.isfinite()
    if how == "fixed":
        assert mean is not None, "it was checked"
        assert std is not None, "it was checked"
        x = (x - mean) / std
    elif how != "none":
        index = _index(group_ids if how in ("group", "rank") else None, scores)
        x = (_ranks if how == "rank" else _z_scores)(x, judged, index)
    return torch.where(judged, x, torch.nan).to(scores.dtype)


def flat_groups(scores: Float[Tensor, " b"], group_ids: Sequence[int] | None = None) -> int:
    """Groups whose judged scores are all equal, so that these say nothing; without `group_ids` all are one group."""
    index, judged = _index(group_ids, scores), scores.isfinite()
    low, high = _extremes(scores.double(), judged, index)
    return int((low == high).sum())


def check_how(how: str, mean: float | None, std: float | None, where: str) -> None:
    """Raises InputError for an unknown way, or for a mean and std that it lacks or does not use."""
    if how not in get_args(How):
        raise InputError(
            f"{where} must be one of {', '.join(get_args(How))}, got {how!r}{near_match(how, get_args(How))}"
        )
    if how == "fixed":
        if mean is None or std is None or not math.isfinite(mean) or not 0 < std < math.inf:
            raise InputError(f"{where} 'fixed' must get a finite mean and a positive std, got {mean!r} and {std!r}")
    elif mean is not None or std is not None:
        raise InputError(f"{where} {how!r} must get no mean and std, which belong to 'fixed', got {mean!r} and {std!r}")


def _index(group_ids: Sequence[int] | None, scores: Tensor) -> Int[Tensor, " b"]:
    """Groups numbered from 0."""
    if group_ids is None:
        return torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    if len(group_ids) != len(scores):
        raise InputError(f"group_ids must have one entry per score, {len(scores)}, got {len(group_ids)}")
    return torch.unique(torch.as_tensor(list(group_ids), dtype=torch.long, device=scores.device), return_inverse=True)[
        1
    ]


def _per_group(values: Tensor, index: Tensor) -> Float[Tensor, " g"]:
    """Sums over groups."""
    groups = int(index.max()) + 1 if len(index) else 0
    return values.new_zeros(groups).index_add(0, index, values)


def _extremes(x: Tensor, judged: Tensor, index: Tensor) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
    """Lowest and highest judged score of each group; inf and -inf where there is none."""
    groups = int(index.max()) + 1 if len(index) else 0
    low = x.new_full((groups,), math.inf).scatter_reduce(0, index, torch.where(judged, x, math.inf), "amin")
    high = x.new_full((groups,), -math.inf).scatter_reduce(0, index, torch.where(judged, x, -math.inf), "amax")
    return low, high


def _z_scores(x: Tensor, judged: Tensor, index: Tensor) -> Float[Tensor, " b"]:
    low, high = _extremes(x, judged, index)
    spread = low < high
    span = torch.where(spread, high - low, 1.0)
    unit = torch.where(judged & spread[index], (x - low[index]) / span[index], 0.0)  # in [0, 1], at any scale
    count = _per_group(judged.double(), index).clamp(min=1)
    centred = torch.where(judged, unit - (_per_group(unit, index) / count)[index], 0.0)
    std = (_per_group(centred**2, index) / count).sqrt()
    return torch.where(spread[index], centred / torch.where(spread, std, 1.0)[index], 0.0)


def _ranks(x: Tensor, judged: Tensor, index: Tensor) -> Float[Tensor, " b"]:
    out = torch.full_like(x, torch.nan)
    if not judged.any():
        return out
    count = _per_group(judged.double(), index)
    before = count.cumsum(0) - count
    rows = torch.stack([index[judged].double(), x[judged]], dim=1)
    _, which, ties = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    place = (ties.cumsum(0) - (ties - 1) / 2)[which] - before[index[judged]]
    n = count[index[judged]]
    out[judged] = (2 * place - n - 1) / (n - 1).clamp(min=1)
    return out
