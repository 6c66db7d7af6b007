"""The loop: micro-batches to optimizer steps, one report a step. No trainer; the caller's `for` body does the rest."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import RunError
from diffalign.rng import SampleRng
from diffalign.sharding import whole
from diffalign.types import ALONE, Batch, Denoiser, Method, RunningMean, Shared, StepLoss, alone

MOST_UNREAD = 32
"""Steps that go on before they are known to be finite; their batches are kept until then."""

DECILE_METRICS = (
    *("loss", "rewards/margins", "rewards/accuracies", "winner_gain", "loser_gain", "err_w", "err_l"),
    *("policy_loss", "ratio", "approx_kl", "clipfrac", "kl_loss"),
)
"""Metrics that are also kept by decile of the noise level."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step that was taken; all numbers are means over the global batch."""

    step: int
    """Steps taken so far."""
    metrics: dict[str, float]
    """Empty where they were not read."""
    deciles: dict[str, list[float | None]]
    """Means by decile of the noise level, clean first; None where no sample fell."""
    samples: int
    """Samples of this step over all processes."""
    seconds: float
    """Of the step; where steps before it were not read, the mean since the last one that was."""
    rewards: RunningMean = field(default_factory=RunningMean)
    """Running mean of the implicit rewards so far, where the method keeps one."""


class NotFinite(RunError):
    """The loss or the gradient was not finite; no update was made."""

    def __init__(self, step: int, value: float, what: str, batch: Batch) -> None:
        super().__init__(f"{what} is not finite at step {step} ({value}); no update was made")
        self.batch = batch


def fit(
    policy: Denoiser,
    reference: Denoiser | None,
    method: Method,
    batches: Iterator[Batch],
    optimizer: Any,
    *,
    steps: int,
    accumulate: int = 1,
    max_grad_norm: float = math.inf,
    seed: int = 0,
    start: int = 0,
    accelerator: Any = None,
    rewards: RunningMean | None = None,
    old: Denoiser | None = None,
    reads: Callable[[int], bool] = lambda step: True,
) -> Iterator[StepReport]:
    """Trains until `steps` optimizer steps have been taken; yields a report after each.

    Args:
        batches: Endless micro-batches, `accumulate` a step, each of the same size.
        optimizer: Holds the parameters to train; prepared by `accelerator` if there is one.
        max_grad_norm: Gradients are scaled down to this norm; inf measures the norm only.
        start: Steps taken already, in a resumed run.
        accelerator: Of `accelerate`, for precision and processes; None trains plainly on one device.
        rewards: The running mean of implicit rewards, in a resumed run.
        old: The policy that made the images, where the method asks for it.
        reads: Whether metrics are read after so many steps. In the others nothing waits for the device, if the
            optimizer can hold back its updates by itself: from the first number on that is not finite it makes none,
            and the error comes at the next step that is read.

    Raises:
        NotFinite: Before the update; it carries the batch.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    shared = replace(shared_with(accelerator, rewards), old=old)
    guard, began = Guard(optimizer, accelerator), time.monotonic()
    taken: list[Taken] = []
    for step in range(start, steps):
        totals = Totals()
        for micro in range(accumulate):
            batch = next(batches).to(device)
            with _autocast(accelerator):
                out = method(policy, reference, batch, SampleRng(seed, batch.samples), shared)
            shared = shared if out.rewards is None else replace(shared, rewards=out.rewards)
            totals.add(out)
            with _without_sync(accelerator, policy, last=micro == accumulate - 1):
                _backward(accelerator, out.loss.mean() / accumulate)
        grad_norm = _clip(accelerator, parameters, max_grad_norm)
        taken.append(Taken(step + 1, batch, totals, totals.gathered(accelerator, grad_norm)))
        read = reads(step + 1) or not guard.holds_back or len(taken) == MOST_UNREAD
        metrics: dict[str, float] = {}
        deciles: dict[str, list[float | None]] = {}
        samples = len(batch) * accumulate * _processes(accelerator)
        if read:
            for one in taken:
                metrics, deciles, samples = one.read(accelerator)
        else:
            guard.watch(taken[-1].numbers)
        optimizer.step()
        optimizer.zero_grad()
        yield StepReport(
            step=step + 1,
            metrics=metrics,
            deciles=deciles,
            samples=samples,
            seconds=(time.monotonic() - began) / len(taken),
            rewards=shared.rewards,
        )
        if read:
            taken, began = [], time.monotonic()


@dataclass(frozen=True)
class Taken:
    """A step whose numbers are on the device."""

    step: int
    batch: Batch
    totals: "Totals"
    numbers: Tensor

    def read(self, accelerator: Any) -> tuple[dict[str, float], dict[str, list[float | None]], int]:
        """(means by name, means by decile, number of samples); waits for the device.

        Raises:
            NotFinite: The loss or the gradient was not finite.
        """
        metrics, deciles, samples = self.totals.parted(self.numbers.tolist(), with_norm=True)
        _check_finite(self.step, metrics, self.batch, accelerator)
        return metrics, deciles, samples


class Guard:
    """Holds updates back after a loss or a gradient that is not finite, without waiting for the device.

    It sets the switch that gradient scalers set, `found_inf`, which fused AdamW reads on the device.
    """

    def __init__(self, optimizer: Any, accelerator: Any) -> None:
        self.inner = optimizer if accelerator is None else optimizer.optimizer
        fused = isinstance(self.inner, torch.optim.AdamW) and bool(self.inner.defaults["fused"])
        self.holds_back = fused and (accelerator is None or accelerator.scaler is None)
        self.found: Tensor | None = None

    def watch(self, numbers: Tensor) -> None:
        """Looks at what `Totals.gathered` gave for a step that is not read."""
        wrong = (~(numbers[1] + numbers[-1]).isfinite()).float()  # loss and norm of the gradient
        self.found = wrong if self.found is None else torch.maximum(self.found, wrong)
        self.inner.found_inf = self.found


def shared_with(accelerator: Any, rewards: RunningMean | None = None) -> Shared:
    """What the first micro-batch shares: sums over the accelerator's processes, and a running mean to go on from."""
    return replace(ALONE, reduce=_reducer(accelerator), rewards=rewards or RunningMean())


