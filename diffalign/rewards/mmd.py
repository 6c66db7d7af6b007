"""Squared maximum mean discrepancies of two sets: KID, CMMD and KAD, and what each sample does for one.

    MMD² = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

Unbiased estimates leave a row's kernel with itself out, and may be negative; biased ones do not. Kernel matrices are
made and summed in blocks of rows, so that memory grows with N and not with N². All in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.sets import check_left, exchanged, pieces
from diffalign.rewards.statistics import check_rows, double
from diffalign.rng import generator
from diffalign.types import Embedded

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Rows [n, d] and [m, d] -> [n, m]."""

KAD_SCALE = 100.0
CMMD_SCALE = 1000.0
CMMD_SIGMA = 10.0

_CELLS = 2**22
"""Entries of a kernel matrix that are made at a time: 32 MiB, and a few of them at once."""
_BINS = 2**16


def polynomial(
    width: int, *, degree: int = 3, gamma: float | int | None = None, coefficient: float | int = 1.0
) -> Kernel:
    """(gamma x·y + coefficient)^degree, with gamma 1 / width unless it is given."""
    factor = 1 / width if gamma is None else gamma
    return lambda x, y: (factor * (x @ y.T) + coefficient) ** degree


def gaussian(sigma: float | int) -> Kernel:
    """exp(-|x - y|² / (2 sigma²))."""
    return lambda x, y: torch.exp(-square_distances(x, y) / (2 * sigma**2))


