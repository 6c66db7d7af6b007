"""One move x_t -> x_s as a distribution, p(x_s | x_t) = N(mean, std^2): its log-probability, its KL divergence.

Below it the posterior of a DDPM path, q(x_s | x_t, x_0), s < t. With abar_t = alpha_t^2, alpha = abar_t / abar_s and
beta = 1 - alpha: mean = sqrt(abar_s) beta / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_s) / (1 - abar_t) x_t,
std^2 = (1 - abar_s) / (1 - abar_t) beta.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import InputError
from diffalign.paths import DDPMPath, broadcast
from diffalign.sampling.schedule import Step
from diffalign.types import Cond, Denoiser, Transition

LEAST_VARIANCE = 1e-20

Reduction = Literal["mean", "sum"]
"""Over the elements of a sample. The sum is the true log-density; the mean is what published clip ranges are for."""

Form = Literal["normal", "scaled_sq"]
"""The normal density; or minus the square of x_s - mean, without 1 / (2 std^2) and constants, as CPS was published."""


Move = Callable[[Tensor, Tensor, Step], Transition]
"""(native prediction, x_t, step) -> where x_s may lie; kernels.py has them."""


def predict(denoiser: Denoiser, x_t: Float[Tensor, "b c h w"], step: Step, cond: Cond) -> Float[Tensor, "b c h w"]:
    """Native prediction at x_t, in float32."""
    return denoiser(step.seen(x_t), step.t.to(x_t.device), cond)


def transition(denoiser: Denoiser, move: Move, x_t: Float[Tensor, "b c h w"], step: Step, cond: Cond) -> Transition:
    """Where a model goes from x_t: one function for rollout, policy and reference."""
    return move(predict(denoiser, x_t, step, cond), x_t, step)


def log_prob(
    transition: Transition,
    x_s: Float[Tensor, " b *rest"],
    *,
    reduction: Reduction = "mean",
    form: Form = "normal",
) -> Float[Tensor, " b"]:
    """log p(x_s | x_t) per sample, in float32; gradient through the mean alone.

    Args:
        reduction: With D elements the sum is D times the mean, so that a clip range of 1e-4 on the mean is one of
            1e-4 D nats on the sum.

    Raises:
        InputError: A transition without noise, which has no density.

    Departs: Black et al. (DDPO, arXiv 2305.13301) and those after them write the sum and compute the mean; the default
        is the mean. Constants are kept, which some code loses to a line break; they cancel in a ratio.
    """
    _check_noise(transition)
    square = (x_s.detach() - transition.mean).square().flatten(1)
    if form == "normal":
        std = transition.std[:, None]
        square = square / (2 * std.square()) + std.log() + 0.5 * math.log(2 * math.pi)
    return -(square.mean(1) if reduction == "mean" else square.sum(1))


def kl_divergence(p: Transition, q: Transition, *, reduction: Reduction = "mean") -> Float[Tensor, " b"]:
    """KL(p : q) per sample for two transitions of one kernel and step: (mean_p - mean_q)^2 / (2 std^2).

    Times `step.length` it is the term of Flow-GRPO's code, whose weights (0.04, 0.01) belong to that form.

    Raises:
        InputError: A transition without noise.
        ValueError: The standard deviations differ, so that these are not two transitions of one step.

    Departs: Liu et al. (Flow-GRPO, arXiv 2505.05470) divide by the total variance, as here; their code divides by that
        of a step of length 1.
    """
    _check_noise(p)
    told = (p.std, q.std) if p.table is None or q.table is None else (p.table, q.table)
    if not torch.equal(*told):
        raise ValueError(f"q.std must be that of p, got {q.std.tolist()} against {p.std.tolist()}")
    square = (p.mean - q.mean).square().flatten(1) / (2 * p.std[:, None].square())
    return square.mean(1) if reduction == "mean" else square.sum(1)


def _check_noise(transition: Transition) -> None:
    told = transition.std if transition.table is None else transition.table
    still = (told <= 0).nonzero().flatten().tolist()
    if still:
        raise InputError(
            f"eta must be positive where a log-prob is asked for, got a move without noise for samples {still} of "
            f"{len(transition.std)}; leave deterministic moves out"
        )


@dataclass(frozen=True)
class Posterior:
    """Coefficients of q(x_s | x_t, x_0): mean = of_x_0 x_0 + of_x_t x_t."""

    of_x_0: Float[Tensor, " b"]
    of_x_t: Float[Tensor, " b"]
    variance: Float[Tensor, " b"]
    """At least 1e-20."""
    beta: Float[Tensor, " b"]
    """Variance of the forward step from s to t."""


def posterior(bar_t: Float[Tensor, " b"], bar_s: Float[Tensor, " b"]) -> Posterior:
    """The posterior between two levels of a DDPM path, by their alpha_bar."""
    alpha = bar_t / bar_s
    return Posterior(
        of_x_0=bar_s.sqrt() * (1 - alpha) / (1 - bar_t),
        of_x_t=alpha.sqrt() * (1 - bar_s) / (1 - bar_t),
        variance=((1 - bar_s) / (1 - bar_t) * (1 - alpha)).clamp(min=LEAST_VARIANCE),
        beta=1 - alpha,
    )


def ddpm_posterior(
    path: DDPMPath,
    x_t: Float[Tensor, " b *rest"],
    x_0: Float[Tensor, " b *rest"],
    t: Int[Tensor, " b"],
    s: Int[Tensor, " b"],
) -> tuple[Float[Tensor, " b *rest"], Float[Tensor, " b"]]:
    """Mean and standard deviation of x_s, given x_t and the clean latents.

    The variance is at least 1e-20. At s = t it is that, and the mean is x_t whatever x_0 is.

    Paper: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 6 and 7, with one step from t to
        s in place of the schedule's.
    """
    bars = path.alpha_bar.to(t.device)
    q = posterior(bars[t], bars[s])
    return broadcast(q.of_x_0, x_0) * x_0 + broadcast(q.of_x_t, x_t) * x_t, q.variance.sqrt()


def ddpm_step(
    path: DDPMPath,
    x_t: Float[Tensor, " b *rest"],
    x_0: Float[Tensor, " b *rest"],
    t: Int[Tensor, " b"],
    s: Int[Tensor, " b"],
    variance_noise: Float[Tensor, " b *rest"],
) -> Float[Tensor, " b *rest"]:
    """x_s from x_t, clean latents as predicted, and the noise of the step.

    Two predictions of the noise at one `variance_noise` end c_t = beta / (sqrt(alpha) sqrt(1 - abar_t)) times their
    difference apart, with the opposite sign; at s = t they end at the same place.
    """
    mean, std = ddpm_posterior(path, x_t, x_0, t, s)
    return mean + broadcast(std, x_t) * variance_noise
