"""DGPO: the images of a prompt as one preference. loss = sigmoid(S) A e, S = beta sum_b A_b (e_b - e_ref_b) / G.

Good images of a group against its bad ones, each weighted by |A|, under Bradley-Terry: -log sigmoid(-S). Advantages of
a group add up to 0, so that the unknown normalisers cancel. The loss here has that one's gradient divided by beta.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffalign.errors import InputError
from diffalign.methods.forward_process import (
    Levels,
    advantage_of,
    check_at_least,
    check_positive,
    count_levels,
    draw_levels,
    forward_metrics,
    groups_of,
    old_policy,
    renoise,
    select_images,
    weighted_kl,
)
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ImageBatch, Needs, Scored, Selection, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class DGPO:
    """Direct group preference optimisation: no ratio of transitions, so images may come from any sampler.

    Paper: Luo et al., "Reinforcing Diffusion Models by Direct Group Preference Optimization", arXiv 2510.08425;
    Luo-Yihong/DGPO.
    Departs: e is the native regression error, the same on flows; a DDPM model is trained on its own epsilon or v error.
    A group is whole in one micro-batch of one process, where the release sums S over processes and takes one t for
    them all; here each group draws its own. The frozen base is the reference, as in the paper, or an average of the
    policy, as later in the release; it is not guided. Images of prompts without spread are left out and counted.
    """

    beta: float = 100.0
    """KL strength on errors averaged over elements: 10 (PickScore) to 100; thousands where the reference is an EMA."""
    kl_weight: float = 1e-3
    """Of the squared distance from the reference's prediction."""
    clip: float | None = 0.01
    """No gradient of e once exp(e_old - e) has gone where A wants it by more than this; None never stops it. Release:
    0.001 to 0.05 for images sampled with guidance, 1e-5 without."""
    clip_kl: bool = False
    """There stop the gradient of the KL too."""
    old_samples_after: int | None = None
    """Optimizer steps after which the old policy makes the images (release: 200 to 500); None: it never does."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    levels: Levels = "walk"
    """Train at the t of the walk's moves, the same for all images of a prompt; or at as many that the path draws."""
    level_first: int = 7
    """Only so many moves, the noisiest, may be trained (`trunc_steps` + 1)."""
    level_count: int = 4
    """How many of them are."""

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, clip=self.clip)
        check_at_least(0, kl_weight=self.kl_weight, old_samples_after=self.old_samples_after)
        check_at_least(1, level_first=self.level_first, level_count=self.level_count)
        if self.clip_kl and self.clip is None:
            raise InputError("method.clip_kl must be false without clip, got true")

    @property
    def needs(self) -> Needs:
        old = self.clip is not None or self.old_samples_after is not None
        return Needs(
            data="prompts", items="images", references=("start", "ema"), group_at_least=2, whole_groups=True, old=old
        )

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        return select_images(scored)

    def old_decay(self, step: int) -> float:
        return min(0.001 * step, 0.3)

    def old_samples(self, step: int) -> bool:
        return self.old_samples_after is not None and step >= self.old_samples_after

    def passes(self, moves: int) -> int:
        if self.levels == "path":
            return self.level_count
        return count_levels(min(self.level_first, moves), self.level_count, "moves that level_first leaves")

    def train_levels(self, moves: int, generator: torch.Generator) -> tuple[int, ...] | None:
        if self.levels == "path":
            return None
        return draw_levels(min(self.level_first, moves), self.passes(moves), generator)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        advantage = advantage_of(batch, "dgpo")
        old = None if self.clip is None else old_policy(shared, "dgpo")
        f = renoise(policy, reference, batch, rng, old=old, error_space=self.error_space, share_in_group=True)
        assert f.pred_ref is not None, "the reference was run"
        err, err_ref = f.error(f.pred), f.error(f.pred_ref)
        contrast = group_contrast(advantage, err.detach() - err_ref, groups_of(batch), beta=self.beta)
        kl = weighted_kl(f.pred, f.pred_ref, self.kl_weight)
        metrics = {"group_weight": contrast.sigmoid(), "group_loss": functional.softplus(contrast)}
        if self.clip is not None:
            assert f.pred_old is not None, "the old policy was run"
            stop = beyond(f.error(f.pred_old) - err.detach(), advantage, self.clip)
            err = torch.where(stop, err.detach(), err)
            kl = torch.where(stop, kl.detach(), kl) if self.clip_kl else kl
            metrics["clipfrac"] = stop.float()
        policy_loss = contrast.sigmoid() * advantage * err
        metrics["policy_loss"] = policy_loss.detach()
        return StepLoss(
            loss=policy_loss + kl, metrics=metrics | forward_metrics(f, advantage), noise_level=f.noise_level
        )


def group_contrast(
    advantage: Float[Tensor, " b"], gap: Float[Tensor, " b"], group: Sequence[int], *, beta: float
) -> Float[Tensor, " b"]:
    """S of each image's group, beta times the mean of A (e - e_ref) over it; below 0 where the group is well ranked.

    Args:
        gap: e - e_ref.
        group: Number of each image's group.

    Paper: Luo et al., arXiv 2510.08425; the group's loss is -log sigmoid(-S).
    """
    numbers = {number: i for i, number in enumerate(dict.fromkeys(group))}
    index = torch.tensor([numbers[number] for number in group], device=gap.device)
    zeros = gap.new_zeros(len(numbers))
    size = zeros.index_add(0, index, torch.ones_like(gap))
    return beta * (zeros.index_add(0, index, (advantage * gap).to(gap.dtype)) / size)[index]


def beyond(gain: Float[Tensor, " b"], advantage: Float[Tensor, " b"], clip: float) -> Bool[Tensor, " b"]:
    """Whether q = exp(gain) has gone where the advantage wants it by more than `clip`.

    Args:
        gain: e_old - e: what the policy denoises the image better by than the old one.
    """
    q = gain.exp()
    return ((advantage > 0) & (q > 1 + clip)) | ((advantage < 0) & (q < 1 - clip))
