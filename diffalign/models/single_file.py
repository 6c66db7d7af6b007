"""Checkpoints in one file, in the layout of the model's authors, read by Diffusers' own converters.

Such a file holds weights alone. Configs, tokenizers and the scheduler come from `home`, the folder or hub id of a
pipeline of the same kind; so do text encoders and a VAE that the file does not hold.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffalign.denoisers import FAMILIES, Family
from diffalign.errors import InputError
from diffalign.models.reading import check_weights, one_line


def is_single_file(path: str) -> bool:
    """A path that names a file of weights, and not a folder or a hub id."""
    return path.endswith(".safetensors")


def is_checkpoint(file: str) -> bool:
    """A file that holds a denoiser, and not a LoRA for one."""
    names = _shapes(file, "model")
    prefixes = tuple(p for family in FAMILIES.values() for p in family.in_file.get(family.net, ()))
    return any(n.startswith(prefixes) for n in names) and not any("lora" in n for n in names)


def guess_home(file: str) -> str:
    """Hub id of the published pipeline whose layout a file has, as Diffusers finds it from names and shapes."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(_shapes(file, "model.path"))["pretrained_model_name_or_path"])


def load_parts(
    family: Family, file: str, home: str, names: Sequence[str], *, revision: str | None = None, where: str
) -> dict[str, Any]:
    """Those components of `names` that a file holds, in eval mode and float32.

    Args:
        home: Folder or hub id of a pipeline whose configs the weights fit.
        names: Components of the pipeline.
        revision: Of a hub id.
        where: Key of the file, for messages.

    Raises:
        InputError: The family has no such layout, the file lacks the denoiser, its weights do not fit the configs, or a
            component is neither in the file nor in a local `home`.
    """
    import diffusers

    if not family.in_file:
        raise InputError(
            f"{where} must be a folder or a hub id with the family {family.name!r}, which has no layout of a single "
            f"file; got {file!r}"
        )
    stored = _shapes(file, where)
    inside = [n for n in names if any(key.startswith(family.in_file.get(n, ())) for key in stored)]
    if family.net in names and family.net not in inside:
        prefix = family.in_file[family.net][0]
        raise InputError(
            f"{where} must hold the {family.net} of the family {family.name!r} in its authors' layout, weights whose "
            f"names start with {prefix!r}, got {file!r} without them"
        )
    if Path(home).is_dir():
        for name in names:
            if name in family.in_file and name not in inside and _is_component(Path(home), name):
                check_weights(Path(home) / name, f"{name!r} is not in {file!r}; model.config")
    if not inside:
        return {}
    cls = getattr(diffusers, family.pipelines[0])
    left_out = {n: None for n in cls._get_signature_keys(cls)[0] if n not in (*inside, "scheduler")}
    lacking = InputError(
        f"{where} must hold all weights of {' and '.join(inside)} as {home!r} has them, got {file!r}, which lacks some"
    )
    with one_line(where, file):
        try:
            made = cls.from_single_file(file, config=home, revision=revision, **left_out).components
        except NotImplementedError as error:  # a weight that nothing was read for cannot be moved
            raise lacking from error
    for name in inside:
        if any(parameter.is_meta for parameter in made[name].parameters()):
            raise lacking
        nn.Module.to(made[name], torch.float32)  # the classes' own would warn of it
    return {name: made[name].eval().requires_grad_(False) for name in inside}


def _is_component(home: Path, name: str) -> bool:
    """`name` is a component that the pipeline in `home` has."""
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.load_config(home).get(name)
    return isinstance(found, (list, tuple)) and found[0] is not None


def _shapes(file: str, where: str) -> dict[str, Tensor]:
    """Tensors of a file by name, without their content."""
    if not Path(file).is_file():
        raise InputError(f"{where} must be a folder, a hub id or a .safetensors file that is there, got {file!r}")
    with one_line(where, file), safe_open(file, framework="pt") as content:
        return {name: torch.empty(content.get_slice(name).get_shape(), device="meta") for name in content.keys()}
