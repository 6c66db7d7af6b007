"""The Fréchet distance of two sets of embeddings: squared 2-Wasserstein distance of the Gaussians fitted to them.

    |m_x - m_y|² + tr S_x + tr S_y - 2 tr (S_x S_y)^{1/2},        covariances over N - 1

With any roots L of the covariances, S = L^T L (centred rows over sqrt(N - 1), or a factor R of S = R R^T turned over),
the last trace is the nuclear norm || L_x L_y^T ||_*. That is exact where there are fewer rows than columns, and its
gradient is safe. Where both sets are large it is the sum of square roots of the eigenvalues of R_y^T S_x R_y, which
costs less. No matrix square root is ever taken, and nothing is added to a diagonal. All in float64.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.errors import InputError, RunError
from diffalign.rewards.statistics import Moments, check_rows, double

Route = Literal["rows", "factor", "symmetric"]
"""Rows of both sets; rows (or a factor) of x and a factor of y; eigenvalues of the symmetric product."""

_EPS = torch.finfo(torch.float64).eps
_SLACK = 1e-8
"""Of the two traces: a distance below that is 0, one below its negative is an error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """A mean and a covariance, float64; of how many rows, where that is known."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "_ _"]
    n: int | None = None

    def __post_init__(self) -> None:
        width = len(self.mean)
        if self.covariance.shape != (width, width):
            raise InputError(f"covariance must have shape {(width, width)}, got {tuple(self.covariance.shape)}")
        check_rows(torch.cat([self.mean[None], self.covariance]), "mean and covariance")
        object.__setattr__(self, "mean", double(self.mean))
        object.__setattr__(self, "covariance", double(self.covariance))

    @classmethod
    def of(cls, side: "Side") -> "Gaussian":
        """Fitted to rows or moments; a Gaussian as it is. With no more rows than columns its factor is theirs."""
        if isinstance(side, Gaussian):
            return side
        if isinstance(side, Tensor) and not side.requires_grad and 2 <= len(side) <= side.shape[1]:
            half = _Half.of_rows(side)
            _, sizes, right = torch.linalg.svd(half.root, full_matrices=False)
            kept = sizes > _tolerance(half.root) * sizes[:1]
            return cls.from_factor(half.mean, right[kept].T * sizes[kept], n=len(side))
        moments = Moments.of(side) if isinstance(side, Tensor) else side
        return cls(mean=moments.mean, covariance=moments.covariance, n=moments.n)

    @classmethod
    def from_factor(cls, mean: Float[Tensor, " d"], factor: Float[Tensor, "d r"], n: int | None = None) -> "Gaussian":
        """With covariance R R^T, where R has orthogonal columns."""
        made = cls(mean=mean, covariance=double(factor) @ double(factor).T, n=n)
        made.__dict__["factor"] = double(factor)
        return made

    @cached_property
    def factor(self) -> Float64[Tensor, "d r"]:
        """R with S = R R^T: eigenvectors times roots of their eigenvalues, those that are 0 left out.

        Raises:
            InputError: The covariance has a gradient, which eigenvectors do not carry safely, or is not one.
        """
        if self.covariance.requires_grad:
            raise InputError("a covariance must have no gradient to be factored, got one; use route 'symmetric'")
        values, vectors = torch.linalg.eigh(self.covariance)
        most = values[-1:].clamp_min(0)
        if (values[:1] < -_SLACK * most).any() or not len(values):
            raise InputError(f"a covariance must have no negative eigenvalue, got {values[:1].tolist()}")
        kept = values > len(values) * _EPS * most
        return vectors[:, kept] * values[kept].sqrt()

    @property
    def factored(self) -> bool:
        """Whether the factor is already known."""
        return "factor" in self.__dict__

    @property
    def spectrum(self) -> Float64[Tensor, " r"]:
        """Eigenvalues of the covariance that are not 0."""
        return self.factor.square().sum(0)

    def to(self, device: torch.device | str) -> "Gaussian":
        """On another device."""
        made = Gaussian(mean=self.mean.to(device), covariance=self.covariance.to(device), n=self.n)
        if self.factored:
            made.__dict__["factor"] = self.factor.to(device)
        return made


Side = Float[Tensor, "_ _"] | Moments | Gaussian
"""A set: its rows, their moments, or a Gaussian."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrechetParts:
    """The terms of the distance, all at least 0."""

    mean_term: Float64[Tensor, ""]
    """|m_x - m_y|²"""
    trace_x: Float64[Tensor, ""]
    trace_y: Float64[Tensor, ""]
    nuclear_norm: Float64[Tensor, ""]
    """tr (S_x S_y)^{1/2}"""

    @property
    def distance(self) -> Float64[Tensor, ""]:
        """Their sum; 0 where it is below 1e-8 of the traces, with its gradient.

        Raises:
            RunError: Negative by more than that, which two covariances cannot give.
        """
        value = self.mean_term + self.trace_x + self.trace_y - 2 * self.nuclear_norm
        slack = _SLACK * (self.trace_x + self.trace_y).detach().abs()
        if value < -slack:
            raise RunError(f"a Fréchet distance must be at least 0, got {float(value):.6g}; check the covariances")
        return value - torch.where(value < slack, value, 0.0).detach()


