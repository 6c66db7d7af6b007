"""One micro-batch on the device itself, with random weights and random latents; and a few moves of the sampler."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.bare import Encoding, bare_vae
from diffalign.checks import context_of, reference_kind, rounding_of
from diffalign.denoisers import Family
from diffalign.denoisers.guided import Guided
from diffalign.fit import fit
from diffalign.models.load import load_net_config, load_scheduler_config
from diffalign.models.lora import add_lora
from diffalign.models.policy import make_old, make_reference
from diffalign.models.quantized import swap_linears
from diffalign.models.save import trainable
from diffalign.online.settings import OnlineSettings
from diffalign.own_work import own_batch, own_walk
from diffalign.placing import make_accelerator, make_optimizer, place_net
from diffalign.sampling.rollout import rollout
from diffalign.settings import TrainConfig
from diffalign.types import Batch, Cond, ImageBatch, PairBatch

TIMES = 4
"""Of which the first warms up."""
MOVES = 3
"""Of the sampler, each time."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A batch of images of a run on its own, by parts."""

    move: float
    """Seconds of one move."""
    decoding: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One micro-batch on the device itself."""

    seconds: float
    """Of one micro-batch with an optimizer step; the median of three after one to warm up."""
    peak: int | None
    """Most bytes that torch had allocated on a GPU; None on a CPU."""
    device: str
    sampled: Sampled | None = None


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
    old = make_old(policy, adapted=adapted) if cfg.method.needs.old else None
    prepared, optimizer = accelerator.prepare(net, make_optimizer(cfg, list(trainable(net).values())))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sampled = None if cfg.online is None else _sampled(cfg, cfg.online, family, policy, inputs, accelerator)
    trained, other = replace(policy, net=prepared), None if reference is None else reference.denoiser
    seconds = []
    begin = time.perf_counter()
    for _ in fit(
        guided(cfg, trained, inputs, device),
        None if other is None else guided(cfg, other, inputs, device),
        cfg.method,
        batches(cfg, family, inputs),
        optimizer,
        steps=TIMES,
        max_grad_norm=cfg.train.max_grad_norm,
        seed=cfg.seed,
        accelerator=accelerator,
        old=None if old is None else old.denoiser,
    ):
        _finish(device)
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return Measured(
        seconds=statistics.median(seconds[1:]),
        peak=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        device=device.type,
        sampled=sampled,
    )


def guided(cfg: TrainConfig, denoiser: Any, inputs: Encoding, device: torch.device) -> Any:
    """A model as it is trained: with guidance where its own moves are what is trained on."""
    own = cfg.online
    if own is None or own.guidance == 1 or cfg.method.needs.items not in ("transitions", "transition_pairs"):
        return denoiser
    uncond = _conditions(inputs, 1, torch.Generator().manual_seed(cfg.seed)).to(device)
    return Guided(denoiser=denoiser, uncond=uncond, guidance=own.guidance)


def batches(cfg: TrainConfig, family: Family, inputs: Encoding) -> Iterator[Batch]:
    """The same random latents for ever, each time with other noise."""
    rows, first = cfg.train.batch_size, 0
    generator = torch.Generator().manual_seed(cfg.seed)
    cond = _conditions(inputs, rows, generator)
    walk = None if cfg.online is None else own_walk(cfg, family)
    while True:
        samples = tuple(range(first, first + rows))
        if walk is None:
            yield _of_data(cfg, inputs, cond, samples)
        else:
            yield own_batch(cfg, walk, cond, samples, shape=inputs.latent)
        first += rows


def _of_data(cfg: TrainConfig, inputs: Encoding, cond: Cond, samples: tuple[int, ...]) -> Batch:
    rows, kind = len(samples), cfg.method.needs.batches
    generator = torch.Generator().manual_seed(cfg.seed)
    x, y = torch.randn(2, rows, *inputs.latent, generator=generator)
    score = torch.rand(2, rows, generator=generator)
    ref = None if cfg.train.fixed_draws is None else torch.ones(rows, 2 if kind == "pairs" else 1).double()
    if kind == "pairs":
        return PairBatch(x_w=x, x_l=y, cond=cond, samples=samples, score_w=score[0], score_l=score[1], err_ref=ref)
    label = torch.tensor([1.0, -1.0]).repeat(rows)[:rows] if kind == "labelled" else None
    return ImageBatch(x_0=x, cond=cond, samples=samples, label=label, err_ref=ref)


def _sampled(
    cfg: TrainConfig, own: OnlineSettings, family: Family, policy: Any, inputs: Encoding, accelerator: Any
) -> Sampled:
    """A few moves of a batch, and the decoding of another."""
    device, rows = accelerator.device, own.batch_size
    generator = torch.Generator().manual_seed(cfg.seed)
    walk = own_walk(cfg, family)
    count = min(MOVES, len(walk.schedule))
    short = replace(walk.schedule, moves=walk.schedule.moves.rows(torch.arange(count)))
    cond, uncond = (_conditions(inputs, n, generator).to(device) for n in (rows, 1))
    sampler = Guided(denoiser=policy, uncond=uncond, guidance=own.guidance)
    x_init = torch.randn(rows, *inputs.latent, generator=generator).to(device)
    vae, context = bare_vae(cfg, "cpu").to(device), context_of(cfg, family)

    def walked() -> None:
        with accelerator.autocast():
            rollout(sampler, walk.kernel, short, cond, list(range(rows)), x_init=x_init)

    def decoded() -> None:
        with torch.no_grad():
            family.decode(vae, x_init, context)

    move = _seconds(walked, device) / count
    return Sampled(move=move, decoding=_seconds(decoded, device), images=rows)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The median of three after one to warm up."""
    seconds = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        work()
        _finish(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _conditions(inputs: Encoding, rows: int, generator: torch.Generator) -> Cond:
    return Cond({name: _filled((rows, *shape), dtype, generator) for name, (shape, dtype) in inputs.cond.items()})


def _filled(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype)
