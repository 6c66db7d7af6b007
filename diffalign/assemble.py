"""The parts of a run, built from its config: a flat list of constructor calls."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffalign import attention, environment, recompute
from diffalign import checkpoint as disk
from diffalign.checks import (
    PRECISIONS,
    REFERENCE_DECAY,
    buckets_of,
    check_batch,
    check_shard,
    context_of,
    method_name,
    reference_kind,
    rounding_of,
    text_dtype_of,
)
from diffalign.config import dump
from diffalign.data.batches import Collator, Rows
from diffalign.data.buckets import check_filled
from diffalign.data.cache import Share
from diffalign.data.images import Preprocessing
from diffalign.data.pairs import Counts, PairReader
from diffalign.data.prepare import CacheJob, Encoders, cached, content_key, split_cached, split_live, vae_scale
from diffalign.denoisers import Context, Family
from diffalign.errors import InputError
from diffalign.guard.parts import GuardParts, Standing, make_guard
from diffalign.models.load import detect_family
from diffalign.models.policy import Reference, cast_frozen, load_policy, make_reference, share_out
from diffalign.models.quantized import round_weights
from diffalign.models.save import trainable
from diffalign.online.parts import OnlineParts, make_online
from diffalign.online.settings import OnlineSettings
from diffalign.online_checks import check_work
from diffalign.run_folder import find_checkpoint
from diffalign.settings import TrainConfig
from diffalign.sharding import cut_optimizer, local, mesh_of, rows_of
from diffalign.strict import to_toml
from diffalign.types import Needs, ReferenceKind, RunningMean


@dataclass
class Best:
    """The best held-out measure so far and the step that reached it."""

    value: float | None = None
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a run is made of."""

    cfg: TrainConfig
    folder: Path
    accelerator: Any
    share: Share
    family: Family
    policy: Any
    """Denoiser whose network is prepared by the accelerator."""
    net: Any
    """The network itself, without wrappers."""
    reference: Reference | None
    parameters: dict[str, torch.nn.Parameter]
    """What is trained, by name."""
    optimizer: Any
    attention: str
    """Kernel that attention runs on."""
    ema: Any | None
    collator: Collator | None
    """None for a run on its own images."""
    held: Collator | None
    """Held-out rows, without prompt dropout."""
    online: OnlineParts | None
    """Of a run on its own images."""
    guard: GuardParts | None
    counts: Counts
    start: int
    """Steps taken before, in a resumed run."""
    metrics_offset: int
    best: Best = field(default_factory=Best)
    rewards: RunningMean = field(default_factory=RunningMean)
    """Of implicit rewards, in a resumed run."""

    @property
    def reference_kind(self) -> ReferenceKind:
        """What the policy is measured against."""
        return reference_kind(self.cfg)


