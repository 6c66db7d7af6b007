"""Inversion: the noise that a model itself would draw an image from, found by walking its noise-free sampler backwards.

One move from level s up to level s': x' = alpha_s' x0_hat + sigma_s' eps_hat, with (x0_hat, eps_hat) what the model
predicts at (x, s). For a flow that is x + (s' - s) v. At the end tau = (x_t - alpha_t x_0) / sigma_t is the noise that
explains x_t. Every sample has a t of its own, so ladders differ in length: a rung runs only the samples still below
their t. No gradient, no guidance.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffalign import paths
from diffalign.errors import InputError
from diffalign.paths import DDPMPath, NoisePath, broadcast
from diffalign.rng import SampleRng
from diffalign.types import Cond, Denoiser

Mode = Literal["exact", "release"]

Noise = Callable[[Tensor, str], Tensor]
"""Standard normal noise like a tensor, by purpose: `SampleRng.normal`, or what joins several of them."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """How an image is inverted: levels, where the last one is, corrections, noise.

    `exact` stands on the clean image (alpha = 1, sigma = 0), then on T/n, 2T/n, ... below t, and lands on t itself.

    `release` repeats the released code of InPO (JaydenLyh/InPO, train.py, with its pinned diffusers 0.20): moves from
    -99, 1, 101, ... (n = 10; alpha_bar of a negative index is that of index 0) as long as they start below t. It ends
    at the first such level at or above t, or at the last one below, up to 99 away from t, and its first call tells the
    model a timestep of -99; x_t is then taken to be at t. The original used the first t for its whole batch; here each
    sample has its own.
    """

    levels: int = 10
    mode: Mode = "exact"
    eta: float | None = None
    """Noise after every move, in standard deviations of the DDIM posterior; None is the mode's own, 0 or 0.1."""
    renoise: bool = False
    """ReNoise: each move is made with the mean of the predictions before and after a first try of it."""

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise InputError(f"method.levels must be at least 1, got {self.levels}")
        if self.eta is not None and self.eta < 0:
            raise InputError(f"method.eta must be at least 0, got {self.eta}")
        if self.mode == "exact" and self.eta:
            raise InputError(
                f"method.eta must be left out in mode 'exact', whose x_t is the inverted one to the last digit, "
                f"got {self.eta}"
            )

    @property
    def noise_scale(self) -> float:
        """eta, with the mode's own where none is given."""
        return {"exact": 0.0, "release": 0.1}[self.mode] if self.eta is None else self.eta


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """What an inversion found."""

    x_t: Float[Tensor, " b *rest"]
    eps: Float[Tensor, " b *rest"]
    """tau: the noise that explains x_t, x_t = alpha_t x_0 + sigma_t tau."""
    forwards: Float[Tensor, " b"]
    """Calls of the model that each sample took."""


@dataclass(frozen=True)
class Level:
    """Where samples stand: what the model is told, and the coefficients."""

    t: Shaped[Tensor, " b"]
    alpha: Float[Tensor, " b"]
    sigma: Float[Tensor, " b"]


@dataclass(frozen=True)
class Move:
    """One rung: the samples that still climb, from where to where."""

    rows: Int[Tensor, " m"]
    source: Level
    goal: Level


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    x_0: Float[Tensor, " b *rest"],
    t: Shaped[Tensor, " b"],
    cond: Cond,
    ladder: Ladder | None = None,
    *,
    noise: Noise | None = None,
) -> Inversion:
    """Walks clean samples up to their t, each on its own ladder, in float32 or better.

    Args:
        denoiser: The model that is inverted, conditioned as in training; it must predict noise or velocity.
        t: On the CPU it costs no synchronisation.
        ladder: None is `Ladder()`.
        noise: Draws for a ladder with eta > 0.

    Raises:
        InputError: The model predicts clean samples; `release` on a flow; eta without `noise`.

    Paper: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 14, backwards; Garibi et al.,
    "ReNoise", arXiv 2403.14602, with one correction a move.
    """
    ladder = ladder or Ladder()
    if denoiser.prediction == "sample":
        raise InputError("model must predict epsilon, v or velocity to be inverted, got prediction_type 'sample'")
    if ladder.noise_scale > 0 and noise is None:
        raise InputError(f"noise must be given with eta {ladder.noise_scale}, got None")
    x = x_0.float() if x_0.dtype.itemsize < 4 else x_0
    calls = torch.zeros(len(x_0))
    for rung, move in enumerate(_moves(denoiser.path, t.cpu(), ladder)):
        rows = move.rows.to(x.device)
        moved = climb(denoiser, x[rows], cond.rows(rows), _on(move.source, x), _on(move.goal, x), ladder.renoise)
        if ladder.noise_scale > 0 and noise is not None:
            std = broadcast(ladder.noise_scale * posterior_std(move.source, move.goal), moved).to(x)
            moved = moved + std * noise(x, f"inversion_{rung}")[rows]
        x = x.index_copy(0, rows, moved.to(x.dtype))
        calls[move.rows] += 1 + ladder.renoise
    alpha_t, sigma_t = (broadcast(c, x).to(x) for c in denoiser.path.coefficients(t))
    return Inversion(x_t=x, eps=(x - alpha_t * x_0) / sigma_t, forwards=calls.to(x.device))


