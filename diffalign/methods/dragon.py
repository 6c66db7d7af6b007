"""DRAGON: two sets of own images, D+ and D-, that differ in a reward of single images or of whole sets, contrasted."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from diffalign.errors import InputError
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.diffusion_kto import DiffusionKTO
from diffalign.methods.pairing import best_and_worst, by_prompt
from diffalign.methods.set_construction import Sets, build_sets, halves, tallying
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, PairBatch, Scored, Selection, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class Dragon:
    """DRAGON: what a reward of sets likes (Fréchet distance, Vendi score) or one of single images, by contrast.

    By rewards of single images the better of two images of a prompt goes to D+ and the other to D-; of more the best
    and the worst. By a reward of sets R the images of each prompt are dealt to two sets; the better set is D+, and two
    images of a prompt change places wherever that raises r(D+) = w R(D+) + the mean of the single images' weighted
    scores. w is the weight of R's name, or 1.

    Paper: Bai et al., "DRAGON: Distributional Rewards Optimize Diffusion Generative Models", arXiv 2504.15217.
    Departs: the authors have no public code, and where the paper's construction of sets is not spelt out it is ours:
    the start, one pass in random order, strict gains only. They compare both losses and do not name a default; beta is
    not published. All images of D+ and D- weigh alike, where Diffusion-KTO's release draws good images 4 times in 5.
    """

    loss: Literal["dpo", "kto"] = "dpo"
    """Pairs under Diffusion-DPO, or images under Diffusion-KTO, good in D+ and bad in D-."""
    beta: float = 100.0
    """KL strength on errors averaged over elements, on the scale of the loss: a logit has slope beta / 2 under `dpo`
    and beta under `kto`."""
    passes: int = 1
    """How often the prompts are gone over, at most; it ends where a pass exchanges nothing."""
    by_prompt: bool = False
    """A reward of sets looks at the images of each prompt apart, and its mean is what counts; needs four of each."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if self.passes < 1:
            raise InputError(f"method.passes must be at least 1, got {self.passes}")

    @property
    def needs(self) -> Needs:
        return Needs(
            data="prompts",
            items="pairs" if self.loss == "dpo" else "labelled",
            references=("start", "pool", "ema"),
            batch_statistics=self.loss == "kto",
            group_at_least=4 if self.by_prompt else 2,
            of_sets=True,
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        """D+ and D-: as pairs under `dpo`, as images of weight 1 and -1 under `kto`."""
        if scored.set_reward is None:
            found = best_and_worst(scored.total, scored.group)
            return self._selection(found.places, dict(found.metrics))
        prompts = [halves(places) for places in by_prompt(scored.group)]
        parts = prompts if self.by_prompt else [torch.cat(prompts)]
        built = [self._sets(scored, pairs, generator) for pairs in parts]
        better = [sets for sets in built if sets.trail[-1] > sets.worse]
        places = torch.cat([built[0].places[:0], *(sets.places for sets in better)])
        metrics = {
            "set_start": _mean([sets.trail[0] for sets in built]),
            "set_plus": _mean([sets.trail[-1] for sets in built]),
            "set_minus": _mean([sets.worse for sets in built]),
            "swaps": float(sum(len(sets.trail) - 1 for sets in built)),
            "zero_std_ratio": 1 - len(better) / len(built),
            "left_over": len(scored) - 2.0 * sum(map(len, parts)),
        }
        return self._selection(places, metrics)

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: PairBatch | ImageBatch,
        rng: SampleRng,
        shared: Shared = ALONE,
    ) -> StepLoss:
        if isinstance(batch, PairBatch):
            dpo = DiffusionDPO(beta=self.beta, error_space=self.error_space)
            return dpo(policy, reference, batch, rng, shared)
        return DiffusionKTO(beta=self.beta, error_space=self.error_space)(policy, reference, batch, rng, shared)

    def _sets(self, scored: Scored, pairs: Int[Tensor, "p 2"], generator: torch.Generator) -> Sets:
        """The sets that can be made of some of the round's images."""
        assert scored.set_reward is not None, "there is one to build sets by"
        assert scored.embedded is not None, "a round with a set reward has its images embedded"
        used = pairs.flatten()
        own = scored.total[used] if scored.scores else torch.zeros(len(used), dtype=torch.float64)
        of = tallying(
            scored.set_reward,
            scored.embedded.take(used.tolist()),
            weight=scored.weights.get(scored.set_reward.name, 1.0),
            scores=own,
        )
        orders = [torch.randperm(len(pairs), generator=generator).tolist() for _ in range(self.passes)]
        found = build_sets(torch.arange(len(used)).view(-1, 2), of, orders)
        return Sets(places=used[found.places], trail=found.trail, worse=found.worse)

    def _selection(self, places: Int[Tensor, "m 2"], metrics: dict[str, float]) -> Selection:
        metrics["pairs"] = float(len(places))
        if self.loss == "dpo":
            return Selection(places=places, metrics=metrics)
        weight = torch.tensor([1.0, -1.0]).repeat(len(places))
        return Selection(places=places.reshape(-1, 1), weight=weight, metrics=metrics)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
