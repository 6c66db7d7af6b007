"""Batches of what a method selected of a round, in an order that belongs to the run's stream of samples.

An item is a selected row with one of the moves: the one that is trained, or whose t is. Rows come in blocks of a
global micro-batch; the micro-batches of a block go over all moves of its rows, in an order drawn for each, before the
next block starts. So `accumulate` equal to the number of moves gives one update a block, as DDPO and D3PO do. Rows are
shuffled anew at every pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from diffalign import rng
from diffalign.online.store import Store
from diffalign.sampling.walk import KernelWalk
from diffalign.types import (
    Batch,
    Cond,
    ImageBatch,
    Items,
    OnlineMethod,
    PairBatch,
    Selection,
    TrainsAtLevels,
    TransitionBatch,
    TransitionPairs,
)


@dataclass(frozen=True, kw_only=True)
class RoundOrder:
    """Which item each sample of the run's stream is, in one round: a row, and the number of a move of the walk."""

    rows: int
    turns: int
    """How often each row is trained in one pass over all."""
    moves: int
    """Of the walk; an item is row x moves + move."""
    draw: Callable[[torch.Generator], Sequence[int]] | None
    """Numbers of the moves of one row's turns, in their order; None where a row has no moves."""
    first: int
    """The round's first sample."""
    block: int
    """Rows of a global micro-batch."""
    unit: int = 1
    """Rows that stay together and share what is drawn: 1, or the images of a prompt."""
    seed: int
    round: int

    def item(self, sample: int) -> int:
        """Row times moves plus move."""
        nth, turn = self._place(sample)
        count, member = divmod(nth, self.unit)
        number, index = divmod(count, self.rows // self.unit)
        unit = self._units(number)[index]
        drawn = self._moves(number, unit)
        return (unit * self.unit + member) * self.moves + (drawn[turn] if drawn else 0)

    def use_of(self, sample: int) -> int:
        """How many turns its row had before this sample."""
        nth, turn = self._place(sample)
        return nth // self.rows * self.turns + turn

    def _place(self, sample: int) -> tuple[int, int]:
        """(number of the row in the stream of rows, its turn)."""
        block, rest = divmod(sample - self.first, self.block * self.turns)
        turn, place = divmod(rest, self.block)
        return block * self.block + place, turn

    @cache  # noqa: B019 (an order lives as long as its round)
    def _units(self, number: int) -> list[int]:
        shuffle = rng.generator(self.seed, "round", self.round, "rows", number)
        return torch.randperm(self.rows // self.unit, generator=shuffle).tolist()

    @cache  # noqa: B019
    def _moves(self, number: int, unit: int) -> Sequence[int]:
        if self.draw is None:
            return ()
        return self.draw(rng.generator(self.seed, "round", self.round, "moves", number, unit))


@dataclass(frozen=True, kw_only=True)
class RoundCollator:
    """Batches of one round, of the kind that its method is called with."""

    store: Store
    walk: KernelWalk
    cond: Cond
    """Of the round's prompts, by their place."""
    selection: Selection
    images: Int[Tensor, " n"]
    """Place in the store of each image that `selection` counts."""
    kind: Items
    order: RoundOrder
    mean_old: bool = False

    def batch(self, items: Sequence[int], samples: Sequence[int]) -> Batch:
        """The batch of some items; `samples` are their numbers in the run's stream."""
        named, moves = tuple(samples), self.order.moves
        rows = torch.tensor([item // moves for item in items])
        places = self.images[self.selection.places[rows]]  # [B, k]
        first, last = places[:, 0].tolist(), places[:, -1].tolist()
        weight = None if self.selection.weight is None else self.selection.weight[rows].float()
        steps = [item % moves for item in items]
        match self.kind:
            case "transitions":
                old = self.moves(first, steps, old=True)
                assert weight is not None, "moves are weighed by an advantage"
                return replace(old, advantage=weight, samples=named)
            case "transition_pairs":
                return self._move_pairs(first, last, steps, named)
            case "pairs":
                x_w, x_l = self.store.x_0(first), self.store.x_0(last)
                return PairBatch(x_w=x_w, x_l=x_l, cond=self._cond(first), samples=named)
            case "labelled":
                return ImageBatch(x_0=self.store.x_0(first), cond=self._cond(first), samples=named, label=weight)
            case "images":
                return ImageBatch(
                    x_0=self.store.x_0(first),
                    cond=self._cond(first),
                    samples=named,
                    advantage=weight,
                    t=self.walk.schedule.levels[torch.tensor(steps)] if self.order.draw is not None else None,
                    group=self._groups(first, samples),
                )

    def moves(self, rows: Sequence[int], steps: Sequence[int], *, old: bool = False) -> TransitionBatch:
        """Moves of images by place in the store, unweighed; with what the old policy says of them where `old`."""
        noisy, first = self.store.walk()
        x_t, x_s = self.store.states(rows, [step - first for step in steps])
        places = [noisy.index(step) for step in steps]
        return TransitionBatch(
            x_t=x_t,
            x_s=x_s,
            step=torch.tensor(steps),
            log_prob_old=self.store.log_prob_old(rows, places) if old else torch.zeros(len(rows)),
            advantage=torch.zeros(len(rows)),
            cond=self._cond(rows),
            walk=self.walk,
            samples=tuple(range(len(rows))),
            mean_old=self.store.mean_old(rows, places) if old and self.mean_old else None,
        )

    def _move_pairs(
        self, better: Sequence[int], worse: Sequence[int], steps: Sequence[int], samples: tuple[int, ...]
    ) -> TransitionPairs:
        _, first = self.store.walk()
        levels = [step - first for step in steps]
        x_t_w, x_s_w = self.store.states(better, levels)
        x_t_l, x_s_l = self.store.states(worse, levels)
        return TransitionPairs(
            x_t_w=x_t_w,
            x_s_w=x_s_w,
            x_t_l=x_t_l,
            x_s_l=x_s_l,
            step=torch.tensor(steps),
            cond=self._cond(better),
            walk=self.walk,
            samples=samples,
        )

    def _cond(self, rows: Sequence[int]) -> Cond:
        return self.cond.rows(torch.tensor([self.store.entries[row].group for row in rows]))

    def _groups(self, rows: Sequence[int], samples: Sequence[int]) -> tuple[int, ...]:
        """One number for every prompt and turn: whoever shares it shares random numbers."""
        prompts = 1 + max(entry.group for entry in self.store.entries)
        uses = [self.order.use_of(sample) for sample in samples]
        groups = [self.store.entries[row].group for row in rows]
        return tuple((self.order.round << 40) + use * prompts + g for use, g in zip(uses, groups, strict=True))


def turns_of(
    method: OnlineMethod, noisy: Sequence[int], moves: int
) -> tuple[int, Callable[[torch.Generator], Sequence[int]] | None]:
    """(how often a row is trained in a pass, what draws the moves of its turns).

    Args:
        noisy: Numbers of the walk's moves with noise.
    """
    if method.needs.items in ("transitions", "transition_pairs"):
        return len(noisy), lambda draw: [noisy[i] for i in torch.randperm(len(noisy), generator=draw).tolist()]
    if not isinstance(method, TrainsAtLevels):
        return 1, None
    turns = method.passes(moves)
    if method.train_levels(moves, rng.generator(0, "trial")) is None:
        return turns, None
    return turns, lambda draw: method.train_levels(moves, draw) or ()
