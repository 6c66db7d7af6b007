"""Into Diffusers' classes: pipelines, and single components of them, from a folder, a hub id, a file or a shipped name.

Only safetensors are read. Nothing is loaded that was not asked for: training from a cache takes the denoiser alone.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from diffalign.denoisers import FAMILIES, Context, Family
from diffalign.errors import InputError
from diffalign.models.denoiser import find_denoiser
from diffalign.models.lora import adapter_layers
from diffalign.models.reading import check_weights, one_line, refuse_pickle
from diffalign.models.single_file import guess_home, is_single_file, load_parts
from diffalign.models.text import text_dtypes
from diffalign.shipped import MODELS, resolve

NOT_FOR_IMAGES = {"safety_checker", "feature_extractor", "image_encoder"}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model is aligned, and from where it starts."""

    path: str
    """Folder of a Diffusers pipeline, hub id, name of a shipped model ("tiny-sd"), or a checkpoint in one
    .safetensors file."""
    config: str | None = None
    """Beside a checkpoint in one file: folder or hub id of a pipeline with its configs, tokenizers and scheduler; None
    is the published one that Diffusers takes the file for."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Weight variant in the folder or repository, such as "fp16"."""
    vae: str | None = None
    """Folder or hub id of another AutoencoderKL than the pipeline's own."""
    denoiser: str | None = None
    """Fine-tuned denoiser to start from: a folder or hub id, a run's export, or a checkpoint in one file; it is the
    reference too."""
    lora: str | None = None
    """Folder or file of a LoRA to start from; base and LoRA together are the reference too."""


def pipeline_index(source: ModelSource, *, weights: bool = True) -> dict[str, Any]:
    """Components of the pipeline by name, as its `model_index.json` lists them.

    Args:
        weights: A folder must hold the weights of its components.

    Raises:
        InputError: No such folder or repository, a pickle checkpoint, or a folder with a part missing.
    """
    from diffusers import DiffusionPipeline

    refuse_pickle("model.path", resolve(source.path, MODELS))
    where, path = home(source)
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        alone = (Path(path) / "config.json").is_file() or any((Path(path) / f.net).is_dir() for f in FAMILIES.values())
        remedy = "; a denoiser alone is named as model.denoiser, beside the pipeline that it belongs to"
        said = f"{where} must be the folder of a Diffusers pipeline, got {path!r} without model_index.json"
        raise InputError(said + (remedy if alone else ""))
    with one_line(where, path):
        index = DiffusionPipeline.load_config(path, revision=source.revision)
    if weights and where == "model.path" and Path(path).is_dir():
        _check_folder(Path(path), index)
    return dict(index)


def home(source: ModelSource) -> tuple[str, str]:
    """(key, folder or hub id) of the pipeline's configs, tokenizers and scheduler.

    Raises:
        InputError: A checkpoint's file is not there, or a config is named beside a pipeline.
    """
    path = resolve(source.path, MODELS)
    if not is_single_file(path):
        if source.config is not None:
            raise InputError(
                f"model.config must be left out unless model.path is a .safetensors file, got {source.config!r} beside "
                f"{source.path!r}"
            )
        return "model.path", path
    return "model.config", guess_home(path) if source.config is None else resolve(source.config, MODELS)


def detect_family(source: ModelSource, *, weights: bool = True) -> Family:
    """The family of a pipeline, by the class that its `model_index.json` names.

    Raises:
        InputError: No family knows the class, or a component is not there.
    """
    index = pipeline_index(source, weights=weights)
    name = index.get("_class_name")
    for family in FAMILIES.values():
        if name in family.pipelines:
            _check_components(family, index, source.path)
            return family
    known = ", ".join(f"{f.name} ({', '.join(f.pipelines)})" for f in FAMILIES.values())
    raise InputError(f"model.path must be a pipeline of a known family, got {name!r}; known families: {known}")


