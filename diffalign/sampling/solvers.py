"""Moves without noise of second order: DPM-Solver++(2M), which looks back at one move; `kernels.ode` is the first."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.paths import broadcast
from diffalign.sampling.schedule import Step

Samples = Float[Tensor, " b *rest"]


@dataclass(frozen=True)
class Before:
    """The move before, which ended where this one starts."""

    x_0: Samples
    """What the network implied there."""
    step: Step


def dpmpp_2m(x_0: Samples, x_t: Samples, step: Step, before: Before | None) -> Samples:
    """x_s from x_t and the clean latents that the network implies at it, extrapolated from those of the move before.

    With lambda = log(alpha / sigma) and h = lambda_s - lambda_t: D = x_0 + h / (2 h_before) (x_0 - x_0_before) and
    x_s = sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D. Of first order, D = x_0: a move with none before it, one to
    the clean level, whose h is infinite, and one after a move from pure noise, whose h was.

    Paper: Lu et al., "DPM-Solver++", arXiv 2211.01095, algorithm 2.
    """
    if before is not None:
        share = _extrapolated(step, before.step)
        x_0 = x_0 + broadcast(share, x_t).to(x_t) * (x_0 - before.x_0)
    kept = step.sigma_s / step.sigma_t
    of_x_0 = step.alpha_s - kept * step.alpha_t
    return broadcast(kept, x_t).to(x_t) * x_t + broadcast(of_x_0, x_t).to(x_t) * x_0


def _extrapolated(step: Step, before: Step) -> Float[Tensor, " b"]:
    """h / (2 h_before), and 0 where either is infinite."""
    h, h_before = _gained(step), _gained(before)
    return torch.where(h.isfinite(), h / (2 * h_before), 0.0)


def _gained(step: Step) -> Float[Tensor, " b"]:
    """By how much a move raises log(alpha / sigma)."""
    return (step.alpha_s * step.sigma_t / (step.sigma_s * step.alpha_t)).log()
