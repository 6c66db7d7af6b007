"""Rows to batches: in which order, by which process, with which latents and which prompts.

The run is one stream of samples 0, 1, 2, ...; every epoch is a permutation of the items, which are the rows, or for
labelled data their single images. A sample's number decides its item and all its random numbers, so batches do not
depend on how many processes or micro-batches share an optimizer step.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffalign import rng
from diffalign.data.buckets import BucketOrder, Size
from diffalign.data.cache import CacheReader, CacheTable, EncodeImages, EncodePrompts, Share
from diffalign.data.images import Preprocessing, decode, origin, place, to_size
from diffalign.data.orders import Drawn, Order, Turn
from diffalign.data.pairs import PairReader, Row
from diffalign.errors import InputError
from diffalign.rng import SampleRng
from diffalign.types import Batch, Cond, ImageBatch, PairBatch

Member = Literal["w", "l"]
"""An image of a row; a single image is its row's `w`, whatever its label."""


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """What lies between a VAE's latents z and the denoiser's: x_0 = (z - shift) * scale."""

    scale: float
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What rows say of their images."""

    score: Float[Tensor, "n 2"]
    """Scores of winner and loser; NaN where there are none."""
    good: Bool[Tensor, " n"]
    """Labels of single images; True for pairs."""
    paired: bool
    """Rows are pairs, not single images."""
    bucket: Int[Tensor, " n"] | None = None
    """Which bucket's shape a row's images have; None for squares."""

    @property
    def both_labels(self) -> bool:
        return bool(len(self.good)) and (self.paired or bool(self.good.any() and not self.good.all()))

    def rows(self, index: Tensor) -> "Marks":
        bucket = None if self.bucket is None else self.bucket[index]
        return Marks(score=self.score[index], good=self.good[index], paired=self.paired, bucket=bucket)


@runtime_checkable
class Rows(Protocol):
    """Rows by position, as moments of winner and loser and as conditions."""

    @property
    def marks(self) -> Marks | None:
        """None for pairs without scores."""
        ...

    def __len__(self) -> int: ...

    def latents(
        self, rows: Sequence[int], samples: Sequence[int], member: Member
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and std of one image a row, unscaled."""
        ...

    def cond(self, rows: Sequence[int], dropped: Sequence[bool]) -> Cond: ...

    def prompt(self, row: int) -> str: ...


@runtime_checkable
class Sized(Protocol):
    """Rows that know how large their winners were as stored, and where they were cropped."""

    def origin(self, rows: Sequence[int], samples: Sequence[int]) -> Int[Tensor, "b 4"]:
        """Height, width, upper and left edge of the crop."""
        ...


