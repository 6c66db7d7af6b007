"""Noise paths x_t = alpha_t x_0 + sigma_t eps, for DDPM schedules and for rectified flow.

DDPM: t is an integer index 0..T-1, alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t), read from the
scheduler. Flow: t is a float in [0, 1], alpha_t = 1 - t, sigma_t = t. t grows with noise in both.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rng import SampleRng

Prediction = Literal["epsilon", "v_prediction", "sample", "velocity"]
"""Native output of a network: eps; alpha_t eps - sigma_t x_0 (DDPM); x_0; eps - x_0 (flow)."""

ErrorSpace = Literal["native", "eps", "x0", "v"]


Distribution = Literal["uniform", "logit_normal"]


@dataclass(frozen=True, kw_only=True)
class TimestepSampling:
    """How training draws t: a distribution over u in [0, 1), squeezed into [low, high)."""

    distribution: Distribution | None = None
    """None is the family's own. `logit_normal`: u = sigmoid(N(mean, std)); Esser et al., arXiv 2403.03206, 3.1."""
    low: float = 0.0
    """Least share of the noise range that is trained, in [0, 1)."""
    high: float = 1.0
    """Greatest share of the noise range that is trained, in (low, 1]."""
    mean: float = 0.0
    """Of the logit; only with `logit_normal`."""
    std: float = 1.0
    """Of the logit; only with `logit_normal`."""
    levels: int | None = None
    """DDPM: t is one of so many only, the last of each of as many equal parts of the range (SDXL-Turbo: 4, that is 249,
    499, 749 and 999); None trains all."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"timesteps.low and .high must satisfy 0 <= low < high <= 1, got {self.low}, {self.high}")
        if self.std <= 0:
            raise InputError(f"timesteps.std must be positive, got {self.std}")
        if self.levels is not None and self.levels < 1:
            raise InputError(f"timesteps.levels must be at least 1, got {self.levels}")
        if self.distribution == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise InputError(
                "timesteps.mean and .std must be left out when u is uniform; they shape 'logit_normal' only"
            )

    def resolved(self, default: Distribution) -> "TimestepSampling":
        """The same with the family's distribution where none is named."""
        return replace(self, distribution=self.distribution or default)

    def draw(self, rng: SampleRng) -> Float[Tensor, " b"]:
        """u in [low, high), float64, one per sample."""
        u = rng.uniform("t")
        if self.distribution == "logit_normal":
            normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-12, 1 - 1e-12) - 1)
            u = torch.sigmoid(self.mean + self.std * normal)
        elif self.distribution is None:
            raise ValueError("distribution must be named before drawing, got None; call resolved()")
        return self.low + (self.high - self.low) * u


