"""One micro-batch of a run without weights or data, on fake tensors, to count what it costs.

The denoiser is that of the model's own configs. A run on its own images is counted where it samples, too.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign import losses, recompute
from diffalign.bare import Encoding, bare_net
from diffalign.checks import PRECISIONS, context_of, reference_kind, rounding_of
from diffalign.counting import (
    Memory,
    autocast,
    count_flop,
    drop_gradients,
    fake_mode,
    make_fake,
    run_backward,
    run_sizes,
    saved_bytes,
    size_of,
)
from diffalign.denoisers import Family
from diffalign.denoisers.guided import Guided
from diffalign.models.load import load_scheduler_config
from diffalign.models.lora import OLD, add_lora, add_reference
from diffalign.models.policy import cast_frozen, make_reference
from diffalign.models.quantized import imitate, spared_bytes
from diffalign.models.save import trainable
from diffalign.rng import SampleRng
from diffalign.settings import TrainConfig
from diffalign.sharding import gathered_bytes, group_sizes
from diffalign.types import Cond, Encoder
from diffalign.workload import Evaluations


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What the networks of a run are, and what one micro-batch costs; FLOPs are per sample, sizes in bytes."""

    parameters: int
    trainable: int
    """Parameters that training changes."""
    weights: int
    """Of the denoiser, without adapters; rounded ones with their scales."""
    adapters: int
    """Trained and frozen ones."""
    second: int
    """Frozen copies of the denoiser, where the reference or an old policy is one."""
    trained: tuple[int, ...]
    """Number of elements of every trained tensor."""
    forward: int
    backward: int
    """With what gradient checkpointing computes again."""
    reference: int
    features: int
    """The encoder's part of a forward pass, for methods that compare features."""
    features_backward: int
    handed: int
    """What autograd was handed for the backward pass, parameters and views of them left out."""
    saved: int
    """What is held when the forward pass ends."""
    peak: int
    """Most at a time of forward and backward pass, with the gradients, beside weights and optimizer states."""
    reference_peak: int
    """The same of the forward pass of a reference or an old policy, where it goes before the policy's."""
    sampling_peak: int = 0
    """The same of the sampler's forward pass, of a run on its own images."""
    gathered: int = 0
    """Of a sharded run, whose peaks are without weights and gradients: what is gathered at a time, and theirs."""


def rehearse(cfg: TrainConfig, family: Family, inputs: Encoding, work: Evaluations, *, device: str) -> Rehearsal:
    """Runs one micro-batch on fake tensors, as `fit` would: reference, policy, backward pass; and one of the sampler.

    Args:
        work: Says whether the reference predicts, and when, and whether features are compared.
        device: "cpu" or "cuda", which need not be there; they differ in mixed precision.
    """
    adapted = cfg.train.trainable == "lora"
    net = bare_net(cfg, family)
    rounding = rounding_of(cfg, torch.device(device))
    rounded = imitate(net, rounding)
    net = _shaped(net, cfg, family, device)
    scheduler = load_scheduler_config(cfg.model)
    policy: Any = family.make_denoiser(net, scheduler, cfg.timesteps, context_of(cfg, family))
    compared = reference_kind(cfg) != "none"
    copies = 0 if adapted else compared + cfg.method.needs.old
    second = bare_net(cfg, family) if copies else None
    samples = cfg.train.batch_size * samples_of(cfg, work)
    t = policy.path.sample_t(SampleRng(0, tuple(range(samples))))
    cast = autocast(device, PRECISIONS[cfg.train.precision])
    sizes = run_sizes(net, second)
    sizes["weights"] -= spared_bytes(rounded, rounding)
    sizes["second"] *= copies
    narrow = PRECISIONS[cfg.train.precision] if cfg.train.shard else None
    gathered = gathered_bytes(group_sizes(net, family.blocks), narrow or torch.float32) if cfg.train.shard else 0
    with fake_mode():
        for one in (net, *([] if second is None else [second])):
            make_fake(one, narrow)
        reference: Any = policy if second is None else replace(policy, net=second)
        if compared and adapted:
            reference = make_reference(policy, adapted=True).denoiser
        run = _Run(
            policy=policy,
            reference=reference,
            x_t=torch.empty(samples, *inputs.latent),
            t=torch.empty_like(t),
            cond=_empty(inputs, samples),
            work=work,
            cast=cast,
            cast_backward=nullcontext() if device == "cpu" else cast,
            rows=None if cfg.online is None else cfg.online.batch_size,
        )
        known = [*net.parameters(), *net.buffers()]
        known += [] if second is None else [*second.parameters(), *second.buffers()]
        sampling_peak = 0 if cfg.online is None else run.sampling(known, _sampler_of(cfg, policy, inputs), inputs)
        parameters = trainable(net)
        if cfg.train.shard:
            drop_gradients(net)
        elif cfg.train.accumulate > 1:
            for parameter in parameters.values():
                parameter.grad = torch.empty_like(parameter)
        held = size_of([p.grad for p in parameters.values() if p.grad is not None])
        counts: dict[str, Any] = run.all(known, held)
        return Rehearsal(**sizes, **counts, sampling_peak=sampling_peak, gathered=gathered)