def climb(
    denoiser: Denoiser, x: Float[Tensor, " b *rest"], cond: Cond, source: Level, goal: Level, renoise: bool = False
) -> Float[Tensor, " b *rest"]:
    """One noise-free move between two levels, up or down; with `renoise` made anew with the mean of two predictions."""
    pred = denoiser(x, source.t, cond)
    moved = step(denoiser, pred, x, source, goal)
    if not renoise:
        return moved
    return step(denoiser, (pred + denoiser(moved, source.t, cond)) / 2, x, source, goal)


def step(
    denoiser: Denoiser, pred: Float[Tensor, " b *rest"], x: Float[Tensor, " b *rest"], source: Level, goal: Level
) -> Float[Tensor, " b *rest"]:
    """x' = alpha_s' x0_hat + sigma_s' eps_hat."""
    x_0, eps = paths.implied(denoiser.prediction, pred, x, source.alpha, source.sigma)
    return broadcast(goal.alpha, x) * x_0 + broadcast(goal.sigma, x) * eps


def clean_level(t: Shaped[Tensor, " b"]) -> Level:
    """The clean image itself, alpha = 1 and sigma = 0; the model is told the least t that it knows, 0."""
    one = torch.ones(t.shape, dtype=torch.float64)
    return Level(torch.zeros_like(t), one, torch.zeros_like(one))


def level_at(path: NoisePath, t: Shaped[Tensor, " b"]) -> Level:
    """The level at t."""
    return Level(t, *path.coefficients(t))


def posterior_std(low: Level, high: Level) -> Float[Tensor, " b"]:
    """Standard deviation of a DDPM sample at the lower level, given x_0 and the sample at the higher one."""
    return low.sigma / high.sigma * (1 - (high.alpha / low.alpha).square()).clamp(min=0).sqrt()


def draw_t(path: NoisePath, rng: SampleRng, ladder: Ladder) -> Shaped[Tensor, " b"]:
    """The path's own draw of t; in mode `exact` what falls below 1/n of the range (n at least 10) is moved up there.

    Nearer to the image tau is the same single prediction, and its division by sigma_t magnifies rounding up to 0 / 0.
    """
    t = path.sample_t(rng)
    if ladder.mode == "release":
        return t
    return torch.maximum(t, path.rungs(max(ladder.levels, 10))[1].to(t))


def _moves(path: NoisePath, t: Shaped[Tensor, " b"], ladder: Ladder) -> Iterator[Move]:
    return _exact(path, t, ladder.levels) if ladder.mode == "exact" else _release(path, t, ladder.levels)


def _exact(path: NoisePath, t: Shaped[Tensor, " b"], levels: int) -> Iterator[Move]:
    """From the clean image over the rungs below each t onto t."""
    rungs = path.rungs(levels).to(t)  # [n + 1], the last is the end of the range
    yield Move(torch.arange(len(t)), clean_level(t), level_at(path, torch.minimum(rungs[1], t)))
    for low, high in pairwise(rungs[1:]):
        rows = (low < t).nonzero().flatten()
        if len(rows) == 0:
            return
        yield Move(rows, level_at(path, low.expand(len(rows))), level_at(path, torch.minimum(high, t[rows])))


def _release(path: NoisePath, t: Shaped[Tensor, " b"], levels: int) -> Iterator[Move]:
    """From 1 - T/n over 1, 1 + T/n, ... as long as a rung lies below t; Stable Diffusion's `steps_offset` is the 1."""
    if not isinstance(path, DDPMPath):
        raise InputError("method.mode must be 'exact' on a flow, whose ladder the released code does not have")
    stride = len(path.alpha_bar) // levels
    if stride < 2:
        raise InputError(f"method.levels must be at most {len(path.alpha_bar) // 2} in mode 'release', got {levels}")
    for rung in range(levels):
        low = 1 + (rung - 1) * stride
        rows = (low < t).nonzero().flatten()
        if len(rows) == 0:
            return
        here = torch.full((len(rows),), low)
        source = Level(here, *path.coefficients(here.clamp(min=0)))
        yield Move(rows, source, level_at(path, here + stride))


def _on(level: Level, like: Tensor) -> Level:
    """The level on a tensor's device, coefficients in its type."""
    return Level(level.t.to(like.device), level.alpha.to(like), level.sigma.to(like))