def load_pipeline(
    source: ModelSource,
    *,
    only: Sequence[str] | None = None,
    net: nn.Module | None = None,
    text_dtype: torch.dtype = torch.float32,
) -> Any:
    """The Diffusers pipeline, in eval mode and with float32 weights but for its text encoders'.

    Args:
        source: Its `vae`, `denoiser` and `lora` are in place of, or on top of, the pipeline's own.
        only: Components that are loaded, beside the scheduler; None loads all that images are made with.
        net: A denoiser that takes its place in the pipeline as it is, instead of a loaded one.
        text_dtype: Of text encoders, as `text_dtypes` has it.
    """
    from diffusers import DiffusionPipeline

    index = pipeline_index(source)
    family = detect_family(source)
    there = {name: value[0] is not None for name, value in index.items() if isinstance(value, list)}
    wanted = set(there) - NOT_FOR_IMAGES if only is None else {*only, "scheduler"}
    parts: dict[str, Any] = {name: None for name, present in there.items() if not present or name not in wanted}
    if source.vae is not None and "vae" in wanted:
        parts["vae"] = load_vae(source.vae)
    if net is None and source.denoiser is not None and family.net in wanted:
        parts[family.net] = load_net(source, family)
    if net is not None:
        parts[family.net] = net
    narrow = {name: kind for name, kind in text_dtypes(family, index, text_dtype).items() if name in wanted}
    where, place = home(source)
    if is_single_file(source.path):
        parts |= _from_file(source, family, [name for name in family.in_file if name in wanted and name not in parts])
    with one_line(where, place):
        pipeline = DiffusionPipeline.from_pretrained(
            place,
            revision=source.revision,
            variant=source.variant,
            use_safetensors=True,
            dtype={"default": torch.float32, **narrow},
            **parts,
            **({"requires_safety_checker": False} if "requires_safety_checker" in index else {}),
        )
    if net is None and source.lora is not None and family.net in wanted:
        load_lora_into(pipeline, family, source.lora)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and component is not net:
            component.eval().requires_grad_(False)
        if name in narrow:  # one that came in a single file is float32 still
            nn.Module.to(component, narrow[name])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_lora_into(pipeline: Any, family: Family, path: str, *, adapter: str | None = None) -> None:
    """Adds a LoRA (folder, file or hub id) to a pipeline, as its family loads it.

    Raises:
        InputError: It is a pickle, it cannot be read, or it adapts a text encoder that the pipeline does not hold.
    """
    refuse_pickle("model.lora", path)
    place = Path(path)
    file = place if place.is_file() else next(iter(sorted(place.glob("*.safetensors"))), None)
    if place.exists() and file is None:
        raise InputError(f"model.lora must hold a .safetensors file, got {path!r} with none")
    with one_line("model.lora", path):
        if file is not None:
            with safe_open(file, framework="pt") as content:
                foreign = [k for k in content.keys() if k.startswith(("text_encoder", "lora_te"))]
            if foreign and pipeline.components.get("text_encoder") is None:
                raise InputError(f"model.lora must adapt the denoiser only, got {path!r} with {foreign[0]!r}")
        folder, name = (path, None) if file is None else (str(file.parent), file.name)
        family.load_lora(pipeline, folder, name, adapter)
    if not any(adapter_layers(part) for part in pipeline.components.values() if isinstance(part, nn.Module)):
        raise InputError(
            f"model.lora must be a LoRA in a form that Diffusers reads for the family {family.name!r}, got {path!r}, "
            "which adapts nothing of it"
        )


def load_net(source: ModelSource, family: Family) -> nn.Module:
    """The denoiser alone: the source's fine-tuned one if it names one, else the pipeline's."""
    if source.denoiser is None:
        if is_single_file(source.path):
            return _from_file(source, family, [family.net])[family.net]
        return _component(family.net_class(), source, resolve(source.path, MODELS), family.net)
    path = resolve(source.denoiser, MODELS)
    refuse_pickle("model.denoiser", path)
    if is_single_file(path):
        return _from_file(source, family, [family.net], path, "model.denoiser")[family.net]
    subfolder = find_denoiser(path, family, load_net_config(source, family))
    return _component(family.net_class(), ModelSource(path=path), path, subfolder, where="model.denoiser")


def _from_file(
    source: ModelSource, family: Family, names: Sequence[str], file: str | None = None, where: str = "model.path"
) -> dict[str, Any]:
    return load_parts(family, file or source.path, home(source)[1], names, revision=source.revision, where=where)


def load_vae(place: str) -> Any:
    """An AutoencoderKL alone, from its folder, a pipeline's, or a hub id."""
    from diffusers import AutoencoderKL

    path = resolve(place, MODELS)
    refuse_pickle("model.vae", path)
    subfolder = "vae" if (Path(path) / "vae").is_dir() else None
    return _component(AutoencoderKL, ModelSource(path=path), path, subfolder, where="model.vae")


