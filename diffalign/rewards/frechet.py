"""The Fréchet distance as a set reward over any encoder, and what each sample does for it.

Leaving sample i out of N rows changes mean and covariance exactly by the updates of `Moments.without`; its credit is
the distance of the set without it minus the distance of the set, positive where it helps. To first order that is

    2 (m_x - m_y)·dm + tr((I - T) dS)

with the transport map T of the whole set: one factorisation for all samples.

Where samples are exchanged, sums of e and of F^T e e^T F are kept, F a factor of the reference's covariance: the
nuclear norm needs no more of the set's covariance S than F^T S F.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.gaussians import FrechetParts as FrechetParts
from diffalign.rewards.gaussians import (
    Gaussian,
    Side,
    frechet_distance,
    frechet_parts,
    nuclear_norm,
    transport_half,
    width_of,
)
from diffalign.rewards.gaussians import expected_bias as expected_bias
from diffalign.rewards.gaussians import frechet_gradient as frechet_gradient
from diffalign.rewards.sets import Space, check_left, credit_of, exchanged, open_space, pieces
from diffalign.rewards.statistics import Gather, Moments, double
from diffalign.types import Embedded, MediaEncoder, Modality, RewardBatch, SetOutput, alone


def leave_one_out(x: Embedded, y: Gaussian) -> Float64[Tensor, " b"]:
    """Distance to y without each sample minus the distance of all: one nuclear norm a sample.

    Raises:
        InputError: A sample without which fewer than two rows are left.
    """
    check_left(x, 2)
    rows = double(x.rows)
    mean = rows.mean(0)
    centred = rows - mean
    n, total = len(rows), centred.square().sum()
    seen = centred @ y.factor
    if n < seen.shape[1]:
        seen = torch.linalg.qr(seen.T, mode="r").R.T  # [n, n], same singular values, centred or not
    found = []
    for piece in (slice(0, 0), *pieces(x.counts)):
        own = centred[piece]
        left, shift = n - len(own), own.sum(0)
        kept = torch.cat([seen[: piece.start], seen[piece.stop :]])
        moved = mean - shift / left - y.mean
        trace = (total - own.square().sum() - shift.square().sum() / left) / (left - 1)
        cross = nuclear_norm(kept - kept.mean(0)) / (left - 1) ** 0.5
        found.append(moved.square().sum() + trace - 2 * cross)
    return torch.stack(found[1:]) - found[0]


def influence(x: Embedded, y: Gaussian) -> Float64[Tensor, " b"]:
    """`leave_one_out` to first order in the change of mean and covariance.

    The order of samples is nearly that of `leave_one_out` where the set is away from y; where it is as near as chance
    allows, first-order terms are small and the order less sure.
    """
    check_left(x, 2)
    rows = double(x.rows)
    mean = rows.mean(0)
    centred, half = rows - mean, transport_half(x.rows, y)
    n = len(rows)

    def form(v: Tensor) -> Tensor:
        """v^T (I - T) v of each row."""
        return v.square().sum(-1) - (v @ half).square().sum(-1)

    own = form(centred)
    shift = torch.stack([centred[piece].sum(0) for piece in pieces(x.counts)])
    count = torch.tensor(x.counts, dtype=rows.dtype, device=rows.device)
    left = n - count
    taken = torch.stack([own[piece].sum() for piece in pieces(x.counts)]) + form(shift) / left
    mean_change = -2 / left * (shift @ (mean - y.mean))
    return mean_change + (own.sum() - taken) / (left - 1) - own.sum() / (n - 1)


def per_sample(x: Embedded, y: Gaussian) -> Float64[Tensor, " b"]:
    """Distance to y of every sample's own rows: for ranking only, its level is that of missing diversity.

    Raises:
        InputError: A sample with fewer than two rows.
    """
    short = [i for i, count in enumerate(x.counts) if count < 2]
    if short:
        raise InputError(
            f"every sample must have at least 2 embeddings to be a set of its own, got fewer for samples {short[:8]}"
        )
    known = y if y.factored else Gaussian.from_factor(y.mean, y.factor, y.n)
    return torch.stack([frechet_distance(x.rows[piece], known, route="factor") for piece in pieces(x.counts)])


def _own(x: Embedded, y: Gaussian) -> Float64[Tensor, " b"]:
    return -per_sample(x, y)


_WAYS: dict[str, Callable[[Embedded, Gaussian], Tensor]] = {"loo": leave_one_out, "influence": influence, "self": _own}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """Samples of which sets are made, about their common mean."""

    rows: Float64[Tensor, "n d"]
    seen: Float64[Tensor, "n r"]
    """Along the columns of the reference's factor."""
    parts: tuple[slice, ...]
    """Rows of each sample."""
    apart: Float64[Tensor, " d"]
    """The pool's mean minus the reference's."""
    trace: Float64[Tensor, ""]
    """Of the reference's covariance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrechetTally:
    """Minus the distance of a set from running sums: an exchange costs O(r²), its score eigenvalues of an r x r matrix.

    r is the rank of the reference. A set of no more than r rows has its score from their singular values instead,
    which are exact there.
    """

    pool: _Pool
    members: tuple[int, ...]
    n: int
    """Rows of the set."""
    total: Float64[Tensor, " d"]
    seen: Float64[Tensor, " r"]
    squares: Float64[Tensor, ""]
    products: Float64[Tensor, "r r"] | None
    """Sum of F^T e e^T F; None where the set began with no more than r rows."""

    @classmethod
    def of(cls, pool: Embedded, members: Sequence[int], y: Gaussian) -> "FrechetTally":
        """Of the set of these samples of the pool, against a reference."""
        rows = double(pool.rows)
        mean = rows.mean(0)
        held = _Pool(
            rows=rows - mean,
            seen=(rows - mean) @ y.factor,
            parts=tuple(pieces(pool.counts)),
            apart=mean - y.mean,
            trace=y.covariance.trace(),
        )
        own = torch.cat([held.rows[held.parts[i]] for i in members])
        seen = torch.cat([held.seen[held.parts[i]] for i in members])
        return cls(
            pool=held,
            members=tuple(members),
            n=len(own),
            total=own.sum(0),
            seen=seen.sum(0),
            squares=own.square().sum(),
            products=seen.T @ seen if len(own) > seen.shape[1] else None,
        )

    @cached_property
    def score(self) -> float:
        mean = self.total / self.n
        parts = FrechetParts(
            mean_term=(mean + self.pool.apart).square().sum(),
            trace_x=(self.squares - self.n * mean.square().sum()) / (self.n - 1),
            trace_y=self.pool.trace,
            nuclear_norm=self._cross(),
        )
        return -float(parts.distance)

    def exchange(self, out: int, into: int) -> "FrechetTally":
        gone, come = (self.pool.rows[self.pool.parts[i]] for i in (out, into))
        unseen, seen = (self.pool.seen[self.pool.parts[i]] for i in (out, into))
        return replace(
            self,
            members=exchanged(self.members, out, into),
            n=self.n + len(come) - len(gone),
            total=self.total + come.sum(0) - gone.sum(0),
            seen=self.seen + seen.sum(0) - unseen.sum(0),
            squares=self.squares + come.square().sum() - gone.square().sum(),
            products=None if self.products is None else self.products + seen.T @ seen - unseen.T @ unseen,
        )

    def _cross(self) -> Float64[Tensor, ""]:
        """tr (S_x S_y)^{1/2}"""
        if self.products is None or self.n <= len(self.products):
            seen = torch.cat([self.pool.seen[self.pool.parts[i]] for i in self.members])
            return nuclear_norm(seen - seen.mean(0)) / (self.n - 1) ** 0.5
        inner = torch.addr(self.products, self.seen, self.seen, alpha=-1 / self.n) / (self.n - 1)
        return torch.linalg.eigvalsh(inner).clamp_min(0).sqrt().sum()


class FrechetDistance(ABC):
    """A set reward by the Fréchet distance to a reference set; never made itself."""

    needs_reference = True
    range = (float("-inf"), 0.0)
    licence = "the encoder's"
    space: Space
    reference: Gaussian | None

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        return self.space.encoder.version

    @property
    def modality(self) -> Modality:
        return self.space.encoder.modality

    @property
    def requires(self) -> frozenset[str]:
        return self.space.requires

    def to(self, device: torch.device | str) -> "FrechetDistance":
        self.space.to(device)
        return self

    @torch.no_grad()
    def fit_reference(self, batches: Iterable[RewardBatch]) -> None:
        """Takes the reference set: its mean and covariance, from a stream."""
        self.reference = Gaussian.of(self.space.summarise(batches)[0])

    def save_reference(self, file: str | Path) -> None:
        """Writes mean, factor and number of rows."""
        held = self.held()
        self.space.save(file, "gaussian", {"mean": held.mean, "factor": held.factor}, rows=held.n or 0)

    def load_reference(self, file: str | Path) -> None:
        """Reads what `save_reference` of any Fréchet reward with this encoder has written."""
        tensors, rows = self.space.load(file, "gaussian", {"mean": 1, "factor": 2})
        if len(tensors["mean"]) != len(tensors["factor"]):
            raise InputError(f"reference {str(file)!r} must have a mean and a factor of one width; it is damaged")
        self.reference = Gaussian.from_factor(tensors["mean"], tensors["factor"], n=rows)

    @torch.no_grad()
    def score_set(self, batches: Iterable[RewardBatch]) -> SetOutput:
        """Minus the distance of all batches together, which are never held at once."""
        self.held()
        return self._of(*self.space.summarise(batches))

    def embed(self, batch: RewardBatch) -> Embedded:
        """A batch in the encoder's space."""
        return self.space.embed(batch)

    @torch.no_grad()
    def of_rows(self, embedded: Embedded) -> SetOutput:
        """Minus the distance of a set that is embedded already."""
        rows = embedded.rows
        self.space.check_enough(len(rows), len(embedded.counts))
        return self._of(rows if len(rows) <= rows.shape[1] else Moments.of(rows), len(embedded.counts))

    @torch.no_grad()
    def tally(self, pool: Embedded, members: Sequence[int]) -> FrechetTally:
        """Minus the distance of a set of the pool's samples, while they are exchanged."""
        self.space.check_enough(sum(pool.counts[i] for i in members), len(members))
        return FrechetTally.of(pool, members, self.held(pool.rows))

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, ""]:
        """Minus the distance of one batch, with gradient to its media."""
        rows = self.space.embed_with_graph(batch).rows
        return -frechet_distance(rows, self.held(rows), route="factor").float()

    @torch.no_grad()
    def credit(self, batch: RewardBatch, mode: str = "loo") -> Float[Tensor, " b"]:
        """What each sample does for the distance of the batch; "self" is minus its own distance."""
        credit_of(mode, _WAYS)
        return self.credit_rows(self.space.embed(batch), mode)

    @torch.no_grad()
    def credit_rows(self, embedded: Embedded, mode: str = "loo") -> Float[Tensor, " b"]:
        """`credit` of a set that is embedded already."""
        way = credit_of(mode, _WAYS)
        return way(embedded, self.held(embedded.rows)).float().to(embedded.rows.device)

    def held(self, like: Side | None = None) -> Gaussian:
        """The reference, on the device and of the width of a set."""
        if self.reference is None:
            raise self.space.no_reference()
        if like is None:
            return self.reference
        self.space.check_width(width_of(like), len(self.reference.mean))
        place = double(like[:0]).device if isinstance(like, Tensor) else like.mean.device
        if self.reference.mean.device != place:
            self.reference = self.reference.to(place)
        return self.reference

    def _of(self, summary: Tensor | Moments, samples: int) -> SetOutput:
        parts = frechet_parts(summary, self.held(summary))
        raw = {
            "distance": parts.distance,
            "mean_term": parts.mean_term,
            "trace": parts.trace_x,
            "trace_reference": parts.trace_y,
            "nuclear_norm": parts.nuclear_norm,
        }
        values = {name: float(value) for name, value in raw.items()}
        return SetOutput(score=-values["distance"], raw=values, samples=samples)

    def _open(self, space: Space) -> None:
        self.space, self.reference = space, None


class FrechetReward(FrechetDistance):
    """Minus the Fréchet distance to a reference set in an encoder's space: FID's formula, CLIP embeddings by default.

    `raw` holds the distance and its terms, positive. Distances of sets of different size, or in different encoders,
    are not comparable: N samples of the reference itself are away from it by about D / N + D² / 4N times the variance
    (`expected_bias`). Needs many more samples than the encoder has dimensions, unless sets of one size are compared.

    Paper: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", arXiv
    1706.08500.
    """

    name = "frechet"

    def __init__(
        self,
        encoder: str | MediaEncoder = "clip",
        *,
        encoder_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        gather: Gather = alone,
    ) -> None:
        """Names an encoder ("clip:tiny-clip"), or takes one as it is.

        Args:
            encoder: Its spec, or the encoder.
            encoder_options: Keyword arguments of the encoder's class, where it is named.
            device: Where the encoder works.
            gather: Joins the rows of all processes, of which each then brings its share of a set.
        """
        self._open(open_space(self.name, encoder, encoder_options, device, gather))
