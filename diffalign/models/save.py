"""Out to what others load: a LoRA in the form of Diffusers, kohya or PEFT, or the denoiser as a component folder."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.denoisers import Family
from diffalign.denoisers.kohya import Adapter
from diffalign.denoisers.peft_files import save_peft
from diffalign.errors import InputError
from diffalign.models.lora import POLICY, adapter_layers, lora_state


def export_lora(net: Any, family: Family, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` with the adapter's metadata, without which alpha would be lost."""
    metadata = net.peft_config[POLICY].to_dict()
    with replacing(folder) as fresh:
        family.save_lora(fresh, lora_state(net), metadata)


def export_kohya(net: Any, family: Family, file: Path) -> None:
    """Writes the adapter as one file in the form of kohya-ss/sd-scripts, alpha included.

    Raises:
        InputError: The family or the adapter has no such form.
    """
    from safetensors.torch import save_file

    if family.to_kohya is None:
        raise InputError(
            f"format must be 'peft' with the family {family.name!r}, which the programs that read kohya's files do not "
            "have; got 'kohya'"
        )
    state = family.to_kohya(net, _adapters(net))
    fresh = file.with_name(f".{file.name}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, fresh, metadata={"format": "pt"})
    with fresh.open("rb") as handle:
        os.fsync(handle.fileno())
    fresh.replace(file)


def export_peft(net: Any, folder: Path) -> None:
    """Writes the adapter as the folder that `PeftModel.from_pretrained(network, folder)` reads."""
    metadata = net.peft_config[POLICY].to_dict()
    with replacing(folder) as fresh:
        save_peft(fresh, lora_state(net), metadata)


def _adapters(net: Any) -> dict[str, Adapter]:
    """The trained adapter by module; its scale is alpha / rank, whatever the config has it from."""
    from peft.tuners.lora import LoraLayer

    found = {}
    layers = set(adapter_layers(net))
    for name, layer in net.named_modules():
        if layer not in layers:
            continue
        plain = isinstance(layer, LoraLayer) and POLICY in layer.lora_A and not layer.lora_magnitude_vector
        if not plain or layer.lora_B[POLICY].bias is not None:
            raise InputError(f"the LoRA must have a down and an up matrix and no more for kohya's form, got {name!r}")
        found[name] = Adapter(
            down=layer.lora_A[POLICY].weight.detach().cpu(),
            up=layer.lora_B[POLICY].weight.detach().cpu(),
            scale=float(layer.scaling[POLICY]),
        )
    return found


def export_full(
    net: Any, family: Family, folder: Path, *, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the denoiser as the pipeline's component folder, `unet/` or `transformer/`.

    Args:
        state: The network's `state_dict` where it is sharded, whole; None asks the network for it.
    """
    cls: Any = family.net_class()
    with torch.device("meta"):  # Diffusers writes a network's own class and weights, which sharding has changed
        plain = cls.from_config(net.config)
    found = net.state_dict() if state is None else state
    plain.load_state_dict({k: v.detach().to("cpu", dtype).contiguous() for k, v in found.items()}, assign=True)
    with replacing(folder) as fresh:
        plain.save_pretrained(fresh / family.net, safe_serialization=True)


class replacing:
    """A folder written beside its name and put in place only when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fresh = folder.with_name(f".{folder.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.fresh, ignore_errors=True)
            return
        for file in sorted(self.fresh.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self.fresh.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}