def load_vae_config(source: ModelSource) -> dict[str, Any]:
    """Scaling constants and sizes of the VAE, without its weights; what is left out is its class's default."""
    import diffusers
    from diffusers import AutoencoderKL

    where, path = ("model.vae", resolve(source.vae, MODELS)) if source.vae else home(source)
    subfolder = "vae" if source.vae is None or (Path(path) / "vae").is_dir() else None
    with one_line(where, path):
        config = dict(AutoencoderKL.load_config(path, subfolder=subfolder, revision=source.revision))
    name = config.get("_class_name", "AutoencoderKL")
    if name not in dir(diffusers):
        raise InputError(f"{where} must have a VAE of Diffusers' own classes, got {path!r} with {name!r}")
    return {**_defaults(getattr(diffusers, name)), **config}


def load_net_config(source: ModelSource, family: Family) -> dict[str, Any]:
    """Sizes of the pipeline's denoiser, without its weights; what a config leaves out is its class's default."""
    where, path = home(source)
    with one_line(where, path):
        cls: Any = family.net_class()
        return {**_defaults(cls), **cls.load_config(path, subfolder=family.net, revision=source.revision)}


def _defaults(cls: type) -> dict[str, Any]:
    """What a class of Diffusers takes where its config says nothing."""
    named = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    return {k: v for k, v in named.items() if v is not inspect.Parameter.empty}


def vae_factor(source: ModelSource) -> int:
    """Pixels of an image per latent, along a side."""
    return int(2 ** (len(load_vae_config(source)["block_out_channels"]) - 1))


def native_resolution(source: ModelSource, family: Family) -> int:
    """Side in pixels that the model was made for."""
    return family.latent_shape(load_net_config(source, family))[1] * vae_factor(source)


def load_context(
    source: ModelSource,
    family: Family,
    *,
    resolution: int | None = None,
    seconds: float | None = None,
    guidance: float | None = None,
    where: str = "config.data.",
) -> Context:
    """What the denoiser is told of images of this side, in pixels, or of clips of this length.

    Args:
        resolution: None is the side that the model was made for.
        where: What stands before the name of a size in a message.

    Raises:
        InputError: The model does not make that, or a guidance is given to a network that is told none.
    """
    from diffusers import AutoencoderKL

    if guidance is not None and not family.told_guidance:
        raise InputError(
            f"config.train.guidance must be left out with the family {family.name!r}, whose network is told none; "
            f"got {guidance}"
        )
    if source.vae is not None and family.modality != "image":
        raise InputError(
            f"config.model.vae must be left out with the family {family.name!r}, whose VAE is no AutoencoderKL; got "
            f"{source.vae!r}"
        )

    def configs(name: str) -> dict[str, Any]:
        known = {"vae": lambda: load_vae_config(source), family.net: lambda: load_net_config(source, family)}
        return known[name]() if name in known else _load_config(AutoencoderKL, source, name)

    return replace(family.size(family, configs, resolution=resolution, seconds=seconds, where=where), guidance=guidance)


def load_scheduler_config(source: ModelSource) -> dict[str, Any]:
    """The folder's scheduler config."""
    from diffusers import DDPMScheduler

    return _load_config(DDPMScheduler, source, "scheduler")


def _load_config(cls: Any, source: ModelSource, name: str) -> dict[str, Any]:
    """The config of a component as it lies in its folder; `cls` knows the name of its file."""
    where, path = home(source)
    with one_line(where, path):
        return dict(cls.load_config(path, subfolder=name, revision=source.revision))


def _component(cls: Any, source: ModelSource, path: str, subfolder: str | None, where: str = "model.path") -> Any:
    folder = Path(path) / (subfolder or "")
    if Path(path).is_dir():
        check_weights(folder, where)
    with one_line(where, str(folder) if Path(path).is_dir() else path):
        net = cls.from_pretrained(
            path, subfolder=subfolder, revision=source.revision, variant=source.variant, use_safetensors=True,
            dtype=torch.float32,
        )  # fmt: skip
    return net.eval().requires_grad_(False)


def _check_components(family: Family, index: dict[str, Any], path: str) -> None:
    for name in ("vae", "scheduler", family.net, *family.text):
        found = index.get(name)
        if name not in family.optional and (not isinstance(found, list) or found[0] is None):
            raise InputError(
                f"model.path must have the component {name!r} of the family {family.name!r}, got {path!r}, whose "
                "model_index.json has none"
            )


def _check_folder(folder: Path, index: dict[str, Any]) -> None:
    for name, value in index.items():
        if not isinstance(value, list) or value[0] is None or name in NOT_FOR_IMAGES:
            continue
        part = folder / name
        if not part.is_dir():
            raise InputError(
                f"model.path must hold the component {name!r} of its model_index.json, missing in {folder}"
            )
        if (part / "config.json").is_file():
            check_weights(part, "model.path")
