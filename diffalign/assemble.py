"""The parts of a run, built from its config: a flat list of constructor calls."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffalign import checkpoint as disk
from diffalign import environment
from diffalign.checks import (
    REFERENCE_DECAY,
    check_batch,
    check_shard,
    context_of,
    reference_kind,
    rounding_of,
    text_dtype_of,
)
from diffalign.config import dump
from diffalign.data.batches import Collator
from diffalign.data.cache import Share
from diffalign.data.pairs import Counts
from diffalign.data.prompts import read_prompts
from diffalign.denoisers import Context, Family
from diffalign.errors import InputError
from diffalign.guard.parts import GuardParts, Standing, make_guard
from diffalign.models.load import detect_family
from diffalign.models.policy import Reference, load_policy, make_reference, share_out
from diffalign.models.save import trainable
from diffalign.online.parts import OnlineParts, make_online
from diffalign.online.settings import OnlineSettings
from diffalign.online_checks import check_work
from diffalign.placing import make_accelerator, make_ema, make_optimizer, pick_attention, place_net
from diffalign.rows import make_collators, prompts_of
from diffalign.run_folder import find_checkpoint
from diffalign.settings import TrainConfig
from diffalign.sharding import cut_optimizer, local, mesh_of, rows_of
from diffalign.strict import to_toml
from diffalign.types import ReferenceKind, RunningMean


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
    """None for a run on its own images, unless some of the data's are mixed in."""
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
    if cfg.online is None or cfg.method.needs.real:
        collator, held, counts = make_collators(cfg, family, folder, share, accelerator)
    check_batch(cfg, share.of)

    kernel = pick_attention(policy.net, cfg, accelerator)
    net = place_net(policy.net, cfg, accelerator, adapted=adapted)
    kind = reference_kind(cfg)
    moves, lent = kind in ("ema", "pool"), cfg.train.shard
    reference = None if kind == "none" else make_reference(policy, adapted=adapted, moves=moves, lent=lent)
    online = None
    if cfg.online is not None:
        online = make_rounds(cfg, cfg.online, family, policy, told, accelerator, share, real=collator)
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


def make_rounds(
    cfg: TrainConfig,
    settings: OnlineSettings,
    family: Family,
    policy: Any,
    told: Context,
    accelerator: Any,
    share: Share,
    *,
    real: Collator | None,
) -> OnlineParts:
    """What the rounds of an online run are made with; prompts are those of the real rows, where there are some."""
    online = make_online(
        settings,
        cfg.method.needs,
        cfg.model,
        family,
        policy,
        prompts=read_prompts(cfg.data.path, cfg.data.limit) if real is None else prompts_of(cfg.data.path, real.rows),
        zeros=cfg.data.empty_prompt == "zeros",
        context=told,
        adapted=cfg.train.trainable == "lora",
        device=accelerator.device,
        offload=cfg.train.offload,
        text_dtype=text_dtype_of(cfg, accelerator.device.type),
    )
    check_work(cfg, settings, online.walk, share.of)
    return online


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
