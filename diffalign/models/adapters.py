"""Which of a network's LoRA adapters run, by name and weight; and a choice for each branch of guidance."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from diffalign.errors import InputError, near_match
from diffalign.models.lora import adapter_layers
from diffalign.paths import NoisePath, Prediction
from diffalign.types import Cond, Denoiser

Adapters = str | Mapping[str, float | int]
"""An adapter by name, or several with the weight that each is multiplied by; an empty mapping is the base alone."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A denoiser whose network runs with the adapters named here, whichever are active outside."""

    denoiser: Denoiser
    layers: tuple[Any, ...]
    """Adapted layers of its network."""
    weights: Mapping[str, float]

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        with mixed(self.layers, self.weights):
            return self.denoiser(x_t, t, cond)


@contextmanager
def mixed(layers: tuple[Any, ...], weights: Mapping[str, float]) -> Iterator[None]:
    """Inside, `layers` run with these adapters, each times its weight, and with no other; after it, as before."""
    before = [(layer._disable_adapters, layer._active_adapter, dict(layer.scaling)) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = not weights
            layer._active_adapter = list(weights)
            for name, weight in weights.items():
                layer.set_scale(name, weight)
        yield
    finally:
        for layer, (disabled, active, scaling) in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
            layer._active_adapter = active
            layer.scaling.update(scaling)


def branches(
    denoiser: Denoiser, net: nn.Module, adapter: Adapters | None, negative: Adapters | None
) -> tuple[Denoiser, Denoiser | None]:
    """The models of the conditional and of the negative branch of guidance, on one network.

    Args:
        adapter: None is the network as it is; beside a `negative` one that names a single adapter it is the only other
            adapter that is loaded, or the base if there is none.
        negative: None is that of the conditional branch, for which the second model is None.

    Raises:
        InputError: An adapter that is not loaded, a weight that is no finite number, or a choice to be made.
    """
    layers = adapter_layers(net)
    loaded = sorted({name for layer in layers for name in layer.scaling})
    if negative is None:
        weights = None if adapter is None else _weights("adapter", adapter, loaded)
        return (denoiser if weights is None else Adapted(denoiser=denoiser, layers=layers, weights=weights)), None
    apart = _weights("negative_adapter", negative, loaded)
    if adapter is None:
        others = [name for name in loaded if name not in apart]
        if len(apart) != 1 or len(others) > 1:
            raise InputError(
                f"adapter must be named beside negative_adapter={negative!r} with the adapters {', '.join(loaded)} "
                "loaded, got None; {} is the model without any"
            )
        adapter = dict.fromkeys(others, 1.0)
    chosen = Adapted(denoiser=denoiser, layers=layers, weights=_weights("adapter", adapter, loaded))
    return chosen, Adapted(denoiser=denoiser, layers=layers, weights=apart)


def _weights(where: str, adapter: Adapters, loaded: list[str]) -> dict[str, float]:
    weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
    for name, weight in weights.items():
        if name not in loaded:
            hint = near_match(name, loaded) if loaded else "; none is: call load_lora_weights with an adapter_name"
            raise InputError(f"{where} must be a loaded adapter, got {name!r}{hint}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise InputError(f"{where}[{name!r}] must be a finite number, got {weight!r}")
    return {name: float(weight) for name, weight in weights.items()}
