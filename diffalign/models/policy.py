"""The two models of an alignment run: the policy that is trained and the reference that it is measured against."""

import copy
from dataclasses import replace
from typing import Any

import torch

from diffalign.denoisers import Family
from diffalign.models.load import ModelSource, load_net, load_pipeline, load_scheduler_config
from diffalign.models.lora import LoraSettings, adapter_reference, add_lora, start_from_lora
from diffalign.paths import TimestepSampling
from diffalign.types import Denoiser


def load_policy(
    source: ModelSource, family: Family, timesteps: TimestepSampling | None, *, lora: LoraSettings | None, seed: int
) -> Any:
    """The denoiser to train: its parameters that require gradient are the adapter's, or all without `lora`.

    Networks stay in eval mode: no dropout, so that policy and reference are the same function of the same weights.
    """
    if source.lora is not None and lora is not None:
        pipeline = load_pipeline(replace(source, lora=None), only=(family.net,))
        net = pipeline.components[family.net]
        start_from_lora(pipeline, net, source.lora, lora)
    else:
        net = load_net(source, family)
        if lora is not None:
            add_lora(net, lora, family.lora_targets, seed=seed)
        else:
            net.requires_grad_(True)
    return family.make_denoiser(net.eval(), load_scheduler_config(source), timesteps)


def make_reference(policy: Any, *, adapted: bool) -> Denoiser:
    """The policy as it starts: its network without the adapter, or a frozen copy of it; called by the same code."""
    if adapted:
        return adapter_reference(policy, policy.net)
    frozen = copy.deepcopy(policy.net).requires_grad_(False)
    return replace(policy, net=frozen)


def cast_frozen(net: torch.nn.Module, dtype: torch.dtype) -> None:
    """Stores the weights that are not trained in a smaller type; trained ones keep theirs."""
    for parameter in net.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(
                    name, buffer.to(dtype), persistent=name not in module._non_persistent_buffers_set
                )
