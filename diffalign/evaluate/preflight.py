"""Everything that can be wrong with an evaluation, checked before an image is made."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from diffalign import rewards as plugins
from diffalign.data.prompts import PromptSet, read_prompts
from diffalign.errors import InputError, near_match
from diffalign.evaluate.comparison import Judge
from diffalign.evaluate.generate import arm_source, latent_shape
from diffalign.evaluate.results import ROLES, Role
from diffalign.evaluate.score import score_images
from diffalign.models.load import ModelSource, detect_family, load_net_config, load_vae_config
from diffalign.types import Reward

PROMPTS_FILE = "prompts.jsonl"
"""Written first and removed last, so that it marks a folder as one of an evaluation."""
RESULTS_FILE = "results.json"
"""Written last and removed first: where it lies, the evaluation is whole."""

_OURS = {PROMPTS_FILE, "images", "scores.parquet", "report.html", "summary.md", RESULTS_FILE}
_LABELS = ("category", "challenge")


def base_source(base: str | ModelSource) -> ModelSource:
    """The pipeline that the other arm is compared with."""
    if isinstance(base, ModelSource):
        return base
    source = arm_source(base, ModelSource(path=base))
    if source.path == base and (source.lora or source.denoiser):
        raise InputError(f"base must be a pipeline or a run, got {base!r}, which goes on top of one")
    return source


def distinct(prompts: str | Path | Sequence[str] | PromptSet) -> tuple[PromptSet, int]:
    """Each prompt once, in order, and how many were dropped."""
    if isinstance(prompts, (str, Path)):
        prompts = read_prompts(prompts)
    if not isinstance(prompts, PromptSet):
        prompts = PromptSet(name="given in Python", prompts=list(prompts), metadata=[{} for _ in prompts])
    if not prompts.prompts:
        raise InputError("prompts must hold at least one prompt, got none")
    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts.prompts)))}
    kept = prompts.rows(sorted(first.values()))
    return kept, len(prompts) - len(kept)


def load_judges(specs: Sequence[str | Reward], roles: Mapping[str, str]) -> tuple[list[Reward], list[Judge]]:
    """Rewards, and their parts in the evaluation; a reward without a declared role counts as held out."""
    if not specs:
        raise InputError("rewards must name at least one reward, got none")
    loaded = [plugins.load(spec) if isinstance(spec, str) else spec for spec in specs]
    names = [reward.name for reward in loaded]
    if len(set(names)) < len(names):
        raise InputError(f"rewards must have different names, got {', '.join(names)}")
    for name, role in roles.items():
        if name not in names:
            raise InputError(f"roles must name rewards of this evaluation, got {name!r}{near_match(name, names)}")
        if role not in ROLES:
            raise InputError(f"roles must be one of {', '.join(ROLES)}, got {role!r} for {name!r}")
    judges = [
        Judge(
            name=reward.name,
            spec=spec if isinstance(spec, str) else reward.name,
            version=reward.version,
            role=cast(Role, roles.get(reward.name, "held_out")),
            role_declared=reward.name in roles,
        )
        for spec, reward in zip(specs, loaded, strict=True)
    ]
    return loaded, judges


def common_size(sources: Mapping[str, ModelSource]) -> tuple[int, int]:
    """(height, width) of the images, after the check that all arms start from noise of one shape."""
    shapes, sizes = {}, []
    for arm, source in sources.items():
        channels, height, width = latent_shape(load_net_config(source, detect_family(source)))
        factor = 2 ** (len(load_vae_config(source)["block_out_channels"]) - 1)
        shapes[arm] = (channels, height, width)
        sizes.append((height * factor, width * factor))
    if len(set(shapes.values())) > 1:
        raise InputError(f"base and aligned must start from latents of one shape, got {shapes}")
    return sizes[0]


def rehearse(rewards: Sequence[Reward], prompts: PromptSet, size: tuple[int, int]) -> None:
    """Lets every reward score one gray image, so that what is wrong with it shows before hours of sampling."""
    score_images([torch.full((3, *size), 0.5)], prompts.prompts[:1], rewards, metadata=prompts.metadata[:1])


def claim(folder: Path, prompts: PromptSet) -> None:
    """Makes the folder, emptied of an earlier evaluation, and writes the prompts there; other files are left alone.

    Raises:
        InputError: A file of another origin has the name of one of ours.
    """
    found = {place.name for place in folder.iterdir()} & _OURS if folder.is_dir() else set()
    if folder.is_file() or (found and PROMPTS_FILE not in found):
        others = ", ".join(sorted(found)[:3]) or "a file of that name"
        raise InputError(
            f"output must be a folder without {', '.join(sorted(_OURS))} of another origin, got {str(folder)!r} with "
            f"{others}"
        )
    for name in sorted(found, key=lambda n: (n != RESULTS_FILE, n == PROMPTS_FILE)):
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    rows = zip(prompts.prompts, prompts.metadata, strict=True)
    lines = [json.dumps({"prompt": prompt, **about}, ensure_ascii=False) for prompt, about in rows]
    (folder / PROMPTS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def labels_of(prompts: PromptSet) -> dict[str, list[str]]:
    """Labels that every prompt carries, such as PartiPrompts' Category and Challenge."""
    found = {}
    for wanted in _LABELS:
        for key in prompts.metadata[0]:
            if key.lower() == wanted and all(isinstance(m.get(key), str) and m[key] for m in prompts.metadata):
                found[key] = [str(m[key]) for m in prompts.metadata]
    return found


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" takes the GPU if there is one.

    Raises:
        InputError: A GPU that is not there, or no device at all.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device must be a device of this machine, got {name!r} and no GPU is there")
    return device
