"""Mean and scatter of embeddings, float64, from a stream: in pieces, over processes, and with samples taken out again.

Of N rows with mean m the scatter is sum (x - m)(x - m)^T. Two sets are joined by the parallel form of Chan, Golub and
LeVeque: n = n_1 + n_2, and with d = m_2 - m_1

    m = m_1 + d n_2 / n,        scatter = scatter_1 + scatter_2 + d d^T n_1 n_2 / n

which is exact, keeps its precision whatever the mean, and undone is exact removal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, distributed

from diffalign.errors import InputError

Gather = Callable[[Tensor], Tensor]
"""Rows of this process -> rows of all processes, one process after the other; `alone` where there is one."""

_BLOCK = 8192
"""Rows that are turned to float64 at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Rows seen, their mean, and their scatter about it."""

    n: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        """Of no rows."""
        zeros = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        return cls(n=0, mean=zeros[0], scatter=zeros[1:])

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> "Moments":
        """Of rows of any floating type; keeps their graph."""
        blocks = [cls._of_block(double(block)) for block in check_rows(rows).split(_BLOCK) if len(block)]
        return reduce(cls.merge, blocks, cls.empty(rows.shape[1], rows.device if blocks else "cpu"))

    @classmethod
    def _of_block(cls, rows: Float64[Tensor, "n d"]) -> "Moments":
        mean = rows.mean(0)
        centred = rows - mean
        return cls(n=len(rows), mean=mean, scatter=centred.T @ centred)

    def add(self, rows: Float[Tensor, "n d"]) -> "Moments":
        """With these rows too."""
        return self.merge(Moments.of(rows))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together."""
        if not self.n or not other.n:
            return self if self.n else other
        n, apart = self.n + other.n, other.mean - self.mean
        return Moments(
            n=n,
            mean=self.mean + apart * (other.n / n),
            scatter=torch.addr(self.scatter + other.scatter, apart, apart, alpha=self.n * other.n / n),
        )

    def without(self, rows: Float[Tensor, "k d"]) -> "Moments":
        """Of the set without these of its rows: one sample, or all frames of one clip.

        Raises:
            InputError: More rows than the set has.
        """
        out = Moments.of(rows)
        n = self.n - out.n
        if n < 0:
            raise InputError(f"rows must be of the set of {self.n}, got {out.n}")
        if not n or not out.n:
            return Moments.empty(len(self.mean), self.mean.device) if out.n else self
        apart = out.mean - self.mean
        return Moments(
            n=n,
            mean=self.mean - apart * (out.n / n),
            scatter=torch.addr(self.scatter - out.scatter, apart, apart, alpha=-self.n * out.n / n),
        )

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Scatter over N - 1.

        Raises:
            InputError: Fewer than two rows.
        """
        if self.n < 2:
            raise InputError(f"a covariance must be of at least 2 rows, got {self.n}")
        return self.scatter / (self.n - 1)

    def over_processes(self, gather: Gather) -> "Moments":
        """Of the rows of all processes together, the same in each."""
        own = torch.cat([self.mean.new_tensor([self.n]), self.mean, self.scatter.flatten()])
        width = len(self.mean)
        parts = [
            Moments(n=int(part[0]), mean=part[1 : width + 1], scatter=part[width + 1 :].view(width, width))
            for part in gather(own[None])
        ]
        return reduce(Moments.merge, parts)


def gather_rows(rows: Shaped[Tensor, " n *rest"]) -> Shaped[Tensor, " total *rest"]:
    """Rows of all processes of `torch.distributed`, which may differ in number; the rows as they are where none runs.

    Every process must call it. It has no gradient.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    place = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    own = rows.detach().to(place).contiguous()
    size = own.new_tensor([len(own)], dtype=torch.int64)
    sizes = [torch.empty_like(size) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in lengths]
    if padded.numel():
        distributed.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(rows.device)


def check_rows(rows: Tensor, what: str = "embeddings") -> Tensor:
    """The rows, checked.

    Raises:
        InputError: Not a matrix of finite floating-point numbers.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise InputError(f"{what} must be floating-point rows (n, d), got {rows.dtype} of shape {tuple(rows.shape)}")
    if rows.numel() and not math.isfinite(float(rows.detach().abs().amax())):
        bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
        raise InputError(f"{what} must be finite, got NaN or infinity in rows {bad[:8]} of {len(rows)}")
    return rows


def double(values: Tensor) -> Tensor:
    """As float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
