"""The frozen network under a LoRA in 8 or 4 bits: layers of bitsandbytes in place of the linear ones of its blocks.

8 bits are LLM.int8: weights by output row, inputs by token, and columns of an input with a value beyond 6 in 16 bits.
4 bits are NF4: blocks of 64 weights on 16 levels, with a float32 scale each. Layers are swapped when a network is
loaded, so that peft gives them its own adapters; their weights are rounded when it is placed, on the run's device.

Papers: Dettmers et al., "LLM.int8()", arXiv 2208.07339; Dettmers et al., "QLoRA", arXiv 2305.14314.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.environment import need_bitsandbytes

BLOCK = 64
"""Weights that share a scale in 4 bits."""
LEVELS = 16
"""Float32 levels of 4 bits, which every layer keeps."""
OUTLIER = 6.0
"""Where inputs leave int8 for 16 bits; the paper's value."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the frozen network is stored, and what its rounded layers compute in."""

    bits: Literal["8bit", "4bit"]
    dtype: torch.dtype
    """Of inputs and outputs: that of mixed precision."""
    device: torch.device
    """Where weights are rounded."""


def rounded_linears(net: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that are rounded: those of transformer blocks, apart from embedders of t and class inside them."""

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(p.endswith("transformer_blocks") for p in parts) and "emb" not in parts

    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear) and inside(name)}


def swap_linears(net: nn.Module, rounding: Rounding) -> None:
    """Puts layers of bitsandbytes in the place of linear ones; they hold the same weights until `round_weights`.

    Raises:
        InputError: bitsandbytes is missing, or does not work on the device.
    """
    need_bitsandbytes("config.train.quantize", rounding.device)
    _silence()
    for name, linear in rounded_linears(net).items():
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, _layer(linear, rounding).eval().requires_grad_(False))
    setattr(net, f"is_loaded_in_{rounding.bits}", True)  # where peft looks which layers it may meet


def round_weights(net: nn.Module, device: torch.device) -> None:
    """Rounds the weights of swapped layers on a device, or moves there what is rounded already."""
    for layer in swapped_layers(net):
        layer.weight = layer.weight.to(device)


def swapped_layers(net: nn.Module) -> tuple[Any, ...]:
    """Layers of bitsandbytes in a network; none where nothing was swapped."""
    if not any(getattr(net, f"is_loaded_in_{bits}", False) for bits in ("8bit", "4bit")):
        return ()
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return tuple(m for m in net.modules() if isinstance(m, Linear4bit | Linear8bitLt))


def scales(net: nn.Module) -> Iterator[Tensor]:
    """Scales of rounded weights, which are no parameters of their layers."""
    from bitsandbytes.nn import Linear4bit

    for layer in swapped_layers(net):
        if isinstance(layer, Linear4bit):
            yield layer.weight.quant_state.absmax
            yield layer.weight.quant_state.code
        else:
            yield layer.weight.SCB if layer.state.SCB is None else layer.state.SCB


def stored_bytes(weight: Tensor, bits: Literal["8bit", "4bit"]) -> int:
    """What a weight matrix takes when it is rounded, with its scales."""
    count = weight.numel()
    if bits == "8bit":
        return count + 4 * len(weight)
    return -(-count // 2) + 4 * -(-count // BLOCK) + 4 * LEVELS


def spared_bytes(layers: Sequence[nn.Linear], rounding: Rounding | None) -> int:
    """What rounding the weights of some layers saves of what they take."""
    return 0 if rounding is None else sum(m.weight.nbytes - stored_bytes(m.weight, rounding.bits) for m in layers)


def imitate(net: nn.Module, rounding: Rounding | None) -> tuple[nn.Linear, ...]:
    """Lets a network without numbers cost what a rounded one does, but for the bytes of its weights; for a plan.

    Returns:
        The layers that would be rounded.
    """
    if rounding is None:
        return ()
    layers = tuple(rounded_linears(net).values())
    for layer in layers:
        layer.forward = functools.partial(_imitated, layer, rounding)  # type: ignore[method-assign]
    return layers


def _layer(linear: nn.Linear, rounding: Rounding) -> Any:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.data
    layer: Any
    if rounding.bits == "8bit":
        layer = Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind = {"compress_statistics": False, "quant_type": "nf4"}
        layer = Linear4bit(*sizes, bias, compute_dtype=rounding.dtype, device="meta", **kind)
        layer.weight = Params4bit(weight.to(rounding.dtype), requires_grad=False, blocksize=BLOCK, module=layer, **kind)
        layer.support_avx512bf16_for_cpu = False  # would pack weights anew once a call has no gradient
    if bias:
        layer.bias = nn.Parameter(linear.bias.data.to(rounding.dtype), requires_grad=False)
    layer.register_forward_pre_hook(functools.partial(_narrow, rounding.dtype))
    return layer


def _narrow(dtype: torch.dtype, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs in the type of mixed precision, as autocast has them for a layer of PyTorch."""
    x, *rest = arguments
    return (x.to(dtype), *rest)


def _silence() -> None:
    """Takes away one line of bitsandbytes' log, which comes at every call of every layer in 8 bits."""
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if _is_news not in log.filters:
        log.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in str(record.msg)


def _imitated(layer: nn.Linear, rounding: Rounding, x: Tensor) -> Tensor:
    return _Imitation.apply(x.to(rounding.dtype), layer.weight, layer.bias, rounding.bits == "8bit")


class _Imitation(torch.autograd.Function):
    """A linear layer whose weight is made anew in each pass; in 8 bits it holds on to its input until the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keeps: bool) -> Tensor:
        ctx.weight = weight
        ctx.kept = x if keeps and ctx.needs_input_grad[0] else None
        return nn.functional.linear(x, weight.to(x.dtype, copy=True), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        return grad @ ctx.weight.to(grad.dtype, copy=True), None, None, None
