"""Batches, what a method returns; what a denoiser and a method are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffalign.paths import NoisePath, Prediction
from diffalign.rng import SampleRng


@dataclass(frozen=True)
class Cond:
    """What a denoiser is conditioned on: named, batch-first tensors. Only a family's own code knows the names."""

    tensors: Mapping[str, Shaped[Tensor, " b *rest"]]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def repeat(self, times: int) -> "Cond":
        """The whole batch `times` times, one after the other: [w1, w2] -> [w1, w2, w1, w2]."""
        return Cond({k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in self.tensors.items()})

    def rows(self, index: Tensor | slice) -> "Cond":
        return Cond({k: v[index] for k, v in self.tensors.items()})

    def to(self, device: torch.device | str) -> "Cond":
        return Cond({k: v.to(device, non_blocking=True) for k, v in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs that share a prompt: clean latents of winner and loser, scaled as the denoiser takes them."""

    x_w: Float[Tensor, "b c h w"]
    x_l: Float[Tensor, "b c h w"]
    cond: Cond
    samples: tuple[int, ...]
    """Number of each pair in the run's stream, from which its random numbers are derived."""
    score_w: Float[Tensor, " b"] | None = None
    """Scores of the winners by some judge, from the data's score columns."""
    score_l: Float[Tensor, " b"] | None = None
    """Scores of the losers by the same judge."""

    def __len__(self) -> int:
        return len(self.x_w)

    def to(self, device: torch.device | str) -> "PairBatch":
        return replace(
            self,
            x_w=self.x_w.to(device, non_blocking=True),
            x_l=self.x_l.to(device, non_blocking=True),
            cond=self.cond.to(device),
            score_w=None if self.score_w is None else self.score_w.to(device, non_blocking=True),
            score_l=None if self.score_l is None else self.score_l.to(device, non_blocking=True),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        named = {"x_w": self.x_w, "x_l": self.x_l, "score_w": self.score_w, "score_l": self.score_l}
        return {**{k: v for k, v in named.items() if v is not None}, **_common(self.samples, self.cond)}


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Single images with their prompts: clean latents, scaled as the denoiser takes them."""

    x_0: Float[Tensor, "b c h w"]
    cond: Cond
    samples: tuple[int, ...]
    """Number of each image in the run's stream, from which its random numbers are derived."""
    label: Float[Tensor, " b"] | None = None
    """+1 for a good image, -1 for a bad one, where the data is labelled."""

    def __len__(self) -> int:
        return len(self.x_0)

    def to(self, device: torch.device | str) -> "ImageBatch":
        return replace(
            self,
            x_0=self.x_0.to(device, non_blocking=True),
            cond=self.cond.to(device),
            label=None if self.label is None else self.label.to(device, non_blocking=True),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        label = {} if self.label is None else {"label": self.label}
        return {"x_0": self.x_0, **label, **_common(self.samples, self.cond)}


Batch = PairBatch | ImageBatch


def _common(samples: tuple[int, ...], cond: Cond) -> dict[str, Tensor]:
    return {"samples": torch.tensor(samples), **{f"cond.{k}": v for k, v in cond.tensors.items()}}


def alone(total: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return total


@dataclass(frozen=True)
class RunningMean:
    """Mean of everything that was added, kept as sum and count; 0 while there is nothing. Never waits for a device."""

    total: Float[Tensor, ""] | float = 0.0
    count: Float[Tensor, ""] | float = 0.0

    @property
    def mean(self) -> Float[Tensor, ""] | float:
        return self.total / self.count if isinstance(self.count, Tensor) or self.count else 0.0

    def numbers(self) -> dict[str, float]:
        """Sum and count for a checkpoint; waits for the device."""
        return {"total": float(self.total), "count": float(self.count)}

    def add(self, values: Float[Tensor, " n"], reduce: Callable[[Tensor], Tensor] = alone) -> "RunningMean":
        """With the values of every process added."""
        both = torch.stack([values.detach().double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
        total, count = reduce(both)
        return RunningMean(self.total + total, self.count + count)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a micro-batch shares with those before it and with the other processes."""

    rewards: RunningMean = field(default_factory=RunningMean)
    """Of all implicit rewards before this micro-batch, winners and losers alike; for links that ask for it."""
    reduce: Callable[[Tensor], Tensor] = alone
    """Sum over processes, without gradient."""


ALONE = Shared()


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a method makes of one batch: no averaging inside, the trainer takes the means."""

    loss: Float[Tensor, " b"]
    metrics: dict[str, Float[Tensor, " b"]]
    """Detached, per sample, under TRL's names where TRL has one."""
    noise_level: Float[Tensor, " b"]
    """Where each sample's t lies between clean (0) and pure noise (1); metrics are also kept by decile of it."""
    rewards: RunningMean | None = None
    """The running mean with this micro-batch in it, where the method keeps one."""


ReferenceKind = Literal["none", "start", "ema", "pool"]
"""No reference; the policy as it started; a moving average of the policy; an earlier checkpoint of it."""

Replay = Literal["uniform", "last", "first"]
"""Which of the policies before a round is its reference."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method must be given; whatever is against it is an error before anything runs."""

    data: Literal["pairs", "images", "labelled"]
    """Winner and loser; winners alone; or single images, each good or bad."""
    references: tuple[ReferenceKind, ...] = ("start",)
    """What the policy may be measured against, the method's own choice first."""
    scores: bool = False
    """Pairs come with scores of both images."""
    float32_features: bool = False
    """The reference is run in part, with gradient, on differences that only float32 resolves."""
    batch_statistics: bool = False
    """A mean over the micro-batch of all processes enters the loss, so that needs two samples or more."""
    replay: Replay | None = None
    """Training goes in rounds: the loser is an image that the round's reference samples for the winner's prompt."""

    @property
    def batches(self) -> Literal["pairs", "images", "labelled"]:
        """What the method is called with: the data's own kind, or winners that rounds have joined to losers."""
        return self.data if self.replay is None else "pairs"


@runtime_checkable
class Denoiser(Protocol):
    """One face for every family: native predictions of a network along a noise path."""

    @property
    def path(self) -> NoisePath: ...

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        """Native output of the network, always float32."""
        ...


@runtime_checkable
class Encoder(Denoiser, Protocol):
    """A denoiser that also shows what it sees in noised latents on its way down."""

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Maps of its encoder from shallow to deep, in float32, differentiable in `x_t`; the last is the encoder's own.

        Args:
            mid: The middle block of a U-Net belongs to the encoder.
            blocks: How many blocks of a transformer do; None is half of them.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A paper's loss: a frozen dataclass of its hyperparameters and one call."""

    @property
    def needs(self) -> Needs: ...

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: Batch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss: ...
