"""Weights shared out over processes (FSDP2), for full fine-tuning of what does not fit on one device.

Of every weight, its gradient and its optimizer states a process holds the rows that are its own. The weights of a block
are gathered when it runs and let go after it, forward and backward; its gradients are averaged over the processes and
shared out at once, in every micro-batch. So a step is that of DistributedDataParallel, with more traffic and an N-th of
the memory. Files know nothing of it: what is written is whole, and what is read is cut to a process's rows.

All processes must run the network equally often and gather in the same order, or they wait for each other for ever.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shard(net: nn.Module, mesh: Any, *, blocks: Sequence[str], dtype: torch.dtype | None = None) -> None:
    """Shares out a network's weights in place, and moves them to the mesh's device one block after the other.

    Args:
        mesh: A `DeviceMesh` of one dimension, as `mesh_of` makes it.
        blocks: Classes of the modules that are gathered each by itself; the weights outside them are one more.
        dtype: Type that weights are gathered in; None is their own. Rows and gradients stay as they are stored.

    Raises:
        ValueError: The network has no such block.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for group in grouped(net, blocks):
        # the root lets go too: what a pass without gradient leaves gathered would be old after the next step
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def grouped(net: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """Modules whose weights are gathered together, inner ones first and the network itself last.

    Raises:
        ValueError: The network has no such block.
    """
    found = [module for module in net.modules() if type(module).__name__ in blocks]
    if not found:
        raise ValueError(f"blocks must name classes of the network's modules, got {', '.join(blocks)}")
    return [*reversed(found), net]


def group_sizes(net: nn.Module, blocks: Sequence[str]) -> list[int]:
    """Numbers of weights that are gathered together, in the order of `grouped`."""
    met: set[int] = set()
    sizes = []
    for group in grouped(net, blocks):
        fresh = {id(p): p.numel() for p in group.parameters() if id(p) not in met}
        met |= fresh.keys()
        sizes.append(sum(fresh.values()))
    return sizes


def gathered_bytes(sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Most bytes at a time that sharding holds beside a process's own rows, given what `group_sizes` found.

    The weights outside all blocks, a block that runs and the next one, which is gathered meanwhile, through a buffer;
    and the gradients of a block, as they come and in float32 to be shared out.
    """
    *blocks, outer = sizes
    width = dtype.itemsize
    return width * outer + max(max(blocks) * (3 * width + width + 4), outer * (width + 4))


def mesh_of(device: torch.device, processes: int) -> Any:
    """All processes in a row, which their group must have been made for."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (processes,))


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A process's own rows of tensors, in the memory that they share with them; whole tensors as they are."""
    return [t.to_local() if _shared(t) else t for t in tensors]  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the rows of all processes, which must all call this."""
    return tensor.detach().full_tensor() if _shared(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU where they had to be gathered; all processes must call this.

    Args:
        keep: This process wants them. Others get none of those that were gathered.
    """
    found = {}
    for name, tensor in tensors.items():
        there = whole(tensor)  # one at a time is all that a device has room for
        if not _shared(tensor):
            found[name] = there
        elif keep:
            found[name] = there.cpu()
    return found


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut to this process's rows, on the device of `like` and shared out as that is."""
    if not _shared(like):
        return tensor.to(like.device)
    mesh = like.device_mesh  # type: ignore[attr-defined]
    count = -(-len(tensor) // mesh.size())
    first = min(len(tensor), count * mesh.get_local_rank())
    return _joined(tensor[first : first + count].to(like.device, copy=True), like)


def join_rows(rows: Sequence[Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `local` gave, as tensors that are shared out as those of `like` are, by their names."""
    return {name: _joined(own, whole) for own, (name, whole) in zip(rows, like.items(), strict=True)}


def gather_optimizer(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """An optimizer's `state_dict` with whole tensors; all processes must call this."""
    found = {}
    for index, entry in state["state"].items():
        tensors = {name: value for name, value in entry.items() if isinstance(value, Tensor)}
        found[index] = {**{k: v for k, v in entry.items() if k not in tensors}, **gathered(tensors, keep=keep)}
    return {**state, "state": found}


def cut_optimizer(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimizer's `state_dict` with whole tensors, cut to this process's rows of its parameters."""
    found = {}
    for index, entry in state["state"].items():
        like = parameters[index]
        found[index] = {
            name: rows_of(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in entry.items()
        }
    return {**state, "state": found}


def _joined(rows: Tensor, like: Tensor) -> Tensor:
    if not _shared(like):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _shared(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
