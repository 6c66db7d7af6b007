"""Results that are made again in the backward pass where that costs next to nothing: "selective" checkpointing.

Inside `recomputed` a tape notes how cheap results come to be: norms, activations, gates, casts, copies and the cheap
ones of the matrix products. Of these autograd gets a recipe in place of numbers. What recipes start from is kept:
outputs of convolutions, attention and other products, and residual sums. A recipe calls the same kernels on the same
numbers, so gradients are the same to the last bit. None of the network's own code runs twice, no random number is
drawn again, and adapters that are switched in between change nothing.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Checkpointing = bool | Literal["selective"]
"""False keeps everything for the backward pass, True nothing but the inputs of blocks, "selective" what is dear."""

NARROW = 512
"""A product over so few numbers costs no more than reading and writing its output once: at 790 TFLOP/s and 3 TB/s, an
H100's in 16 bits, 2 FLOPs a number against 4 bytes."""

_aten = torch.ops.aten
_CHEAP = frozenset(
    {
        _aten.native_group_norm.default,
        _aten.native_layer_norm.default,
        _aten._fused_rms_norm.default,
        _aten.pow.Tensor_Scalar,
        _aten.rsqrt.default,
        _aten.silu.default,
        _aten.gelu.default,
        _aten.sigmoid.default,
        _aten.tanh.default,
        _aten.mul.Tensor,
        _aten.mul.Scalar,
        _aten.add.Scalar,
        _aten._to_copy.default,
        _aten.clone.default,
        _aten.cat.default,
        _aten.stack.default,
        _aten.upsample_nearest2d.default,
    }
)
"""Of an operation with several outputs the first is made again; the others are statistics, and kept."""
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})


def use(net: Any, kind: Checkpointing) -> None:
    """Puts what `train.gradient_checkpointing` names into a network of Diffusers, for passes with gradient."""
    if kind == "selective":
        net.forward = MethodType(_forward, net)  # bound, so that a deep copy runs itself
    elif kind:
        net.enable_gradient_checkpointing()


def _forward(net: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(net).forward(net, *args, **kwargs)
    with recomputed():
        return type(net).forward(net, *args, **kwargs)


@contextmanager
def recomputed() -> Iterator[None]:
    """Inside, results that are cheap to make again are not kept for the backward pass.

    Raises:
        RuntimeError: In the backward pass, if a tensor that a recipe starts from was changed in place.
    """
    tape = _Tape()
    with torch.autograd.graph.saved_tensors_hooks(tape.pack, _unpack), tape:
        yield


_watcher: ContextVar[Callable[[Tensor], object] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(see: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside, `see` is shown every tensor that a tape keeps for the backward pass, some of them again and again."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


@dataclass(eq=False)
class _Recipe:
    """How the storage of a cheap result is made."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    waiting: int = 0
    """Tensors that autograd will ask for; while there are some, the result is kept once it is there."""
    result: Tensor | None = None

    def make(self) -> Tensor:
        if self.result is not None:
            return self.result
        out = self.func(*_filled(self.args), **_filled(self.kwargs))
        result: Tensor = out[0] if isinstance(out, tuple) else out
        self.result = result if self.waiting else None
        return result


@dataclass(frozen=True)
class _Made:
    """A view of what a recipe makes."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Kept:
    """A tensor that is needed again as it is."""

    alias: Tensor
    version: int

    def tensor(self) -> Tensor:
        if self.alias._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.alias.shape)} was changed in place after the forward pass had used it, "
                'which train.gradient_checkpointing = "selective" cannot undo; set it to true or false'
            )
        return self.alias


class _Asked:
    """What autograd holds in place of a cheap result."""

    def __init__(self, made: _Made, device: str) -> None:
        self.made, self.device, self.new = made, device, True
        made.recipe.waiting += 1

    def tensor(self) -> Tensor:
        recipe = self.made.recipe
        if self.new:
            self.new = False
            recipe.waiting -= 1
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            out = self.made.tensor()
        if not recipe.waiting:
            recipe.result = None
        return out


class _Tape(TorchDispatchMode):
    """Recipes of the cheap results that are alive, by storage: views need no recipe of their own."""

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, _Recipe] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        named = dict(kwargs or {})
        out = func(*args, **named)
        if func._schema.is_mutable:
            for value in (*args, *named.values()):
                if isinstance(value, Tensor):
                    self._recipes.pop(_key(value), None)  # from here on it is no longer what the recipe makes
        elif self._cheap(func, args):
            self._note(out[0] if isinstance(out, tuple) else out, func, args, named)
        return out

    def pack(self, tensor: Tensor) -> Any:
        """What autograd is to hold: an alias of the tensor, or a recipe."""
        made, see = self._made(tensor), _watcher.get()
        if see is not None:
            _show(tensor if made is None else made, see)
        if made is not None:
            return _Asked(made, tensor.device.type)
        alias = tensor.detach()  # the tensor itself would be a cycle that is never let go
        return _Kept(alias, alias._version)

    def _cheap(self, func: Any, args: Any) -> bool:
        if func in _PRODUCTS:
            over, wide = args[-1].shape
            return bool(over <= NARROW or over < wide)
        if func is not _aten.add.Tensor:
            return func in _CHEAP
        x, y = args[:2]
        if not isinstance(y, Tensor) or x.shape != y.shape:
            return True
        return _key(x) in self._recipes and _key(y) in self._recipes  # a sum with what is kept ends a chain of recipes

    def _note(self, out: Tensor, func: Any, args: Any, kwargs: Any) -> None:
        storage = out.untyped_storage()
        if storage._cdata in self._recipes or storage.nbytes() != out.numel() * out.itemsize:
            return
        self._recipes[storage._cdata] = _Recipe(func, self._noted(args), self._noted(kwargs))
        weakref.finalize(storage, _forget, self._recipes, storage._cdata)

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._made(value) or _keep(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._noted(v) for v in value)
        return {k: self._noted(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _made(self, tensor: Tensor) -> _Made | None:
        recipe = self._recipes.get(_key(tensor))
        if recipe is None:
            return None
        return _Made(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _forget(recipes: dict[int, _Recipe], key: int) -> None:
    recipes.pop(key, None)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _keep(tensor: Tensor) -> _Kept:
    """An alias without history that shares the count of changes in place."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        alias = tensor.detach()
    return _Kept(alias, alias._version)


def _filled(value: Any) -> Any:
    """Arguments with tensors in the places of recipes."""
    if isinstance(value, (_Made, _Kept)):
        return value.tensor()
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(v) for v in value)
    return {k: _filled(v) for k, v in value.items()} if isinstance(value, dict) else value


def _show(value: Any, see: Callable[[Tensor], object]) -> None:
    """Shows the tensors that a value, or the recipe of one, holds."""
    if isinstance(value, _Made):
        _show((*value.recipe.args, *value.recipe.kwargs.values()), see)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _show(one, see)
    elif isinstance(value, (Tensor, _Kept)):
        see(value if isinstance(value, Tensor) else value.alias)


def _unpack(held: _Asked | _Kept) -> Tensor:
    return held.tensor()
