"""What a network sees on its way: outputs of inner modules, taken from its own forward pass, which ends at the last.

The network runs eagerly, in float32, without autocast and without checkpointing: two inputs of an encoder lie about
1e-3 apart, one or two units in the last place of fp16, and a pass that is computed again during backward would meet
adapters that have been switched on meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import InputError


def captured(net: Any, modules: Sequence[nn.Module], x_t: Float[Tensor, " b *rest"], **inputs: Any) -> list[Any]:
    """Outputs of `modules`, in their order, when the diffusers model `net` runs on `x_t`; nothing after them runs.

    Args:
        net: Without wrappers. Its class's own forward is called, so neither compilation nor a precision policy that was
            put around it takes part.
        x_t: Float32 or float64, as the weights are.
        inputs: What else the forward takes; floating-point tensors are brought to the dtype of `x_t`.

    Raises:
        RuntimeError: Inputs or weights are narrower than float32.
    """
    _check_precision(net, x_t)
    found: dict[int, Any] = {}

    def keep(place: int, module: nn.Module, args: Any, output: Any) -> None:
        found[place] = output
        if len(found) == len(modules):
            raise _Done

    wide = {k: v.to(x_t.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(x_t.device.type, enabled=False))
        stack.enter_context(_not_checkpointed(net))
        for place, module in enumerate(modules):
            stack.enter_context(module.register_forward_hook(partial(keep, place)))
        stack.enter_context(suppress(_Done))
        type(net).forward(net, x_t, **wide)
    assert len(found) == len(modules), "every wanted module must be on the forward pass"
    return [found[place] for place in range(len(modules))]


def first_blocks(net: Any, *, mid: bool, blocks: int | None) -> list[nn.Module]:
    """The blocks of a transformer that count as its encoder, None for half of them.

    Raises:
        InputError: `mid` is set, or there are fewer blocks.
    """
    depth = len(net.transformer_blocks)
    count = max(1, depth // 2) if blocks is None else blocks
    if mid:
        raise InputError("method.perception.mid must be false with a transformer, which has no middle block")
    if not 1 <= count <= depth:
        raise InputError(f"method.perception.blocks must be at most the transformer's {depth}, got {count}")
    return list(net.transformer_blocks[:count])


def token_maps(
    tokens: Sequence[Float[Tensor, "b _n _d"]], x_t: Float[Tensor, "b c h w"], patch: int
) -> list[Float[Tensor, "b _d _h _w"]]:
    """Image tokens, row by row of squares of `patch` latents, as maps."""
    h, w = (side // patch for side in x_t.shape[-2:])
    return [level.transpose(1, 2).unflatten(2, (h, w)) for level in tokens]


def join_levels(
    levels: Sequence[Float[Tensor, "b _c _h _w"]], *, normalize: bool = False, pool: bool = False
) -> Float[Tensor, "b d h w"]:
    """Maps of several sizes as one: each reshaped to the smallest height and width, then joined on channels.

    Args:
        levels: From shallow to deep.
        normalize: Multiply level k by C_last / C_k, with C_k its channels after reshaping, so that a level does not
            count by its size.
        pool: Average every level over space first.

    Paper: Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636
        (`collect_intermediate_steps`, `normalize` and `pool_encoder` of the authors' code).
    """
    if pool:
        levels = [level.mean((2, 3), keepdim=True) for level in levels]
    h, w = (min(level.shape[i] for level in levels) for i in (2, 3))
    shaped = [level.reshape(len(level), -1, h, w) for level in levels]
    if normalize:
        shaped = [level * (shaped[-1].shape[1] / level.shape[1]) for level in shaped]
    return torch.cat(shaped, dim=1)


class _Done(Exception):
    """The last wanted output is there."""


@contextmanager
def _not_checkpointed(net: Any) -> Iterator[None]:
    before = net.is_gradient_checkpointing
    if before:
        net.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if before:
            net.enable_gradient_checkpointing()


def _check_precision(net: nn.Module, x_t: Tensor) -> None:
    for what, dtype in (("inputs", x_t.dtype), *(("weights", p.dtype) for p in net.parameters())):
        if dtype.itemsize < 4:
            name = str(dtype).removeprefix("torch.")
            raise RuntimeError(
                f"{what} of a feature encoder must be float32, got {name}; its inputs lie too close together for less"
            )
