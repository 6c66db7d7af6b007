"""One micro-batch of a run without weights or data: on fake tensors to count it, or on the device to time it.

The networks are those of the model's own configs; VAE and text encoders are run too, since they say what the denoiser
is conditioned on. Only configs and tokenizers are read.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import losses, recompute
from diffalign.assemble import make_accelerator, make_optimizer, place_net
from diffalign.checks import PRECISIONS, buckets_of, context_of, reference_kind, rounding_of, text_dtype_of
from diffalign.counting import (
    Memory,
    autocast,
    count_flop,
    drop_gradients,
    fake_mode,
    make_fake,
    net_bytes,
    run_backward,
    run_sizes,
    saved_bytes,
    size_of,
)
from diffalign.denoisers import Family
from diffalign.fit import fit
from diffalign.models.load import home, load_net_config, load_scheduler_config, load_vae_config, native_resolution
from diffalign.models.lora import add_lora, add_reference
from diffalign.models.policy import cast_frozen, make_reference
from diffalign.models.quantized import imitate, spared_bytes, swap_linears
from diffalign.models.save import trainable
from diffalign.models.text import in_float32, text_dtypes
from diffalign.rng import SampleRng
from diffalign.settings import TrainConfig
from diffalign.sharding import gathered_bytes, group_sizes
from diffalign.types import Batch, Cond, Encoder, ImageBatch, PairBatch
from diffalign.workload import Evaluations


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What VAE and text encoders cost, and what they give."""

    latent: tuple[int, ...]
    """Channels, height and width."""
    cond: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and type of one prompt's conditions by name."""
    image_flop: int
    prompt_flop: int
    weights: int
    """Bytes of VAE and text encoders."""
    largest: int
    """Of the largest of them."""
    peak: int
    """Most bytes at a time beside the weights, with `data.encode_batch_size` images."""

    @property
    def prompt_bytes(self) -> int:
        """Conditions of one prompt."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.cond.values())


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
    """A frozen copy of the denoiser, where the reference is one."""
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
    """The same of the reference's forward pass."""
    gathered: int = 0
    """Of a sharded run, whose peaks are without weights and gradients: what is gathered at a time, and theirs."""


def encoding(cfg: TrainConfig, family: Family, index: Mapping[str, Any], *, device: str = "cpu") -> Encoding:
    """Runs VAE and text encoders of a `model_index.json` on fake tensors, as they run on a "cpu" or "cuda" device."""
    from diffusers import AutoencoderKL

    side = cfg.data.resolution or native_resolution(cfg.model, family)
    width, height = max(buckets_of(cfg, family), key=lambda size: (math.prod(size), -max(size)), default=(side, side))
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(load_vae_config(cfg.model)).eval().requires_grad_(False)
    pipeline = _text_pipeline(cfg, family, index, text_dtype_of(cfg, device))
    texts = [part for name in family.text if isinstance(part := pipeline.components[name], nn.Module)]
    with torch.no_grad(), fake_mode():
        for net in (vae, *texts, pipeline.components[family.net]):
            make_fake(net)
        known = [t for net in (vae, *texts) for t in (*net.parameters(), *net.buffers())]
        with Memory(known) as memory:
            found: list[Any] = []
            count = cfg.data.encode_batch_size
            flop = count_flop(lambda: found.append(_moments(vae, torch.empty(count, 3, height, width))))
            prompt_flop = count_flop(lambda: found.append(in_float32(family.encode_prompts(pipeline, ["a"]))))
    mean, cond = found
    return Encoding(
        latent=tuple(mean.shape[1:]),
        cond={name: (tuple(t.shape[1:]), t.dtype) for name, t in cond.tensors.items()},
        image_flop=flop // count,
        prompt_flop=prompt_flop,
        weights=sum(net_bytes(net) for net in (vae, *texts)),
        largest=max(net_bytes(net) for net in (vae, *texts)),
        peak=memory.peak,
    )


def _moments(vae: Any, pixels: Tensor) -> Tensor:
    posterior = vae.encode(pixels).latent_dist
    return torch.stack([posterior.mean, posterior.std])[0]


