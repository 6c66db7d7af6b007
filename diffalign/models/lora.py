"""LoRA on a denoiser (peft), and the reference policy that it gives for free: the same network with its adapter off.

Adapters are switched by setting the layers' own flags, inside a context that restores them whatever happens. Peft's
`disable_adapters` would also flip `requires_grad` of every LoRA tensor, twice a step.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from diffalign.denoisers import Family
from diffalign.errors import InputError
from diffalign.paths import NoisePath, Prediction
from diffalign.types import Cond, Encoder

POLICY = "default"
"""Name of the trained adapter; the one that the exporters of Diffusers expect."""
REFERENCE = "reference"
"""Name of the frozen copy of a LoRA that training started from."""
OLD = "old"
"""Name of the slow copy of a LoRA that samples in its place."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of the trained adapter."""

    rank: int = 16
    alpha: float | None = None
    """Scale of the adapter is alpha / rank; None takes alpha = rank."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of adapted modules; None takes the family's attention projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank must be at least 1, got {self.rank}")


def add_lora(net: Any, settings: LoraSettings, targets: tuple[str, ...], *, seed: int) -> None:
    """Adds a trainable adapter that changes nothing yet (B = 0), its weights in float32.

    Raises:
        InputError: A target matches no module of the network.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    chosen = settings.targets or targets
    names = [name for name, _ in net.named_modules()]
    for target in chosen:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise InputError(f"lora.targets must name modules of the denoiser, got {target!r}, which matches none")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else settings.rank,
        init_lora_weights="gaussian",
        target_modules=list(chosen),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(net, config, POLICY)
    cast_training_params(net, torch.float32)


def _inject(net: Any, config: Any, name: str) -> None:
    """Adds an adapter and makes it the active one, also to networks that Diffusers gave no such method."""
    from diffusers.loaders import PeftAdapterMixin
    from peft import inject_adapter_in_model

    if isinstance(net, PeftAdapterMixin):
        net.add_adapter(config, adapter_name=name)
        return
    inject_adapter_in_model(config, net, adapter_name=name)
    activate(net, name)


def activate(net: nn.Module, name: str) -> None:
    """Puts one of a network's adapters in use."""
    for layer in adapter_layers(net):
        layer.set_adapter(name)


def fuse(net: nn.Module) -> None:
    """Adds a network's adapters to its weights and takes the adapted layers away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())


def start_from_lora(pipeline: Any, net: Any, family: Family, path: str, settings: LoraSettings) -> None:
    """Loads a LoRA twice: as the adapter to train, and as the frozen reference.

    Args:
        pipeline: A pipeline that holds the denoiser `net` and nothing else; its own loader reads the file.

    Raises:
        InputError: The LoRA's rank or alpha is not that of `settings`, or it adapts more than the denoiser.
    """
    from diffusers.training_utils import cast_training_params

    from diffalign.models.load import load_lora_into

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are what we want
        for name in (REFERENCE, POLICY):
            load_lora_into(pipeline, family, path, adapter=name)
    config = net.peft_config[POLICY]
    if config.r != settings.rank or settings.alpha not in (None, config.lora_alpha):
        raise InputError(
            f"lora.rank and .alpha must equal those of model.lora ({config.r}, {config.lora_alpha}), "
            f"got {settings.rank}, {settings.alpha}"
        )
    activate(net, POLICY)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{POLICY}." in name)
    cast_training_params(net, torch.float32)


def add_reference(net: Any, name: str = REFERENCE) -> None:
    """Sets a frozen float32 copy of the trained adapter beside it; where training started from a LoRA it is there."""
    from diffusers.training_utils import cast_training_params

    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if name not in net.peft_config:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            _inject(net, net.peft_config[POLICY], name)
        activate(net, POLICY)
        for key, parameter in net.named_parameters():
            parameter.requires_grad_(key in trained)
        cast_training_params(net, torch.float32)
    with torch.no_grad():
        for key, parameter in reference_parameters(net, name).items():  # may be stored in 16 bits: too few to average
            parameter.data = trained[key].detach().clone()


def reference_parameters(net: Any, adapter: str = REFERENCE) -> dict[str, nn.Parameter]:
    """Weights of a frozen adapter by the names of the trained ones."""
    own = f".{adapter}."
    return {name.replace(own, f".{POLICY}."): p for name, p in net.named_parameters() if own in name}


def lora_state(net: Any) -> dict[str, Tensor]:
    """Weights of the trained adapter in peft's names, as exporters take them."""
    from peft import get_peft_model_state_dict

    return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(net, adapter_name=POLICY).items()}


@dataclass(frozen=True, kw_only=True)
class AdapterReference:
    """The policy's own network with its adapter off, or with a frozen adapter in its place.

    Its weights never get a gradient. Its predictions carry none; its features carry that of their input.
    """

    policy: Encoder
    layers: tuple[Any, ...]
    adapter: str | None
    """None switches adapters off; a name puts that adapter in place of the trained one."""

    @property
    def path(self) -> NoisePath:
        return self.policy.path

    @property
    def prediction(self) -> Prediction:
        return self.policy.prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        with torch.no_grad(), switched(self.layers, self.adapter):
            return self.policy(x_t, t, cond)

    def features(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        cond: Cond,
        *,
        mid: bool = False,
        blocks: int | None = None,
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Maps of the policy's encoder without the trained adapter."""
        with switched(self.layers, self.adapter):
            return self.policy.features(x_t, t, cond, mid=mid, blocks=blocks)


def adapter_reference(policy: Encoder, net: nn.Module) -> AdapterReference:
    """The reference that lives in the adapted network `net` of `policy`: base alone, or base and the starting LoRA."""
    layers = adapter_layers(net)
    started = any(REFERENCE in layer.lora_A for layer in layers)
    return AdapterReference(policy=policy, layers=layers, adapter=REFERENCE if started else None)


def adapter_layers(net: nn.Module) -> tuple[Any, ...]:
    """Every adapted layer of a network."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return tuple(module for module in net.modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def switched(layers: tuple[Any, ...], adapter: str | None) -> Iterator[None]:
    """Inside, `layers` run with adapters off (None) or with `adapter`; after it, as before."""
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    states = [vars(layer) for layer in layers]  # setting an attribute of a module takes ten times as long
    try:
        for state in states:
            if adapter is None:
                state["_disable_adapters"] = True
            else:
                state["_active_adapter"] = [adapter]
        yield
    finally:
        for state, (disabled, active) in zip(states, before, strict=True):
            state["_disable_adapters"] = disabled
            state["_active_adapter"] = active
