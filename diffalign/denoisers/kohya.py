"""LoRAs in the form of kohya-ss/sd-scripts, which most other programs read.

One file of `<module>.lora_down.weight` [r, in], `.lora_up.weight` [out, r] and `.alpha`: the module's weight gains
alpha / r up @ down. Modules are named as in the layout of the model's authors, with `lora_unet_` before them and
underscores for dots. Where that layout joins what Diffusers keeps apart, the LoRAs become one of the summed rank:

    W = [W_q; W_k; W_v],   down = [down_q; down_k; down_v],   up = blockdiag(up_q, up_k, up_v)

A part without a LoRA leaves zeros in its rows. The change of the weights stays the same, bit for bit where the scales
of the parts agree.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import InputError

PREFIX = "lora_unet_"
"""Before the names of a denoiser's modules, for transformers too."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The LoRA of one module: its weight gains `scale` up @ down."""

    down: Tensor
    up: Tensor
    scale: float


def by_converter(net: Any, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """A U-Net's LoRA by Diffusers' converter, in Diffusers' names of modules.

    The converter takes alpha for the rank, whatever it was; it is put right here.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    weights = {f"unet.{name}.lora_A.weight": a.down for name, a in adapters.items()}
    weights |= {f"unet.{name}.lora_B.weight": a.up for name, a in adapters.items()}
    state: dict[str, Tensor] = convert_state_dict_to_kohya(weights)
    for name, adapter in adapters.items():
        key = f"{PREFIX}{name.replace('.', '_')}.alpha"
        assert key in state, f"the converter names alpha {key}"
        state[key] = torch.tensor(adapter.scale * len(adapter.down))
    return state


def by_table(
    net: Any,
    adapters: Mapping[str, Adapter],
    table: Mapping[str, Sequence[str]],
    *,
    swapped: Sequence[str],
) -> dict[str, Tensor]:
    """A transformer's LoRA in its authors' names.

    Args:
        net: The adapted network, which knows how many rows a part without a LoRA has.
        adapters: By names of the network's modules.
        table: Authors' module -> the network's modules that are its rows, in order; `{}` is the number of a block.
        swapped: Modules whose rows are shift and scale for the authors, scale and shift for Diffusers.

    Raises:
        InputError: An adapted module is not in the table.
    """
    place_of = {part: (place, parts) for place, parts in table.items() for part in parts}
    groups: dict[str, list[str]] = {}
    for name in adapters:
        template, number = re.sub(r"(?<=blocks\.)\d+", "{}", name), re.search(r"(?<=blocks\.)\d+", name)
        if template not in place_of:
            raise InputError(f"the LoRA must adapt modules that kohya files have a name for, got {name!r}")
        place, parts = place_of[template]
        block = number.group() if number else ""
        groups[place.format(block)] = [part.format(block) for part in parts]
    state = {}
    for place, parts in groups.items():
        joined = _joined(net, [(part, adapters.get(part)) for part in parts], scaled=place.startswith("final_layer"))
        up = torch.cat(joined.up.chunk(2)[::-1]) if parts[0] in swapped else joined.up
        key = PREFIX + place.replace(".", "_")
        state[f"{key}.lora_down.weight"] = joined.down.contiguous()
        state[f"{key}.lora_up.weight"] = up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(joined.scale * len(joined.down))
    return state


def _joined(net: Any, parts: Sequence[tuple[str, Adapter | None]], *, scaled: bool) -> Adapter:
    """One LoRA for modules that are one under each other.

    Args:
        scaled: Alpha is the rank and the scale is in `up`, for the final layer, whose alpha Diffusers does not read.
    """
    there = [adapter for _, adapter in parts if adapter is not None]
    scale = 1.0 if scaled else there[0].scale
    if len(parts) == 1:
        return Adapter(down=there[0].down, up=there[0].up * (there[0].scale / scale), scale=scale)
    rank = sum(len(adapter.down) for adapter in there)
    rows, first = [], 0
    for name, adapter in parts:
        count = net.get_submodule(name).out_features if adapter is None else len(adapter.up)
        block = there[0].up.new_zeros(count, rank)
        if adapter is not None:
            last = first + len(adapter.down)
            block[:, first:last] = adapter.up * (adapter.scale / scale)
            first = last
        rows.append(block)
    return Adapter(down=torch.cat([a.down for a in there]), up=torch.cat(rows), scale=scale)
