"""Arms of a comparison: models in every form, or folders of finished images; each known by a hash of what it is."""

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError, near_match
from diffalign.evaluate.score import IMAGES, SOUNDS
from diffalign.evaluate.store import digest_of
from diffalign.models.load import NOT_FOR_IMAGES, ModelSource, load_pipeline
from diffalign.models.reading import hub_files, one_line
from diffalign.models.single_file import is_checkpoint, is_single_file
from diffalign.shipped import MODELS, resolve

FINISHED = IMAGES | SOUNDS
"""Suffixes of what others have made."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OF_A_MODEL = {".safetensors", ".json", ".txt", ".model"}
"""Files that say what a model does."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison."""

    name: str
    spec: str
    source: ModelSource | None
    """None for finished images or clips."""
    images: Path | None = None
    """Folder of finished images or clips."""

    @property
    def run(self) -> Path | None:
        """Folder of the run that it is the export of, if it is one."""
        return run_folder(self.spec)

    def digest(self) -> str:
        """Hash of weights and configs, or of the finished images: what is equal gives equal images."""
        if self.images is not None:
            return _of_files(self.images, sorted(f for f in self.images.iterdir() if f.suffix.lower() in FINISHED))
        assert self.source is not None, "an arm is a model or images"
        places = [self.source.path, self.source.vae, self.source.denoiser, self.source.lora]
        if self.source.config is not None:
            places.append(self.source.config)
        found = [None if place is None else _of_model(place, self.source.revision) for place in places]
        return hashlib.sha256(repr((found, self.source.variant)).encode()).hexdigest()


Aligned = str | Sequence[str] | Mapping[str, str]


def find_arms(base: str | ModelSource, aligned: Aligned) -> tuple[Arm, ...]:
    """The arms, base first.

    Args:
        aligned: One arm, which is called "aligned"; several, called after their last folder; or several by name.

    Raises:
        InputError: No arm, a name that is no folder's name, or a spec that is nothing that `arm_source` takes.
    """
    named = {"aligned": aligned} if isinstance(aligned, str) else _named(aligned)
    if not named:
        raise InputError("aligned must name at least one arm, got none")
    for name in named:
        if not _NAME.fullmatch(name) or name == "base":
            raise InputError(f"names of arms must be letters, digits, '.', '_' or '-', and not 'base', got {name!r}")
    first = _base_arm(base)
    ground = first.source or ModelSource(path="")
    return first, *(_arm(name, spec, ground) for name, spec in named.items())


def parse_arms(words: Sequence[str]) -> Aligned:
    """Arms as a command line has them, `PLACE` or `NAME=PLACE` each; a place may hold a '=' itself if it is there."""
    pairs = [("", word) if Path(word).exists() else _split(word) for word in words]
    if not any(name for name, _ in pairs):
        return list(words)
    found: dict[str, str] = {}
    for name, spec in pairs:
        if name in found:
            raise InputError(f"names of arms must differ, got {name!r} twice")
        found[name or _free_name(spec, found)] = spec
    return found


def _split(word: str) -> tuple[str, str]:
    name, equals, spec = word.partition("=")
    return (name, spec) if equals and _NAME.fullmatch(name) else ("", word)


def arm_source(spec: str, base: ModelSource) -> ModelSource:
    """Which model an arm is.

    Args:
        spec: A pipeline (folder, hub id, shipped name or a checkpoint in one .safetensors file), a LoRA (folder, hub id
            or .safetensors file), a denoiser (its component folder, a folder that holds `unet/` or `transformer/`, or a
            hub id of such files), or the folder of a run of ours.
        base: The pipeline under a LoRA or a denoiser, whose configs a checkpoint in one file takes too. A run's folder
            names its own.

    Raises:
        InputError: It is none of these.
    """
    place = Path(resolve(spec, MODELS))
    if place.is_file():
        return _with_file(place, base)
    if not place.is_dir():
        if spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not is_single_file(spec):
            return _of_hub(spec, base)
        raise InputError(
            "model must be a folder, a .safetensors file, a hub id or a shipped name, "
            f"got {spec!r}{near_match(spec, MODELS)}"
        )
    if (place / "model_index.json").is_file():
        return ModelSource(path=spec)
    if (place / "config.toml").is_file():
        return _of_run(place)
    nets = {family.net for family in FAMILIES.values()}
    if (place / "config.json").is_file() or any((place / net).is_dir() for net in nets):
        return replace(base, denoiser=str(place), lora=None)
    if any(place.glob("*.safetensors")):
        return replace(base, lora=str(place))
    raise InputError(
        f"model must hold model_index.json (a pipeline), config.toml (a run), {', '.join(sorted(nets))} or config.json "
        f"(a denoiser), or a .safetensors file (a LoRA), got {spec!r} with none of them"
    )


