"""How far an arm went from its base: images from the same noise, and errors on real images.

Methods should be compared at equal drift: a method that moves further wins more and breaks more.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses, paths
from diffalign.rewards.lpips import PerceptualDistance
from diffalign.rng import SampleRng
from diffalign.types import Cond, Denoiser

LEVELS = tuple(i / 10 for i in range(1, 10))
"""Shares of the noise range at which errors are measured."""


def same_seed_cosine(arm: Float[Tensor, "n d"], base: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of each image's embedding with that of the base's image from the same noise; rows are unit rows."""
    return (arm.double() * base.double()).sum(1)


def pixel_distance(arm: Float[Tensor, "b 3 h w"], base: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Mean absolute difference of pixels, in shares of the range."""
    return (arm - base).abs().flatten(1).mean(1)


@torch.no_grad()
def same_seed_distance(
    arm: Float[Tensor, "b 3 h w"], base: Float[Tensor, "b 3 h w"], distance: PerceptualDistance
) -> Float[Tensor, " b"]:
    """Perceptual distance of each image from the base's image from the same noise."""
    return distance.between(distance.features(arm), distance.features(base)).cpu()


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    cond: Cond,
    *,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> Float[np.ndarray, "n l"]:
    """Squared error of the native prediction for each clean latent at each noise level, averaged over elements.

    Args:
        denoiser: On the device of the latents; two models see the same noise for the same seed.
        x_0: Latents of real images that training never saw.
        levels: Shares of the noise range, in [0, 1).
    """
    columns = []
    for number, level in enumerate(levels):
        rng = SampleRng(seed, tuple(number * len(x_0) + row for row in range(len(x_0))))
        eps = rng.normal(x_0, "prior damage")
        t = denoiser.path.at(torch.full((len(x_0),), level, dtype=torch.float64)).to(x_0.device)
        target = paths.target(denoiser.path, denoiser.prediction, x_0, eps, t)
        pred = denoiser(paths.add_noise(denoiser.path, x_0, eps, t), t, cond)
        columns.append(losses.squared_error(pred, target).double().cpu())
    return torch.stack(columns, dim=1).numpy()
