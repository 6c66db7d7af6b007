"""What a run ran on: versions, commit and device, for `environment.json` and `diffalign env`."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "diffalign",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pillow",
)
EXTRAS = {
    "openclip": ("open_clip_torch", "torchvision"),
    "xformers": ("xformers",),
    "8bit": ("bitsandbytes",),
    "track": ("tensorboard",),
    "metrics": ("torchmetrics",),
}
"""Packages of each extra of `pip install diffalign[...]`."""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions by package, `missing` where there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def commit() -> str | None:
    """Commit of the checkout that the package runs from; None outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a number in a report may depend on, apart from the config."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions(),
        "commit": commit(),
        "device": device.type,
        "device_name": device_name(device),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def bitsandbytes_fault(device: torch.device) -> str | None:
    """Why an installed bitsandbytes cannot round layers on a device; None if it can: both kinds are tried."""
    try:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        for made in (Linear8bitLt(64, 64, has_fp16_weights=False), Linear4bit(64, 64, compute_dtype=torch.float16)):
            layer = made.to(device).eval()
            x = torch.ones(1, 2, 64, device=device, dtype=torch.float16, requires_grad=True)
            layer(x).sum().backward()
            if x.grad is None or not x.grad.isfinite().all():
                return f"{type(layer).__name__} gives gradients that are not finite"
    except Exception as error:  # whatever a broken build raises is what there is to say
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def need_bitsandbytes(what: str, device: torch.device) -> None:
    """Checks that bitsandbytes is there and works on a device.

    Raises:
        InputError: It is missing, with the extra that brings it, or it cannot round layers there, with the reason.
    """
    from diffalign.errors import InputError

    need_extra("bitsandbytes", "8bit", what)
    fault = bitsandbytes_fault(device)
    if fault is not None:
        version = versions(("bitsandbytes",))["bitsandbytes"]
        raise InputError(f"{what} must have a bitsandbytes that works on {device.type}, got {version}: {fault}")


def need_extra(package: str, extra: str, what: str) -> None:
    """Checks that an optional package is there.

    Raises:
        InputError: It is not; the message names the extra that brings it.
    """
    from importlib.util import find_spec

    from diffalign.errors import InputError

    if find_spec(package) is None:
        raise InputError(
            f"{what} must have the package {package!r}, which is missing; pip install 'diffalign[{extra}]'"
        )
