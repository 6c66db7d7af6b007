"""A denoiser alone: a folder or repository with its config and weights, at its top or in a component's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.denoisers import Family
from diffalign.errors import InputError
from diffalign.models.reading import hub_files, one_line

WHERE = "model.denoiser"
_FACES = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
    "num_embeds_ada_norm",
    "guidance_embeds",
    "io_channels",
    "cond_token_dim",
    "global_cond_dim",
)
"""Entries of a config that say what a network takes and gives."""


def find_denoiser(path: str, family: Family, native: Mapping[str, Any]) -> str | None:
    """Folder inside `path`, or None for its top, of a fine-tuned denoiser.

    Args:
        native: Config of the pipeline's own denoiser.

    Raises:
        InputError: There is none, it is not to be had, it is of another class than the family's, or it takes or gives
            other things than the pipeline's own.
    """
    cls: Any = family.net_class()
    subfolder = _subfolder(path, family)
    with one_line(WHERE, path):
        config = dict(cls.load_config(path, subfolder=subfolder))
    found = config.get("_class_name", cls.__name__)
    if found != cls.__name__:
        raise InputError(
            f"{WHERE} must be a {cls.__name__}, as the family {family.name!r} has, got {path!r}, a {found}"
        )
    for name in _FACES:
        if name in config and name in native and config[name] != native[name]:
            raise InputError(
                f"{WHERE} must take and give what the denoiser of model.path does, got {path!r} with {name} "
                f"{config[name]!r} in place of {native[name]!r}"
            )
    return subfolder


def _subfolder(path: str, family: Family) -> str | None:
    names = (f"{family.net}/config.json", "config.json")
    if Path(path).is_dir():
        there = [name for name in names if (Path(path) / name).is_file()]
    elif Path(path).exists():
        there = []
    else:
        with one_line(WHERE, path):
            there = hub_files(path, names)
        if not there:
            return None  # the loader says what is wrong
    if not there:
        raise InputError(
            f"{WHERE} must hold a {family.net_class().__name__}, a config.json and weights, in {family.net}/ or at "
            f"its top, got {path!r} with neither"
        )
    return family.net if there[0] == names[0] else None
