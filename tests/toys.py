"""Toy denoisers for the mathematics: a small network on a real noise path, and one whose errors are set by hand."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import paths
from diffalign.methods import METHODS
from diffalign.paths import DDPMPath, FlowPath, NoisePath, Prediction, TimestepSampling
from diffalign.types import Cond, ImageBatch, PairBatch

SHAPE = (4, 4, 4)


def sd_alpha_bar(steps: int = 1000) -> Tensor:
    """Stable Diffusion's schedule: betas are squares of a line from sqrt(0.00085) to sqrt(0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def ddpm() -> DDPMPath:
    return DDPMPath(alpha_bar=sd_alpha_bar().float())


def flow(shift: float = 1.0) -> FlowPath:
    return FlowPath(shift=shift, timesteps=TimestepSampling(distribution="logit_normal"))


class Net(nn.Module):
    """A few channels of convolution that see x_t, t and the condition."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv2d(SHAPE[0] + 2, 16, 3, padding=1)
            self.last = nn.Conv2d(16, SHAPE[0], 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.last(self.hidden(x_t, t, c))

    def hidden(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        extra = torch.stack([t.to(x_t.dtype), c.mean(1)], dim=1)[..., None, None].expand(-1, -1, *x_t.shape[2:])
        return torch.tanh(self.first(torch.cat([x_t, extra], dim=1)))


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A denoiser around `Net`; with `scaled` t is brought to [0, 1] first."""

    net: Any
    path: NoisePath
    prediction: Prediction = "epsilon"

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(x_t, self.path.noise_level(t), cond["c"]).float()

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, *, mid: bool = False, blocks: int | None = None):
        """Two levels, the deeper one at half the size."""
        hidden = self.net.hidden(x_t, self.path.noise_level(t), cond["c"])
        return [hidden, nn.functional.avg_pool2d(hidden, 2)]


def toy(prediction: Prediction = "epsilon", seed: int = 0) -> Toy:
    """A toy denoiser on the path that belongs to its prediction."""
    return Toy(net=Net(seed), path=flow() if prediction == "velocity" else ddpm(), prediction=prediction)


def pairs(size: int = 4, seed: int = 0, first: int = 0) -> PairBatch:
    rng = torch.Generator().manual_seed(seed)
    return PairBatch(
        x_w=torch.randn(size, *SHAPE, generator=rng),
        x_l=torch.randn(size, *SHAPE, generator=rng),
        cond=Cond({"c": torch.randn(size, 3, generator=rng)}),
        samples=tuple(range(first, first + size)),
        score_w=0.2 + 0.05 * torch.rand(size, generator=rng),
        score_l=0.15 + 0.05 * torch.rand(size, generator=rng),
    )


def images(size: int = 4, seed: int = 0) -> ImageBatch:
    """Single images, good and bad by turns."""
    batch = pairs(size, seed)
    label = 1.0 - 2.0 * (torch.arange(size) % 2)
    return ImageBatch(x_0=batch.x_w, cond=batch.cond, samples=batch.samples, label=label)


def swapped(batch: PairBatch) -> PairBatch:
    return replace(batch, x_w=batch.x_l, x_l=batch.x_w, score_w=batch.score_l, score_l=batch.score_w)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A denoiser whose squared errors are what the test says: the true target off by sqrt(error).

    It is told the clean latents, so it knows the target; `errors` has one entry per row of the joined batch.
    """

    x_0: Tensor
    errors: Tensor
    path: NoisePath
    prediction: Prediction = "epsilon"

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha_t, sigma_t = (paths.broadcast(c, x_t) for c in self.path.coefficients(t))
        eps = (x_t - alpha_t * self.x_0) / sigma_t
        true = paths.target(self.path, self.prediction, self.x_0, eps, t)
        return true + paths.broadcast(self.errors.sqrt(), x_t)


ON_DATA = [name for name, cls in METHODS.items() if cls().needs.data != "prompts"]
"""Methods that train on images of the data."""
