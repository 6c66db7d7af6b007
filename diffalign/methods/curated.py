"""Curated retraining: of a prompt's own images one is kept, the likelier the better it is, and trained on as data are.

    p(kept = k) = exp(r_k / T) / sum_j exp(r_j / T)

over K images. Round by round that goes towards p_t H / E[H] with H = K e^r / (e^r + sum of K - 1 others' e^r), for many
images towards p_t e^r; the mean of e^r never falls.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.errors import InputError
from diffalign.methods.pairing import check_scores, with_company, zero_spread
from diffalign.methods.sft import SFT
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, Scored, Selection, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class Curated:
    """Retraining on own images that a choice by reward has kept; best-of-K fine-tuning at temperature 0.

    Prompts whose images are all alike keep one too, as the choice says; a round that has no other prompts is left out.

    Paper: Ferbach et al., "Self-Consuming Generative Models with Curated Data Provably Optimize Human Preferences",
    arXiv 2407.09499.
    Departs: real images are left out unless `real_share` asks for them. Without them the loop closes in on images of
    the highest reward: watch diversity, and take few rounds.
    """

    temperature: float = 0.2
    """T that scores are divided by; 0 keeps the best. The paper's runs multiply a score in [0, 1] by 5."""
    real_share: float = 0.0
    """Share of the samples that are images of the data, 1 / (1 + lambda) in the paper, with which the loop has a stable
    end; prompts are then those of the data too. 1 is fine-tuning on the data alone."""
    error_space: ErrorSpace = "native"
    """Between which predictions the error is; `native` is what the network predicts, at constant weight."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"method.temperature must be at least 0, got {self.temperature}")
        if not 0 <= self.real_share <= 1:
            raise InputError(f"method.real_share must be in [0, 1], got {self.real_share}")

    @property
    def needs(self) -> Needs:
        return Needs(data="prompts", items="images", references=("none",), group_at_least=2, real_share=self.real_share)

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        """One image of every prompt."""
        total = scored.total
        check_scores(total)
        held = with_company(scored.group)
        flat = zero_spread(total, scored.group)
        kept = held[chosen(total[held], scored.group[held], self.temperature, generator)]
        metrics = {
            "kept": float(len(kept)),
            "kept_score": float(total[kept].mean()),
            "kept_gain": float(total[kept].mean() - total[held].mean()),
            "zero_std_ratio": flat,
        }
        return Selection(places=kept[:0, None] if flat == 1 else kept[:, None], metrics=metrics)

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        return SFT(error_space=self.error_space)(policy, None, batch, rng, shared)


def chosen(
    scores: Float[Tensor, " n"], group: Int[Tensor, " n"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " p"]:
    """Place of one image of each group, drawn with probability softmax(score / temperature) within it.

    The greatest of r / T plus Gumbel noise is such a draw. At temperature 0 it is one of those of the highest score.
    """
    uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp(min=torch.finfo().tiny)
    noise = -torch.log(-torch.log(uniform)).to(scores.device)
    keys = [noise, scores.double()] if temperature == 0 else [scores.double() / temperature + noise]
    order = torch.arange(len(scores), device=scores.device)
    for key in (*keys, group):  # the last key counts most
        order = order[key[order].argsort(stable=True)]
    last = group[order].unique_consecutive(return_counts=True)[1].cumsum(0) - 1
    return order[last]
