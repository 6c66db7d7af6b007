"""The two models of an alignment run: the policy that is trained and the reference that it is measured against."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffalign.denoisers import Context, Family
from diffalign.models.load import ModelSource, load_context, load_net, load_pipeline, load_scheduler_config
from diffalign.models.lora import (
    OLD,
    AdapterReference,
    LoraSettings,
    adapter_layers,
    adapter_reference,
    add_lora,
    add_reference,
    reference_parameters,
    start_from_lora,
    switched,
)
from diffalign.models.quantized import Rounding, swap_linears
from diffalign.paths import TimestepSampling
from diffalign.sharding import shard
from diffalign.types import Denoiser


def load_policy(
    source: ModelSource,
    family: Family,
    timesteps: TimestepSampling | None,
    *,
    lora: LoraSettings | None,
    seed: int,
    context: Context | None = None,
    rounding: Rounding | None = None,
) -> Any:
    """The denoiser to train: its parameters that require gradient are the adapter's, or all without `lora`.

    Networks stay in eval mode: no dropout, so that policy and reference are the same function of the same weights.

    Args:
        context: None is that of images of the model's own size.
        rounding: Of the frozen network under `lora`; its layers are rounded when the network is placed.
    """
    if source.lora is not None and lora is not None:
        pipeline = load_pipeline(replace(source, lora=None), only=(family.net,))
        net = pipeline.components[family.net]
        if rounding is not None:
            swap_linears(net, rounding)
        start_from_lora(pipeline, net, family, source.lora, lora)
    else:
        net = load_net(source, family)
        if lora is not None and rounding is not None:
            swap_linears(net, rounding)
        if lora is not None:
            add_lora(net, lora, family.lora_targets, seed=seed)
        else:
            net.requires_grad_(True)
    told = load_context(source, family) if context is None else context
    return family.make_denoiser(net.eval(), load_scheduler_config(source), timesteps, told)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the policy is measured against, and the weights of it that may move."""

    denoiser: Denoiser
    net: Any
    """The network that it runs: the policy's own, or the frozen copy."""
    layers: tuple[Any, ...] = ()
    """Adapted layers of `net`, which are switched to `adapter` where the reference lives in the policy's network."""
    adapter: str | None = None
    parameters: dict[str, torch.nn.Parameter]
    """By the names of the trained parameters; empty for a reference that stays as it is."""

    @contextmanager
    def network(self) -> Iterator[Any]:
        """Inside, the network as the reference, for a pipeline to sample with."""
        with torch.no_grad(), switched(self.layers, self.adapter):
            yield self.net

    def follow(self, trained: Mapping[str, torch.nn.Parameter], *, decay: float) -> None:
        """One step of the moving average: reference <- decay reference + (1 - decay) policy."""
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.parameters.values()), [trained[name].detach() for name in self.parameters], 1 - decay
            )


def make_reference(policy: Any, *, adapted: bool, moves: bool = False, lent: bool = False) -> Reference:
    """The policy as it starts: its network without the adapter, or a frozen copy of it; called by the same code.

    Args:
        adapted: The policy is a network with a trained adapter.
        moves: The reference will be given other weights: an adapter of its own beside the trained one, or the copy.
        lent: The copy has the policy's own weights in memory, until `share_out` gives each rows of its own.
    """
    if adapted:
        if moves:
            add_reference(policy.net)
        parameters = reference_parameters(policy.net) if moves else {}
        inside = adapter_reference(policy, policy.net)
        return Reference(
            denoiser=inside, net=policy.net, layers=inside.layers, adapter=inside.adapter, parameters=parameters
        )
    same = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in policy.net.parameters()} if lent else {}
    frozen = copy.deepcopy(policy.net, same).requires_grad_(False)
    parameters = dict(frozen.named_parameters()) if moves else {}
    return Reference(denoiser=replace(policy, net=frozen), net=frozen, parameters=parameters)


def share_out(
    net: torch.nn.Module,
    reference: Reference | None,
    mesh: Any,
    *,
    blocks: Sequence[str],
    dtype: torch.dtype | None,
) -> Reference | None:
    """Shares the policy's network, and a copy of it that is the reference, out over processes; see `sharding.shard`.

    Returns:
        The reference with its weights as they are now.
    """
    shard(net, mesh, blocks=blocks, dtype=dtype)
    if reference is None:
        return None
    shard(reference.net, mesh, blocks=blocks, dtype=dtype)
    return replace(reference, parameters=dict(reference.net.named_parameters()) if reference.parameters else {})


def make_old(policy: Any, *, adapted: bool) -> Reference:
    """A slow copy of the policy that samples in its place: an adapter of its own beside the trained one, or a copy."""
    if not adapted:
        return make_reference(policy, adapted=False, moves=True)
    add_reference(policy.net, OLD)
    layers = adapter_layers(policy.net)
    inside = AdapterReference(policy=policy, layers=layers, adapter=OLD)
    return Reference(
        denoiser=inside, net=policy.net, layers=layers, adapter=OLD, parameters=reference_parameters(policy.net, OLD)
    )


def cast_frozen(net: torch.nn.Module, dtype: torch.dtype) -> None:
    """Stores the weights that are not trained in a smaller type; trained and rounded ones keep theirs."""
    for parameter in net.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(
                    name, buffer.to(dtype), persistent=name not in module._non_persistent_buffers_set
                )
