"""Where a run's network lies and what moves it: device and precision, kernel of attention, optimizer, average."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from diffalign import attention, environment, recompute
from diffalign.checks import PRECISIONS
from diffalign.errors import InputError
from diffalign.models.policy import cast_frozen
from diffalign.models.quantized import round_weights
from diffalign.settings import TrainConfig
from diffalign.sharding import local


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
