"""Aspect buckets: shapes that images are fitted to, and an order of samples in which a step has one shape.

A bucket is a width and a height, both whole steps, of an area of at most that of the square trained on: for every
width the greatest height that fits, and both turned round, as kohya-ss/sd-scripts and NovelAI's article have it. An
image belongs to the bucket whose aspect ratio is nearest on a logarithmic scale. A pair has one bucket, its winner's.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from diffalign import rng
from diffalign.errors import InputError

Size = tuple[int, int]
"""Width and height in pixels."""

STEP = 64
"""Pixels from one side to the next where nobody chose."""


def name_of(size: Size) -> str:
    """A size as it is written, such as "1152x896"."""
    return f"{size[0]}x{size[1]}"


def bucket_table(
    resolution: int,
    names: Sequence[str] | None = None,
    *,
    step: int = STEP,
    low: int | None = None,
    high: int | None = None,
) -> tuple[Size, ...]:
    """The buckets of a resolution from the tallest to the widest, or those that are named.

    Args:
        resolution: Side of the square whose area no bucket exceeds.
        names: Such as "1152x896"; None takes every bucket that the rule gives.
        low: Shortest side; None is half the resolution, in whole steps.
        high: Longest side; None is twice the resolution.

    Raises:
        InputError: A number is not in whole steps, or a name is not of a bucket.
    """
    if step < 1:
        raise InputError(f"data.bucket_step must be at least 1, got {step}")
    low = -(-resolution // (2 * step)) * step if low is None else low
    high = 2 * resolution if high is None else high
    for key, side in (("resolution", resolution), ("bucket_min", low), ("bucket_max", high)):
        if side < 1 or side % step:
            raise InputError(
                f"data.{key} must be a multiple of data.bucket_step, {step}, with data.buckets; got {side}"
            )
    if not low <= resolution <= high:
        raise InputError(
            "data.bucket_min and data.bucket_max must be on either side of data.resolution, "
            f"{resolution}, got {low} and {high}"
        )
    if names is not None:
        return _named(names, resolution, step, low, high)
    sizes: set[Size] = set()
    for width in range(low, high + 1, step):
        height = min(high, resolution**2 // width // step * step)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return _sorted(sizes)


def _named(names: Sequence[str], resolution: int, step: int, low: int, high: int) -> tuple[Size, ...]:
    sizes: set[Size] = set()
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if match is None:
            raise InputError(f"data.buckets must be true, false or sizes such as '1152x896', got {name!r}")
        size = (int(match[1]), int(match[2]))
        if any(side % step or not low <= side <= high for side in size) or size[0] * size[1] > resolution**2:
            raise InputError(
                f"data.buckets must have sides that are multiples of {step} from {low} to {high} and areas of at most "
                f"{resolution}x{resolution}, got {name!r}"
            )
        sizes.add(size)
    if not sizes:
        raise InputError("data.buckets must name at least one size, got none; false is what trains on squares")
    return _sorted(sizes)


def _sorted(sizes: set[Size]) -> tuple[Size, ...]:
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """Place of the bucket whose aspect ratio is nearest to that of an image; of two, the larger one."""
    aspect = math.log(size[0] / size[1])

    def far(place: int) -> tuple[float, int]:
        width, height = buckets[place]
        return abs(aspect - math.log(width / height)), -width * height

    return min(range(len(buckets)), key=far)


def describe(filled: Mapping[str, int], cropped: int) -> str:
    """How many items each bucket has, and how many losers have a shape of their own."""
    words = ", ".join(f"{name} {n}" for name, n in filled.items())
    return f"buckets: {words}; {cropped} losers of another shape are cropped to their winner's"


def check_filled(buckets: Sequence[Size], bucket: Int[Tensor, " n"], group: int) -> dict[str, int]:
    """Number of items by bucket, of those that have any.

    Raises:
        InputError: A bucket has fewer than the `group` of an optimizer step.
    """
    counts = torch.bincount(bucket, minlength=len(buckets)).tolist()
    few = [f"{name_of(size)} ({n})" for size, n in zip(buckets, counts, strict=True) if 0 < n < group]
    if not few:
        return {name_of(size): n for size, n in zip(buckets, counts, strict=True) if n}
    enough = [name_of(size) for size, n in zip(buckets, counts, strict=True) if n >= group]
    named = ", ".join(f'"{name}"' for name in enough)
    remedy = f"; set data.buckets = [{named}], or make the steps smaller" if enough else "; make the steps smaller"
    raise InputError(
        f"data.buckets must each have at least the {group} images or pairs to train on that a step takes "
        f"(train.batch_size x train.accumulate x processes), got {', '.join(few)}{remedy}"
    )


class BucketOrder:
    """Which item each sample of the stream is where the samples of an optimizer step share a bucket.

    Every epoch has a permutation of all items, the same as without buckets, and a bucket takes its own of it, epoch
    after epoch: what its last step lacks comes from its next epoch, so that it sees each of its items once before any
    twice. After e epochs a bucket of n items has had ceil(e n / group) steps; the steps of an epoch are shuffled among
    the buckets.
    """

    def __init__(self, bucket: Int[Tensor, " n"], group: int, seed: int) -> None:
        """Of items by their buckets, each with at least `group` items, the samples of a step over all processes."""
        self.bucket = bucket
        self.group = group
        self.seed = seed
        self.counts: list[int] = torch.bincount(bucket).tolist()
        self._epoch = -1
        self._turns: list[tuple[int, int]] = []
        self._dealt: dict[int, list[list[int]]] = {}

    def item(self, sample: int) -> int:
        step, place = divmod(sample, self.group)
        bucket, turn = self._turn(step)
        epoch, position = divmod(turn * self.group + place, self.counts[bucket])
        return self._items(epoch)[bucket][position]

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it has had before."""
        epoch = step * self.group // len(self.bucket)
        while sum(self._steps(epoch)) > step:  # twice at most, since every bucket has `group` items
            epoch -= 1
        before = self._steps(epoch)
        if epoch != self._epoch:
            after = self._steps(epoch + 1)
            turns = [(b, turn) for b in range(len(self.counts)) for turn in range(before[b], after[b])]
            shuffle = rng.generator(self.seed, epoch, "buckets")
            order = [turns[i][0] for i in torch.randperm(len(turns), generator=shuffle).tolist()]
            had = list(before)
            self._epoch, self._turns = epoch, []
            for b in order:
                self._turns.append((b, had[b]))
                had[b] += 1
        return self._turns[step - sum(before)]

    def _steps(self, epochs: int) -> list[int]:
        """Steps of each bucket in the first epochs."""
        return [-(-epochs * n // self.group) for n in self.counts]

    def _items(self, epoch: int) -> list[list[int]]:
        """The items of an epoch in its order, by bucket."""
        if epoch not in self._dealt:
            shuffle = rng.generator(self.seed, epoch, "order")
            order = torch.randperm(len(self.bucket), generator=shuffle)
            by_bucket = self.bucket[order].argsort(stable=True)
            parts = order[by_bucket].split(self.counts)
            kept = {known: items for known, items in self._dealt.items() if known == epoch - 1}
            self._dealt = kept | {epoch: [part.tolist() for part in parts]}
        return self._dealt[epoch]
