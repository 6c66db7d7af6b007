"""Networks that wait on the CPU, of which one at a time is on the device: text encoders and VAE on small cards.

Their weights are never changed, so they stay on the CPU for good: what runs on the device is a copy that is dropped
afterwards, and nothing is copied back.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Turns:
    """Frozen networks that take turns on a device; each comes by itself when it is called."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.here: nn.Module | None = None
        """The network whose copy is on the device."""
        self._home: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._handles: list[Any] = []

    def add(self, networks: Iterable[Any], *, leaves: bool = False) -> None:
        """Lets networks take turns; with `leaves` they go after every call, otherwise when another one comes."""
        for net in networks:
            self._home[net] = [(tensor, tensor.data) for tensor in (*net.parameters(), *net.buffers())]
            net._hf_hook = _Bring(self, self.device)
            self._handles.append(net.register_forward_pre_hook(lambda module, arguments: self.bring(module)))
            if leaves:
                self._handles.append(net.register_forward_hook(lambda module, arguments, out: self.park()))

    def bring(self, net: nn.Module) -> None:
        """Puts a network on the device, once the one that was there has gone."""
        if net is self.here:
            return
        self.park()
        for tensor, home in self._home[net]:
            tensor.data = home.to(self.device)
        self.here = net

    def park(self) -> None:
        """Clears the device."""
        if self.here is None:
            return
        for tensor, home in self._home[self.here]:
            tensor.data = home
        self.here = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def end(self) -> None:
        """Clears the device and lets go of the networks."""
        self.park()
        for handle in self._handles:
            handle.remove()
        for net in self._home:
            del net._hf_hook
        self._home.clear()
        self._handles.clear()


class _Bring:
    """What Diffusers looks for on a component: where it runs, and what to call before a VAE encodes or decodes."""

    def __init__(self, turns: Turns | None, device: torch.device) -> None:
        self.turns = turns
        self.execution_device = device

    def pre_forward(self, module: nn.Module) -> None:
        if self.turns is not None:
            self.turns.bring(module)


@contextmanager
def placed(pipeline: Any, net: Any, *, offload: bool) -> Iterator[Any]:
    """Inside, a pipeline can sample where its denoiser `net` is: as a whole there, or with the others taking turns.

    Args:
        net: On its device already, where it stays.
    """
    if not offload:
        yield pipeline.to(net.device)
        return
    others = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and part is not net]
    turns = Turns(net.device)
    turns.add(others, leaves=True)
    net._hf_hook = _Bring(None, net.device)
    try:
        yield pipeline
    finally:
        del net._hf_hook
        turns.end()
