"""How rewards read networks: what a library raises becomes one line, and no weight is left at random."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import InputError
from diffalign.progress import loading

_LENGTH = 300
"""Letters of a library's message that are shown."""


@contextmanager
def reading(must: str, got: str) -> Iterator[None]:
    """Turns what libraries raise over a file or a model into `<must>, got <got>: <why>`.

    Raises:
        InputError: In place of theirs.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        why = " ".join(str(error).split())[:_LENGTH]
        raise InputError(f"{must}, got {got!r}: {why}") from error


def whole_network(read: Callable[..., Any], model: str, revision: str | None, *, where: str, kind: str) -> Any:
    """A network of transformers or diffusers in float32, to be used and not trained.

    Args:
        read: Its class's `from_pretrained`, with the options that it needs.
        model: A folder or a hub id.
        revision: Of the model on the hub.
        where: What is read and for whom, for messages: "encoder dino: model".
        kind: What it must be: "a ViT".

    Raises:
        InputError: It cannot be read, or lacks weights, which the library would draw at random. Whole numbers may be
            missing: positions and their like, which old files do not hold, are alike in every model.
    """
    with reading(f"{where} must be {kind}", model), loading(model):
        net, found = read(model, revision=revision, weights_only=True, dtype=torch.float32, output_loading_info=True)
    learned = {name for name, held in net.state_dict().items() if held.is_floating_point()}
    missing = sorted(learned & set(found["missing_keys"]))
    if missing:
        raise InputError(f"{where} must hold all weights, got {model!r} without {', '.join(missing[:3])}")
    return net.eval().requires_grad_(False)


def read_state(file: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a file by name; arrays become tensors.

    Raises:
        InputError: It cannot be read as `read_file` does, or holds something else.
    """
    state = read_file(file, what)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor | np.ndarray) for value in state.values()):
        raise InputError(f"{what} must be a state dict, got {type(state).__name__} in {str(file)!r}")
    return {name: torch.as_tensor(value) for name, value in state.items()}


def read_file(file: Path, what: str) -> Any:
    """What a .safetensors file holds, or a pickle, which is read without running code.

    Raises:
        InputError: It is missing, damaged, or would run code.
    """
    with reading(f"{what} must be readable", str(file)):
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)


def pinned(model: str, revision: str | None) -> str:
    """A model's name with its revision, if one is pinned."""
    return model if revision is None else f"{model}@{revision}"
