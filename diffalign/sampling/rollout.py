"""The one sampling loop: from x_init down a schedule by a kernel, with exact log-probs of what it did.

Noise belongs to an image: x_init and the noise of every move come from (its seed, the move's number), on the CPU, in
float32, so that an image does not depend on the batch that it was made in. Training computes log-probs again with the
functions of transitions.py that the loop calls. On an unchanged policy, at an equal batch shape, the ratio is exactly
1. Another batch shape changes rounding inside the network: log-probs of the tiny models then moved by up to 4e-7 in
float32 and 1.3e-3 in bfloat16 (bounds in tests: 1e-5 and 2e-3), against clip ranges of 1e-6 to 1e-3. So where shapes
differ old log-probs are computed again, with `log_probs`, before the first update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError, RunError
from diffalign.progress import Advancing
from diffalign.rng import generator
from diffalign.sampling.kernels import Kernel, ode
from diffalign.sampling.schedule import Schedule
from diffalign.sampling.solvers import Before, dpmpp_2m
from diffalign.sampling.transitions import predict, transition
from diffalign.types import Cond, Denoiser, Trajectory


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What a rollout keeps of its way."""

    levels: Literal["noisy", "all"] = "noisy"
    """States that moves with noise leave and reach, which is what training needs; or every state."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of kept states. float16 halves memory: kept states are rounded, to 11 bits, before the walk goes on from them,
    so that their log-probs are those of the rounded states and can be computed again from what was kept."""
    x_0_hat: bool = False
    """The clean latents that the network implied at every move."""


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
    """Standard normal x_init, float32 on the CPU; equal seeds share it."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "x_init")) for seed in seeds])


def draw_window(size: int, low: int, high: int, *, seed: int, place: Sequence[int | str]) -> range:
    """`size` consecutive moves within [low, high), their start uniform, from (seed, place).

    One window serves all samples of a prompt: draw it by round, or by round and prompt, and never by image.

    Raises:
        InputError: The window does not fit.

    Paper: Li et al., "MixGRPO", arXiv 2507.21802 (random strategy); Flow-GRPO-Fast of yifan123/flow_grpo.
    """
    if not 1 <= size <= high - low or low < 0:
        raise InputError(f"window must have a size in [1, {high - low}] within [{low}, {high}), got {size}")
    start = low + int(torch.randint(high - low - size + 1, (), generator=generator(seed, *place, "window")))
    return range(start, start + size)


def noisy_steps(kernel: Kernel, schedule: Schedule, window: range | None = None) -> tuple[int, ...]:
    """Numbers of the moves that a rollout makes with noise: the window's, or all that the kernel has noise for.

    Raises:
        InputError: A window outside the schedule, or with a move that has no noise.
    """
    noisy = (kernel.stds(schedule) > 0).tolist()
    if window is None:
        return tuple(i for i, some in enumerate(noisy) if some)
    wrong = [i for i in window if not 0 <= i < len(noisy)]
    if wrong or window.step != 1 or not window:
        raise InputError(f"window must be consecutive moves within [0, {len(noisy)}), got {window}")
    still = [i for i in window if not noisy[i]]
    if still:
        raise InputError(
            f"window must hold moves with noise, got {window}, where {kernel.name!r} has none at {still}; raise "
            "eta, or leave the last move out"
        )
    return tuple(window)


def check_solver(kernel: Kernel, moves: int, noisy: int) -> None:
    """Raises InputError for a second order where fewer than two moves are without noise."""
    if kernel.solver_order > 1 and moves - noisy < 2:
        raise InputError(
            f"kernel.solver_order must be 1 where fewer than 2 moves are without noise, got {kernel.solver_order} with "
            f"noise on {noisy} of {moves} by {kernel.name!r}; take the kernel 'ode', or a window"
        )


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    kernel: Kernel,
    schedule: Schedule,
    cond: Cond,
    seeds: Sequence[int],
    *,
    x_init: Float[Tensor, "b c h w"],
    variance_noise: Float[Tensor, "_b _n _c _h _w"] | None = None,
    window: range | None = None,
    keep: Keep | None = None,
    shown: Advancing | None = None,
) -> Trajectory:
    """Samples of a model and the way to them; without gradient, and under the caller's autocast.

    Args:
        denoiser: A `Guided` one for guidance.
        seeds: Of every image, for the noise of its moves; images of a group differ in it.
        x_init: Standard normal, on the model's device; `initial_noise`, or the same noise for a whole group.
        variance_noise: Standard normal, for every move of the schedule, in place of that from the seeds.
        window: Moves with noise; outside it the walk is the noise-free one. None is wherever the kernel has noise.
        shown: A bar to advance by each move.

    Raises:
        InputError: A window that cannot be, or noise of another shape.
        RunError: An image is not finite.
    """
    keep = keep or Keep()
    if not len(seeds) == len(x_init) == len(next(iter(cond.tensors.values()))):
        raise ValueError(f"seeds, x_init and cond must be of one length, got {len(seeds)} and {len(x_init)}")
    _check_noise(variance_noise, (len(x_init), len(schedule), *x_init.shape[1:]))
    noisy = noisy_steps(kernel, schedule, window)
    check_solver(kernel, len(schedule), len(noisy))
    kept = _kept_levels(noisy, len(schedule), keep)
    x = _stored(schedule.start_std * x_init.float(), 0 in kept, keep)
    states, log_prob, x_0_hat = ([x] if 0 in kept else []), [], []
    before: Before | None = None
    for i in range(len(schedule)):
        step = schedule.step(torch.full((len(x),), i))
        pred = predict(denoiser, x, step, cond)
        if keep.x_0_hat:
            x_0_hat.append(step.implied(pred, x)[0])
        if i in noisy:
            move, before = kernel(pred, x, step), None
            x = _stored(move.sample(_step_noise(seeds, i, x, variance_noise)), i + 1 in kept, keep)
            log_prob.append(kernel.log_prob(move, x))
        elif kernel.solver_order == 1:
            x = _stored(ode(pred, x, step).mean, i + 1 in kept, keep)
        else:
            x_0 = step.implied(pred, x)[0]
            x_s, before = dpmpp_2m(x_0, x, step, before), Before(x_0, step)
            x = _stored(x_s, i + 1 in kept, keep)
        if i + 1 in kept:
            states.append(x)
        if shown is not None:
            shown.advance()
    _check_finite(x, seeds)
    return Trajectory(
        x=torch.stack(states, dim=1).to(_DTYPES[keep.dtype]),
        t=schedule.levels[kept.start : kept.stop],
        log_prob=torch.stack(log_prob, dim=1) if log_prob else x.new_zeros(len(x), 0),
        steps=noisy,
        cond=cond,
        x_0=x,
        seeds=tuple(seeds),
        first=kept.start,
        x_0_hat=torch.stack(x_0_hat, dim=1) if x_0_hat else None,
    )


def log_probs(denoiser: Denoiser, kernel: Kernel, schedule: Schedule, trajectory: Trajectory) -> Float[Tensor, "b n"]:
    """Log-probs of a trajectory's moves with noise under a model, one call of it a move; with gradient if enabled."""
    rows = []
    for i in trajectory.steps:
        x_t, x_s = trajectory.states(i)
        step = schedule.step(torch.full((len(x_t),), i))
        rows.append(kernel.log_prob(transition(denoiser, kernel, x_t, step, trajectory.cond), x_s))
    return torch.stack(rows, dim=1) if rows else trajectory.log_prob.new_zeros(len(trajectory), 0)


