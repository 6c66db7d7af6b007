"""Out to what others load: a LoRA by the pipeline's own writer, or the denoiser as a component folder."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.denoisers import Family
from diffalign.models.lora import POLICY, lora_state


def export_lora(net: Any, family: Family, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` with the adapter's metadata, without which alpha would be lost."""
    metadata = net.peft_config[POLICY].to_dict()
    with replacing(folder) as fresh:
        family.save_lora(fresh, lora_state(net), metadata)


def export_full(net: Any, family: Family, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes the denoiser as the pipeline's component folder, `unet/` or `transformer/`."""
    with replacing(folder) as fresh:
        weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in net.state_dict().items()}
        net.save_pretrained(fresh / family.net, state_dict=weights, safe_serialization=True)


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
