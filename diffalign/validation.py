"""Held-out pairs: the method's own loss and metrics at fixed noise, equally from every decile of the noise range."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffalign.data.batches import Collator
from diffalign.data.cache import Share
from diffalign.errors import InputError
from diffalign.fit import Totals
from diffalign.methods.measure import pair_errors
from diffalign.paths import DDPMPath, FlowPath, TimestepSampling
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Method, PairBatch, RunningMean


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Means over all held-out pairs and deciles."""

    metrics: dict[str, float]
    deciles: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Movement:
    """How far the model has moved on chosen and on rejected images: err_ref - err, above 0 where it became better."""

    winner: float
    loser: float | None
    """None where nothing was measured on rejected images."""
    deciles: dict[str, list[float | None]]
    """The same by decile of the noise range, clean first, under "winner" and "loser"."""

    @property
    def displaced(self) -> bool:
        """The model became worse at chosen and rejected images alike: likelihood displacement."""
        return self.loser is not None and self.winner < 0 and self.loser < 0

    @property
    def sentence(self) -> str:
        """What happened and where, for the log."""
        levels = [(v, i) for i, v in enumerate(self.deciles["winner"]) if v is not None]
        most = f", the chosen ones most at noise decile {min(levels)[1] + 1} of 10" if levels else ""
        return (
            f"likelihood displacement: the model is worse than it was at chosen ({self.winner:+.3g}) and rejected "
            f"({self.loser or 0:+.3g}) held-out images alike{most}"
        )


def movement(first: Validation, last: Validation) -> Movement | None:
    """Gains over the reference at the `last` validation; without a reference, errors at the `first` minus those now."""

    def of(name: str, gain: str) -> tuple[float | None, list[float | None]]:
        if gain in last.metrics:
            return last.metrics[gain], last.deciles.get(gain, [])
        if name not in last.metrics or name not in first.metrics:
            return None, []
        pairs = zip(first.deciles.get(name, []), last.deciles.get(name, []), strict=False)
        return first.metrics[name] - last.metrics[name], [None if a is None or b is None else a - b for a, b in pairs]

    (winner, winners), (loser, losers) = of("err_w", "winner_gain"), of("err_l", "loser_gain")
    if winner is None:
        return None
    return Movement(winner=winner, loser=loser, deciles={"winner": winners, "loser": losers})


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
    together: bool = False,
) -> Validation:
    """Every held-out pair once in every decile, with the same noise each time it is called.

    A pair's draws depend on its place among the held-out ones alone, so two validations differ by the weights only.

    Args:
        together: Processes with fewer batches run as many as the others, since they gather their weights together;
            what they run beyond their own is not counted.
    """
    totals = Totals()
    shared = replace(ALONE, rewards=rewards or RunningMean())  # processes may differ in how many batches they have
    for decile in range(10):
        local = replace(policy, path=_within(policy.path, decile / 10, (decile + 1) / 10))
        own = [(rows, True) for rows in _mine(collator, batch_size, share)]
        most = len(list(_mine(collator, batch_size, replace(share, mine=0))))
        spare = [([0], False)] * (most - len(own)) if together else []
        for rows, counts in [*own, *spare]:
            batch = collator.batch(rows, [-1 - row * 10 - decile for row in rows]).to(accelerator.device)
            with accelerator.autocast():
                out = method(local, reference, batch, SampleRng(collator.seed, batch.samples), shared)
            if counts:
                totals.add(out)
    metrics, deciles, _ = totals.means(accelerator)
    for rows in itertools.islice(_mine(collator, batch_size, share), 1 if share.of == 1 else 0):
        batch = collator.batch(rows, [-1 - row * 10 for row in rows]).to(accelerator.device)
        if isinstance(batch, PairBatch):
            with accelerator.autocast():
                metrics |= entanglement(policy, batch, SampleRng(collator.seed, batch.samples))
    return Validation(metrics=metrics, deciles=deciles)


def entanglement(policy: Any, batch: PairBatch, rng: SampleRng) -> dict[str, float]:
    """Cosine `grad_cos` of the gradients of winners' and losers' mean errors, and `grad_ratio` of their norms.

    A small step of plain DPO makes winners better only while |g_w| / |g_l| is above the cosine. Taken over the last
    trained parameters, at most ten million numbers of them.

    Paper: Yuan et al., "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement", arXiv
    2410.13828.
    """
    chosen = _last([p for p in policy.net.parameters() if p.requires_grad], 10_000_000)
    with torch.enable_grad():
        e = pair_errors(policy, None, batch, rng)
        grads = [
            torch.cat(
                [
                    g.flatten().float()
                    for g in torch.autograd.grad(err.mean(), chosen, retain_graph=keep, materialize_grads=True)
                ]
            )
            for err, keep in ((e.err_w, True), (e.err_l, False))
        ]
    norms = [g.norm().item() for g in grads]
    if not all(norms):
        return {}
    return {"grad_cos": torch.dot(*grads).item() / (norms[0] * norms[1]), "grad_ratio": norms[0] / norms[1]}


def _last(parameters: list[torch.nn.Parameter], most: int) -> list[torch.nn.Parameter]:
    """The last parameters that together hold at most `most` numbers, at least one."""
    kept: list[torch.nn.Parameter] = []
    for parameter in reversed(parameters):
        most -= parameter.numel()
        if kept and most < 0:
            break
        kept.append(parameter)
    return kept


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


def _mine(collator: Collator, batch_size: int, share: Share) -> Iterator[list[int]]:
    for alike in collator.alike:
        rows = alike[share.mine :: share.of]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]