def samples_of(cfg: TrainConfig, work: Evaluations) -> int:
    """Samples of the policy's one call with gradient for every pair, image or move."""
    if cfg.online is not None:
        return round(work.with_gradient)
    return 2 if cfg.method.needs.batches == "pairs" else 1


@dataclass(frozen=True, kw_only=True)
class _Run:
    policy: Encoder
    reference: Encoder
    x_t: Tensor
    t: Tensor
    cond: Cond
    work: Evaluations
    cast: AbstractContextManager[Any]
    cast_backward: AbstractContextManager[Any]
    rows: int | None = None
    """Images that are sampled at a time."""

    def all(self, known: list[Tensor], held: int) -> dict[str, int]:
        """FLOPs and bytes by the names of `Rehearsal`; `held` bytes of gradients are there already."""
        made: dict[str, Tensor] = {}
        looks = bool(self.work.features_with_gradient or self.work.features_without_gradient)
        count = {"reference": 0, "features": 0, "features_backward": 0}
        with Memory([*known, self.x_t, self.t, *self.cond.tensors.values()]) as memory:
            first = self.work.without_gradient and not self.work.reference_last
            if first:
                count["reference"] = self._compare()
            reference_peak = memory.peak
            memory.restart()
            before = memory.now
            with saved_bytes(known) as handed:
                with self.cast:
                    count["forward"] = count_flop(lambda: made.update(out=self._predict(self.policy)))
                if looks:
                    pred = made["out"]
                    count["features"] = count_flop(lambda: made.update(out=self._look(pred)))
                loss = losses.squared_error(made["out"], torch.empty_like(made["out"])).mean()
            saved = memory.now - before
            if self.work.without_gradient and not first:
                count["reference"] = self._compare()
            with self.cast_backward:
                count["backward"] = count_flop(lambda: run_backward(loss))
        if looks:
            count["features_backward"] = self._alone()
            count["backward"] -= count["features_backward"]
        flop = {name: value // len(self.x_t) for name, value in count.items()}
        return flop | {
            "handed": handed(),
            "saved": saved,
            "peak": memory.peak - before + held,
            "reference_peak": reference_peak,
        }

    def sampling(self, known: list[Tensor], sampler: Guided, inputs: Encoding) -> int:
        """Most bytes at a time of a move of the sampler."""
        assert self.rows is not None, "a run on its own images says how many it samples at a time"
        x_t, cond = torch.empty(self.rows, *inputs.latent), _empty(inputs, self.rows)
        t = torch.empty(self.rows, dtype=self.t.dtype)
        with Memory([*known, x_t, t, *cond.tensors.values()]) as memory, self.cast, torch.no_grad():
            sampler(x_t, t, cond)
        return memory.peak

    def _compare(self) -> int:
        """FLOPs of the reference's forward pass."""
        with self.cast, torch.no_grad():
            return count_flop(lambda: self._predict(self.reference))

    def _predict(self, denoiser: Encoder) -> Tensor:
        return denoiser(self.x_t, self.t, self.cond)

    def _look(self, x_s: Tensor) -> Tensor:
        return self.reference.features(x_s, self.t, self.cond, mid=self.work.mid, blocks=self.work.blocks)[-1]

    def _alone(self) -> int:
        """FLOPs of the backward pass through the features, to their input."""
        x_s = torch.empty_like(self.x_t).requires_grad_(True)
        return count_flop(self._look(x_s).sum().backward)


def _shaped(net: Any, cfg: TrainConfig, family: Family, device: str) -> Any:
    """Adapters, storage types and checkpointing as `assemble` has them, before there is a device."""
    if cfg.train.trainable == "full":
        net.requires_grad_(True)
    else:
        with torch.device("meta"):
            add_lora(net, cfg.lora, family.lora_targets, seed=cfg.seed)
            if cfg.model.lora is not None or reference_kind(cfg) in ("ema", "pool"):
                add_reference(net)
            if cfg.method.needs.old:
                add_reference(net, OLD)
        dtype = PRECISIONS[cfg.train.precision]
        if device == "cuda" and dtype is not None and not cfg.method.needs.float32_features:
            cast_frozen(net, dtype)
    recompute.use(net, cfg.train.gradient_checkpointing)
    return net


def _sampler_of(cfg: TrainConfig, policy: Encoder, inputs: Encoding) -> Guided:
    """The policy as it samples."""
    assert cfg.online is not None, "a run on its own images samples"
    return Guided(denoiser=policy, uncond=_empty(inputs, 1), guidance=cfg.online.guidance)


def _empty(inputs: Encoding, rows: int) -> Cond:
    return Cond({name: torch.empty(rows, *shape, dtype=dtype) for name, (shape, dtype) in inputs.cond.items()})
