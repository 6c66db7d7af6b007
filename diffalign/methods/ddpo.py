"""DDPO: denoising as a chain of decisions with one reward at its end; PPO's loss on every move, and no reference."""

from dataclasses import dataclass

import torch

from diffalign.advantages import Combine, Recipe, Scheme
from diffalign.errors import InputError
from diffalign.methods.policy_gradient import clipped, evaluated, policy_metrics
from diffalign.methods.selection import select_by_advantage
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, Scored, Selection, Shared, StepLoss, TransitionBatch


@dataclass(frozen=True, kw_only=True)
class DDPO:
    """Denoising diffusion policy optimization: loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) on every move.

    The score of an image is measured against those of its prompt in this round and in earlier ones, so that a prompt
    needs no group of images. Nothing holds the policy to where it started: watch held-out rewards and diversity.

    Paper: Black et al., "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301 (DDPO-IS);
    kvablack/ddpo-pytorch.
    Departs: log-probs are averaged over elements, as in the authors' code, where the paper writes their sum. Prompts
    in which no image has an advantage are left out and counted.
    """

    clip_range: float = 1e-4
    """eps, on ratios of log-probs that are averaged over elements: with D of these, D times as many nats."""
    advantage: Scheme = "per_prompt"
    """What scores are measured against; `batch` is the release without tracking of prompts."""
    combine: Combine = "advantages"
    """Several rewards: their advantages are added by weight, or their scores; the release has one reward."""
    clip_advantage: float = 5.0
    """Advantages are cut to plus and minus this."""
    buffer_size: int | None = None
    """Scores that a prompt is measured against with `per_prompt`, the round's among them; None is 16, 32 is the
    release's for aesthetic score and prompt alignment."""
    min_count: int | None = None
    """Scores of a prompt below which it is measured against the round with `per_prompt`; None is 16."""

    def __post_init__(self) -> None:
        if not self.clip_range > 0:
            raise InputError(f"method.clip_range must be positive, got {self.clip_range}")
        _ = self.recipe  # its own checks

    @property
    def recipe(self) -> Recipe:
        """How scores become advantages."""
        return Recipe(
            advantage=self.advantage,
            combine=self.combine,
            clip_advantage=self.clip_advantage,
            buffer_size=self.buffer_size,
            min_count=self.min_count,
        )

    @property
    def needs(self) -> Needs:
        least = self.recipe.group_at_least
        return Needs(data="prompts", items="transitions", references=("none",), group_at_least=least)

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        return select_by_advantage(scored, self.recipe)

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser | None,
        batch: TransitionBatch,
        rng: SampleRng,
        shared: Shared = ALONE,
    ) -> StepLoss:
        now = evaluated(policy, batch)
        found = clipped(now.log_ratio, batch.advantage, self.clip_range)
        return StepLoss(
            loss=found.loss, metrics=policy_metrics(now, found), noise_level=batch.walk.noise_level(batch.step)
        )
