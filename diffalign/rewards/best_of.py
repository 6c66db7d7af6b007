"""Best of n: the images of a prompt that a reward scores highest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign import rewards
from diffalign.errors import InputError, RunError
from diffalign.types import FunctionReward, Reward, RewardBatch

RewardLike = str | Reward | Callable[..., Any]
"""A spec as `rewards.load` takes it, a reward, or a plain `f(images, prompts) -> scores`."""


def image_reward(reward: Any) -> Reward:
    """A reward of images, from anything that `RewardLike` names.

    Raises:
        InputError: Nothing of that name, no reward at all, or one of other media.
    """
    if isinstance(reward, str):
        reward = rewards.load(reward)
    if not isinstance(reward, Reward):
        if not callable(reward):
            raise InputError(f"reward must be a spec, a reward or a function of images and prompts, got {reward!r}")
        reward = FunctionReward(name=f"{type(reward).__name__} given to best_of", function=reward)
    if reward.modality != "image":
        raise InputError(f"reward must judge images, got {reward.name!r}, which judges {reward.modality}")
    return reward


def score_prompts(reward: Reward, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "p n"]:
    """Scores of the images of every prompt, those of one prompt in one batch; NaN where one could not be judged.

    Args:
        images: Those of the first prompt, then those of the second: as many for each.
    """
    rows = []
    for i, (prompt, own) in enumerate(zip(prompts, images.chunk(len(prompts)), strict=True)):
        batch = RewardBatch(images=own, prompts=[prompt] * len(own), group_ids=[i] * len(own))
        out = reward.score(batch)
        assert out.valid is not None, "it is made where a reward gives none"
        rows.append(torch.where(out.valid, out.scores, torch.nan).float().cpu())
    return torch.stack(rows)


def best(scores: Float[Tensor, "p n"], count: int) -> Int[Tensor, "p k"]:
    """Places of the highest scores in each row, the highest first; of equal ones the earlier. NaN is left out.

    Raises:
        RunError: A row has fewer than `count` scores.
    """
    judged = (~scores.isnan()).sum(1)
    if len(judged) and judged.min() < count:
        short = int(judged.argmin())
        raise RunError(
            f"reward must score at least {count} of the {scores.shape[1]} images of each prompt, got {judged[short]} "
            f"for prompt {short}"
        )
    ranked = torch.where(scores.isnan(), -torch.inf, scores).argsort(dim=1, descending=True, stable=True)
    return ranked[:, :count]