_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def _kept_levels(noisy: tuple[int, ...], moves: int, keep: Keep) -> range:
    """Numbers of the levels that are kept; without any noise only the last."""
    if keep.levels == "all":
        return range(moves + 1)
    return range(noisy[0], noisy[-1] + 2) if noisy else range(moves, moves + 1)


def _stored(x: Float[Tensor, "b c h w"], kept: bool, keep: Keep) -> Float[Tensor, "b c h w"]:
    """A state as it will be read again."""
    return x.to(_DTYPES[keep.dtype]).float() if kept else x


def _step_noise(
    seeds: Sequence[int], step: int, like: Float[Tensor, "b c h w"], given: Tensor | None
) -> Float[Tensor, "b c h w"]:
    if given is not None:
        return given[:, step].to(like)
    rows = [torch.randn(like.shape[1:], generator=generator(seed, "step", step)) for seed in seeds]
    return torch.stack(rows).to(like.device)


def _check_noise(given: Tensor | None, shape: tuple[int, ...]) -> None:
    if given is not None and given.shape != shape:
        raise InputError(f"variance_noise must have shape {shape}, with noise for each move, got {tuple(given.shape)}")


def _check_finite(x: Float[Tensor, "b c h w"], seeds: Sequence[int]) -> None:
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise RunError(f"latents of a rollout must be finite, got others for seeds {[seeds[i] for i in bad]}")
