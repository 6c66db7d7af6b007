"""A sampler's walk: its moves, and what it leaves behind for training on them."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffalign.paths import broadcast
from diffalign.types.denoisers import Cond, Denoiser


@dataclass(frozen=True)
class Transition:
    """p(x_s | x_t) = N(mean, std^2)."""

    mean: Float[Tensor, " b *rest"]
    std: Float[Tensor, " b"]
    """Total standard deviation, square root of the step's length included; it never depends on the network."""
    table: Float[Tensor, " b"] | None = None
    """`std` as the walk's tables on the CPU have it, whose numbers are read without waiting for a device."""

    def sample(self, noise: Float[Tensor, " b *rest"]) -> Float[Tensor, " b *rest"]:
        """mean + std noise."""
        return self.mean + broadcast(self.std, noise) * noise


@runtime_checkable
class Walk(Protocol):
    """A kernel on a schedule: where a model may go from x_t, and how likely it was to go where it went.

    Moves are numbered, 0 the noisiest; the number may differ from sample to sample.
    """

    def transition(
        self, denoiser: Denoiser, x_t: Float[Tensor, "b c h w"], step: Int[Tensor, " b"], cond: Cond
    ) -> Transition:
        """Where `denoiser` goes from x_t; one function for rollout, policy and reference."""
        ...

    def log_prob(self, transition: Transition, x_s: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """log p(x_s | x_t), averaged over elements, in the kernel's own form."""
        ...

    def length(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """sigma_t - sigma_s, minus the dt of papers on flows; float32."""
        ...

    def odds(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """sigma_t / (1 - sigma_t), of flows alone; float32, and finite at the first move too."""
        ...

    @property
    def stds(self) -> Float[Tensor, " n"]:
        """Standard deviation of every move: 0 where it has no noise; float32."""
        ...

    def noise_level(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Where each move starts between the last one (0) and the first (1); float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """States of a walk, x_init's level first, and log-probs of its moves with noise.

    All levels or a stretch of them: `first` is the number of the first one kept, and the move of number i goes from
    level i to level i + 1. Where x is float16 the walk itself went on from the rounded states and its log-probs are
    those of them, so that they can be computed again exactly.
    """

    x: Float[Tensor, "b m c h w"]
    t: Shaped[Tensor, " m"]
    """Of the kept levels; x[:, j] is at t[j]."""
    log_prob: Float[Tensor, "b n"]
    """Averaged over elements, in the kernel's own form, as the sampling model had them."""
    steps: tuple[int, ...]
    """Number of the move of each log-prob."""
    cond: Cond
    x_0: Float[Tensor, "b c h w"]
    """Where the walk ended, float32."""
    seeds: tuple[int, ...]
    first: int = 0
    x_0_hat: Float[Tensor, "b k c h w"] | None = None
    """Clean latents that the network implied at every move of the walk, float32."""

    def __len__(self) -> int:
        return len(self.x)

    def states(self, step: int) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """(x_t, x_s) of the move of this number, float32.

        Raises:
            ValueError: It was not kept.
        """
        place = step - self.first
        if not 0 <= place < self.x.shape[1] - 1:
            raise ValueError(f"step must be kept, in [{self.first}, {self.first + self.x.shape[1] - 1}), got {step}")
        return self.x[:, place].float(), self.x[:, place + 1].float()

    def rows(self, index: slice) -> "Trajectory":
        """Some of the samples."""
        return replace(
            self,
            x=self.x[index],
            log_prob=self.log_prob[index],
            cond=self.cond.rows(index),
            x_0=self.x_0[index],
            seeds=self.seeds[index],
            x_0_hat=None if self.x_0_hat is None else self.x_0_hat[index],
        )

    def to(self, device: torch.device | str) -> "Trajectory":
        return replace(
            self,
            x=self.x.to(device),
            log_prob=self.log_prob.to(device),
            cond=self.cond.to(device),
            x_0=self.x_0.to(device),
            x_0_hat=None if self.x_0_hat is None else self.x_0_hat.to(device),
        )
