"""Flow-GRPO: a group of images per prompt, each better or worse than the others; PPO's loss and a KL to a reference.

The same loss on other walks is other papers: with the kernel `dance` and kl = 0 it is DanceGRPO, on a few consecutive
moves (`online.window`) with noise alone MixGRPO and Flow-GRPO-Fast, on `ddim` moves GRPO for U-Nets.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.advantages import Combine, Recipe
from diffalign.errors import InputError
from diffalign.methods.policy_gradient import (
    Evaluated,
    KLForm,
    Surrogate,
    clipped,
    evaluated,
    guarded_log_ratio,
    masked,
    policy_metrics,
    reference_kl,
)
from diffalign.methods.selection import penalised, select_by_advantage
from diffalign.rng import SampleRng
from diffalign.sampling.transitions import kl_divergence
from diffalign.types import ALONE, Denoiser, Needs, Scored, Selection, Shared, StepLoss, Transition, TransitionBatch

Trust = Literal["clip", "guard", "mask"]
"""PPO's clip; the clip on GRPO-Guard's ratio; Flow-DPPO's mask."""
StepWeight = Literal["none", "longcat", "tempflow"]
Relative = Literal["group", "global_std", "unbiased", "max_std", "win_rate"]

_RANGES: dict[Trust, float] = {"clip": 1e-4, "guard": 2e-6, "mask": 1e-5}


