"""Rewards for tests of online runs, found by `tests.online_rewards:name`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of all pixels."""
    return images.mean((1, 2, 3))


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How much more red than blue there is."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def constant(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same for every image."""
    return torch.full((len(images),), 0.5)


def blind(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """NaN for every second image."""
    scores = images.mean((1, 2, 3))
    scores[::2] = float("nan")
    return scores


def short(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """One score too few."""
    return images.mean((1, 2, 3))[1:]


def darkness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """What brightness takes away."""
    return -brightness(images, prompts)
