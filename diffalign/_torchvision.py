"""A cure for torchvision beside a CPU build of torch: the wheel on the package index is built for CUDA.

Its C extension then does not load, and `import torchvision` fails because the operators `torchvision::nms` and
`torchvision::qnms` are unknown; with it fail peft, open_clip and large parts of transformers and diffusers. Declaring
the two schemas lets everything import that does not call them. With a torch that has CUDA, or without torchvision,
this does nothing.
"""

import importlib.util
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_kept: list[Any] = []


def declare_missing_operators() -> None:
    """Makes `import torchvision` work beside CPU torch; calling the two operators still raises."""
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    for _ in range(len(_OPERATORS) + 1):
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = [name for name in _OPERATORS if f"torchvision::{name} does not exist" in str(error)]
            if not missing:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(missing[0] + _SCHEMA)
            _kept.append(library)