def assemble(cfg: TrainConfig) -> Parts:
    """Builds a run and, where the config resumes one, puts it back to its checkpoint.

    Raises:
        InputError: Something in the config, the data, the model or the run's folder is wrong; nothing was changed.
    """
    accelerator = make_accelerator(cfg)
    share = Share(accelerator.process_index, accelerator.num_processes)
    check_shard(cfg, share.of)
    family = detect_family(cfg.model)
    folder = Path(cfg.output)
    resumed = find_checkpoint(folder, cfg)

    guard = None if cfg.guard is None else make_guard(cfg.guard, cfg.online, cfg.data.path)
    adapted = cfg.train.trainable == "lora"
    lora, told = cfg.lora if adapted else None, context_of(cfg, family)
    rounding = rounding_of(cfg, accelerator.device)
    policy = load_policy(cfg.model, family, cfg.timesteps, lora=lora, seed=cfg.seed, context=told, rounding=rounding)
    collator, held, counts = None, None, Counts()
    if cfg.online is None:
        collator, held, counts = make_collators(cfg, family, folder, share, accelerator)
    check_batch(cfg, share.of)

    kernel = pick_attention(policy.net, cfg, accelerator)
    net = place_net(policy.net, cfg, accelerator, adapted=adapted)
    kind = reference_kind(cfg)
    moves, lent = kind in ("ema", "pool"), cfg.train.shard
    reference = None if kind == "none" else make_reference(policy, adapted=adapted, moves=moves, lent=lent)
    online = None if cfg.online is None else make_rounds(cfg, cfg.online, family, policy, told, accelerator, share)
    if cfg.train.shard:
        mesh = mesh_of(accelerator.device, share.of)
        dtype = torch.bfloat16 if cfg.train.precision == "bf16" else None
        reference = share_out(net, reference, mesh, blocks=family.blocks, dtype=dtype)
    parameters = trainable(net)
    made = make_optimizer(cfg, list(parameters.values()))
    prepared, optimizer = (net, accelerator.prepare(made)) if cfg.train.shard else accelerator.prepare(net, made)
    ema = make_ema(cfg, parameters)

    parts = Parts(
        cfg=cfg,
        folder=folder,
        accelerator=accelerator,
        share=share,
        family=family,
        policy=replace(policy, net=prepared),
        net=net,
        reference=reference,
        parameters=parameters,
        optimizer=optimizer,
        attention=kernel,
        ema=ema,
        collator=collator,
        held=held,
        online=online,
        guard=guard,
        counts=counts if online is None else Counts(rows=len(online.prompts), kept=len(online.prompts)),
        start=0,
        metrics_offset=0,
    )
    return parts if resumed is None else restore(parts, resumed)


def make_collators(
    cfg: TrainConfig, family: Family, folder: Path, share: Share, accelerator: Any
) -> tuple[Collator, Collator | None, Counts]:
    """Batches of rows to train on and of rows held out."""
    rows, held, counts = prepare_rows(cfg, family, folder, share, accelerator)
    check_prompts(cfg, rows)
    group = cfg.train.batch_size * cfg.train.accumulate * share.of
    collator = Collator(
        rows=rows,
        kind=cfg.method.needs.batches,
        scale=vae_scale(cfg.model),
        seed=cfg.seed,
        prompt_dropout=cfg.data.prompt_dropout,
        latents=cfg.data.latents,
        swap=cfg.data.swap_labels,
        positive_ratio=cfg.data.positive_ratio,
        sizes=cfg.data.sizes == "original",
        group=group,
    )
    if collator.bucket is not None:
        counts.buckets = check_filled(buckets_of(cfg, family), collator.bucket, group)
    return collator, None if held is None else replace(collator, rows=held, prompt_dropout=0.0), counts


def make_rounds(
    cfg: TrainConfig,
    settings: OnlineSettings,
    family: Family,
    policy: Any,
    told: Context,
    accelerator: Any,
    share: Share,
) -> OnlineParts:
    """What the rounds of an online run are made with."""
    online = make_online(
        settings,
        cfg.method.needs,
        cfg.model,
        family,
        policy,
        prompts=cfg.data.path,
        limit=cfg.data.limit,
        zeros=cfg.data.empty_prompt == "zeros",
        context=told,
        adapted=cfg.train.trainable == "lora",
        device=accelerator.device,
        offload=cfg.train.offload,
        text_dtype=text_dtype_of(cfg, accelerator.device.type),
    )
    check_work(cfg, settings, online.walk, share.of)
    return online


