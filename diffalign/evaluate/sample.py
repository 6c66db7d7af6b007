"""Images of a prompt set in a folder, and a run's export in other forms."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from diffalign.data.prompts import read_prompts
from diffalign.denoisers import Family
from diffalign.errors import InputError, near_match
from diffalign.evaluate.arms import arm_source, base_source
from diffalign.evaluate.generate import generate, save_images
from diffalign.evaluate.preflight import pick_device
from diffalign.evaluate.settings import batch_size
from diffalign.models.load import ModelSource, detect_family, load_lora_into, load_pipeline
from diffalign.models.lora import POLICY, fuse
from diffalign.models.save import export_kohya, export_peft, replacing
from diffalign.progress import bar


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How images are made; None leaves it to the model's family or size."""

    images_per_prompt: int = 1
    steps: int | None = None
    guidance: float | None = None
    batch_size: int | None = None
    device: str = "auto"


def model_source(model: str, base: str | None) -> ModelSource:
    """The pipeline of a model: itself, or `base` with the LoRA or denoiser that the model is.

    Raises:
        InputError: A LoRA or a denoiser without a base.
    """
    if base is not None:
        return arm_source(model, base_source(base))
    source = arm_source(model, ModelSource(path=model))
    if source.path == model and (source.lora or source.denoiser):
        raise InputError(f"model must be a pipeline or a run, got {model!r}, which goes on top of one; name it as base")
    return source


def sample_to_folder(
    source: ModelSource, prompts: str, folder: Path, settings: SampleSettings, limit: int | None = None
) -> int:
    """Writes images and metadata.jsonl; returns the number of images.

    Raises:
        InputError: The folder is not empty, or a model or prompt is wrong.
    """
    asked = read_prompts(prompts, limit).prompts
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"output must be a new or empty folder, got {str(folder)!r} with files in it")
    family: Family = detect_family(source)
    pipeline: Any = load_pipeline(source).to(pick_device(settings.device))
    folder.mkdir(parents=True, exist_ok=True)
    made = generate(
        pipeline,
        family,
        asked,
        images_per_prompt=settings.images_per_prompt,
        steps=family.steps if settings.steps is None else settings.steps,
        guidance=family.guidance if settings.guidance is None else settings.guidance,
        batch_size=batch_size(settings.batch_size, family.latent_shape(pipeline.components[family.net].config)),
    )
    total = len(asked) * settings.images_per_prompt
    with bar("images", total) as shown:
        save_images(made, asked, folder, shown)
    return total


FORMATS = ("diffusers", "kohya", "peft")
"""A whole pipeline, the LoRA as one file for other programs, the LoRA as a folder of PEFT."""


def export(source: ModelSource, out: Path, form: str = "diffusers") -> None:
    """Writes a model in the form of others, one of `FORMATS`.

    Args:
        out: A new folder, or a new .safetensors file for "kohya".

    Raises:
        InputError: `out` exists or is of the wrong kind, or the model has no such form.
    """
    if form not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {form!r}{near_match(form, FORMATS)}")
    if out.exists():
        raise InputError(f"output must be new, got {str(out)!r}, which exists")
    if (out.suffix == ".safetensors") != (form == "kohya"):
        kind = "a .safetensors file" if form == "kohya" else "a folder"
        raise InputError(f"output must be {kind} with the format {form!r}, got {str(out)!r}")
    if form == "diffusers":
        export_pipeline(source, out)
    else:
        export_adapter(source, out, form)


def export_adapter(source: ModelSource, out: Path, form: str) -> None:
    """Writes a LoRA alone, for kohya's programs or for PEFT."""
    if source.lora is None:
        raise InputError(
            f"model must be a LoRA, or a run that trained one, with the format {form!r}; got whole weights"
        )
    family = detect_family(source)
    pipeline = load_pipeline(replace(source, lora=None), only=(family.net,))
    load_lora_into(pipeline, family, source.lora, adapter=POLICY)
    net = pipeline.components[family.net]
    if form == "kohya":
        export_kohya(net, family, out)
    else:
        export_peft(net, out)


def export_pipeline(source: ModelSource, folder: Path) -> None:
    """Writes a whole pipeline that plain `DiffusionPipeline.from_pretrained` opens, a LoRA fused into its weights."""
    pipeline = load_pipeline(source)
    if source.lora is not None:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                fuse(part)
    with replacing(folder) as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
