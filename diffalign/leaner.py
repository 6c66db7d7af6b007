"""Changes to a run that take less memory, in the order of what they cost: those that keep the result come first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from diffalign.checks import check
from diffalign.errors import InputError
from diffalign.models.lora import LoraSettings
from diffalign.settings import TrainConfig


def leaner(
    cfg: TrainConfig, *, gathered: bool = False, processes: int = 1
) -> Iterator[tuple[tuple[str, ...], str, TrainConfig]]:
    """Changes that a config allows, the cheapest first, each from `cfg`, or `gathered` on top of each other.

    Args:
        processes: How many the run has; several may share weights out.

    Yields:
        Keys as `diffalign train CONFIG` takes them, what the change costs, and the changed config.
    """
    shared = ("shard",) if processes > 1 else ()
    for name in ("encode", "sampled", "offload", "checkpointing", *shared, "batch", "lora", "bf16", "quantize", "8bit"):
        for overrides, costs, changed in _change(name, cfg, last=gathered):
            try:
                check(changed)
            except InputError:
                continue
            yield overrides, costs, changed
            if gathered:
                cfg = changed


def _change(name: str, cfg: TrainConfig, *, last: bool) -> Iterator[tuple[tuple[str, ...], str, TrainConfig]]:
    t = cfg.train
    own = cfg.online
    if name == "encode" and cfg.data.encode_batch_size > 1 and own is None:
        data = replace(cfg.data, encode_batch_size=1)
        yield ("data.encode_batch_size=1",), "a slower start", replace(cfg, data=data)
    elif name == "sampled" and own is not None:
        sizes = [n for n in range(own.batch_size - 1, 0, -1) if own.batch_size % n == 0]
        for size in sizes[-1:] if last else sizes:
            online = replace(own, batch_size=size)
            yield (f"online.batch_size={size}",), "slower sampling", replace(cfg, online=online)
    elif name == "offload" and not t.offload:
        yield ("train.offload=true",), "a slower start", replace(cfg, train=replace(t, offload=True))
    elif name == "checkpointing" and t.gradient_checkpointing is not True:
        if not last and not t.gradient_checkpointing:
            train = replace(t, gradient_checkpointing="selective")
            yield ('train.gradient_checkpointing="selective"',), "cheap results twice", replace(cfg, train=train)
        train = replace(t, gradient_checkpointing=True)
        yield ("train.gradient_checkpointing=true",), "a second forward pass", replace(cfg, train=train)
    elif name == "shard" and t.trainable == "full" and not t.shard:
        yield ("train.shard=true",), "more traffic between processes", replace(cfg, train=replace(t, shard=True))
    elif name == "batch":
        least = 2 if cfg.method.needs.batch_statistics else 1
        sizes = [n for n in range(t.batch_size - 1, least - 1, -1) if t.batch_size % n == 0]
        for size in sizes[-1:] if last else sizes:
            more = t.accumulate * t.batch_size // size
            keys = (f"train.batch_size={size}", f"train.accumulate={more}")
            yield keys, "smaller batches, slower", replace(cfg, train=replace(t, batch_size=size, accumulate=more))
    elif name == "lora" and t.trainable == "full":
        train = replace(t, trainable="lora", shard=False)
        yield ('train.trainable="lora"',), "another model", replace(cfg, train=train, lora=LoraSettings())
    elif name == "bf16" and t.precision == "no":
        yield ('train.precision="bf16"',), "less exact margins", replace(cfg, train=replace(t, precision="bf16"))
    elif name == "quantize" and t.quantize != "4bit":
        offered: list[tuple[Literal["8bit", "4bit"], str]] = [
            ("8bit", "a LoRA trained on weights and inputs in 8 bits, slower"),
            ("4bit", "a LoRA trained on weights in 4 bits, about a tenth off each"),
        ]
        for bits, costs in offered[-1:] if last or t.quantize == "8bit" else offered:
            yield (f'train.quantize="{bits}"',), costs, replace(cfg, train=replace(t, quantize=bits))
    elif name == "8bit" and cfg.optimizer.name == "adamw":
        optimizer = replace(cfg.optimizer, name="adamw8bit")
        yield ('optimizer.name="adamw8bit"',), "rounded moments", replace(cfg, optimizer=optimizer)
