"""Vendi score: the effective number of different samples in a set, by the spectrum of their similarities.

With unit rows X (N x D), rho = X X^T / N has trace 1; its eigenvalues p are those of the D x D matrix X^T X / N too,
whichever is smaller is used. Of order q

    V_q = (sum p^q)^{1 / (1 - q)},        V_1 = exp(-sum p log p),        V_inf = 1 / max p

in [1, N]. Each eigenvalue's gradient is f'(p) times its own projector, so equal eigenvalues do no harm.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.errors import InputError
from diffalign.rewards.mmd import unit
from diffalign.rewards.sets import Collected, Space, check_left, credit_of, exchanged, open_space, pieces
from diffalign.rewards.statistics import Gather
from diffalign.types import Embedded, MediaEncoder, Modality, RewardBatch, SetOutput, alone

_LEAST = 1e-12
"""Eigenvalues of a density at or below this are 0."""


def vendi(rows: Float[Tensor, "n d"], q: float | int = 1.0) -> Float64[Tensor, ""]:
    """Vendi score of a set of embeddings, which are brought to length 1; differentiable.

    Args:
        rows: At least one.
        q: Order, at least 0: 0 counts directions, large q looks at the most common kind only; infinity is allowed.

    Raises:
        InputError: No rows, a row of zeros, numbers that are not finite, or an order that is none.

    Paper: Friedman and Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning", arXiv 2210.02410;
        orders other than 1: Pasarkar and Dieng, "Cousins of the Vendi Score", arXiv 2310.12952.
    """
    check_order(q)
    if not len(rows):
        raise InputError("a Vendi score must be of at least 1 embedding, got 0")
    unit_rows = unit(rows)
    if q == 2:
        n, d = unit_rows.shape
        similar = unit_rows @ unit_rows.T if n <= d else unit_rows.T @ unit_rows
        return n**2 / similar.square().sum()
    return _Vendi.apply(unit_rows, q)


def check_order(q: float | int) -> None:
    """Raises InputError for what is no order."""
    if not q >= 0:
        raise InputError(f"q must be at least 0, got {q!r}")


def leave_one_out(x: Embedded, q: float | int = 1.0) -> Float64[Tensor, " b"]:
    """Vendi score of all rows minus that without each sample: what it adds."""
    check_left(x, 1)
    whole = vendi(x.rows, q)
    without = [vendi(torch.cat([x.rows[: p.start], x.rows[p.stop :]]), q) for p in pieces(x.counts)]
    return whole - torch.stack(without)


def influence(x: Embedded, q: float | int = 1.0) -> Float64[Tensor, " b"]:
    """`leave_one_out` to first order in the change of the density."""
    check_left(x, 1)
    unit_rows = unit(x.rows)
    n, d = unit_rows.shape
    values, vectors = _spectrum(unit_rows)
    slopes = _slopes(values, q)
    seen = n * values * vectors.square() if n <= d else (unit_rows @ vectors).square()  # [N, r]: squares along each
    excess = seen @ slopes - values @ slopes
    counts = torch.tensor(x.counts, dtype=unit_rows.dtype, device=unit_rows.device)
    return torch.stack([excess[piece].sum() for piece in pieces(x.counts)]) / (n - counts)


def per_sample(x: Embedded, q: float | int = 1.0) -> Float64[Tensor, " b"]:
    """Vendi score of every sample's own rows."""
    if min(x.counts, default=0) < 2:
        raise InputError(f"every sample must have at least 2 embeddings to be a set of its own, got {min(x.counts)}")
    return torch.stack([vendi(x.rows[piece], q) for piece in pieces(x.counts)])