class CachedRows:
    """Rows out of a finished cache."""

    def __init__(self, reader: CacheReader, table: CacheTable, rows: Int[Tensor, " n"], seed: int) -> None:
        self.reader = reader
        self.table = table
        self.rows = rows
        self.seed = seed
        paired = bool((table.rejected[rows] >= 0).all())
        bucket = None if table.bucket is None else table.bucket[rows, 0]
        self.marks = Marks(score=table.score[rows], good=table.good[rows], paired=paired, bucket=bucket)

    def __len__(self) -> int:
        return len(self.rows)

    def latents(
        self, rows: Sequence[int], samples: Sequence[int], member: Member
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        where = self.table.chosen if member == "w" else self.table.rejected
        places = torch.stack([self._place(where[self.rows[r]], s) for r, s in zip(rows, samples, strict=True)])
        return self.reader.moments(places, self._size(rows))

    def origin(self, rows: Sequence[int], samples: Sequence[int]) -> Int[Tensor, "b 4"]:
        if self.table.origin is None:
            raise ValueError("the cache must hold sizes to give them, got one that was built without")
        found = [self.table.origin[self.rows[r]] for r in rows]
        return torch.stack([self._place(places, s) for places, s in zip(found, samples, strict=True)])

    def _size(self, rows: Sequence[int]) -> str:
        if self.marks.bucket is None:
            return ""
        found = self.marks.bucket[torch.tensor(rows)].unique().tolist()
        if len(found) != 1:
            raise ValueError(f"rows of a batch must have one bucket, got {len(found)}")
        return self.table.sizes[found[0]]

    def _place(self, places: Int[Tensor, "k n"], sample: int) -> Int[Tensor, " n"]:
        if len(places) == 1:
            return places[0]
        return places[int(torch.randint(len(places), (), generator=rng.generator(self.seed, sample, "variant")))]

    def cond(self, rows: Sequence[int], dropped: Sequence[bool]) -> Cond:
        prompt = self.table.prompt[self.rows[torch.tensor(rows)]]
        return self.reader.cond(torch.where(torch.tensor(dropped), 0, prompt))

    def prompt(self, row: int) -> str:
        return self.table.prompts[int(self.table.prompt[self.rows[row]])]


class LiveRows:
    """Rows encoded when they are asked for: needs VAE and text encoder in memory, and allows endless random crops."""

    def __init__(
        self,
        reader: PairReader,
        numbers: Sequence[int],
        prep: Preprocessing,
        images: EncodeImages,
        prompts: EncodePrompts,
        seed: int,
        batch_size: int,
        marks: Marks | None = None,
    ) -> None:
        """Rows `numbers` of the source, of which `marks` tell; `batch_size` images go through the VAE at a time."""
        self.reader = reader
        self.numbers = numbers
        self.prep = prep
        self.images = images
        self.prompts = prompts
        self.seed = seed
        self.batch_size = batch_size
        self.marks = marks

    def __len__(self) -> int:
        return len(self.numbers)

    def latents(
        self, rows: Sequence[int], samples: Sequence[int], member: Member
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        pixels = torch.stack([self._pixels(r, s, member) for r, s in zip(rows, samples, strict=True)])
        parts = [self.images(some) for some in pixels.split(self.batch_size)]
        mean, std = (torch.cat([part[i] for part in parts]).float().cpu() for i in (0, 1))
        return mean, std

    def origin(self, rows: Sequence[int], samples: Sequence[int]) -> Int[Tensor, "b 4"]:
        found = [(self._row(r), self._size(r), s) for r, s in zip(rows, samples, strict=True)]
        return torch.tensor(
            [origin(row.chosen, size, place(self.prep, self.seed, row.number, s)) for row, size, s in found]
        )

    def _size(self, row: int) -> Size:
        bucket = None if self.marks is None else self.marks.bucket
        return self.prep.size(None if bucket is None else int(bucket[row]))

    def _pixels(self, row: int, sample: int, member: Member) -> Float[Tensor, "3 h w"]:
        found = self._row(row)
        data = found.chosen if member == "w" else found.rejected
        if data is None:
            raise ValueError(f"row {found.number} must have a rejected image, got none")
        try:
            return to_size(decode(data), self._size(row), place(self.prep, self.seed, found.number, sample))
        except OSError as error:
            raise InputError(f"data.path must have readable images, got row {found.number}: {error}") from error

    def cond(self, rows: Sequence[int], dropped: Sequence[bool]) -> Cond:
        texts = ["" if drop else self._row(row).prompt for row, drop in zip(rows, dropped, strict=True)]
        return self.prompts(texts)

    def prompt(self, row: int) -> str:
        return self._row(row).prompt

    def _row(self, row: int) -> Row:
        number = self.numbers[row]
        found = self.reader.row(number, self.reader.table[number])
        if not isinstance(found, Row):
            raise InputError(f"data.path must not change while it is read, got row {number} {found.reason}")
        return found


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches of rows: samples the VAE's posterior, drops prompts (for the pair), scales."""

    rows: Rows
    kind: Literal["pairs", "images", "labelled"]
    scale: LatentScale
    seed: int
    prompt_dropout: float = 0.0
    """Probability that a sample's prompt is replaced by "", for both members of a pair."""
    latents: Literal["sample", "mean"] = "sample"
    """Draw from the VAE's posterior afresh each time, as reference trainers do, or take its mean."""
    swap: bool = False
    """Winners and losers change places, good and bad labels too."""
    positive_ratio: float | None = None
    """Labelled images: probability that a sample is a good one, drawn with replacement; None takes every image once an
    epoch."""
    sizes: bool = False
    """Conditions say how large the winner was as stored and where it was cropped, for the loser too, as `origin`."""
    group: int = 1
    """Samples of an optimizer step over all processes; with buckets they share one."""

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_dropout <= 1:
            raise InputError(f"data.prompt_dropout must be in [0, 1], got {self.prompt_dropout}")

    def __len__(self) -> int:
        """Number of items: rows, or for labelled data single images, of which a pair has two."""
        return len(self.rows) * (2 if self._halves else 1)

    @property
    def order(self) -> Turn:
        """Which item each sample of the stream is."""
        if self.positive_ratio is not None:
            return Drawn(self.good, self.positive_ratio, self.seed)
        bucket = self.bucket
        return Order(len(self), self.seed) if bucket is None else BucketOrder(bucket, self.group, self.seed)

    @property
    def bucket(self) -> Int[Tensor, " n"] | None:
        """Which bucket's shape each item has; None for squares."""
        bucket = None if self.rows.marks is None else self.rows.marks.bucket
        return bucket if bucket is None or not self._halves else bucket.repeat_interleave(2)

    @property
    def alike(self) -> list[list[int]]:
        """All items, in order within a bucket: those that may share a batch are together."""
        bucket = self.bucket
        if bucket is None:
            return [list(range(len(self)))]
        return [(bucket == one).nonzero().flatten().tolist() for one in bucket.unique().tolist()]

    @property
    def good(self) -> Bool[Tensor, " n"]:
        """Whether each item of labelled data is a good image."""
        marks = self.rows.marks
        labels = torch.arange(len(self)) % 2 == 0 if self._halves or marks is None else marks.good
        return ~labels if self.swap else labels

    def batch(self, items: Sequence[int], samples: Sequence[int]) -> Batch:
        """The batch of some items; `samples` are their numbers in the run's stream."""
        draws = SampleRng(self.seed, tuple(samples))
        rows = [item // 2 for item in items] if self._halves else list(items)
        dropped = (draws.uniform("prompt_dropout") < self.prompt_dropout).tolist()
        cond = self.rows.cond(rows, dropped)
        if self.sizes:
            if not isinstance(self.rows, Sized):
                raise ValueError(f"rows must know the sizes of images, got {type(self.rows).__name__}")
            cond = Cond({**cond.tensors, "origin": self.rows.origin(rows, draws.samples)})
        if self.kind == "labelled":
            label = self.good[torch.tensor(items)].float() * 2 - 1
            return ImageBatch(x_0=self._mixed(items, rows, draws), cond=cond, samples=draws.samples, label=label)
        members: tuple[Member, Member] = ("l", "w") if self.swap else ("w", "l")
        x_w = self._latents(rows, draws, members[0])
        if self.kind == "images":
            return ImageBatch(x_0=x_w, cond=cond, samples=draws.samples)
        score_w, score_l = self._scores(rows)
        return PairBatch(
            x_w=x_w,
            x_l=self._latents(rows, draws, members[1]),
            cond=cond,
            samples=draws.samples,
            score_w=score_w,
            score_l=score_l,
        )

    @property
    def _halves(self) -> bool:
        """Whether an item is one image of a pair: winners at even places, losers at odd ones."""
        return self.kind == "labelled" and (self.rows.marks is None or self.rows.marks.paired)

    def _scores(self, rows: Sequence[int]) -> tuple[Float[Tensor, " b"] | None, Float[Tensor, " b"] | None]:
        """Scores of winners and losers, if every row has them."""
        if self.rows.marks is None:
            return None, None
        score = self.rows.marks.score[torch.tensor(rows)]
        if not score.isfinite().all():
            return None, None
        first, second = score.unbind(1)
        return (second, first) if self.swap else (first, second)

    def _mixed(self, items: Sequence[int], rows: Sequence[int], draws: SampleRng) -> Float[Tensor, "b c h w"]:
        """Single images, of pairs winners and losers side by side."""
        if not self._halves:
            return self._latents(rows, draws, "w")
        members: tuple[Member, Member] = ("w", "l")
        parts, places = [], []
        for parity, member in enumerate(members):
            mine = [i for i, item in enumerate(items) if item % 2 == parity]
            if mine:
                some = SampleRng(self.seed, tuple(draws.samples[i] for i in mine))
                parts.append(self._latents([rows[i] for i in mine], some, member))
                places += mine
        return torch.cat(parts)[torch.tensor(places).argsort()]

    def _latents(self, rows: Sequence[int], draws: SampleRng, member: Member) -> Float[Tensor, "b c h w"]:
        z, std = self.rows.latents(rows, draws.samples, member)
        if self.latents == "sample":
            z = z + std * draws.normal(z, f"posterior_{member}")
        return (z - self.scale.shift) * self.scale.scale


@runtime_checkable
class Source(Protocol):
    """What makes batches of items in an order of its own."""

    @property
    def order(self) -> Turn: ...

    def batch(self, items: Sequence[int], samples: Sequence[int]) -> Batch:
        """The batch of some items; `samples` are their numbers in the run's stream."""
        ...


def stream(collator: Source, *, batch_size: int, accumulate: int, share: Share, start_step: int = 0) -> Iterator[Batch]:
    """This process's micro-batches from optimizer step `start_step` on, without end, in the collator's order."""
    order = collator.order
    for micro in itertools.count(start_step * accumulate):
        first = (micro * share.of + share.mine) * batch_size
        samples = range(first, first + batch_size)
        yield collator.batch([order.item(s) for s in samples], list(samples))


def held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out `fraction`, by its hash: all rows of a prompt go together."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < fraction * 2**64