@runtime_checkable
class NoisePath(Protocol):
    """Coefficients of x_t = alpha_t x_0 + sigma_t eps, and the draw of t for training."""

    def coefficients(self, t: Shaped[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """(alpha_t, sigma_t) on the device of t."""
        ...

    def sample_t(self, rng: SampleRng) -> Shaped[Tensor, " b"]:
        """One t per sample, on the CPU."""
        ...

    def at(self, level: Float[Tensor, " b"]) -> Shaped[Tensor, " b"]:
        """The t at a share of the noise range, `level` in [0, 1)."""
        ...

    def noise_level(self, t: Shaped[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Share of the noise range at t, in [0, 1]."""
        ...

    def rungs(self, count: int) -> Shaped[Tensor, " n"]:
        """The `count` + 1 values of t that part its range evenly, whatever the draw of t: 0 first, its end last."""
        ...


@dataclass(frozen=True, kw_only=True)
class DDPMPath:
    """Variance-preserving path on a discrete schedule."""

    alpha_bar: Float[Tensor, " T"]
    """Diffusers' `alphas_cumprod`."""
    timesteps: TimestepSampling = TimestepSampling(distribution="uniform")

    def coefficients(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        alpha_bar = self.alpha_bar.to(t.device, non_blocking=True)[t]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def sample_t(self, rng: SampleRng) -> Int[Tensor, " b"]:
        u, levels = self.timesteps.draw(rng), self.timesteps.levels
        if levels is None:
            return self.at(u)
        return ((u * levels).long().clamp(0, levels - 1) + 1) * len(self.alpha_bar) // levels - 1

    def at(self, level: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        return (level * len(self.alpha_bar)).long().clamp(0, len(self.alpha_bar) - 1)

    def noise_level(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (t + 0.5) / len(self.alpha_bar)

    def rungs(self, count: int) -> Int[Tensor, " n"]:
        return torch.arange(count + 1) * len(self.alpha_bar) // count


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """Rectified flow: a straight line from data (t = 0) to noise (t = 1)."""

    shift: float = 1.0
    """Static resolution shift of the model's scheduler: t = shift u / (1 + (shift - 1) u); 1 is none."""
    timesteps: TimestepSampling = TimestepSampling(distribution="logit_normal")

    def coefficients(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        return 1 - t, t

    def sample_t(self, rng: SampleRng) -> Float[Tensor, " b"]:
        return self.at(self.timesteps.draw(rng))

    def at(self, level: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (self.shift * level / (1 + (self.shift - 1) * level)).float()

    def noise_level(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return t

    def rungs(self, count: int) -> Float[Tensor, " n"]:
        return torch.arange(count + 1, dtype=torch.float64) / count


def add_noise(
    path: NoisePath, x_0: Float[Tensor, " b *rest"], eps: Float[Tensor, " b *rest"], t: Shaped[Tensor, " b"]
) -> Float[Tensor, " b *rest"]:
    """x_t = alpha_t x_0 + sigma_t eps."""
    alpha_t, sigma_t = path.coefficients(t)
    return broadcast(alpha_t, x_0) * x_0 + broadcast(sigma_t, x_0) * eps


def target(
    path: NoisePath,
    prediction: Prediction,
    x_0: Float[Tensor, " b *rest"],
    eps: Float[Tensor, " b *rest"],
    t: Shaped[Tensor, " b"],
) -> Float[Tensor, " b *rest"]:
    """What the native output should equal at (x_0, eps, t)."""
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x_0
    if prediction == "velocity":
        return eps - x_0
    alpha_t, sigma_t = path.coefficients(t)
    return broadcast(alpha_t, x_0) * eps - broadcast(sigma_t, x_0) * x_0


def to_x0_eps(
    path: NoisePath,
    prediction: Prediction,
    pred: Float[Tensor, " b *rest"],
    x_t: Float[Tensor, " b *rest"],
    t: Shaped[Tensor, " b"],
) -> tuple[Float[Tensor, " b *rest"], Float[Tensor, " b *rest"]]:
    """Clean sample and noise that a native prediction implies; together they give x_t back."""
    return implied(prediction, pred, x_t, *path.coefficients(t))


def implied(
    prediction: Prediction,
    pred: Float[Tensor, " b *rest"],
    x_t: Float[Tensor, " b *rest"],
    alpha_t: Float[Tensor, " b"],
    sigma_t: Float[Tensor, " b"],
) -> tuple[Float[Tensor, " b *rest"], Float[Tensor, " b *rest"]]:
    """The same at given coefficients, so also at the clean level, alpha = 1 and sigma = 0 (not from x_0)."""
    alpha_t, sigma_t = broadcast(alpha_t, x_t), broadcast(sigma_t, x_t)
    if prediction == "epsilon":
        return (x_t - sigma_t * pred) / alpha_t, pred
    if prediction == "sample":
        return pred, (x_t - alpha_t * pred) / sigma_t
    if prediction == "velocity":
        return x_t - sigma_t * pred, x_t + alpha_t * pred
    return alpha_t * x_t - sigma_t * pred, sigma_t * x_t + alpha_t * pred


def error_factor(
    path: NoisePath, prediction: Prediction, space: ErrorSpace, t: Shaped[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Squared error in `space` divided by the squared native error, at equal x_t.

    At fixed x_t an error in one parametrisation is a multiple of the error in another: squared, the eps-error is
    alpha_t^2 and the x_0-error sigma_t^2 times the v-error (DDPM and flow alike). For a network that predicts v this
    holds at pure noise too, where alpha_t = 0.

    Paper: Liu et al., "Improving Video Generation with Human Feedback", arXiv 2501.13918: beta_t = beta (1 - t)^2 of
    Flow-DPO is `space = "eps"` on a flow model.
    """
    alpha_t, sigma_t = path.coefficients(t)
    native = {"epsilon": "eps", "v_prediction": "v", "velocity": "v", "sample": "x0"}[prediction]
    if space in ("native", native):
        return torch.ones_like(alpha_t)
    from_v = {"eps": alpha_t**2, "v": torch.ones_like(alpha_t), "x0": sigma_t**2}
    return from_v[space] / from_v[native]


def broadcast(coefficient: Shaped[Tensor, " b"], like: Shaped[Tensor, " b *rest"]) -> Shaped[Tensor, " b *ones"]:
    """A coefficient per sample [B], shaped [B, 1, ...] to multiply `like`."""
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))
