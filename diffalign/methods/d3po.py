"""D3PO: DPO on single moves x_t -> x_s of two walks, the one to the better image against the one to the worse.

With log_ratio = log p(x_s | x_t) - log p_ref(x_s | x_t), averaged over elements, a move's implicit reward is beta
delta, delta = log clip(exp(log_ratio), 1 - clip, 1 + clip). Every move to the better image counts as better than the
move of the same number to the worse one, so that one judgement trains all moves of a walk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffalign import losses
from diffalign.errors import InputError
from diffalign.methods.measure import won
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, Scored, Selection, Shared, StepLoss, TransitionPairs

Pairs = Literal["all", "best_worst"]


@dataclass(frozen=True, kw_only=True)
class D3PO:
    """Logistic loss on clipped log-ratios of moves to the better and the worse image of a prompt.

    Several rewards prefer by Pareto: the winner is nowhere worse and somewhere better, all else is a tie. People's
    labels are one reward among others. The reference is the base model, or, as where people label round by round, the
    policy at the start of the round. SPO's loss is this one with beta = 10.

    Paper: Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", arXiv 2311.13231;
        yk7333/d3po. Liang et al. (SPO), arXiv 2406.04314.
    Departs: log-probs are averaged over elements, as in the authors' code, where the paper has the sum. A tie makes no
        pair, where their code gives it the loss log 2 and no gradient, so that means here are over true pairs. The clip
        is the paper's 0.1; their first code had 0.2, under which images fell apart. It is taken of the log-ratio, which
        cannot overflow. Both references are theirs: their script for rewards keeps the base, their script for people
        and the paper renew it round by round.
    """

    beta: float = 0.1
    """KL strength; multiplies a difference of log-ratios that are *averaged* over elements. SPO: 10."""
    clip: float = 0.1
    """How far exp(log_ratio) may be from 1; outside it a move has no gradient, on either side."""
    pairs: Pairs = "all"
    """Of a prompt's images: all pairs with a winner, or the one whose weighted sums of scores are farthest apart. With
    two images both are the paper's pair."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if not 0 < self.clip < 1:
            raise InputError(f"method.clip must be in (0, 1), got {self.clip}")

    @property
    def needs(self) -> Needs:
        return Needs(data="prompts", items="transition_pairs", references=("start", "pool"), group_at_least=2)

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        """Pairs with a winner, prompt by prompt; nothing is drawn.

        Metrics: `tie_rate` is the share of all comparisons within prompts that have no winner, `zero_std_ratio` that
        of prompts without a pair, `trained_prompt_num` the number of those with one; `pair_margin` is by how much a
        winner's weighted sum of scores leads, on average, where there is a pair.

        Raises:
            InputError: No prompt has two images, or no reward has a weight.
        """
        scores, total = _oriented(scored), scored.total
        chosen, compared, ties, prompts, trained = [], 0, 0, 0, 0
        for members in _groups(scored.group):
            if len(members) < 2:
                continue
            found = members[better(scores[:, members]).nonzero()]  # [m, 2], the winner first
            comparisons = math.comb(len(members), 2)
            compared, ties = compared + comparisons, ties + comparisons - len(found)
            prompts, trained = prompts + 1, trained + bool(len(found))
            if self.pairs == "best_worst" and len(found):
                found = found[_margin(total, found).argmax()][None]
            chosen.append(found)
        if len(scored) and not prompts:
            raise InputError("online.group must give at least 2 images of a prompt to compare, got single ones only")
        places = torch.cat(chosen) if chosen else scored.group.new_zeros(0, 2)
        metrics = {
            "tie_rate": ties / max(1, compared),
            "zero_std_ratio": 1 - trained / max(1, prompts),
            "trained_prompt_num": float(trained),
            "pairs": float(len(places)),
        }
        if len(places):
            metrics["pair_margin"] = _margin(total, places).mean().item()
        return Selection(places=places, metrics=metrics)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: TransitionPairs, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        with torch.no_grad():
            log_prob_ref = pair_log_probs(reference, batch)
        log_ratio = pair_log_probs(policy, batch) - log_prob_ref  # [2B]
        log_ratio_w, log_ratio_l = log_ratio.chunk(2)
        delta = clipped(log_ratio, self.clip)
        delta_w, delta_l = delta.chunk(2)
        loss = losses.sigmoid(self.beta * delta_w, self.beta * delta_l)
        outside = (delta != log_ratio).float()
        margin = self.beta * (delta_w - delta_l)
        metrics = {
            "rewards/chosen": self.beta * delta_w,
            "rewards/rejected": self.beta * delta_l,
            "rewards/margins": margin,
            "rewards/accuracies": won(margin),
            "log_ratio_w": log_ratio_w,
            "log_ratio_l": log_ratio_l,
            "delta_w": delta_w,
            "delta_l": delta_l,
            "ratio_win": delta_w.exp(),
            "ratio_lose": delta_l.exp(),
            "clipfrac": torch.stack(outside.chunk(2)).mean(0),
        }
        level = batch.walk.noise_level(batch.step).to(loss.device)
        return StepLoss(loss=loss, metrics={k: v.detach() for k, v in metrics.items()}, noise_level=level)


def pair_log_probs(denoiser: Denoiser, batch: TransitionPairs) -> Float[Tensor, " two_b"]:
    """Log-probs of the moves to winners, then to losers, averaged over elements; from one call of the model."""
    x_t = torch.cat([batch.x_t_w, batch.x_t_l])  # [2B, C, H, W]
    x_s = torch.cat([batch.x_s_w, batch.x_s_l])
    move = batch.walk.transition(denoiser, x_t, batch.step.repeat(2), batch.cond.repeat(2))
    return batch.walk.log_prob(move, x_s)


def clipped(log_ratio: Float[Tensor, " b"], clip: float) -> Float[Tensor, " b"]:
    """log clip(exp(log_ratio), 1 - clip, 1 + clip): in log space further down than up, without gradient outside."""
    return log_ratio.clamp(math.log1p(-clip), math.log1p(clip))


def better(scores: Float[Tensor, "k n"]) -> Bool[Tensor, "n n"]:
    """Whether the first image is better than the second: for no judge worse, and for one better.

    Args:
        scores: A row for every judge, higher is better.
    """
    first, second = scores[:, :, None], scores[:, None, :]
    return (first >= second).all(0) & (first > second).any(0)


def _oriented(scored: Scored) -> Float[Tensor, "k n"]:
    """Scores of the rewards that count, in float64, those with a negative weight turned round."""
    rows = []
    for name, scores in scored.scores.items():
        if scores.isnan().any():
            bad = scores.isnan().nonzero().flatten().tolist()
            raise ValueError(f"scores of {name!r} must be numbers, got NaN for images {bad}")
        if scored.weights[name]:
            rows.append(math.copysign(1.0, scored.weights[name]) * scores.double())
    if not rows:
        raise InputError(f"rewards must have one whose weight is not 0, got {dict(scored.weights)}")
    return torch.stack(rows)


def _groups(group: Int[Tensor, " n"]) -> Iterator[Int[Tensor, " g"]]:
    """Places of the images of each prompt."""
    order = group.argsort(stable=True)
    _, counts = group[order].unique_consecutive(return_counts=True)
    yield from order.split(counts.tolist())


def _margin(total: Float[Tensor, " n"], pairs: Int[Tensor, "m 2"]) -> Float[Tensor, " m"]:
    """By how much winners lead."""
    return total[pairs[:, 0]] - total[pairs[:, 1]]
