"""What a round of own images asks of the networks, before there is one: counts of calls, and bytes that it keeps.

Rounds are counted as the engine makes them: whole batches, guidance as a second sample, log-probs computed again in
batches of training's shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffalign.checks import context_of
from diffalign.denoisers import Family
from diffalign.online.collate import turns_of
from diffalign.online.parts import make_walk
from diffalign.online.settings import OnlineSettings
from diffalign.online_checks import check_work
from diffalign.sampling.rollout import noisy_steps
from diffalign.sampling.walk import KernelWalk
from diffalign.settings import TrainConfig
from diffalign.types import Batch, Cond, Denoiser, ImageBatch, OnlineMethod, PairBatch, TransitionBatch, TransitionPairs
from diffalign.workload import SAMPLES, Evaluations, count_calls


@dataclass(frozen=True, kw_only=True)
class RoundWork:
    """One round, over all processes; evaluations are samples through the denoiser, with guidance two for each."""

    rounds: int
    """Of the run."""
    processes: int
    images: int
    moves: int
    """Of the sampler."""
    noisy: int
    """Of these, how many have noise."""
    sampling: int
    """Evaluations that sample."""
    again: int
    """Evaluations for log-probs of the policy that sampled; 0 where the rollout's own are taken."""
    under_reference: int
    """Evaluations for log-probs of the reference, of a method that has the KL in its reward."""
    items: int
    """Moves, pairs or images that the updates go over, each as often as it is trained."""
    with_gradient: int
    without_gradient: int
    """Of these evaluations in training `of_old` are the old policy's, the others the reference's."""
    of_old: int


def own_walk(cfg: TrainConfig, family: Family) -> KernelWalk:
    """The sampler's walk.

    Raises:
        InputError: It cannot be on this model.
    """
    return make_walk(_own(cfg), cfg.method.needs, cfg.model, family=family, context=context_of(cfg, family))


def own_evaluations(cfg: TrainConfig, denoiser: Denoiser, walk: KernelWalk, *, reference: bool) -> Evaluations:
    """What a method asks of its networks for one move, pair or image of its own."""
    own, needs = _own(cfg), cfg.method.needs
    samples = tuple(range(own.group * math.ceil(SAMPLES / own.group)))
    on_moves = needs.items in ("transitions", "transition_pairs")
    return count_calls(
        cfg.method,
        denoiser,
        own_batch(cfg, walk, Cond({}), samples, shape=(1, 2, 2)),
        reference=reference,
        old=needs.old,
        guidance=own.guidance if on_moves else 1.0,
    )


def own_batch(
    cfg: TrainConfig, walk: KernelWalk, cond: Cond, samples: tuple[int, ...], *, shape: Sequence[int]
) -> Batch:
    """A batch as a round gives it to the method, of random latents."""
    rows, group = len(samples), _own(cfg).group
    generator = torch.Generator().manual_seed(cfg.seed)
    a, b, c, d = torch.randn(4, rows, *shape, generator=generator)
    weight = torch.linspace(-1, 1, rows)
    noisy, moves = _noisy(cfg, walk), len(walk.schedule)
    step = torch.tensor([noisy[i % len(noisy)] for i in range(rows)]) if noisy else torch.zeros(rows).long()
    method = cfg.method
    assert isinstance(method, OnlineMethod), "a method on prompts selects"
    match method.needs.items:
        case "transitions":
            mean_old = c if method.needs.mean_old else None
            return TransitionBatch(
                x_t=a, x_s=b, step=step, log_prob_old=torch.zeros(rows), advantage=weight, cond=cond, walk=walk,
                samples=samples, mean_old=mean_old,
            )  # fmt: skip
        case "transition_pairs":
            return TransitionPairs(x_t_w=a, x_s_w=b, x_t_l=c, x_s_l=d, step=step, cond=cond, walk=walk, samples=samples)
        case "pairs":
            real = ImageBatch(x_0=c, cond=cond, samples=samples) if method.needs.real_beside else None
            return PairBatch(x_w=a, x_l=b, cond=cond, samples=samples, real=real)
        case "labelled":
            return ImageBatch(x_0=a, cond=cond, samples=samples, label=weight.sign())
        case _:
            at_moves = turns_of(method, noisy, moves)[1] is not None
            numbers = tuple(sample // group for sample in samples)
            level = walk.schedule.levels[torch.tensor([i % moves for i in range(rows)])] if at_moves else None
            return ImageBatch(x_0=a, cond=cond, samples=samples, advantage=weight, t=level, group=numbers)


def round_work(cfg: TrainConfig, walk: KernelWalk, work: Evaluations, processes: int) -> RoundWork:
    """What a round asks.

    Raises:
        InputError: Its updates do not come out even on so many processes.
    """
    own, t = _own(cfg), cfg.train
    check_work(cfg, own, walk, processes)
    guided = 2 if own.guidance > 1 else 1
    noisy = len(_noisy(cfg, walk))
    items = own.updates * t.accumulate * t.batch_size * processes
    return RoundWork(
        rounds=t.steps // own.updates,
        processes=processes,
        images=own.images,
        moves=own.steps,
        noisy=noisy,
        sampling=own.images * own.steps * guided,
        again=_again(cfg, noisy) * guided,
        under_reference=own.images * noisy * guided if cfg.method.needs.log_ratio else 0,
        items=items,
        with_gradient=round(items * work.with_gradient),
        without_gradient=round(items * work.without_gradient),
        of_old=round(items * work.of_old),
    )


def kept_levels(cfg: TrainConfig, walk: KernelWalk) -> int:
    """States of an image that a rollout keeps: one more than there are moves from the first with noise to the last."""
    noisy = _noisy(cfg, walk)
    return noisy[-1] - noisy[0] + 2 if noisy else 1


def _again(cfg: TrainConfig, noisy: int) -> int:
    """Moves that are evaluated again, each part of a round in whole batches."""
    own, t, needs = _own(cfg), cfg.train, cfg.method.needs
    if needs.items != "transitions" or not own.evaluated_again(t.batch_size, mean_old=needs.mean_old):
        return 0
    parts = [min(own.batch_size, own.images - first) for first in range(0, own.images, own.batch_size)]
    return sum(t.batch_size * math.ceil(images * noisy / t.batch_size) for images in parts)


def _noisy(cfg: TrainConfig, walk: KernelWalk) -> tuple[int, ...]:
    """Numbers of the moves with noise; a window's are where it starts first."""
    window = _own(cfg).window
    if window is None:
        return noisy_steps(walk.kernel, walk.schedule)
    low, _ = window.bounds(len(walk.schedule))
    return tuple(range(low, low + window.size))


def _own(cfg: TrainConfig) -> OnlineSettings:
    assert cfg.online is not None, "a run on its own images says how it makes them"
    return cfg.online
