"""Advantages: how much better than others an image scored, from scores and the numbers of their groups alone.

With mean_g, std_g of a prompt's group, mean, std of a round and R the score: `group` (R - mean_g) / (std_g + 1e-4);
`global_std` with std, and `max_std` with the largest std_g, in place of std_g; `unbiased` (R - mean_g) / (std_g + 1e-8)
with n - 1 under the root, n elsewhere; `win_rate` is `group` of the share of its group that an image beats; `batch`
(R - mean) / (std + 1e-8); `per_prompt` (R - mean_h) / (std_h + 1e-6) with h the prompt's scores of several rounds.
All is float64. A deviation of at most 1e-8 is rounding and counts as none, so that equal scores have advantage 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffalign.errors import InputError, near_match

Scheme = Literal["group", "global_std", "unbiased", "max_std", "win_rate", "batch", "per_prompt"]
"""What a score is measured against. Flow-GRPO has `group` and `global_std` (SD3), DanceGRPO and MixGRPO `unbiased`,
LongCat `max_std`, Pref-GRPO `win_rate`, DDPO `per_prompt`, and `batch` where it does not track prompts."""
Combine = Literal["advantages", "scores"]
"""Several rewards: each has its advantages, and these are added; or scores are added, where the widest spread rules."""
Past = Mapping[int, Sequence[float]]
"""Scores of earlier rounds for the prompt of each group, the oldest first."""

RELATIVE: tuple[Scheme, ...] = ("group", "global_std", "unbiased", "max_std", "win_rate")
"""Schemes that measure an image against others of its prompt, of which there must be one."""
TOLERANCE = 1e-8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a method makes advantages of scores; its fields are the method's keys."""

    advantage: Scheme = "group"
    combine: Combine = "advantages"
    clip_advantage: float = 5.0
    """Advantages are cut to plus and minus this; how many were is counted. inf cuts none."""
    extremes: int | None = None
    """Of every group this many best and as many worst images are trained on, their advantages still over all of it;
    DanceGRPO's video recipe has 4 of 24. None trains on all."""
    buffer_size: int | None = None
    """Scores of a prompt that `per_prompt` remembers, those of the round included; None is 16 there."""
    min_count: int | None = None
    """Scores of a prompt below which `per_prompt` measures against the whole round; None is 16 there."""

    def __post_init__(self) -> None:
        if not self.clip_advantage > 0:
            raise InputError(f"method.clip_advantage must be positive, got {self.clip_advantage}")
        if self.extremes is not None and self.extremes < 1:
            raise InputError(f"method.extremes must be at least 1, got {self.extremes}")
        if self.advantage != "per_prompt" and (self.buffer_size, self.min_count) != (None, None):
            raise InputError(
                f"method.buffer_size and .min_count must be left out with advantage = {self.advantage!r}, got "
                f"{self.buffer_size} and {self.min_count}; only 'per_prompt' remembers scores"
            )
        size, least = self.tracker
        if not 1 <= least <= size:
            raise InputError(f"method.min_count must be in [1, buffer_size], got {least} with buffer_size {size}")

    @property
    def tracker(self) -> tuple[int, int]:
        """(buffer_size, min_count) with DDPO's numbers where none are named."""
        size = 16 if self.buffer_size is None else self.buffer_size
        return size, 16 if self.min_count is None else self.min_count

    @property
    def group_at_least(self) -> int:
        """Images of one prompt without which there is nothing to compare."""
        return 2 if self.advantage in RELATIVE else 1


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Images of a round that are trained on."""

    places: Int[Tensor, " m"]
    advantage: Float[Tensor, " m"]
    """Clipped, float64."""
    metrics: dict[str, float]
    """`zero_std_ratio`: share of prompts left out because none of their images has an advantage; `trained_prompt_num`:
    prompts that stay; `group_size`: mean over all prompts; `reward_std_mean`: mean over prompts of the std of the
    weighted sum of scores; `advantage_clipfrac`: share of the images whose advantage was cut; `lone_images`: those
    left out because no other of their prompt could be scored."""


def choose(
    scores: Mapping[str, Float[Tensor, " n"]],
    weights: Mapping[str, float],
    group: Int[Tensor, " n"],
    recipe: Recipe,
    *,
    past: Mapping[str, Past] | None = None,
) -> Chosen:
    """Images of a round with their clipped advantages; prompts in which no image is better than another are left out.

    Args:
        scores: By reward.
        weights: Of each reward in the sum.
        group: Number of each image's prompt; images of a prompt lie together.
        past: By reward; `per_prompt` alone asks.

    Raises:
        InputError: Scores that are not finite, no weight for a reward, or one image a prompt with a relative scheme.

    Departs: Flow-GRPO's code draws some of the images it left out again, to fill its batches; nothing is drawn here.
    """
    index, size = _groups(group)
    company = size[index] >= (recipe.group_at_least if (size > 1).any() else 1)  # all alone is an error, below
    kept = company.nonzero().flatten()
    rest = group[kept]
    raw = combined({k: v[kept] for k, v in scores.items()}, weights, rest, recipe, past=past)
    cut = raw.clamp(-recipe.clip_advantage, recipe.clip_advantage)
    on = moving(raw, rest)
    if recipe.extremes is not None:
        on = on & extremes(raw, rest, recipe.extremes)
    total = torch.stack([weights[k] * v.double() for k, v in scores.items()]).sum(0)
    trained = len(group[kept][on].unique())
    metrics = {
        "zero_std_ratio": 1 - len(rest[moving(raw, rest)].unique()) / max(1, len(size)),
        "trained_prompt_num": float(trained),
        "group_size": len(group) / max(1, len(size)),
        "reward_std_mean": float(_std(total, index, size).mean()) if len(size) else 0.0,
        "advantage_clipfrac": float((raw != cut).double().mean()) if len(raw) else 0.0,
        "lone_images": float((~company).sum()),
    }
    return Chosen(places=kept[on], advantage=cut[on], metrics=metrics)


def combined(
    scores: Mapping[str, Float[Tensor, " n"]],
    weights: Mapping[str, float],
    group: Int[Tensor, " n"],
    recipe: Recipe,
    *,
    past: Mapping[str, Past] | None = None,
) -> Float[Tensor, " n"]:
    """Advantages of several rewards as one, not clipped.

    Paper: Li et al., "MixGRPO", arXiv 2507.21802, for the sum of advantages; Flow-GRPO and DDPO add scores.
    """
    missing = [name for name in scores if name not in weights]
    if missing or not scores:
        raise InputError(f"weights must have one of every reward, {sorted(scores)}, got {dict(weights)}")
    past = past or {}
    buffer_size, min_count = recipe.tracker

    def of(values: Tensor, before: Past) -> Tensor:
        return advantages(values, group, recipe.advantage, past=before, buffer_size=buffer_size, min_count=min_count)

    if recipe.combine == "advantages":
        return torch.stack([weights[k] * of(v, past.get(k, {})) for k, v in scores.items()]).sum(0)
    total = torch.stack([weights[k] * v.double() for k, v in scores.items()]).sum(0)
    return of(total, _total_past(weights, past, list(scores)))


def advantages(
    scores: Float[Tensor, " n"],
    group: Int[Tensor, " n"],
    scheme: str,
    *,
    past: Past | None = None,
    buffer_size: int = 16,
    min_count: int = 16,
) -> Float[Tensor, " n"]:
    """How much better than others each image scored, in standard deviations, float64.

    Args:
        group: Images of one prompt share a number; groups may be of different sizes.
        scheme: One of `Scheme`.
        past: By group number, and only `per_prompt` asks: with the round's own scores after them, the last
            `buffer_size` are what a prompt's images are measured against, or if they are fewer than `min_count` the
            round. It follows that a prompt may be met one image at a time.

    Raises:
        InputError: An unknown scheme, scores that are not finite, or a group of one image with a scheme relative to it.

    Paper: Liu et al., "Flow-GRPO", arXiv 2505.05470; Black et al., "DDPO", arXiv 2305.13301, for `per_prompt`; Wang et
        al., "Pref-GRPO", arXiv 2508.20751, for `win_rate`.
    Departs: std_g is over n, where DanceGRPO's is `unbiased`; win rates are not rounded to three decimals.
    """
    if scheme not in get_args(Scheme):
        raise InputError(f"advantage must be a known scheme, got {scheme!r}{near_match(scheme, get_args(Scheme))}")
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"scores must be finite, got others for images {bad} of {len(scores)}")
    if scores.shape != group.shape:
        raise InputError(f"group must have one number per score, {len(scores)}, got {len(group)}")
    x = scores.double()
    if not len(x):
        return x
    if scheme == "per_prompt":
        return _tracked(x, group, past or {}, buffer_size, min_count)
    if scheme == "batch":
        return _scaled(x - x.mean(), x.std(correction=0), 1e-8)
    index, size = _groups(group)
    if (size < 2).any():
        raise InputError(
            f"group must hold at least 2 images of every prompt with advantage = {scheme!r}, got 1 of "
            f"{int((size < 2).sum())} of {len(size)} prompts; raise online.group, or choose 'per_prompt' or 'batch'"
        )
    if scheme == "win_rate":
        pairs = pairs_within(group)
        x = win_rates(pairs, _outcome(x[pairs[:, 0]] - x[pairs[:, 1]]), len(x))
    centred = x - _mean(x, index, size)[index]
    std = _std(x, index, size, correction=int(scheme == "unbiased"))
    spread = {"global_std": x.std(correction=0), "max_std": std.max()}.get(scheme, std[index])  # others: the group's
    return _scaled(centred, spread, 1e-8 if scheme == "unbiased" else 1e-4)


def moving(advantage: Float[Tensor, " n"], group: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether any image of an image's prompt has an advantage: where none has, there is nothing to learn."""
    index, size = _groups(group)
    some = (advantage.abs() > TOLERANCE).to(advantage.dtype)
    return (advantage.new_zeros(len(size)).index_add(0, index, some) > 0)[index]