def make_accelerator(cfg: TrainConfig) -> Any:
    """Device, precision and processes, by accelerate.

    Raises:
        InputError: A GPU that is not there, fp16 without one, or a launcher with a way of sharding of its own.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if cfg.train.device == "cuda" and not torch.cuda.is_available():
        raise InputError("config.train.device must be a device of this machine, got 'cuda' and no GPU is there")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise InputError(
                f"accelerate launch must be told no plugin, got {name}; train.shard = true shares weights out under "
                "any launcher"
            )
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    accelerator = Accelerator(
        mixed_precision=cfg.train.precision if cfg.train.precision != "fp16" or torch.cuda.is_available() else "no",
        cpu=cfg.train.device == "cpu",
        log_with=list(cfg.track) or None,
        project_dir=cfg.output,
    )
    if cfg.train.precision == "fp16" and accelerator.device.type != "cuda":
        raise InputError(
            "config.train.precision must be 'no' or 'bf16' without a GPU, got 'fp16', whose gradient scaling needs one"
        )
    return accelerator


def claim_folder(parts: Parts) -> None:
    """Writes config and environment into the run's folder, and removes what a killed run left there."""
    if parts.accelerator.is_main_process:
        parts.folder.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(parts.folder / "config.toml", to_toml(dump(parts.cfg)))
        about = {
            **environment.describe(parts.accelerator.device),
            **({} if parts.cfg.train.quantize == "none" else environment.versions(("bitsandbytes",))),
            "attention": parts.attention,
            "processes": parts.accelerator.num_processes,
            "seed": parts.cfg.seed,
            **({"buckets": parts.counts.buckets} if parts.counts.buckets else {}),
        }
        disk.write_atomic(parts.folder / "environment.json", json.dumps(about, indent=1))
        disk.drop_after(parts.folder / "checkpoints", parts.start)
    parts.accelerator.wait_for_everyone()


def prepare_rows(
    cfg: TrainConfig, family: Family, folder: Path, share: Share, accelerator: Any
) -> tuple[Rows, Rows | None, Counts]:
    """Rows to train on and rows held out, from the cache or encoded as they are asked for."""
    data, needs = cfg.data, cfg.method.needs
    if needs.data == "prompts":
        raise ValueError("cfg.method must train on images of the data to have rows, got one that makes its own")
    reader = PairReader(data, bad_images=needs.data == "labelled")
    reader.check_fits(needs.data, scores=needs.scores, swapped=data.swap_labels)
    prep = Preprocessing(
        resolution=context_of(cfg, family).resolution,
        crop=data.crop,
        flip=data.flip,
        variants=data.variants,
        sizes=data.sizes == "original",
        buckets=buckets_of(cfg, family),
    )
    zeros, offload, kind = data.empty_prompt == "zeros", cfg.train.offload, text_dtype_of(cfg, accelerator.device.type)
    encoders = Encoders(cfg.model, family, accelerator.device, zeros=zeros, offload=offload, text_dtype=kind)
    fraction = 0.0 if cfg.validation is None else cfg.validation.fraction
    limit = 0 if cfg.validation is None else cfg.validation.pairs
    if data.cache is False:
        rows, held, counts = split_live(
            reader, prep, encoders, fraction, limit, cfg.seed, data.encode_batch_size, scored=needs.scores
        )
        check_labels(rows, needs)
        return rows, held, counts
    place = folder / "cache" if data.cache is True else Path(data.cache)
    job = CacheJob(
        folder=place,
        key=content_key(encoders, reader, prep, dtype=data.cache_dtype, seed=cfg.seed),
        dtype=getattr(torch, data.cache_dtype),
        batch_size=data.encode_batch_size,
        seed=cfg.seed,
        share=share,
        wait=accelerator.wait_for_everyone,
    )
    table = cached(reader, prep, encoders, job)
    rows, held = split_cached(place, table, fraction, limit, cfg.seed, scored=needs.scores)
    check_labels(rows, needs)
    return rows, held, table.counts


def check_labels(rows: Rows, needs: Needs) -> None:
    """Raises InputError where a method learns from good and bad images and the data has one kind alone."""
    marks = rows.marks
    if needs.data == "labelled" and marks is not None and not marks.both_labels:
        good = int(marks.good.sum())
        raise InputError(
            f"data.path must have good and bad images for this method, got {good} good and {len(rows) - good} bad "
            "to train on"
        )


