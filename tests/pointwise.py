"""What every differentiable reward of image and prompt must hold, smooth pictures to hold it on, and full-size nets."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from diffalign.types import RewardBatch

PROMPTS = ["a red circle", "two blue squares on a table", "a red circle", "fog"]


def waves(height: int, width: int, count: int = 1) -> torch.Tensor:
    """Smooth pictures: sums of sinusoids in [0.1, 0.9]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / height
    pictures = [
        [
            0.5 + sum(0.1 * np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 8, (4, 3)))
            for _ in range(3)
        ]
        for _ in range(count)
    ]
    return torch.tensor(np.array(pictures), dtype=torch.float32)


def batch_of(order: list[int], height: int = 64, width: int = 56) -> RewardBatch:
    """Four pictures and their prompts, in an order."""
    return RewardBatch(images=waves(height, width, 4)[order], prompts=[PROMPTS[i] for i in order])


def check_independence(make: Callable[[int], Any]) -> None:
    """A sample's score does not depend on batch size, order, neighbours or doubles; `make` takes a batch size."""
    whole = make(32).score(batch_of([0, 1, 2, 3])).scores
    assert whole.std() > 0
    for order, size in (([0, 1, 2, 3], 1), ([3, 1, 0, 2], 3), ([1, 1, 2, 1], 2), ([2], 32)):
        scores = make(size).score(batch_of(order)).scores
        torch.testing.assert_close(scores, whole[order], rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def check_gradient(reward: Any, cos_scale: float) -> None:
    """The gradient is finite, reaches every picture and no weight; values agree with the reference road in the cosine.

    The tolerance is the declared one of rewards.md 1.2: 0.002 of a cosine on smooth pictures.
    """
    batch = batch_of([0, 1, 2, 3])
    images = batch.images.clone().requires_grad_()
    scores = reward.differentiable_score(RewardBatch(images=images, prompts=batch.prompts))
    scores.sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in reward.encoder.parts.net.parameters())
    torch.testing.assert_close(scores.detach(), reward.score(batch).scores, atol=2e-3 * cos_scale, rtol=0)


def check_full_size(reward: Any, cos_scale: float, height: int = 512, width: int = 512) -> None:
    """One picture by both roads of a network of full size: close in the cosine, with a gradient."""
    images = waves(height, width).requires_grad_()
    batch = RewardBatch(images=images, prompts=PROMPTS[:1])
    graph = reward.differentiable_score(batch)
    graph.sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()
    torch.testing.assert_close(graph.detach(), reward.score(batch).scores, atol=2e-3 * cos_scale, rtol=0)
