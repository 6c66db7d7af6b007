"""How often a method runs its networks: the method itself, run on denoisers that compute nothing and count."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from diffalign.denoisers.guided import Guided
from diffalign.paths import NoisePath, Prediction
from diffalign.rng import SampleRng
from diffalign.types import Batch, Cond, Denoiser, ImageBatch, Method, PairBatch, Shared

SAMPLES = 256
"""Pairs or images over which counts are averaged, for methods that run a network as often as t is high."""

Role = Literal["policy", "reference", "old"]


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Samples that networks are run on, per pair, single image or move; with guidance two for each."""

    with_gradient: float
    """Of the policy, with a backward pass."""
    without_gradient: float
    """Of policy, reference or old policy."""
    of_policy: float = 0.0
    """How many of those without gradient are the policy's."""
    of_old: float = 0.0
    """How many of them are the old policy's, which made the images."""
    features_with_gradient: float = 0.0
    """Of the reference's first half, with a backward pass to its input."""
    features_without_gradient: float = 0.0
    mid: bool = False
    blocks: int | None = None
    """How far the first half goes, as the method asked."""
    reference_last: bool = False
    """The reference is run when the policy's activations are already held for the backward pass."""

    @property
    def of_reference(self) -> float:
        """How many of those without gradient are the reference's."""
        return self.without_gradient - self.of_policy - self.of_old

    def words(self) -> str:
        """Such as "2 with gradient + 2 without"."""
        parts = [f"{self.with_gradient:g} with gradient + {self.without_gradient:g} without"]
        if self.features_with_gradient or self.features_without_gradient:
            parts.append(
                f"features {self.features_with_gradient:g} with gradient + {self.features_without_gradient:g} without"
            )
        return "; ".join(parts)


def evaluations(method: Method, denoiser: Denoiser, *, reference: bool, samples: int = SAMPLES) -> Evaluations:
    """What a method asks of its networks for one pair or image, averaged over its draws of t.

    Args:
        denoiser: Whose noise path it is; never run.
        reference: Whether the method is given one.
    """
    return count_calls(method, denoiser, _batch(method, tuple(range(samples))), reference=reference)


def count_calls(
    method: Method, denoiser: Denoiser, batch: Batch, *, reference: bool, old: bool = False, guidance: float = 1.0
) -> Evaluations:
    """What a method asks of its networks for one sample of a batch, whose numbers do not matter.

    Args:
        reference, old: Whether the method is given one.
        guidance: Above 1, policy and reference are guided as they sampled.
    """
    tally, samples = _Tally(), len(batch)

    def stand_in(role: Role) -> Denoiser:
        weight = nn.Parameter(torch.ones(())) if role == "policy" else torch.ones(())
        counter = _Counter(tally=tally, role=role, path=denoiser.path, prediction=denoiser.prediction, weight=weight)
        if guidance == 1 or role == "old":
            return counter
        return Guided(denoiser=counter, uncond=Cond({}), guidance=guidance)

    def share(count: int) -> float:
        return round(count / samples, 2)

    shared = Shared(old=stand_in("old") if old else None)
    other = stand_in("reference") if reference else None
    out = method(stand_in("policy"), other, batch, SampleRng(0, batch.samples), shared)
    out.loss.mean().backward()
    return Evaluations(
        with_gradient=share(tally.graded),
        without_gradient=share(tally.plain["reference"] + tally.plain["policy"] + tally.plain["old"]),
        of_policy=share(tally.plain["policy"]),
        of_old=share(tally.plain["old"]),
        features_with_gradient=share(tally.graded_features),
        features_without_gradient=share(tally.plain_features),
        mid=tally.mid,
        blocks=tally.blocks,
        reference_last=tally.reference_last,
    )


def _batch(method: Method, numbers: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, len(numbers), 1, 2, 2, generator=generator)
    score = torch.rand(2, len(numbers), generator=generator)
    kind = method.needs.batches
    if kind == "pairs":
        return PairBatch(x_w=x, x_l=y, cond=Cond({}), samples=numbers, score_w=score[0], score_l=score[1])
    label = torch.tensor([1.0, -1.0]).repeat(len(numbers))[: len(numbers)]
    return ImageBatch(x_0=x, cond=Cond({}), samples=numbers, label=label if kind == "labelled" else None)


class _Tally:
    def __init__(self) -> None:
        self.graded = 0
        self.plain: dict[Role, int] = {"policy": 0, "reference": 0, "old": 0}
        self.graded_features = 0
        self.plain_features = 0
        self.mid = False
        self.blocks: int | None = None
        self.reference_last = False


@dataclass(frozen=True, kw_only=True)
class _Counter:
    """A denoiser whose network is one number."""

    tally: _Tally
    role: Role
    path: NoisePath
    prediction: Prediction
    weight: Tensor

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        out = x_t * self.weight
        if out.requires_grad:
            self.tally.graded += len(t)
        else:
            self.tally.plain[self.role] += len(t)
            self.tally.reference_last |= self.role == "reference" and self.tally.graded > 0
        return out

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        self.tally.mid, self.tally.blocks = mid, blocks
        if x_t.requires_grad and torch.is_grad_enabled():
            self.tally.graded_features += len(t)
        else:
            self.tally.plain_features += len(t)
        return [x_t * 1.0]