def _reducer(accelerator: Any) -> Callable[[Tensor], Tensor]:
    if accelerator is None or accelerator.num_processes == 1:
        return alone
    return lambda total: accelerator.reduce(total.detach(), reduction="sum")


class Totals:
    """Sums of metrics over micro-batches and processes; stays on the device until it is read."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.binned: Tensor | None = None

    def add(self, out: StepLoss) -> None:
        metrics = {"loss": out.loss.detach(), **out.metrics}
        self.names = list(metrics)
        table = torch.stack([m.double() if m.device.type == "cpu" else m.float() for m in metrics.values()])
        ones = torch.ones_like(table[:1])
        rows = [i for i, name in enumerate(metrics) if name in DECILE_METRICS]
        bins = (out.noise_level.to(table.device) * 10).long().clamp(0, 9)
        one_hot = torch.nn.functional.one_hot(bins, 10).to(table.dtype)  # [B, 10]
        sums = torch.cat([ones, table]).sum(1)
        binned = torch.cat([ones, table[rows]]) @ one_hot
        self.sums = sums if self.sums is None else self.sums + sums
        self.binned = binned if self.binned is None else self.binned + binned

    def means(
        self, accelerator: Any = None, grad_norm: Tensor | None = None
    ) -> tuple[dict[str, float], dict[str, list[float | None]], int]:
        """(means by name, means by decile, number of samples) over all processes; waits for the device."""
        values = self.gathered(accelerator, grad_norm).tolist()
        return self.parted(values, with_norm=grad_norm is not None)

    def gathered(self, accelerator: Any = None, grad_norm: Tensor | None = None) -> Tensor:
        """Number of samples, sums with the loss's first, sums by decile, and last the norm; over all processes."""
        if self.sums is None or self.binned is None:
            raise ValueError("means must follow at least one add")
        flat = torch.cat([self.sums, self.binned.flatten()])
        if accelerator is not None:
            flat = accelerator.reduce(flat, reduction="sum")
        if grad_norm is not None:
            flat = torch.cat([flat, grad_norm.detach().to(flat).reshape(1)])
        return flat

    def parted(
        self, values: list[float], *, with_norm: bool
    ) -> tuple[dict[str, float], dict[str, list[float | None]], int]:
        """What `gathered` gave, as means by name, means by decile and number of samples."""
        count, sums = values[0], values[1 : len(self.names) + 1]
        metrics = {name: total / count for name, total in zip(self.names, sums, strict=True)}
        if with_norm:
            metrics["grad_norm"] = values.pop()
        rows = [values[i : i + 10] for i in range(len(self.names) + 1, len(values), 10)]
        kept = [name for name in self.names if name in DECILE_METRICS]
        deciles = {
            name: [s / n if n else None for s, n in zip(row, rows[0], strict=True)]
            for name, row in zip(kept, rows[1:], strict=True)
        }
        return metrics, deciles, round(count)


def _processes(accelerator: Any) -> int:
    return 1 if accelerator is None else int(accelerator.num_processes)


def _autocast(accelerator: Any) -> Any:
    return contextlib.nullcontext() if accelerator is None else accelerator.autocast()


def _without_sync(accelerator: Any, policy: Any, *, last: bool) -> Any:
    return contextlib.nullcontext() if accelerator is None or last else accelerator.no_sync(policy.net)


def _backward(accelerator: Any, loss: Tensor) -> None:
    if accelerator is None:
        loss.backward()
    else:
        accelerator.backward(loss)


def _clip(accelerator: Any, parameters: list[Tensor], max_grad_norm: float) -> Tensor:
    if accelerator is None:
        return whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    return whole(accelerator.clip_grad_norm_(parameters, max_grad_norm))


def _check_finite(step: int, metrics: dict[str, float], batch: Batch, accelerator: Any) -> None:
    """A gradient that overflows under fp16 is the gradient scaler's business; anything else not finite ends the run."""
    if not math.isfinite(metrics["loss"]):
        raise NotFinite(step, metrics["loss"], "loss", batch)
    scaled = accelerator is not None and accelerator.scaler is not None
    if not math.isfinite(metrics["grad_norm"]) and not scaled:
        raise NotFinite(step, metrics["grad_norm"], "gradient", batch)
