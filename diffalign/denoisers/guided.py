"""Classifier-free guidance around any denoiser: one call on the joined unconditional and conditional batch, or one call
of each of two models."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffalign.errors import InputError
from diffalign.paths import NoisePath, Prediction
from diffalign.types import Cond, Denoiser


@dataclass(frozen=True, kw_only=True)
class Guided:
    """uncond + w (cond - uncond), in float32; a policy that samples with guidance must be trained with it too.

    Paper: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, with w = 1 for no guidance; with a
        `negative` model Wang et al., "Diffusion-NPO", ICLR 2025.
    Departs: gradient flows through both branches, which is exact; the first code of Flow-GRPO
        detached the unconditional one.
    """

    denoiser: Denoiser
    uncond: Cond
    """The condition of the empty or negative prompt: one row for all samples, or a row for each."""
    guidance: float
    """w; 1 is off and calls the conditional branch alone."""
    detach_uncond: bool = False
    """No gradient through the unconditional branch."""
    negative: Denoiser | None = None
    """The model of the unconditional branch; None is `denoiser`, with both branches in one call."""

    def __post_init__(self) -> None:
        if not self.guidance >= 1:
            raise InputError(f"guidance must be at least 1, which is off, got {self.guidance}")

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    @property
    def net(self) -> Any:
        """The network of a denoiser that has one, for whoever synchronises its gradients."""
        return cast(Any, self.denoiser).net

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        if self.guidance == 1:
            return self.denoiser(x_t, t, cond)
        without = self._uncond_like(cond, len(x_t))
        if self.negative is None:
            joined = Cond({name: torch.cat([without[name], value]) for name, value in cond.tensors.items()})
            uncond, conditional = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), joined).chunk(2)
        else:
            uncond, conditional = self.negative(x_t, t, without), self.denoiser(x_t, t, cond)
        if self.detach_uncond:
            uncond = uncond.detach()
        return uncond + self.guidance * (conditional - uncond)

    def _uncond_like(self, cond: Cond, size: int) -> Cond:
        """A row of the unconditional branch for each of the conditional one."""
        if self.uncond.tensors.keys() != cond.tensors.keys():
            raise InputError(f"uncond must hold {sorted(cond.tensors)} like cond, got {sorted(self.uncond.tensors)}")
        rows = {}
        for name, value in cond.tensors.items():
            row = self.uncond[name].to(value)
            if len(row) not in (1, size) or row.shape[1:] != value.shape[1:]:
                raise InputError(
                    f"uncond[{name!r}] must have shape {(1, *value.shape[1:])} or {tuple(value.shape)}, got "
                    f"{tuple(row.shape)}"
                )
            rows[name] = row.expand_as(value)
        return Cond(rows)