def _text_pipeline(cfg: TrainConfig, family: Family, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline with text encoders and denoiser on the meta device, and its tokenizers."""
    import diffusers
    import transformers

    place = {"pretrained_model_name_or_path": home(cfg.model)[1], "revision": cfg.model.revision}
    cls = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = dict.fromkeys(cls._get_signature_keys(cls)[0])
    parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_config(load_scheduler_config(cfg.model))
    parts[family.net] = bare_net(cfg, family)
    narrow = text_dtypes(family, index, dtype)
    for name in family.text:
        library, class_name = index.get(name) or (None, None)
        if library is None or class_name is None:
            continue
        part = getattr(transformers, class_name)
        if issubclass(part, nn.Module):
            config = part.config_class.from_pretrained(subfolder=name, **place)
            with torch.device("meta"):
                parts[name] = part(config).eval().requires_grad_(False).to(narrow[name])
        else:
            parts[name] = part.from_pretrained(subfolder=name, **place)
    if "requires_safety_checker" in index:
        parts["requires_safety_checker"] = False
    return cls(**parts)


def bare_net(cfg: TrainConfig, family: Family) -> Any:
    """The denoiser of the true config on the meta device, frozen."""
    net_class: Any = family.net_class()
    with torch.device("meta"):
        net = net_class.from_config(load_net_config(cfg.model, family))
    return net.eval().requires_grad_(False)


def rehearse(cfg: TrainConfig, family: Family, inputs: Encoding, work: Evaluations, *, device: str) -> Rehearsal:
    """Runs one micro-batch on fake tensors, as `fit` would: reference, policy, backward pass.

    Args:
        work: Says whether the reference predicts, and whether features are compared.
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
    copied = compared and not adapted
    second = bare_net(cfg, family) if copied else None
    samples = cfg.train.batch_size * (2 if cfg.method.needs.batches == "pairs" else 1)
    t = policy.path.sample_t(SampleRng(0, tuple(range(samples))))
    cast = autocast(device, PRECISIONS[cfg.train.precision])
    sizes = run_sizes(net, second)
    sizes["weights"] -= spared_bytes(rounded, rounding)
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
        )
        copies = [] if second is None else [*second.parameters(), *second.buffers()]
        known = [*net.parameters(), *net.buffers(), *copies]
        parameters = trainable(net)
        if cfg.train.shard:
            drop_gradients(net)
        elif cfg.train.accumulate > 1:
            for parameter in parameters.values():
                parameter.grad = torch.empty_like(parameter)
        held = size_of([p.grad for p in parameters.values() if p.grad is not None])
        counts: dict[str, Any] = run.all(known, held)
        return Rehearsal(**sizes, **counts, gathered=gathered)


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

    def all(self, known: list[Tensor], held: int) -> dict[str, int]:
        """FLOPs and bytes by the names of `Rehearsal`; `held` bytes of gradients are there already."""
        made: dict[str, Tensor] = {}
        looks = bool(self.work.features_with_gradient or self.work.features_without_gradient)
        count = {"reference": 0, "features": 0, "features_backward": 0}
        with Memory([*known, self.x_t, self.t, *self.cond.tensors.values()]) as memory:
            if self.work.without_gradient:
                with self.cast, torch.no_grad():
                    count["reference"] = count_flop(lambda: self._predict(self.reference))
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
        dtype = PRECISIONS[cfg.train.precision]
        if device == "cuda" and dtype is not None and not cfg.method.needs.float32_features:
            cast_frozen(net, dtype)
    recompute.use(net, cfg.train.gradient_checkpointing)
    return net


def _empty(inputs: Encoding, rows: int) -> Cond:
    return Cond({name: torch.empty(rows, *shape, dtype=dtype) for name, (shape, dtype) in inputs.cond.items()})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One micro-batch on the device itself."""

    seconds: float
    """Of one micro-batch with an optimizer step; the median of three after one to warm up."""
    peak: int | None
    """Most bytes that torch had allocated on a GPU; None on a CPU."""
    device: str


def measure(cfg: TrainConfig, family: Family, inputs: Encoding) -> Measured:
    """Times the method on random weights and random latents, on the device that the config names.

    Raises:
        InputError: The device is not there.
    """
    accelerator = make_accelerator(cfg)
    device = accelerator.device
    adapted = cfg.train.trainable == "lora"
    net_class: Any = family.net_class()
    net = net_class.from_config(load_net_config(cfg.model, family)).eval().requires_grad_(not adapted)
    rounding = rounding_of(cfg, device)
    if rounding is not None:
        swap_linears(net, rounding)
    if adapted:
        add_lora(net, cfg.lora, family.lora_targets, seed=cfg.seed)
    policy: Any = family.make_denoiser(
        place_net(net, cfg, accelerator, adapted=adapted),
        load_scheduler_config(cfg.model),
        cfg.timesteps,
        context_of(cfg, family),
    )
    kind = reference_kind(cfg)
    reference = None if kind == "none" else make_reference(policy, adapted=adapted, moves=kind in ("ema", "pool"))
    prepared, optimizer = accelerator.prepare(net, make_optimizer(cfg, list(trainable(net).values())))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    begin = time.perf_counter()
    for _ in fit(
        replace(policy, net=prepared),
        None if reference is None else reference.denoiser,
        cfg.method,
        random_batches(cfg, inputs),
        optimizer,
        steps=4,
        max_grad_norm=cfg.train.max_grad_norm,
        seed=cfg.seed,
        accelerator=accelerator,
    ):
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return Measured(
        seconds=statistics.median(seconds[1:]),
        peak=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        device=device.type,
    )


def random_batches(cfg: TrainConfig, inputs: Encoding) -> Iterator[Batch]:
    """The same random latents for ever, each time with other noise."""
    rows = cfg.train.batch_size
    generator = torch.Generator().manual_seed(cfg.seed)

    def latents() -> Tensor:
        return torch.randn(rows, *inputs.latent, generator=generator)

    x, y, score = latents(), latents(), torch.rand(2, rows, generator=generator)
    cond = Cond({name: _filled((rows, *shape), dtype, generator) for name, (shape, dtype) in inputs.cond.items()})
    label = torch.tensor([1.0, -1.0]).repeat(rows)[:rows]
    kind = cfg.method.needs.batches
    ref = None if cfg.train.fixed_draws is None else torch.ones(rows, 2 if kind == "pairs" else 1).double()
    first = 0
    while True:
        samples = tuple(range(first, first + rows))
        if kind == "pairs":
            yield PairBatch(x_w=x, x_l=y, cond=cond, samples=samples, score_w=score[0], score_l=score[1], err_ref=ref)
        else:
            marks = label if kind == "labelled" else None
            yield ImageBatch(x_0=x, cond=cond, samples=samples, label=marks, err_ref=ref)
        first += rows


def _filled(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype)
