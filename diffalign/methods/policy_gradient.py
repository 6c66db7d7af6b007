"""Policy gradients on the moves of rollouts: the ratio to the sampling policy, what bounds it, the KL to a reference.

With l the log-prob of a move averaged over elements, l_old that of the policy that made it, rho = exp(l - l_old), A the
advantage of its image and eps a range: `clipped` max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), PPO's; `masked` -A rho,
but nothing where the policy is already far and would go further. `guarded_log_ratio` stands in for l - l_old and is
mean((x_s - mean_old) (mean - mean_old)) / std, without the bias -mean((mean - mean_old)^2) / (2 std^2) of l - l_old and
of one scale for all moves. At mean = mean_old every rho is 1, and every gradient -A times that of its log-ratio.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from diffalign.paths import NoisePath, Prediction
from diffalign.sampling.transitions import kl_divergence
from diffalign.types import Cond, Denoiser, Transition, TransitionBatch, Walk

KLForm = Literal["exact", "flow_grpo", "v_mse"]
"""Between two normal moves; that times the move's length, as Flow-GRPO's code has it; squared difference of native
predictions. All are averaged over elements."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The moves of a batch under a policy as it is now; log-probs carry its gradient."""

    transition: Transition
    log_prob: Float[Tensor, " b"]
    log_ratio: Float[Tensor, " b"]
    """log_prob - log_prob_old; averaged over elements."""


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What is minimised in place of minus the expected reward."""

    loss: Float[Tensor, " b"]
    ratio: Float[Tensor, " b"]
    """To the policy that made the moves."""
    outside: Bool[Tensor, " b"]
    """Beyond the range, or masked."""


def evaluated(policy: Denoiser, batch: TransitionBatch) -> Evaluated:
    """The batch's moves under `policy`, by the functions that the rollout called: on the policy that made them, at an
    equal batch shape, every log-ratio is exactly 0."""
    transition = batch.walk.transition(policy, batch.x_t, batch.step, batch.cond)
    log_prob = batch.walk.log_prob(transition, batch.x_s)
    return Evaluated(transition=transition, log_prob=log_prob, log_ratio=log_prob - batch.log_prob_old)


def clipped(log_ratio: Float[Tensor, " b"], advantage: Float[Tensor, " b"], clip_range: float) -> Surrogate:
    """PPO's loss: no gradient to a ratio that has already moved beyond the range in the direction of its advantage.

    The range is met by rho - 1, computed without cancellation: published ranges reach down to 2e-6, where rho itself
    has sixteen float32 numbers.

    Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, eq. 7.
    """
    beyond = torch.expm1(log_ratio)  # rho - 1
    loss = torch.maximum(-advantage * beyond, -advantage * beyond.clamp(-clip_range, clip_range)) - advantage
    return Surrogate(loss=loss, ratio=1 + beyond, outside=beyond.detach().abs() > clip_range)


def masked(
    log_ratio: Float[Tensor, " b"], advantage: Float[Tensor, " b"], kl_old: Float[Tensor, " b"], threshold: float
) -> Surrogate:
    """Minus advantage times ratio, but 0 where `kl_old` has reached the threshold and the update would go further.

    Args:
        kl_old: KL to the policy that made the moves, averaged over elements.

    Paper: "Flow-DPPO", arXiv 2606.11025; the projects verl-omni and UniRL.
    """
    ratio = log_ratio.exp()
    further = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    outside = (kl_old >= threshold) & further
    return Surrogate(loss=torch.where(outside, 0.0, -advantage * ratio), ratio=ratio, outside=outside)


def guarded_log_ratio(
    transition: Transition, mean_old: Float[Tensor, " b *rest"], x_s: Float[Tensor, " b *rest"]
) -> Float[Tensor, " b"]:
    """GRPO-Guard's log-ratio: (l - l_old + bias) std with bias = mean((mean - mean_old)^2) / (2 std^2).

    Over the noise its mean is 0 and its standard deviation the root mean square of mean - mean_old, over the root of
    the number of elements, whatever std is. Its gradient reaches the policy through the bias too.

    Paper: Wang et al., "GRPO-Guard", arXiv 2510.22319.
    Departs: computed as the mean of noise times mean - mean_old, which is the same without the cancellation, and does
        not depend on the form of the kernel's log-prob. The authors' code takes one std for a micro-batch, whose moves
        all have the same number; here every move has its own.
    """
    product = (x_s.detach() - mean_old) * (transition.mean - mean_old)
    return product.flatten(1).mean(1) / transition.std


def reference_kl(
    form: KLForm, p: Transition, q: Transition, batch: TransitionBatch, policy: Denoiser
) -> Float[Tensor, " b"]:
    """Distance of the policy's moves `p` from the reference's `q`, averaged over elements.

    A published weight belongs to one form: between exact and flow_grpo lies the move's length, about a twelfth.

    Paper: Liu et al., "Flow-GRPO", arXiv 2505.05470, whose text has `exact` and whose code `flow_grpo`.
    """
    if form == "v_mse":
        square = (p.mean - q.mean).square().flatten(1).mean(1)
        return square / slope(batch.walk, batch.step, policy).to(square).square()
    exact = kl_divergence(p, q)
    return exact if form == "exact" else exact * batch.walk.length(batch.step).to(exact)


def slope(walk: Walk, step: Int[Tensor, " b"], policy: Denoiser) -> Float[Tensor, " b"]:
    """What a move's mean gains by a unit of the native prediction; kernels are linear in it and in x_t."""
    unit = _Unit(path=policy.path, prediction=policy.prediction)
    return walk.transition(unit, torch.zeros(len(step), 1, 1, 1), step, Cond({})).mean.flatten()


def policy_metrics(now: Evaluated, found: Surrogate) -> dict[str, Float[Tensor, " b"]]:
    """What users of these methods watch, under their names; all are means over moves.

    `approx_kl` is half the squared log-ratio. `clipfrac` is the share of moves beyond the range, or masked, of which
    `clipfrac_gt_one` are likelier than they were. `log_prob_gap` must be 0 before the first update of a round.
    """
    gap, ratio, outside = now.log_ratio.detach(), found.ratio.detach(), found.outside
    return {
        "policy_loss": found.loss.detach(),
        "approx_kl": 0.5 * gap.square(),
        "ratio": ratio,
        "clipfrac": outside.to(ratio),
        "clipfrac_gt_one": (outside & (ratio > 1)).to(ratio),
        "clipfrac_lt_one": (outside & (ratio < 1)).to(ratio),
        "log_prob": now.log_prob.detach(),
        "log_prob_gap": gap.abs(),
    }


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A denoiser that predicts 1 everywhere."""

    path: NoisePath
    prediction: Prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        return torch.ones_like(x_t)