@dataclass(frozen=True, kw_only=True)
class FlowGRPO:
    """Group-relative policy optimization on moves with noise: loss = max(-A rho, -A clip(rho, 1 +- eps)) + kl KL.

    Paper: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", arXiv 2505.05470; yifan123/flow_grpo.
    Departs: the KL has the paper's total variance by default, where the code has that of a step of length 1;
    `kl_form = "flow_grpo"` is the code's. Several rewards have their advantages added, as in MixGRPO, where the code
    adds scores. Gradient flows through both branches of guidance, where its first version detached one. Prompts
    without any difference are left out and counted, and none is drawn again in their place.
    """

    kl: float = 0.04
    """Weight of the KL to the reference; 0 needs none. Published for the code's form: 0.04 GenEval and OCR, 0.02
    CLIPScore, 0.01 PickScore, 0 for FLUX and windows. With `exact` the same number holds about twelve times harder;
    LongCat has 3e-4 there."""
    kl_form: KLForm = "exact"
    """What the KL is, see `KLForm`; `flow_grpo` on flows alone."""
    trust: Trust = "clip"
    """What keeps a move near the policy that made it: PPO's clip of the ratio; `guard` (GRPO-Guard, flows alone), the
    clip of a ratio without bias and of one scale, divided by the move's length, so that all moves count alike; or
    `mask` (Flow-DPPO), which drops moves whose KL has reached the range and would grow."""
    clip_range: float | None = None
    """The range of `trust`. None is what was published with it: 1e-4 (Wan and LongCat 1e-3, windows of CPS moves in
    their own log-prob 1e-5), guard 2e-6, mask 1e-5."""
    step_weight: StepWeight = "none"
    """Of a move's loss: `longcat` sqrt(sigma / (1 - sigma)) / sqrt(length), and its square on the KL (flows alone);
    `tempflow` the move's std over its mean over the walk's moves with noise, a scale that its paper does not tell."""
    advantage: Relative = "global_std"
    """What scores are measured against: all are the group's mean and differ in the spread, see `advantages`."""
    combine: Combine = "advantages"
    """Several rewards: their advantages are added by weight, or their scores."""
    clip_advantage: float = 5.0
    """Advantages are cut to plus and minus this."""
    extremes: int | None = None
    """Of every group this many best and as many worst images are trained on; None is all."""
    kl_reward: float = 0.0
    """Weight of the KL inside the reward: every score loses this many times the sum over its image's moves of
    log_prob - log_prob_ref, as they were sampled, whose mean is the KL of the walk. Off in the authors' recipes."""

    def __post_init__(self) -> None:
        if self.kl < 0:
            raise InputError(f"method.kl must be at least 0, got {self.kl}")
        if self.clip_range is not None and not self.clip_range > 0:
            raise InputError(f"method.clip_range must be positive, got {self.clip_range}")
        if self.trust == "guard" and self.step_weight != "none":
            raise InputError(
                f"method.step_weight must be 'none' with trust = 'guard', got {self.step_weight!r}; that has its own "
                "weight of moves"
            )
        if not 0 <= self.kl_reward < math.inf:
            raise InputError(f"method.kl_reward must be at least 0, got {self.kl_reward}")
        if self.kl_reward > 0 and self.advantage == "win_rate":
            raise InputError(
                "method.kl_reward must be 0 with advantage = 'win_rate', which knows no sizes of scores, got "
                f"{self.kl_reward}"
            )
        _ = self.recipe  # its own checks

    @property
    def recipe(self) -> Recipe:
        """How scores become advantages."""
        return Recipe(
            advantage=self.advantage,
            combine=self.combine,
            clip_advantage=self.clip_advantage,
            extremes=self.extremes,
        )

    @property
    def needs(self) -> Needs:
        return Needs(
            data="prompts",
            items="transitions",
            references=("start", "ema") if self.kl > 0 or self.kl_reward > 0 else ("none",),
            group_at_least=self.recipe.group_at_least,
            mean_old=self.trust != "clip",
            log_ratio=self.kl_reward > 0,
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        return select_by_advantage(scored if self.kl_reward == 0 else penalised(scored, self.kl_reward), self.recipe)

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser | None,
        batch: TransitionBatch,
        rng: SampleRng,
        shared: Shared = ALONE,
    ) -> StepLoss:
        self._check_kind(policy)
        now = evaluated(policy, batch)
        found = self._surrogate(now, batch)
        weight = self._weight(batch).to(found.loss)
        loss = weight * found.loss
        metrics = policy_metrics(now, found)
        if self.kl > 0:
            assert reference is not None, "needs has one"
            with torch.no_grad():
                start = batch.walk.transition(reference, batch.x_t, batch.step, batch.cond)
            kl = reference_kl(self.kl_form, now.transition, start, batch, policy)
            loss = loss + self.kl * (weight.square() if self.step_weight == "longcat" else 1.0) * kl
            metrics["kl_loss"] = kl.detach()
        return StepLoss(loss=loss, metrics=metrics, noise_level=batch.walk.noise_level(batch.step))

    def _surrogate(self, now: Evaluated, batch: TransitionBatch) -> Surrogate:
        """Of the moves, before their weights."""
        reach = _RANGES[self.trust] if self.clip_range is None else self.clip_range
        if self.trust == "clip":
            return clipped(now.log_ratio, batch.advantage, reach)
        if batch.mean_old is None:
            raise ValueError(f"batch.mean_old must be given with trust = {self.trust!r}, got None")
        if self.trust == "guard":
            return clipped(guarded_log_ratio(now.transition, batch.mean_old, batch.x_s), batch.advantage, reach)
        old = Transition(batch.mean_old, now.transition.std, now.transition.table)
        kl_old = kl_divergence(now.transition, old).detach()
        return masked(now.log_ratio, batch.advantage, kl_old, reach)

    def _weight(self, batch: TransitionBatch) -> Float[Tensor, " b"]:
        """Of each move's policy loss."""
        length = batch.walk.length(batch.step)
        if self.trust == "guard":
            return 1 / length
        if self.step_weight == "longcat":
            return (batch.walk.odds(batch.step) / length).sqrt()
        if self.step_weight == "tempflow":
            stds = batch.walk.stds
            return stds[batch.step] / stds[stds > 0].mean()
        return torch.ones_like(length)

    def _check_kind(self, policy: Denoiser) -> None:
        """Options whose formulas are of velocities."""
        chosen = {"kl_form": self.kl_form, "trust": self.trust, "step_weight": self.step_weight}
        wrong = {key: value for key, value in chosen.items() if value in ("flow_grpo", "guard", "longcat")}
        if wrong and policy.prediction != "velocity":
            key, value = next(iter(wrong.items()))
            raise InputError(
                f"method.{key} must fit a model that predicts {policy.prediction!r}, got {value!r}, which is for flows"
            )
