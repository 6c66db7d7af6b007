"""Held-out pairs: the method's own loss and metrics at fixed noise, equally from every decile of the noise range."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffalign.data.batches import Collator
from diffalign.data.cache import Share
from diffalign.errors import InputError
from diffalign.fit import Totals, shared_with
from diffalign.paths import DDPMPath, FlowPath, TimestepSampling
from diffalign.rng import SampleRng
from diffalign.types import Denoiser, Method, RunningMean


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Means over all held-out pairs and deciles."""

    metrics: dict[str, float]
    deciles: dict[str, list[float | None]]


@torch.no_grad()
def validate(
    policy: Any,
    reference: Denoiser | None,
    method: Method,
    collator: Collator,
    *,
    batch_size: int,
    share: Share,
    accelerator: Any,
    rewards: RunningMean | None = None,
) -> Validation:
    """Every held-out pair once in every decile, with the same noise each time it is called.

    A pair's draws depend on its place among the held-out ones alone, so two validations differ by the weights only.
    """
    totals = Totals()
    shared = shared_with(accelerator, rewards)
    for decile in range(10):
        local = replace(policy, path=_within(policy.path, decile / 10, (decile + 1) / 10))
        for rows in _mine(len(collator), batch_size, share):
            batch = collator.batch(rows, [-1 - row * 10 - decile for row in rows]).to(accelerator.device)
            with accelerator.autocast():
                totals.add(method(local, reference, batch, SampleRng(collator.seed, batch.samples), shared))
    metrics, deciles, _ = totals.means(accelerator)
    return Validation(metrics=metrics, deciles=deciles)


def better(measure: str, new: float, old: float | None) -> bool:
    """Whether a held-out measure improved: losses and errors fall, implicit rewards and gains rise."""
    if old is None:
        return True
    return new < old if measure == "loss" or measure.startswith("err_") else new > old


def check_measure(measure: str, metrics: dict[str, float]) -> None:
    """Raises InputError for a measure that this method does not have."""
    if measure not in metrics:
        raise InputError(f"checkpoint.best must be a held-out measure: {', '.join(sorted(metrics))}; got {measure!r}")


def _within(path: DDPMPath | FlowPath, low: float, high: float) -> DDPMPath | FlowPath:
    sampling = TimestepSampling(distribution="uniform", low=low, high=high)
    return (
        replace(path, timesteps=sampling, shift=1.0)
        if isinstance(path, FlowPath)
        else replace(path, timesteps=sampling)
    )


def _mine(length: int, batch_size: int, share: Share) -> Iterator[list[int]]:
    rows = list(range(share.mine, length, share.of))
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]