def square_distances(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """|x_i - y_j|², at least 0."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def mmd2(x: Float[Tensor, "n d"], y: Float[Tensor, "m e"], kernel: Kernel, *, unbiased: bool) -> Float64[Tensor, ""]:
    """Squared MMD of two sets of rows, differentiable.

    Raises:
        InputError: Too few rows (2, or 1 if biased), other widths, or numbers that are not finite.
    """
    x, y = _pair(x, y, 2 if unbiased else 1)
    cross = _row_sums(x, y, kernel).sum() / (len(x) * len(y))
    return within(x, kernel, unbiased=unbiased) + within(y, kernel, unbiased=unbiased) - 2 * cross


def within(rows: Float64[Tensor, "n d"], kernel: Kernel, *, unbiased: bool) -> Float64[Tensor, ""]:
    """Mean kernel of a set with itself."""
    total = _row_sums(rows, rows, kernel).sum()
    if not unbiased:
        return total / (len(rows) * len(rows))
    return (total - _diagonal(rows, kernel).sum()) / (len(rows) * (len(rows) - 1))


def kid(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m e"],
    *,
    degree: int = 3,
    gamma: float | int | None = None,
    coefficient: float | int = 1.0,
) -> Float64[Tensor, ""]:
    """Kernel distance of two sets in full: unbiased squared MMD with the kernel (x·y / D + 1)³.

    Paper: Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401.
    """
    return mmd2(x, y, polynomial(x.shape[1], degree=degree, gamma=gamma, coefficient=coefficient), unbiased=True)


def kid_subsets(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m e"], *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """(mean, standard deviation) of `kid` over random subsets without replacement: the protocol of published numbers.

    A subset has `size` rows of each set, or as many as the smaller set has. Rows are put in order first, so that
    the draws do not depend on the order in which they came.
    """
    x, y = (rows[_order(rows)] for rows in _pair(x, y, 2))
    size = min(size, len(x), len(y))
    if size < 2 or subsets < 1:
        raise InputError(f"subsets must be at least 1 of size 2 or more, got {subsets} of size {size}")
    found = []
    for number in range(subsets):
        draws = [
            torch.randperm(len(rows), generator=generator(seed, number, name))[:size].to(rows.device)
            for name, rows in (("x", x), ("y", y))
        ]
        found.append(kid(x[draws[0]], y[draws[1]]))
    values = torch.stack(found)
    return values.mean(), values.std(correction=0)


def cmmd(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m e"],
    *,
    sigma: float | int = CMMD_SIGMA,
    scale: float | int = CMMD_SCALE,
) -> Float64[Tensor, ""]:
    """CMMD: biased squared MMD of unit rows with a wide Gaussian kernel, times 1000.

    Rows are brought to length 1. Within 1 % it is ten times the square distance of their means.

    Paper: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", arXiv
    2401.09603.
    """
    return scale * mmd2(unit(x), unit(y), gaussian(sigma), unbiased=False)


def kad(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m e"],
    *,
    bandwidth: float | int | None = None,
    scale: float | int = KAD_SCALE,
) -> Float64[Tensor, ""]:
    """KAD: unbiased squared MMD with a Gaussian kernel as wide as the reference's median distance, times 100.

    Args:
        x: The set.
        y: The reference; `kad(y, x)` is another number, by the bandwidth.
        bandwidth: Used instead of the median distance of y.

    Paper: Chung et al., "KAD: No More FAD! An Effective and Efficient Evaluation Metric for Audio Generation", arXiv
    2502.15602.
    Departs: The median of an even number of distances is the mean of the two in the middle, where the authors' code
    takes the lower; nothing is added to the bandwidth.
    """
    return scale * mmd2(x, y, gaussian(median_distance(y.detach()) if bandwidth is None else bandwidth), unbiased=True)


def median_distance(rows: Float[Tensor, "n d"]) -> float:
    """Median distance of two different rows, exact, in memory that grows with n.

    Raises:
        InputError: Fewer than two rows, or a median of 0, which is no bandwidth.
    """
    rows = double(check_rows(rows))
    if len(rows) < 2:
        raise InputError(f"a median distance must be of at least 2 rows, got {len(rows)}")
    found = _median_square(rows).sqrt()
    if not len(found) or float(found.mean()) == 0:
        raise InputError("the median distance of a reference must be above 0, got 0; most of its rows are equal")
    return float(found.mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelSums:
    """All that an MMD² and its leave-one-outs are made of: sums of kernels by row of x."""

    xx: Float64[Tensor, " n"]
    """With every row of x, itself included."""
    own: Float64[Tensor, " n"]
    """With itself."""
    xy: Float64[Tensor, " n"]
    """Mean with the rows of y."""
    blocks: Float64[Tensor, " b"]
    """Of all pairs of rows of one sample."""
    yy: Float64[Tensor, ""]
    """Mean within y."""
    counts: tuple[int, ...]
    unbiased: bool

    @classmethod
    def of(
        cls, x: Embedded, y: Float[Tensor, "m e"], kernel: Kernel, *, unbiased: bool, yy: Tensor | None = None
    ) -> "KernelSums":
        """Of a set and a reference; `yy` where it is known already."""
        rows, reference = _pair(x.rows, y, 2 if unbiased else 1)
        parts = [rows[piece] for piece in pieces(x.counts)]
        return cls(
            xx=_row_sums(rows, rows, kernel),
            own=_diagonal(rows, kernel),
            xy=_row_sums(rows, reference, kernel) / len(reference),
            blocks=torch.stack([kernel(part, part).sum() for part in parts]),
            yy=within(reference, kernel, unbiased=unbiased) if yy is None else yy,
            counts=x.counts,
            unbiased=unbiased,
        )

    def value(self) -> Float64[Tensor, ""]:
        """MMD² of the set."""
        n = len(self.xx)
        return self._of(self.xx.sum(), self.own.sum(), self.xy.sum(), torch.tensor(n, device=self.xx.device))

    def leave_one_out(self) -> Float64[Tensor, " b"]:
        """MMD² without each sample minus MMD² of all, exactly."""
        xx, own, xy, count = self._by_sample()
        left = len(self.xx) - count
        check_left(Embedded(rows=self.xx[:, None], counts=self.counts), 2 if self.unbiased else 1)
        without = self._of(self.xx.sum() - 2 * xx + self.blocks, self.own.sum() - own, self.xy.sum() - xy, left)
        return without - self.value()

    def influence(self) -> Float64[Tensor, " b"]:
        """`leave_one_out` to first order: the witness function's mean, less its value at each sample, by 2 k / (n - k).

        The witness of a row is its mean kernel with x minus its mean kernel with y: high where x has too much.
        """
        n = len(self.xx)
        check_left(Embedded(rows=self.xx[:, None], counts=self.counts), 1)
        xx, own, xy, count = self._by_sample()
        mean = (xx - own) / (n - 1) if self.unbiased else xx / n
        witness = mean - xy
        return 2 * (count * witness.sum() / n - witness) / (n - count)

    def each(self) -> Float64[Tensor, " b"]:
        """MMD² of every sample's own rows."""
        _, own, xy, count = self._by_sample()
        return self._of(self.blocks, own, xy, count)

    def _of(self, xx: Tensor, own: Tensor, xy: Tensor, n: Tensor) -> Tensor:
        return _squared(xx, own, xy, n, self.yy, unbiased=self.unbiased)

    def _by_sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = [torch.stack([v[piece].sum() for piece in pieces(self.counts)]) for v in (self.xx, self.own, self.xy)]
        return sums[0], sums[1], sums[2], torch.tensor(self.counts, dtype=self.xx.dtype, device=self.xx.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelTally:
    """`factor` times the MMD² of a set of a pool's samples, by sums of kernels between them: an exchange costs O(N)."""

    blocks: Float64[Tensor, "s s"]
    """Of all rows of one sample with all of another, over the whole pool."""
    own: Float64[Tensor, " s"]
    """Of each sample's rows with themselves."""
    xy: Float64[Tensor, " s"]
    """Mean with the rows of y, added up over each sample's rows."""
    yy: Float64[Tensor, ""]
    """Mean within y."""
    counts: tuple[int, ...]
    unbiased: bool
    factor: float
    members: tuple[int, ...]
    beside: Float64[Tensor, " s"]
    """Of every sample with all rows of the set."""

    @classmethod
    def of(
        cls,
        pool: Embedded,
        members: Sequence[int],
        y: Float[Tensor, "m e"],
        kernel: Kernel,
        *,
        unbiased: bool,
        factor: float,
        yy: Tensor,
    ) -> "KernelTally":
        """Of the set of these samples of the pool, against a reference whose mean kernel within is `yy`."""
        rows, reference = _pair(pool.rows, y, 1)
        blocks = _blocks(rows, pool.counts, kernel)
        single, cross = _diagonal(rows, kernel), _row_sums(rows, reference, kernel) / len(reference)
        own, xy = (torch.stack([v[piece].sum() for piece in pieces(pool.counts)]) for v in (single, cross))
        return cls(
            blocks=blocks,
            own=own,
            xy=xy,
            yy=yy,
            counts=pool.counts,
            unbiased=unbiased,
            factor=factor,
            members=tuple(members),
            beside=blocks[:, list(members)].sum(1),
        )

    @cached_property
    def score(self) -> float:
        held = list(self.members)
        n = self.own.new_tensor(sum(self.counts[i] for i in held))
        xx, own, xy = (values[held].sum() for values in (self.beside, self.own, self.xy))
        return self.factor * float(_squared(xx, own, xy, n, self.yy, unbiased=self.unbiased))

    def exchange(self, out: int, into: int) -> "KernelTally":
        beside = self.beside + self.blocks[:, into] - self.blocks[:, out]
        return replace(self, members=exchanged(self.members, out, into), beside=beside)


def unit(rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    """Rows of length 1, float64.

    Raises:
        InputError: A row of zeros, which has no direction.
    """
    rows = double(check_rows(rows))
    norms = rows.norm(dim=1, keepdim=True)
    zero = (norms[:, 0] == 0).nonzero()[:, 0].tolist()
    if zero:
        raise InputError(f"embeddings must not be 0 to be brought to length 1, got zeros in rows {zero[:8]}")
    return rows / norms


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, rows in (("x", x), ("y", y)):
        check_rows(rows, name)
        if len(rows) < least:
            raise InputError(f"{name} must have at least {least} row{'s' * (least > 1)}, got {len(rows)}")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"x and y must have rows of one width, got {x.shape[1]} and {y.shape[1]}")
    return double(x), double(y)


def _squared(xx: Tensor, own: Tensor, xy: Tensor, n: Tensor, yy: Tensor, *, unbiased: bool) -> Tensor:
    """MMD² of n rows from their kernels' sums."""
    inside = (xx - own) / (n * (n - 1)) if unbiased else xx / n**2
    return inside + yy - 2 * xy / n


def _blocks(rows: Tensor, counts: Sequence[int], kernel: Kernel) -> Tensor:
    """Sum of the kernel between the rows of any two samples."""
    of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(rows.device)
    found = rows.new_zeros(len(counts), len(counts))
    size = max(1, _CELLS // len(rows))
    for chunk, owners in zip(rows.split(size), of.split(size), strict=True):
        columns = rows.new_zeros(len(chunk), len(counts)).index_add_(1, of, kernel(chunk, rows))
        found.index_add_(0, owners, columns)
    return found


def _row_sums(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Sum over y of the kernel, by row of x."""
    return torch.cat([kernel(chunk, y).sum(1) for chunk in x.split(max(1, _CELLS // len(y)))])


def _diagonal(rows: Tensor, kernel: Kernel) -> Tensor:
    return torch.cat([kernel(chunk, chunk).diagonal() for chunk in rows.split(256)])


def _order(rows: Tensor) -> Tensor:
    """Places of rows in an order of their own, by their first columns."""
    first = rows[:, :8].detach().cpu().numpy()
    return torch.from_numpy(np.lexsort(first.T[::-1])).to(rows.device)


def _median_square(rows: Tensor) -> Tensor:
    """The middle square distance, or the two in the middle: bins narrow them down, then what is left is sorted."""
    rows = rows - rows.mean(0)
    pairs = len(rows) * (len(rows) - 1) // 2
    first, last = (pairs - 1) // 2, pairs // 2
    low, high, below, inside = 0.0, 4 * float(rows.square().sum(1).max()), 0, pairs
    while inside > _CELLS:
        counts = torch.stack([torch.histc(values, _BINS, low, high) for values in _squares(rows, low, high)]).sum(0)
        ends = below + counts.cumsum(0)
        a, b = ((ends <= place).sum().item() for place in (first, last))
        step = (high - low) / _BINS
        low, high = max(low, low + (a - 1) * step), min(high, low + (b + 2) * step)  # a bin more, for rounding at edges
        if high - low <= 8 * math.ulp(high):
            return rows.new_tensor([(low + high) / 2])
        below, inside = 0, 0
        for values in _squares(rows, 0.0, high):
            under = int((values < low).sum())
            below, inside = below + under, inside + len(values) - under
    values = torch.cat(list(_squares(rows, low, high))).sort().values
    return values[[first - below, last - below]]


def _squares(rows: Tensor, low: float, high: float) -> Iterator[Tensor]:
    """Square distances of all pairs within bounds, a block at a time."""
    start = 0
    for chunk in rows.split(max(1, _CELLS // len(rows))):
        cells = square_distances(chunk, rows[start:])
        values = cells[torch.ones_like(cells, dtype=torch.bool).triu(1)]
        yield values[(values >= low) & (values <= high)]
        start += len(chunk)
