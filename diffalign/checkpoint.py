"""A run's state on disk: safetensors and JSON, written beside and then renamed, so there is never half a checkpoint.

checkpoints/step-N/ holds weights, optimizer, ema and reference (if kept; .safetensors) and state.json.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import RunError
from diffalign.models.save import replacing
from diffalign.sharding import rows_of

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had not stopped."""

    step: int
    weights: dict[str, Tensor]
    """Trained parameters by name."""
    optimizer: dict[str, Any]
    """The optimizer's `state_dict`."""
    ema: dict[str, Tensor] | None
    """Moving average of the trained parameters, if one is kept."""
    reference: dict[str, Tensor] | None = None
    """Weights of a reference that moves, by the names of the trained parameters."""
    state: dict[str, Any]
    """JSON values: place in metrics.jsonl, best measure so far, gradient scaler."""


def save_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Writes `step-N` under `root`; an interrupted write leaves what was there before."""
    folder = root / f"step-{checkpoint.step}"
    tensors, rest = _split(checkpoint.optimizer)
    with replacing(folder) as fresh:
        save_file(_contiguous(checkpoint.weights), fresh / "weights.safetensors")
        save_file(tensors, fresh / "optimizer.safetensors")
        if checkpoint.ema is not None:
            save_file(_contiguous(checkpoint.ema), fresh / "ema.safetensors")
        if checkpoint.reference is not None:
            save_file(_contiguous(checkpoint.reference), fresh / "reference.safetensors")
        state = {"step": checkpoint.step, "optimizer": rest, **checkpoint.state}
        (fresh / "state.json").write_text(json.dumps(state, indent=1))
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint back."""
    state = json.loads((folder / "state.json").read_text())
    optimizer = _join(load_file(folder / "optimizer.safetensors"), state.pop("optimizer"))
    ema, reference = folder / "ema.safetensors", folder / "reference.safetensors"
    return Checkpoint(
        step=state.pop("step"),
        weights=load_file(folder / "weights.safetensors"),
        optimizer=optimizer,
        ema=load_file(ema) if ema.is_file() else None,
        reference=load_file(reference) if reference.is_file() else None,
        state=state,
    )


def checkpoints(root: Path) -> dict[int, Path]:
    """Whole checkpoints under `root` by step, ascending."""
    found = {}
    for folder in root.glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and (folder / "state.json").is_file():
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def prune(root: Path, *, keep_last: int, keep: Collection[int | None]) -> None:
    """Removes all but the last `keep_last` checkpoints and those of steps in `keep`."""
    steps = list(checkpoints(root))
    for step in steps[: max(0, len(steps) - keep_last)]:
        if step not in keep:
            shutil.rmtree(root / f"step-{step}")


def drop_after(root: Path, step: int) -> None:
    """Removes checkpoints of steps later than `step`, and leftovers of interrupted writes."""
    for number, folder in checkpoints(root).items():
        if number > step:
            shutil.rmtree(folder)
    for leftover in [*root.glob(".step-*.tmp"), *root.glob(".step-*.old")]:
        shutil.rmtree(leftover)


@contextmanager
def enough_room(place: Path, root: Path) -> Iterator[None]:
    """A full disk at `place` ends the run with one line, which says what is whole among the checkpoints in `root`."""
    try:
        yield
    except Exception as error:  # safetensors has its own class for what the system refuses
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and "No space left" not in str(error):
            raise
        last = max(checkpoints(root), default=None)
        kept = "no checkpoint was written yet" if last is None else f"the last whole checkpoint is step-{last}"
        raise RunError(f"{place} could not be written, the disk is full; {kept}") from error


def write_atomic(file: Path, text: str) -> None:
    """Writes a small text file in one move."""
    fresh = file.with_name(f".{file.name}.tmp")
    with fresh.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(file)


def _split(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "parameter.name", and everything else as JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entry in optimizer["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone().contiguous()
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"numbers": numbers, "param_groups": optimizer["param_groups"]}


def _join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for index, entry in rest["numbers"].items():
        state.setdefault(int(index), {}).update(entry)
    return {"state": state, "param_groups": rest["param_groups"]}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def restore_(parameters: dict[str, torch.nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Copies weights into parameters of the same names, in place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(rows_of(weights[name], parameter))
