"""Classifier-free guidance around any denoiser: one call on the joined unconditional and conditional batch."""

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

    Paper: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, with w = 1 for no guidance.
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
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), self._joined(cond, len(x_t)))
        uncond, conditional = both.chunk(2)
        if self.detach_uncond:
            uncond = uncond.detach()
        return uncond + self.guidance * (conditional - uncond)

    def _joined(self, cond: Cond, size: int) -> Cond:
        """Rows of the unconditional branch, then those of the conditional one."""
        if self.uncond.tensors.keys() != cond.tensors.keys():
            raise InputError(f"uncond must hold {sorted(cond.tensors)} like cond, got {sorted(self.uncond.tensors)}")
        joined = {}
        for name, value in cond.tensors.items():
            row = self.uncond[name].to(value)
            if len(row) not in (1, size) or row.shape[1:] != value.shape[1:]:
                raise InputError(
                    f"uncond[{name!r}] must have shape {(1, *value.shape[1:])} or {tuple(value.shape)}, got "
                    f"{tuple(row.shape)}"
                )
            joined[name] = torch.cat([row.expand_as(value), value])
        return Cond(joined)