def extremes(advantage: Float[Tensor, " n"], group: Int[Tensor, " n"], count: int) -> Bool[Tensor, " n"]:
    """Whether an image is one of the `count` best or the `count` worst of its prompt; equals go by their place."""
    out = torch.zeros_like(group, dtype=torch.bool)
    for number in group.unique():
        places = (group == number).nonzero().flatten()
        order = places[advantage[places].argsort(stable=True)]
        out[order[:count]] = True
        out[order[-count:]] = True
    return out


def pairs_within(group: Int[Tensor, " n"]) -> Int[Tensor, "m 2"]:
    """Places of all pairs of images of one prompt."""
    return (group[:, None] == group).triu(1).nonzero()


def win_rates(pairs: Int[Tensor, "m 2"], outcome: Float[Tensor, " m"], count: int) -> Float[Tensor, " n"]:
    """Share of its comparisons that each of `count` images won, float64.

    Args:
        pairs: Places of what was compared.
        outcome: 1 where the first won, 0 where the second did, 1/2 for a tie or an answer that could not be read.

    Raises:
        InputError: An image that was never compared.
    """
    times = torch.bincount(pairs.flatten(), minlength=count)
    if (times == 0).any():
        raise InputError(f"pairs must compare every image, got none with {(times == 0).nonzero().flatten().tolist()}")
    wins = outcome.new_zeros(count, dtype=torch.float64)
    wins = wins.index_add(0, pairs[:, 0], outcome.double()).index_add(0, pairs[:, 1], 1 - outcome.double())
    return wins / times


