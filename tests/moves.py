"""Moves of toy rollouts, as an online method is given them."""

import torch
from torch import Tensor

from diffalign.sampling.kernels import kernel
from diffalign.sampling.rollout import initial_noise, rollout
from diffalign.sampling.schedule import make_schedule
from diffalign.sampling.walk import KernelWalk
from diffalign.types import Cond, Denoiser, TransitionBatch
from tests.toys import SHAPE, Toy, toy

SD_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SD3_CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
VP = ("ddim", "ddpm", "euler_ancestral")


def walk_of(name: str, steps: int = 5, **options) -> KernelWalk:
    """A walk by a kernel over the levels of Stable Diffusion 1.5 or 3."""
    schedule = make_schedule(name, SD_CONFIG if name in VP else SD3_CONFIG, steps)
    return KernelWalk(kernel=kernel(name, **options), schedule=schedule)


def toy_for(name: str, seed: int = 0) -> Toy:
    return toy("epsilon" if name in VP else "velocity", seed)


def moves(
    policy: Denoiser,
    walk: KernelWalk,
    steps: list[int] | None = None,
    *,
    size: int = 4,
    advantage: Tensor | None = None,
) -> TransitionBatch:
    """Some moves of `size` rollouts, one after the other; all with noise if none are named."""
    cond = Cond({"c": torch.arange(size * 3).reshape(size, 3) / 10})
    made = rollout(policy, walk.kernel, walk.schedule, cond, range(size), x_init=initial_noise(range(size), SHAPE))
    steps = list(made.steps) if steps is None else steps
    states = [made.states(i) for i in steps]
    step = torch.tensor(steps).repeat_interleave(size)
    x_t, x_s = (torch.cat(side) for side in zip(*states, strict=True))
    with torch.no_grad():  # a move at a time, as the rollout made them
        means = [
            walk.transition(policy, x, torch.full((size,), i), cond).mean
            for i, (x, _) in zip(steps, states, strict=True)
        ]
    return TransitionBatch(
        x_t=x_t,
        x_s=x_s,
        step=step,
        log_prob_old=torch.cat([made.log_prob[:, made.steps.index(i)] for i in steps]),
        advantage=torch.linspace(1, -1, size).repeat(len(steps)) if advantage is None else advantage,
        cond=cond.repeat(len(steps)),
        walk=walk,
        samples=tuple(range(len(step))),
        mean_old=torch.cat(means),
    )


def rows(batch: TransitionBatch, part: slice) -> TransitionBatch:
    """Some of the moves."""
    return TransitionBatch(
        **{
            k: getattr(batch, k)[part]
            for k in ("x_t", "x_s", "step", "log_prob_old", "advantage", "samples", "mean_old")
        },
        cond=batch.cond.rows(part),
        walk=batch.walk,
    )