def base_source(base: str | ModelSource) -> ModelSource:
    """The pipeline that other arms are compared with."""
    if isinstance(base, ModelSource):
        return base
    source = arm_source(base, ModelSource(path=base))
    if source.path == base and (source.lora or source.denoiser):
        raise InputError(f"base must be a pipeline or a run, got {base!r}, which goes on top of one")
    return source


def load_arm(spec: str, base: ModelSource) -> Any:
    """The pipeline of an arm; see `arm_source`."""
    return load_pipeline(arm_source(spec, base))


def run_folder(spec: str) -> Path | None:
    """The folder of the run that an arm is, if it is one."""
    place = Path(spec)
    return place if (place / "config.toml").is_file() and not (place / "model_index.json").is_file() else None


def _named(aligned: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Arms by name; those that are given without one are called after their folder, and numbered if they share it."""
    if isinstance(aligned, Mapping):
        return dict(aligned)
    if len(aligned) == 1:
        return {"aligned": aligned[0]}
    found: dict[str, str] = {}
    for spec in aligned:
        found[_free_name(spec, found)] = spec
    return found


def _free_name(spec: str, taken: Mapping[str, str]) -> str:
    place = Path(spec)
    own = re.sub(r"[^A-Za-z0-9._-]", "-", place.stem if place.is_file() else place.name).lstrip("._-") or "arm"
    name, number = own, 1
    while name in taken or name == "base":
        number += 1
        name = f"{own}-{number}"
    return name


def _base_arm(base: str | ModelSource) -> Arm:
    if isinstance(base, str) and (images := _image_folder(base)) is not None:
        return Arm(name="base", spec=base, source=None, images=images)
    source = base_source(base)
    return Arm(name="base", spec=source.path if isinstance(base, ModelSource) else base, source=source)


def _arm(name: str, spec: str, base: ModelSource) -> Arm:
    if (images := _image_folder(spec)) is not None:
        return Arm(name=name, spec=spec, source=None, images=images)
    source = arm_source(spec, base)
    if not source.path:
        raise InputError(f"{name} must be a pipeline or a run where the base is a folder of images, got {spec!r}")
    return Arm(name=name, spec=spec, source=source)


def _image_folder(spec: str) -> Path | None:
    """A folder that holds images or clips and nothing of a model."""
    place = Path(spec)
    if not place.is_dir() or any((place / name).is_file() for name in ("model_index.json", "config.toml")):
        return None
    names = [f.suffix.lower() for f in place.iterdir()]
    return place if ".safetensors" not in names and any(n in FINISHED for n in names) else None


def _with_file(file: Path, base: ModelSource) -> ModelSource:
    if not is_single_file(str(file)):
        raise InputError(
            f"model must be a folder or a .safetensors file of a checkpoint or a LoRA, got the file {str(file)!r}"
        )
    if not is_checkpoint(str(file)):
        return replace(base, lora=str(file))
    config = base.config if is_single_file(base.path) else base.path or None
    return ModelSource(path=str(file), config=config, revision=base.revision)


def _of_hub(spec: str, base: ModelSource) -> ModelSource:
    """What a repository of the hub is, by the files that it has; one that is out of reach is taken for a pipeline."""
    nets = [f"{net}/config.json" for net in sorted({family.net for family in FAMILIES.values()})]
    loras = ["pytorch_lora_weights.safetensors", "adapter_config.json"]
    with one_line("model", spec):
        found = hub_files(spec, ["model_index.json", *nets, "config.json", *loras])
    if not found or found[0] == "model_index.json":
        return ModelSource(path=spec)
    return replace(base, lora=spec) if found[0] in loras else replace(base, denoiser=spec, lora=None)


def _of_run(folder: Path) -> ModelSource:
    """The run's own base with its export on top."""
    if not (folder / "export").is_dir():
        raise InputError(f"model must be a finished run, got {str(folder)!r} without export/; go on with it first")
    try:
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        base = ModelSource(**table["model"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.toml'} must be the config of a run, got {error}") from error
    return arm_source(str(folder / "export"), base)


def _of_model(spec: str, revision: str | None) -> str:
    """Hash of a folder's or file's content, or the commit of a hub id."""
    place = Path(resolve(spec, MODELS))
    if place.is_file():
        return digest_of(place)
    if place.is_dir():
        files = (f for f in place.rglob("*") if f.suffix in _OF_A_MODEL and f.is_file())
        return _of_files(place, sorted(f for f in files if not NOT_FOR_IMAGES & set(f.relative_to(place).parts)))
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json", "unet/config.json", "transformer/config.json"):
        cached = try_to_load_from_cache(spec, name, revision=revision)
        if isinstance(cached, str):  # .../snapshots/<commit>/<name>
            return f"{spec}@{Path(cached).parents[name.count('/')].name}"
    return f"{spec}@{revision}"


def _of_files(folder: Path, files: Sequence[Path]) -> str:
    lines = "".join(f"{file.relative_to(folder).as_posix()} {digest_of(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
