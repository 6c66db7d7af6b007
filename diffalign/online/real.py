"""Rows of the data, with their images, among a round's own images or beside each of them.

Among them: of the run's stream of samples a fixed share are rows of the data, spread evenly. Sample s is one where
floor((s + 1) share) > floor(s share); the others go on through the round as if they were alone. Which sample is which
depends on neither processes nor rounds, and rows come in the order that a run on the data alone would have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from diffalign.data.batches import Collator
from diffalign.data.orders import Turn
from diffalign.online.collate import RoundCollator
from diffalign.types import Batch, Cond, ImageBatch, Needs, PairBatch


def real_before(sample: int, share: float) -> int:
    """How many of the first `sample` samples of the stream are rows of the data."""
    return math.floor(sample * share)


@dataclass(frozen=True)
class MixedOrder:
    """Own items as they are numbered, rows of the data as -1 - row."""

    own: Turn
    real: Turn
    share: float

    def item(self, sample: int) -> int:
        """Of a sample of the run's stream."""
        before = real_before(sample, self.share)
        if real_before(sample + 1, self.share) > before:
            return -1 - self.real.item(before)
        return self.own.item(sample - before)


@dataclass(frozen=True, kw_only=True)
class Among:
    """Batches of single images of which a share are the data's."""

    own: RoundCollator
    real: Collator
    share: float

    @property
    def order(self) -> MixedOrder:
        return MixedOrder(self.own.order, self.real.order, self.share)

    def batch(self, items: Sequence[int], samples: Sequence[int]) -> Batch:
        """The batch of some items; `samples` are their numbers in the run's stream."""
        ours = [i for i, item in enumerate(items) if item >= 0]
        theirs = [i for i, item in enumerate(items) if item < 0]
        parts: list[ImageBatch] = []
        if ours:
            own = self.own.batch([items[i] for i in ours], [samples[i] for i in ours])
            assert isinstance(own, ImageBatch), "rows of the data go among single images"
            parts.append(ImageBatch(x_0=own.x_0, cond=own.cond, samples=own.samples))
        if theirs:
            found = self.real.batch([-1 - items[i] for i in theirs], [samples[i] for i in theirs])
            assert isinstance(found, ImageBatch), "rows of the data are taken for their winners"
            parts.append(found)
        return parts[0] if len(parts) == 1 else _joined(parts[0], parts[1], [*ours, *theirs])


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Batches of own pairs, with a row of the data beside each."""

    own: RoundCollator
    real: Collator

    @property
    def order(self) -> Turn:
        return self.own.order

    @cached_property
    def _rows(self) -> Turn:
        return self.real.order

    def batch(self, items: Sequence[int], samples: Sequence[int]) -> Batch:
        """The batch of some items; `samples` are their numbers in the run's stream."""
        own = self.own.batch(items, samples)
        found = self.real.batch([self._rows.item(sample) for sample in samples], samples)
        assert isinstance(own, PairBatch), "rows of the data go beside pairs"
        assert isinstance(found, ImageBatch), "rows of the data are taken for their winners"
        return replace(own, real=found)


def with_real(own: RoundCollator, real: Collator | None, needs: Needs) -> RoundCollator | Among | Beside:
    """A round's batches with the rows of the data that its method asks for.

    Args:
        real: The data, where the method asks for some of it.
    """
    if real is None:
        return own
    return Beside(own=own, real=real) if needs.real_beside else Among(own=own, real=real, share=needs.real_share)


def _joined(a: ImageBatch, b: ImageBatch, places: Sequence[int]) -> ImageBatch:
    """Both batches as one, whose row i is where `places`, of a's rows and then of b's, is i."""
    order = torch.tensor(places).argsort()
    cond = {name: torch.cat([value, b.cond[name].to(value)])[order] for name, value in a.cond.tensors.items()}
    samples = (*a.samples, *b.samples)
    return ImageBatch(
        x_0=torch.cat([a.x_0, b.x_0.to(a.x_0)])[order],
        cond=Cond(cond),
        samples=tuple(samples[i] for i in order.tolist()),
    )
