"""What tensors cost, counted without computing anything: FLOPs, and bytes as they come and go, on fake tensors.

Fake tensors have shapes, types and storages, and no numbers. They run as if on the CPU, whose fused attention keeps
for the backward pass what a GPU's keeps: queries, keys, values, output and one number a row.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from diffalign.recompute import watched

_NARROW = frozenset(
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul __matmul__ "
    "__rmatmul__ mm mv bmm addmm addmv addbmm baddbmm einsum scaled_dot_product_attention".split()
)
"""Functions that CUDA autocast runs in 16 bits."""
_WIDE = frozenset(
    "group_norm layer_norm softmax log_softmax exp log log1p expm1 pow __pow__ __rpow__ sum norm cumsum prod rsqrt "
    "reciprocal cosh sinh tan acos asin mse_loss l1_loss smooth_l1_loss cosine_similarity cdist softplus".split()
)
"""Functions that CUDA autocast runs in float32."""


def fake_mode() -> AbstractContextManager[Any]:
    """Inside, new tensors are fake, and a real one that is met counts as one."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(net: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Gives a network fake tensors for its own, in place; inside `fake_mode`. Weights that are shared stay shared.

    Args:
        dtype: Type of the weights; None is the one that they have.
    """
    fresh: dict[int, Tensor] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                made = fresh.setdefault(id(parameter), nn.Parameter(empty, requires_grad=parameter.requires_grad))
                module._parameters[name] = made  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return net


def size_of(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


def net_bytes(net: nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    return size_of([*net.parameters(), *net.buffers()])


def run_sizes(net: nn.Module, second: nn.Module | None) -> dict[str, Any]:
    """What a run's networks are as they are stored, in numbers and bytes, by the names that a rehearsal has for them.

    Args:
        second: A frozen copy of the network, where there is one.
    """
    weights = {name: p for name, p in net.named_parameters() if ".lora_" not in name}
    trained = tuple(p.numel() for p in net.parameters() if p.requires_grad)
    return {
        "parameters": sum(p.numel() for p in weights.values()),
        "trainable": sum(trained),
        "weights": size_of([*weights.values(), *net.buffers()]),
        "adapters": size_of([p for name, p in net.named_parameters() if ".lora_" in name]),
        "second": 0 if second is None else net_bytes(second),
        "trained": trained,
    }


def count_flop(work: Callable[[], Any]) -> int:
    """FLOPs of a piece of work, by PyTorch's formulas, with those of fused attention on the CPU, where it has none."""
    with _Flops() as counter:
        work()
    return counter.total


class _Flops(TorchDispatchMode):
    """Adds up FLOPs and holds nothing: PyTorch's own counter follows modules too, and so keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten, packet = torch.ops.aten, func._overloadpacket
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class Memory(TorchDispatchMode):
    """Bytes that are held inside it, now and at most: every storage once, from its making until it is let go."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """Storages of `known` tensors count nothing."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return out

    def restart(self) -> None:
        """The peak is looked for from here on."""
        self.peak = self.now

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def drop_gradients(net: nn.Module) -> None:
    """From now on the gradient of a weight is let go of as soon as it is there."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(drop)


@contextmanager
def saved_bytes(known: Sequence[Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Counts what is kept for a backward pass inside: each storage once.

    Args:
        known: Tensors that count nothing, nor does any view of them; parameters, say.
    """
    left_out = {tensor.untyped_storage()._cdata for tensor in known}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            storages[storage._cdata] = storage.nbytes()
        return tensor.detach()  # the tensor itself would be a cycle that is not let go before a backward pass

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), watched(pack):
        yield lambda: sum(storages.values())


def run_backward(loss: Tensor) -> None:
    """The backward pass of a scalar, with the modes that are on: `loss.backward()` would switch function modes off,
    and what checkpointing computes again would miss them."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision as a device of this kind has it, for tensors that are not on it; None is none."""
    if dtype is None:
        return nullcontext()
    return torch.autocast("cpu", dtype) if device == "cpu" else _CudaAutocast(dtype)


class _CudaAutocast(TorchFunctionMode):
    """CUDA's autocast on fake tensors, which a machine without CUDA cannot make of that kind.

    It casts what enters convolutions, matrix products and attention to `dtype`, and what enters norms and reductions
    to float32. A trained float32 weight is cast once and its copy kept, as autocast's cache does.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._kept: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        named = dict(kwargs or {})
        if name in _NARROW:
            args, named = tree_map(self._narrow, (args, named))
        elif name in _WIDE:
            args, named = tree_map(_wide, (args, named))
        return func(*args, **named)

    def _narrow(self, value: Any) -> Any:
        if not _castable(value) or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(self.dtype)
        if id(value) not in self._kept:
            self._kept[id(value)] = value.to(self.dtype)
        return self._kept[id(value)]


def _wide(value: Any) -> Any:
    return value.float() if _castable(value) else value


def _castable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
