"""How often a method runs its networks: the method itself, run on denoisers that compute nothing and count."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from diffalign.paths import NoisePath, Prediction
from diffalign.rng import SampleRng
from diffalign.types import Batch, Cond, Denoiser, ImageBatch, Method, PairBatch

SAMPLES = 256
"""Pairs or images over which counts are averaged, for methods that run a network as often as t is high."""


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Samples that networks are run on, per pair or single image."""

    with_gradient: float
    """Of the policy, with a backward pass."""
    without_gradient: float
    """Of policy or reference."""
    of_policy: float = 0.0
    """How many of those without gradient are the policy's."""
    features_with_gradient: float = 0.0
    """Of the reference's first half, with a backward pass to its input."""
    features_without_gradient: float = 0.0
    mid: bool = False
    blocks: int | None = None
    """How far the first half goes, as the method asked."""

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
    tally = _Tally()
    policy = _Counter(tally=tally, path=denoiser.path, prediction=denoiser.prediction, weight=nn.Parameter(_one()))
    second = _Counter(tally=tally, path=denoiser.path, prediction=denoiser.prediction, weight=_one())
    numbers = tuple(range(samples))
    out = method(policy, second if reference else None, _batch(method, numbers), SampleRng(0, numbers))
    out.loss.mean().backward()
    return Evaluations(
        with_gradient=round(tally.graded / samples, 2),
        without_gradient=round((tally.plain + tally.plain_policy) / samples, 2),
        of_policy=round(tally.plain_policy / samples, 2),
        features_with_gradient=round(tally.graded_features / samples, 2),
        features_without_gradient=round(tally.plain_features / samples, 2),
        mid=tally.mid,
        blocks=tally.blocks,
    )


def _one() -> Tensor:
    return torch.ones(())


def _batch(method: Method, numbers: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, len(numbers), 1, 2, 2, generator=generator)
    score = torch.rand(2, len(numbers), generator=generator)
    kind = method.needs.batches
    if kind == "pairs":
        return PairBatch(x_w=x, x_l=y, cond=Cond({}), samples=numbers, score_w=score[0], score_l=score[1])
    label = torch.tensor([1.0, -1.0]).repeat(len(numbers))[: len(numbers)]
    return ImageBatch(x_0=x, cond=Cond({}), samples=numbers, label=label if kind == "labelled" else None)


@dataclass
class _Tally:
    graded: int = 0
    plain: int = 0
    plain_policy: int = 0
    graded_features: int = 0
    plain_features: int = 0
    mid: bool = False
    blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Counter:
    """A denoiser whose network is one number."""

    tally: _Tally
    path: NoisePath
    prediction: Prediction
    weight: Tensor

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        out = x_t * self.weight
        if out.requires_grad:
            self.tally.graded += len(t)
        elif self.weight.requires_grad:
            self.tally.plain_policy += len(t)
        else:
            self.tally.plain += len(t)
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