def frechet_distance(x: Side, y: Side, *, route: Route | None = None) -> Float64[Tensor, ""]:
    """Fréchet distance of two sets, at least 0; differentiable in whatever has a graph.

    Args:
        x, y: At least two rows each, or moments, or Gaussians.
        route: The cheapest of those that are exact for these sets, unless one is named.

    Raises:
        InputError: Fewer than two rows, other widths, numbers that are not finite, or a route that these sides have
            no means for.

    Paper: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
    """
    return frechet_parts(x, y, route=route).distance


def frechet_parts(x: Side, y: Side, *, route: Route | None = None) -> FrechetParts:
    """The terms of `frechet_distance`, of the same arguments."""
    _check_sides(x, y)
    plan = _cheapest(x, y) if route is None else _named(x, y, route)
    if plan is None:
        a, b = Gaussian.of(x), Gaussian.of(y)
        trace_x, trace_y = a.covariance.trace(), b.covariance.trace()
        first, second = (b, a) if a.factored and not b.factored else (a, b)
        known = second if second.factored else Gaussian(mean=second.mean, covariance=second.covariance.detach())
        cross = _RootTrace.apply(first.covariance, second.covariance, known.factor)
        return FrechetParts(
            mean_term=(a.mean - b.mean).square().sum(), trace_x=trace_x, trace_y=trace_y, nuclear_norm=cross
        )
    left, right = (_Half.of(side, by_rows) for side, by_rows in zip((x, y), plan, strict=True))
    return FrechetParts(
        mean_term=(left.mean - right.mean).square().sum(),
        trace_x=left.root.square().sum(),
        trace_y=right.root.square().sum(),
        nuclear_norm=nuclear_norm(left.root @ right.root.T),
    )


def nuclear_norm(matrix: Float64[Tensor, "n m"]) -> Float64[Tensor, ""]:
    """Sum of singular values; singular values that are 0 to rounding send back no gradient."""
    values = torch.linalg.svdvals(matrix)
    return torch.where(values > _tolerance(matrix) * values[:1], values, values.detach()).sum()


def transport_half(x: Side, y: Side) -> Float64[Tensor, "d r"]:
    """P with P P^T = T, the optimal-transport map from x to y: T S_x T = S_y on the support that both have."""
    left, right = (_Half.of(side, isinstance(side, Tensor)) for side in (x, y))
    product = left.root @ right.root.T
    _, values, v = torch.linalg.svd(product, full_matrices=False)
    kept = values > _tolerance(product) * values[:1]
    return right.root.T @ (v[kept] / values[kept].sqrt()[:, None]).T


def frechet_gradient(x: Float[Tensor, "n d"], y: Side) -> Float64[Tensor, "n d"]:
    """Gradient of the distance with respect to the rows of x, in closed form:

    (2 / N)(m_x - m_y) + (2 / (N - 1)) (I - T)(x_i - m_x).
    """
    _check_sides(x, y)
    rows, half = double(x.detach()), transport_half(x.detach(), y)
    mean = rows.mean(0)
    centred = rows - mean
    n = len(rows)
    toward = mean - (double(y).mean(0) if isinstance(y, Tensor) else y.mean)
    return 2 / n * toward + 2 / (n - 1) * (centred - (centred @ half) @ half.T)


def expected_bias(spectrum: Float[Tensor, " r"], n: int, m: int | None = None) -> Float64[Tensor, ""]:
    """What n samples of the reference's own Gaussian are expected to be away from it, to second order in 1 / n.

    tr S / n + (1 / (2 (n - 1))) [sum_ij l_i l_j / (l_i + l_j) + tr S / 2]; too low once n is below about 4 D.

    Args:
        spectrum: Eigenvalues l of the covariance.
        n: Rows of the set.
        m: Rows that the reference is fitted to, which add the same terms; None for a reference known exactly.
    """
    values = double(spectrum)
    values = values[values > 0]
    pairs = (values[:, None] * values / (values[:, None] + values)).sum()
    sizes = [n] if m is None else [n, m]
    if min(sizes) < 2:
        raise InputError(f"n and m must be at least 2, got {sizes}")
    return sum((values.sum() / k + (pairs + values.sum() / 2) / (2 * (k - 1)) for k in sizes), values.new_zeros(()))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Half:
    """A mean, and a root L of the covariance, S = L^T L."""

    mean: Float64[Tensor, " d"]
    root: Float64[Tensor, "k d"]

    @classmethod
    def of(cls, side: Side, by_rows: bool) -> "_Half":
        if by_rows and isinstance(side, Tensor):
            return cls.of_rows(side)
        fitted = Gaussian.of(side)
        return cls(mean=fitted.mean, root=fitted.factor.T)

    @classmethod
    def of_rows(cls, given: Tensor) -> "_Half":
        rows = double(given)
        mean = rows.mean(0)
        return cls(mean=mean, root=(rows - mean) / math.sqrt(len(rows) - 1))