def pick_attention(net: Any, cfg: TrainConfig, accelerator: Any) -> str:
    """The kernel of attention that the config names, put into the network where it belongs there."""
    dtype = {"no": "fp32"}.get(cfg.train.precision, cfg.train.precision)
    chosen = attention.choose(cfg.train.attention, net, dtype, accelerator.device)
    attention.install(net, chosen)
    return chosen


def place_net(net: Any, cfg: TrainConfig, accelerator: Any, *, adapted: bool) -> Any:
    """The network on its device, in the memory layout and storage types that the config asks for."""
    round_weights(net, accelerator.device)
    halved = adapted and not cfg.method.needs.float32_features
    if halved and accelerator.device.type == "cuda" and cfg.train.precision != "no":
        cast_frozen(net, PRECISIONS[cfg.train.precision] or torch.float32)
    recompute.use(net, cfg.train.gradient_checkpointing)
    if not cfg.train.shard:  # which has no room for it there, and moves it block by block
        net.to(accelerator.device)
    if cfg.train.channels_last:
        net.to(memory_format=torch.channels_last)
    if cfg.train.compile:
        net.compile(dynamic=False)  # shapes are few: batch, held-out batch, samples; symbolic ones can fail to compile
    return net


def make_optimizer(cfg: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it, or with 8-bit states by bitsandbytes."""
    o = cfg.optimizer
    if o.name == "adamw8bit":
        environment.need_extra("bitsandbytes", "8bit", "config.optimizer.name 'adamw8bit'")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps)
    return torch.optim.AdamW(parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps, fused=True)


def make_ema(cfg: TrainConfig, parameters: Mapping[str, torch.nn.Parameter]) -> Any | None:
    """A moving average of the trained parameters, if the config keeps one."""
    if cfg.train.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(local(parameters.values()), decay=cfg.train.ema_decay, foreach=True)


def restore(parts: Parts, folder: Path) -> Parts:
    """Puts weights, optimizer, moving average and counters back to a checkpoint."""
    found = disk.load_checkpoint(folder)
    if found.step > parts.cfg.train.steps:
        raise InputError(
            f"config.train.steps must be at least the checkpoint's {found.step}, got {parts.cfg.train.steps}"
        )
    disk.restore_(parts.parameters, found.weights)
    parts.optimizer.load_state_dict(cut_optimizer(found.optimizer, list(parts.parameters.values())))
    if parts.ema is not None and found.ema is not None:
        shadow = local(rows_of(found.ema[name], p) for name, p in parts.parameters.items())
        parts.ema.load_state_dict({**parts.ema.state_dict(), "shadow_params": shadow, "optimization_step": found.step})
    if parts.reference is not None and found.reference is not None:
        disk.restore_(parts.reference.parameters, found.reference)
    if parts.accelerator.scaler is not None:
        parts.accelerator.scaler.load_state_dict(found.state["scaler"])
    return replace(
        parts,
        start=found.step,
        metrics_offset=found.state["metrics_offset"],
        guard=parts.guard and replace(parts.guard, standing=Standing(**found.state["guard"])),
        best=Best(**found.state["best"]),
        rewards=RunningMean(**found.state["rewards"]),
    )


def follow(parts: Parts) -> None:
    """Moves a reference that follows the policy; called after the optimizer's step."""
    if parts.reference is not None and reference_kind(parts.cfg) == "ema":
        decay = parts.cfg.train.reference_decay
        parts.reference.follow(parts.parameters, decay=REFERENCE_DECAY if decay is None else decay)


def check_prompts(cfg: TrainConfig, rows: Rows) -> None:
    """Raises InputError where a method samples an image for each prompt and there is no prompt in the data."""
    if cfg.method.needs.replay is not None and all(not rows.prompt(row).strip() for row in range(len(rows))):
        raise InputError(
            f"data.path must have prompts for method {method_name(cfg.method)!r}, which samples an image for each; got "
            f"{len(rows)} rows, all with blank ones"
        )
