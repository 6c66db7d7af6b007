"""What a step spends outside its networks, and what it costs to switch adapters off and on."""

import statistics
import time
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

LAYERS = 560
"""Adapted layers of SDXL, with a LoRA on its attention projections."""


class Stepping(Protocol):
    """Something that takes one optimizer step at a time."""

    @property
    def net(self) -> Any:
        """The network that both policy and reference run."""
        ...

    def step(self) -> object: ...


class _Clock:
    """CPU time of this process between `start` and `stop`: other programs on the machine do not count."""

    def __init__(self) -> None:
        self.total = self._began = 0.0

    def start(self, *_: object) -> None:
        self._began = time.process_time()

    def stop(self, *_: object) -> None:
        self.total += time.process_time() - self._began


def share_outside(loop: Stepping, *, steps: int = 3, warmup: int = 1) -> dict[str, Any]:
    """Share of a step's CPU time outside forward and backward passes: batches, noise, loss, clipping, the update."""
    clock, whole, shares = _Clock(), _Clock(), []
    backward = torch.autograd.backward

    def timed(*arguments: Any, **named: Any) -> None:
        clock.start()
        backward(*arguments, **named)
        clock.stop()

    hooks = [loop.net.register_forward_pre_hook(clock.start), loop.net.register_forward_hook(clock.stop)]
    with mock.patch.object(torch.autograd, "backward", timed):
        for i in range(steps + warmup):
            clock.total = whole.total = 0.0
            whole.start()
            loop.step()
            whole.stop()
            if i >= warmup:
                shares.append(1 - clock.total / whole.total)
    for hook in hooks:
        hook.remove()
    return {"share": statistics.median(shares), "range": [min(shares), max(shares)], "steps": steps}


def switching(layers: int = LAYERS, *, rounds: int = 20) -> dict[str, Any]:
    """Milliseconds to switch the adapters of so many layers off and on again: by their flags, and as libraries do."""
    from peft import LoraConfig, inject_adapter_in_model

    from diffalign.models.lora import adapter_layers, switched

    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(layers)))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r"\d+\.0"), net)
    adapted = adapter_layers(net)

    def by_flags() -> None:
        with switched(adapted, None):
            pass

    def by_call() -> None:
        for enabled in (False, True):
            for layer in adapter_layers(net):
                layer.enable_adapters(enabled)

    return {"layers": len(adapted), "flags_ms": _median_ms(by_flags, rounds), "library_ms": _median_ms(by_call, rounds)}


def _median_ms(work: Any, rounds: int) -> float:
    spent = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        spent.append(1000 * (time.process_time() - begin))
    return statistics.median(spent)