class _RootTrace(torch.autograd.Function):
    """tr (S_x S_y)^{1/2} from S_x, S_y and a factor of S_y; its gradients are half the two transport maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        inner = factor.T @ x @ factor
        if any(ctx.needs_input_grad):
            values, vectors = torch.linalg.eigh(inner)
            ctx.save_for_backward(values, vectors, factor)
        else:
            values = torch.linalg.eigvalsh(inner)
        return values.clamp_min(0).sqrt().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, vectors, factor = ctx.saved_tensors
        kept = values > len(values) * _EPS * values[-1:]
        vectors, roots = vectors[:, kept], values[kept].sqrt()
        forth = factor @ (vectors / roots.sqrt())
        back = factor / factor.square().sum(0) @ (vectors * roots.sqrt())
        halves = (forth, back)
        return *(
            0.5 * grad * h @ h.T if need else None for h, need in zip(halves, ctx.needs_input_grad[:2], strict=True)
        ), None


def _tolerance(matrix: Tensor) -> float:
    """Share of the largest singular value below which one is rounding."""
    return max(matrix.shape) * _EPS


def width_of(side: Side) -> int:
    """Elements of a row."""
    return side.shape[-1] if isinstance(side, Tensor) else len(side.mean)


def _count(side: Side) -> int | None:
    return len(side) if isinstance(side, Tensor) else side.n


def _has_gradient(side: Side) -> bool:
    if isinstance(side, Tensor):
        return side.requires_grad
    return (side.scatter if isinstance(side, Moments) else side.covariance).requires_grad


def _check_sides(x: Side, y: Side) -> None:
    for name, side in (("x", x), ("y", y)):
        if isinstance(side, Tensor):
            check_rows(side, name)
        count = _count(side)
        if count is not None and count < 2:
            raise InputError(f"{name} must have at least 2 rows, got {count}")
    if width_of(x) != width_of(y):
        raise InputError(f"x and y must have rows of one width, got {width_of(x)} and {width_of(y)}")


def _named(x: Side, y: Side, route: Route) -> tuple[bool, bool] | None:
    """What a route means: whether each side enters by its rows; None for the symmetric one."""
    if route == "rows" and not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise InputError("route 'rows' must get rows of both sets, got moments")
    return None if route == "symmetric" else (isinstance(x, Tensor), route == "rows")


def _cheapest(x: Side, y: Side) -> tuple[bool, bool] | None:
    """The plan of fewest operations among those that are exact and, where there is a gradient, safe."""
    width = width_of(x)
    costs: dict[tuple[bool, bool] | None, float] = {}
    for plan in ((True, True), (True, False), (False, True), (False, False)):
        sides = list(zip((x, y), plan, strict=True))
        if any(not isinstance(side, Tensor) if by_rows else _has_gradient(side) for side, by_rows in sides):
            continue
        k, r = (_rank(side, by_rows) for side, by_rows in sides)
        known = sum(0.0 if by_rows else _factoring(side) for side, by_rows in sides)
        costs[plan] = known + k * r * (width + 4.0 * min(k, r))
    if not costs or all((_count(side) or math.inf) > width for side in (x, y)):
        fitting = sum(len(side) * width**2 for side in (x, y) if isinstance(side, Tensor))
        costs[None] = fitting + min(_factoring(side, fitted=True) for side in (x, y)) + 4.0 * width**3
    return min(costs, key=lambda plan: costs[plan])


def _rank(side: Side, by_rows: bool) -> int:
    if isinstance(side, Gaussian) and side.factored:
        return side.factor.shape[1]
    count = _count(side) or math.inf
    return int(count if by_rows else min(count, width_of(side)))


def _factoring(side: Side, fitted: bool = False) -> float:
    """Operations to fit and factor a side."""
    if isinstance(side, Gaussian) and side.factored:
        return 0.0
    fit = len(side) * width_of(side) ** 2 if isinstance(side, Tensor) and not fitted else 0
    return fit + 10.0 * width_of(side) ** 3
