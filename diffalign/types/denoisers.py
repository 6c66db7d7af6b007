"""Conditions, and what a denoiser is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffalign.paths import NoisePath, Prediction


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


def common(samples: tuple[int, ...], cond: Cond) -> dict[str, Tensor]:
    """What every batch holds, by name."""
    return {"samples": torch.tensor(samples), **{f"cond.{k}": v for k, v in cond.tensors.items()}}


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