@dataclass(frozen=True, kw_only=True, eq=False)
class VendiTally:
    """Vendi score of a set of a pool's samples: an exchange costs O(1) or O(d²), its score the eigenvalues.

    These are of the set's own block of the pool's similarities; of a set with more rows than columns, of the running
    sum of e e^T.
    """

    rows: Float64[Tensor, "n d"]
    """Of the pool, of length 1."""
    parts: tuple[slice, ...]
    """Rows of each sample."""
    members: tuple[int, ...]
    n: int
    """Rows of the set."""
    q: float | int
    similar: Float64[Tensor, "n n"] | None = None
    products: Float64[Tensor, "d d"] | None = None
    """Instead of the similarities."""

    @classmethod
    def of(cls, pool: Embedded, members: Sequence[int], q: float | int = 1.0) -> "VendiTally":
        """Of the set of these samples of the pool."""
        rows, parts = unit(pool.rows), tuple(pieces(pool.counts))
        own = torch.cat([rows[parts[i]] for i in members])
        made = cls(rows=rows, parts=parts, members=tuple(members), n=len(own), q=q)
        few = made.n <= rows.shape[1]
        return replace(made, similar=rows @ rows.T) if few else replace(made, products=own.T @ own)

    @cached_property
    def score(self) -> float:
        values = torch.linalg.eigvalsh(self._density())
        return float(_score(values[values > _LEAST], self.q))

    def exchange(self, out: int, into: int) -> "VendiTally":
        gone, come = (self.rows[self.parts[i]] for i in (out, into))
        return replace(
            self,
            members=exchanged(self.members, out, into),
            n=self.n + len(come) - len(gone),
            products=None if self.products is None else self.products + come.T @ come - gone.T @ gone,
        )

    def _density(self) -> Float64[Tensor, "_ _"]:
        if self.products is not None:
            return self.products / self.n
        assert self.similar is not None, "one of the two is kept"
        parts = [self.parts[i] for i in self.members]
        own = torch.tensor([row for part in parts for row in range(part.start, part.stop)], device=self.rows.device)
        return self.similar[own[:, None], own] / self.n


class VendiReward:
    """Vendi score: how many different samples a set is worth, from 1 to their number; without a reference.

    Where batches carry group_ids it is the mean over prompts of the score of one prompt's samples, and `raw` has the
    whole set's too; over different prompts it measures the prompts. It rewards noise as readily as variety. On CLIP
    embeddings unless told otherwise.

    Paper: Friedman and Dieng, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning", arXiv 2210.02410.
    """

    name = "vendi"
    needs_reference = False
    range = (1.0, float("inf"))
    licence = "the encoder's"

    def __init__(
        self,
        encoder: str | MediaEncoder = "clip",
        *,
        q: float | int = 1.0,
        encoder_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        gather: Gather = alone,
    ) -> None:
        """Names an encoder, or takes one as it is; `gather` joins the rows of all processes."""
        check_order(q)
        self.space: Space = open_space(self.name, encoder, encoder_options, device, gather)
        self.q = q

    @property
    def version(self) -> str:
        return f"{self.space.encoder.version}, order {self.q:g}"

    @property
    def modality(self) -> Modality:
        return self.space.encoder.modality

    @property
    def requires(self) -> frozenset[str]:
        return self.space.requires

    def to(self, device: torch.device | str) -> "VendiReward":
        self.space.to(device)
        return self

    def fit_reference(self, batches: Iterable[RewardBatch]) -> None:
        """Raises InputError: there is none."""
        raise self._no_use()

    def save_reference(self, file: str | Path) -> None:
        """Raises InputError: there is none."""
        raise self._no_use()

    def load_reference(self, file: str | Path) -> None:
        """Raises InputError: there is none."""
        raise self._no_use()

    @torch.no_grad()
    def score_set(self, batches: Iterable[RewardBatch]) -> SetOutput:
        """The score of all batches together, or the mean over their prompts."""
        found = self.space.collect(batches)
        whole = self.of_rows(found.embedded)
        if found.groups is None:
            return whole
        scores = [vendi(part.rows, self.q) for part in _by_group(found)]
        mean = float(torch.stack(scores).mean())
        return replace(whole, score=mean, raw={**whole.raw, "vendi_prompt": mean, "prompts": float(len(scores))})

    def embed(self, batch: RewardBatch) -> Embedded:
        """A batch in the encoder's space."""
        return self.space.embed(batch)

    @torch.no_grad()
    def of_rows(self, embedded: Embedded) -> SetOutput:
        """The score of a set that is embedded already, whatever its prompts."""
        self.space.check_enough(len(embedded.rows), len(embedded.counts))
        score = float(vendi(embedded.rows, self.q))
        return SetOutput(score=score, raw={"vendi_set": score}, samples=len(embedded.counts))

    @torch.no_grad()
    def tally(self, pool: Embedded, members: Sequence[int]) -> VendiTally:
        """The score of a set of the pool's samples, while they are exchanged."""
        self.space.check_enough(sum(pool.counts[i] for i in members), len(members))
        return VendiTally.of(pool, members, self.q)

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, ""]:
        """The score of one batch, with gradient to its media."""
        parts = _by_group(_grouped(self.space.embed_with_graph(batch), batch))
        return torch.stack([vendi(part.rows, self.q) for part in parts]).mean().float()

    @torch.no_grad()
    def credit(self, batch: RewardBatch, mode: str = "loo") -> Float[Tensor, " b"]:
        """What each sample adds to the score of the batch, exactly or to first order; "self" is its own score."""
        ways = {"loo": leave_one_out, "influence": influence, "self": per_sample}
        way = credit_of(mode, ways)
        found = _grouped(self.space.embed(batch), batch)
        if mode == "self" or found.groups is None:
            return way(found.embedded, self.q).float().to(found.embedded.rows.device)
        ids = torch.tensor(found.groups)
        credits = torch.empty(len(ids))
        parts = _by_group(found)
        for group, part in zip(dict.fromkeys(found.groups), parts, strict=True):
            credits[ids == group] = way(part, self.q).float().cpu() / len(parts)
        return credits.to(found.embedded.rows.device)

    def _no_use(self) -> InputError:
        return InputError(f"set reward {self.name!r} must be used without a reference set, got one")


