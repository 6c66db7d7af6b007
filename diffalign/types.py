"""The contracts that every part shares: batches, what a method returns; what a denoiser, a method, a reward are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
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

    def __len__(self) -> int:
        return len(self.x_w)

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch(
            x_w=self.x_w.to(device, non_blocking=True),
            x_l=self.x_l.to(device, non_blocking=True),
            cond=self.cond.to(device),
            samples=self.samples,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        cond = {f"cond.{k}": v for k, v in self.cond.tensors.items()}
        return {"x_w": self.x_w, "x_l": self.x_l, "samples": torch.tensor(self.samples), **cond}


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Single images with their prompts: clean latents, scaled as the denoiser takes them."""

    x_0: Float[Tensor, "b c h w"]
    cond: Cond
    samples: tuple[int, ...]
    """Number of each image in the run's stream, from which its random numbers are derived."""

    def __len__(self) -> int:
        return len(self.x_0)

    def to(self, device: torch.device | str) -> "ImageBatch":
        return ImageBatch(x_0=self.x_0.to(device, non_blocking=True), cond=self.cond.to(device), samples=self.samples)

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        cond = {f"cond.{k}": v for k, v in self.cond.tensors.items()}
        return {"x_0": self.x_0, "samples": torch.tensor(self.samples), **cond}


Batch = PairBatch | ImageBatch


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a method makes of one batch: no averaging inside, the trainer takes the means."""

    loss: Float[Tensor, " b"]
    metrics: dict[str, Float[Tensor, " b"]]
    """Detached, per sample, under TRL's names where TRL has one."""
    noise_level: Float[Tensor, " b"]
    """Where each sample's t lies between clean (0) and pure noise (1); metrics are also kept by decile of it."""


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
class Method(Protocol):
    """A paper's loss: a frozen dataclass of its hyperparameters and one call."""

    data: ClassVar[Literal["pairs", "images"]]
    """Which batches the method takes."""
    needs_reference: ClassVar[bool]

    def __call__(self, policy: Denoiser, reference: Denoiser | None, batch: Batch, rng: SampleRng) -> StepLoss: ...


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """What a reward may look at. Images are RGB float32 in [0, 1]; fields that a reward does not need may be absent."""

    images: Float[Tensor, "b 3 h w"]
    prompts: Sequence[str] | None = None
    metadata: Sequence[Mapping[str, object]] | None = None


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """Scores of a batch: higher is better, NaN and not `valid` where a sample could not be judged."""

    scores: Float[Tensor, " b"]
    raw: dict[str, Float[Tensor, " b"]] = field(default_factory=dict)
    """Components and native values by name, in their native sign."""
    valid: Bool[Tensor, " b"] | None = None

    def __post_init__(self) -> None:
        if self.valid is None:
            object.__setattr__(self, "valid", ~self.scores.isnan())


@runtime_checkable
class Reward(Protocol):
    """A pointwise reward plug-in."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Model id, revision and scale: what must be equal for two numbers to be comparable."""
        ...

    @property
    def requires(self) -> frozenset[str]:
        """Fields of `RewardBatch` that must be there."""
        ...

    @property
    def range(self) -> tuple[float, float]: ...

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores without gradient, by the reference preprocessing, float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class FunctionReward:
    """A plain `f(images, prompts) -> scores` as a reward plug-in."""

    name: str
    function: Callable[[Tensor, Sequence[str]], Tensor | Sequence[float]]
    version: str = "function"
    requires: frozenset[str] = frozenset({"images", "prompts"})
    range: tuple[float, float] = (float("-inf"), float("inf"))

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        scores = torch.as_tensor(self.function(batch.images, batch.prompts or []), dtype=torch.float32)
        if scores.shape != (len(batch.images),):
            raise ValueError(
                f"reward {self.name!r} must return one score per image, shape ({len(batch.images)},), "
                f"got {tuple(scores.shape)}"
            )
        return RewardOutput(scores=scores)