def _outcome(difference: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return torch.where(difference.abs() <= TOLERANCE, 0.5, (difference > 0).to(difference.dtype))


def _tracked(x: Tensor, group: Tensor, past: Past, buffer_size: int, min_count: int) -> Float[Tensor, " n"]:
    """Against a prompt's last scores, or against the round's where they are few."""
    out = torch.empty_like(x)
    for number in group.unique().tolist():
        own = group == number
        known = torch.cat([x.new_tensor(list(past.get(number, ()))), x[own]])[-buffer_size:]
        base = x if len(known) < min_count else known
        out[own] = _scaled(x[own] - base.mean(), base.std(correction=0), 1e-6)
    return out


def _scaled(centred: Tensor, std: Tensor, guard: float) -> Float[Tensor, " n"]:
    """Deviations by the standard deviation; those that are no more than rounding are 0."""
    return torch.where(centred.abs() <= TOLERANCE, 0.0, centred) / (std + guard)


def _total_past(weights: Mapping[str, float], past: Mapping[str, Past], names: Sequence[str]) -> Past:
    """Earlier scores, added by weight; every reward must know the same images."""
    numbers = {number for name in names for number in past.get(name, {})}
    rows = {g: zip(*(past.get(name, {}).get(g, ()) for name in names), strict=True) for g in sorted(numbers)}
    return {g: [sum(weights[k] * v for k, v in zip(names, row, strict=True)) for row in r] for g, r in rows.items()}


def _groups(group: Tensor) -> tuple[Int[Tensor, " n"], Int[Tensor, " g"]]:
    """Groups numbered from 0, and how many images each has."""
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    return index, size


def _mean(x: Tensor, index: Tensor, size: Tensor) -> Float[Tensor, " g"]:
    return x.new_zeros(len(size)).index_add(0, index, x) / size


def _std(x: Tensor, index: Tensor, size: Tensor, correction: int = 0) -> Float[Tensor, " g"]:
    centred = x - _mean(x, index, size)[index]
    return (x.new_zeros(len(size)).index_add(0, index, centred.square()) / (size - correction)).sqrt()
