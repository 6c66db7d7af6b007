"""Everything that can be wrong with an evaluation, checked before a sample is made."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from diffalign import rewards as plugins
from diffalign.data.prompts import PromptSet, read_prompts
from diffalign.errors import InputError, near_match
from diffalign.evaluate.arms import Arm
from diffalign.evaluate.comparison import Judge
from diffalign.evaluate.form import Form
from diffalign.evaluate.media import PICTURES, Clips, Medium
from diffalign.evaluate.results import ROLES, Role
from diffalign.evaluate.score import columns_of
from diffalign.evaluate.store import JOURNALS, write_whole
from diffalign.types import MediaEncoder, Reward, SetReward

PROMPTS_FILE = "prompts.jsonl"
"""Written first and removed last, so that it marks a folder as one of an evaluation."""
RESULTS_FILE = "results.json"
"""Written last and removed first: where it lies, the evaluation is whole."""
MANIFEST_FILE = "manifest.json"
"""What the images depend on; an evaluation that is taken up again must agree with it."""

_OURS = {
    PROMPTS_FILE, MANIFEST_FILE, PICTURES.folder, Clips.folder, "sweep", JOURNALS, "scores.parquet", "sweep.parquet",
    "report.html", "summary.md", RESULTS_FILE,
}  # fmt: skip
_LABELS = ("category", "tag", "style", "challenge")
"""Labels that results are told apart by; totals are stratified by the first that is there."""


def distinct(prompts: str | Path | Sequence[str] | PromptSet) -> tuple[PromptSet, int]:
    """Each prompt once, in order, and how many were dropped; of a set whose rows are places, every row."""
    if isinstance(prompts, (str, Path)):
        prompts = read_prompts(prompts)
    if not isinstance(prompts, PromptSet):
        prompts = PromptSet(name="given in Python", prompts=list(prompts), metadata=[{} for _ in prompts])
    if not prompts.prompts:
        raise InputError("prompts must hold at least one prompt, got none")
    if prompts.indexed:
        return prompts, 0
    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts.prompts)))}
    kept = prompts.rows(sorted(first.values()))
    return kept, len(prompts) - len(kept)


def load_judges(
    specs: Sequence[str | Reward | SetReward], roles: Mapping[str, str]
) -> tuple[list[Reward], list[Judge], dict[str, SetReward]]:
    """(rewards, their parts in the evaluation, rewards of sets by spec); without a declared role one is held out."""
    if not specs:
        raise InputError("rewards must name at least one reward, got none")
    sets: dict[str, SetReward] = {}
    found: list[tuple[str, Reward]] = []
    for spec in specs:
        if isinstance(spec, str) and spec.partition(":")[0] in plugins.names(plugins.SET_GROUP):
            sets[spec] = plugins.load_set(spec)
        elif isinstance(spec, SetReward):
            sets[f"{spec.name}:{spec.version}" if spec.name in sets else spec.name] = spec
        else:
            reward = plugins.load(spec) if isinstance(spec, str) else spec
            found.append((spec if isinstance(spec, str) else reward.name, reward))
    names = [reward.name for _, reward in found]
    if not found:
        raise InputError(f"rewards must name at least one reward of single images, got {', '.join(sets)} of sets alone")
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
            spec=spec,
            version=reward.version,
            role=cast(Role, roles.get(reward.name, "held_out")),
            role_declared=reward.name in roles,
        )
        for spec, reward in found
    ]
    return [reward for _, reward in found], judges, sets


def check_arms(arms: Sequence[Arm], sweep: Sequence[float]) -> None:
    """Finished images have the guidance that they have."""
    finished = [arm.name for arm in arms if arm.images is not None]
    if finished and sweep:
        raise InputError(f"sweep must be of models, got {', '.join(finished)} as finished images")


def rehearse(rewards: Sequence[Reward], judges: Sequence[Judge], prompts: PromptSet, form: Form) -> None:
    """Lets every reward score one sample, so that what is wrong with it shows before hours of sampling."""
    trial = form.medium.trial(form.sample)[None]
    for reward, judge in zip(rewards, judges, strict=True):
        columns_of(reward, form.of(judge.spec).asked(trial, prompts.prompts[:1], prompts.metadata[:1]))


def check_encoder(encoder: MediaEncoder, spec: str, medium: Medium) -> None:
    """Raises InputError for an encoder of other samples."""
    if encoder.modality != medium.modality:
        raise InputError(f"encoder must be of {medium.folder}, got {spec!r} of {encoder.modality}")


def claim(folder: Path, prompts: PromptSet, manifest: Mapping[str, Any], *, fresh: bool = False) -> None:
    """Makes the folder and writes manifest and prompts there, or takes up the evaluation in it; others' files stay.

    Raises:
        InputError: A file of another origin has the name of one of ours, or the evaluation there has other settings.
    """
    found = {place.name for place in folder.iterdir()} & _OURS if folder.is_dir() else set()
    if folder.is_file() or (found and PROMPTS_FILE not in found):
        others = ", ".join(sorted(found)[:3]) or "a file of that name"
        raise InputError(
            f"output must be a folder without {', '.join(sorted(_OURS))} of another origin, got {str(folder)!r} with "
            f"{others}"
        )
    if found and not fresh:
        _check_same(folder, manifest)
    for name in sorted(
        found if fresh else found & {RESULTS_FILE}, key=lambda n: (n != RESULTS_FILE, n == PROMPTS_FILE)
    ):
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    rows = zip(prompts.prompts, prompts.metadata, strict=True)
    lines = [json.dumps({"prompt": prompt, **about}, ensure_ascii=False) for prompt, about in rows]
    write_whole(folder / PROMPTS_FILE, ("\n".join(lines) + "\n").encode())
    write_whole(folder / MANIFEST_FILE, (json.dumps(manifest, indent=1) + "\n").encode())


def _check_same(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Whether what lies there can be gone on with: arms and seeds may join, what images depend on may not change."""
    file = folder / MANIFEST_FILE
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    remedy = "name a new folder, or start it anew with fresh"
    if old.get("format") != manifest["format"]:
        raise InputError(
            f"output must be a new folder, got {str(folder)!r} with an evaluation of another version; {remedy}"
        )
    changes = [("prompts", old["prompts"]["sha256"], manifest["prompts"]["sha256"])]
    changes += [(name, old["sampling"].get(name), value) for name, value in (manifest["sampling"] or {}).items()]
    for name, about in manifest["arms"].items():
        if name in old["arms"]:
            changes.append((f"the model of {name}", old["arms"][name]["digest"], about["digest"]))
    for what, before, now in changes:
        if before != now:
            raise InputError(
                f"output must be a new folder or hold the same evaluation, got {str(folder)!r} where {what} was "
                f"{before!r} and is {now!r} now; {remedy}"
            )


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