class _Vendi(torch.autograd.Function):
    """Of unit rows, with the gradient in closed form: (2 / N) f'(rho) X."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, q: float | int) -> Tensor:
        values, vectors = _spectrum(rows)
        ctx.save_for_backward(rows, values, vectors)
        ctx.q = q
        return _score(values, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, values, vectors = ctx.saved_tensors
        n, d = rows.shape
        weighted = vectors * _slopes(values, ctx.q)
        along = weighted @ (vectors.T @ rows) if n <= d else (rows @ weighted) @ vectors.T
        return grad * (2 / n) * along, None


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues above 0, their vectors) of the smaller of X X^T / N and X^T X / N."""
    n, d = rows.shape
    values, vectors = torch.linalg.eigh((rows @ rows.T if n <= d else rows.T @ rows) / n)
    kept = values > _LEAST
    return values[kept], vectors[:, kept]


def _score(values: Tensor, q: float | int) -> Tensor:
    if q == 1:
        return torch.exp(-(values * values.log()).sum())
    if q == math.inf:
        return 1 / values.max()
    return values.pow(q).sum().pow(1 / (1 - q))


def _slopes(values: Tensor, q: float | int) -> Tensor:
    """Derivative of the score by each eigenvalue; shared by those that are largest alike at infinite order."""
    score = _score(values, q)
    if q == 1:
        return -score * (values.log() + 1)
    if q == math.inf:
        most = values > values.max() * (1 - 1e-9)
        return -score.square() * most / most.sum()
    return score / (1 - q) * q * values.pow(q - 1) / values.pow(q).sum()


def _grouped(embedded: Embedded, batch: RewardBatch) -> Collected:
    ids = None if batch.group_ids is None else tuple(int(group) for group in batch.group_ids)
    return Collected(embedded=embedded, groups=ids)


def _by_group(found: Collected) -> list[Embedded]:
    """The samples of each prompt, in the order in which prompts first appear; all as one where there are no groups.

    Raises:
        InputError: A prompt with a single sample, whose diversity is not defined.
    """
    if found.groups is None:
        return [found.embedded]
    places: dict[int, list[int]] = {}
    for place, group in enumerate(found.groups):
        places.setdefault(group, []).append(place)
    single = [group for group, held in places.items() if len(held) < 2]
    if single:
        raise InputError(f"every prompt must have at least 2 samples, got 1 for group_ids {single[:8]}")
    return [found.embedded.take(held) for held in places.values()]
