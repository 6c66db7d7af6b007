"""Which item each sample of a run's stream is."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from diffalign import rng


@runtime_checkable
class Turn(Protocol):
    """Which item each sample of the run's stream is."""

    def item(self, sample: int) -> int: ...


class Order:
    """Which item each sample of the stream is: a fresh permutation of the items every epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def item(self, sample: int) -> int:
        epoch, position = divmod(sample, self.length)
        if epoch != self._epoch:
            shuffle = rng.generator(self.seed, epoch, "order")
            self._permutation = torch.randperm(self.length, generator=shuffle).tolist()
            self._epoch = epoch
        return self._permutation[position]


class Drawn:
    """Which item each sample of the stream is: a good one with probability `positive_ratio`, each as likely as others.

    Draws are with replacement, as Diffusion-KTO's weighted sampler makes them (arXiv 2404.04465).
    """

    def __init__(self, good: Bool[Tensor, " n"], positive_ratio: float, seed: int) -> None:
        self.good = good.nonzero().flatten().tolist()
        self.bad = (~good).nonzero().flatten().tolist()
        self.positive_ratio = positive_ratio
        self.seed = seed

    def item(self, sample: int) -> int:
        draw = rng.generator(self.seed, sample, "item")
        wanted = torch.rand((), generator=draw, dtype=torch.float64).item() < self.positive_ratio
        some = self.good if wanted else self.bad
        return int(some[int(torch.randint(len(some), (), generator=draw))])
