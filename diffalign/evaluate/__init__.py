"""Is the aligned model better than its base, on what, by how much, and how sure? Both arms start from the same noise.

Protocol `p2-paired-v1`: one image per (prompt, seed number) and arm, deterministic sampler, scores from the 8-bit
images, win rates with intervals over prompts. `results.json` is written last: where it lies, the evaluation is whole.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign import environment
from diffalign.data.prompts import PromptSet
from diffalign.errors import InputError
from diffalign.evaluate import generate, preflight
from diffalign.evaluate.comparison import compare
from diffalign.evaluate.report import write_report
from diffalign.evaluate.results import Results, write_results
from diffalign.evaluate.score import Table, counted, score_images, write_table
from diffalign.evaluate.summary import write_summary
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.progress import bar
from diffalign.rewards import move
from diffalign.types import Reward


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How images are made, and with what the statistics are seeded."""

    images_per_prompt: int = 1
    """Seeds per prompt; the same in both arms."""
    steps: int = 50
    guidance: float = 7.5
    """Weight w in uncond + w (cond - uncond); 1 is off."""
    batch_size: int = 8
    device: str = "auto"
    """"auto" takes the GPU if there is one."""
    dtype: str = "float32"
    """Of the pipelines: float32, float16 or bfloat16; rewards run in float32."""
    seed: int = 0
    """Of resampling in the statistics; an image takes its noise from its prompt alone."""
    command: str | None = None
    """What a person typed, for the report; None shows the Python call."""

    def __post_init__(self) -> None:
        for name, value in (
            ("images_per_prompt", self.images_per_prompt),
            ("steps", self.steps),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise InputError(f"dtype must be one of 'float32', 'float16', 'bfloat16', got {self.dtype!r}")


def evaluate(
    base: str | ModelSource,
    aligned: str,
    prompts: str | Path | Sequence[str] | PromptSet,
    *,
    rewards: Sequence[str | Reward],
    output: str | Path,
    roles: Mapping[str, str] | None = None,
    settings: EvaluationSettings | None = None,
) -> Results:
    """Compares an aligned model with its base; writes results.json, report.html, summary.md, scores.parquet, images/.

    Args:
        base: A pipeline (folder, hub id, shipped name or `ModelSource`), or the folder of a run.
        aligned: A pipeline, or a LoRA, a denoiser or the folder of a run, as `generate.arm_source` takes it.
        prompts: A file or shipped set as `data.prompts.read_prompts` takes it, or the prompts; repeated ones are
            dropped and counted, since they would give the same images again.
        rewards: Specs as `rewards.load` takes them, or rewards.
        output: A new folder, or one that holds an earlier evaluation, which is replaced.
        roles: By reward name: whose labels the pairs carry ("labeller"), what training optimised ("trained_on"), what
            it never saw ("held_out"). What is not named counts as held out, and the report says so.

    Raises:
        InputError: A model, prompt, reward or folder is wrong; nothing was generated.
        RunError: An image is not finite, or a reward left more than 1 % of the pairs unjudged.
    """
    settings, folder = settings or EvaluationSettings(), Path(output)
    device = preflight.pick_device(settings.device)
    asked, repeated = preflight.distinct(prompts)
    source = preflight.base_source(base)
    sources = {"base": source, "aligned": generate.arm_source(aligned, source)}
    plugins, judges = preflight.load_judges(rewards, roles or {})
    height, width = preflight.common_size(sources)
    preflight.rehearse(plugins, asked, (height, width))
    load_pipeline(sources["aligned"])  # what is wrong with it shows here, not after the base's images
    preflight.claim(folder, asked)

    table: Table = {}
    models: dict[str, dict[str, Any]] = {}
    for arm, spec in (("base", source.path if isinstance(base, ModelSource) else base), ("aligned", aligned)):
        pipeline = load_pipeline(sources[arm]).to(device)
        if settings.dtype != "float32":
            pipeline.to(getattr(torch, settings.dtype))
        for column, values in make_images(arm, pipeline, sources[arm], asked, settings, folder).items():
            table.setdefault(column, []).extend(values)
        run = generate.run_folder(spec)
        scheduler = {"class": type(pipeline.scheduler).__name__, **_public(pipeline.scheduler.config)}
        models[arm] = {"spec": spec, "source": asdict(sources[arm]), "run": run and str(run), "scheduler": scheduler}
        del pipeline
    digest = paired_digest(table)
    table |= score_made(plugins, table, asked, folder, device)
    write_table(table, folder / "scores.parquet")

    labels = preflight.labels_of(asked)
    comparison = compare(table, judges, arm="aligned", against="base", labels=labels, seed=settings.seed)
    results = Results(
        arms=("base", "aligned"),
        n_prompts=len(asked),
        n_seeds=settings.images_per_prompt,
        comparisons=(comparison,),
        prompt_set={"name": asked.name, "sha256": asked.sha256, "duplicates_dropped": repeated},
        settings={**asdict(settings), "height": height, "width": width},
        models=models,
        latents_sha256=digest,
        environment=environment.describe(device),
    )
    write_report(results, table, folder, labels)
    write_summary(results, folder)
    write_results(results, folder / preflight.RESULTS_FILE)
    return results


def make_images(
    arm: str, pipeline: Any, source: ModelSource, prompts: PromptSet, settings: EvaluationSettings, folder: Path
) -> Table:
    """Writes images/<arm>/; returns one row per image."""
    made = generate.generate(
        pipeline,
        detect_family(source),
        prompts.prompts,
        images_per_prompt=settings.images_per_prompt,
        steps=settings.steps,
        guidance=settings.guidance,
        batch_size=settings.batch_size,
    )
    with bar(f"{arm} images", len(prompts) * settings.images_per_prompt) as shown:
        table = generate.save_images(made, prompts.prompts, folder / "images" / arm, shown)
    return {"arm": [arm] * len(table["prompt"]), **table}


def paired_digest(table: Table) -> str:
    """Hash over all latents' hashes, after the check that both arms had the same ones."""
    half = len(table["arm"]) // 2
    hashes = table["latent_sha256"]
    assert hashes[:half] == hashes[half:], "both arms must start from the same latents"
    return hashlib.sha256("".join(hashes[:half]).encode()).hexdigest()


def score_made(
    rewards: Sequence[Reward], table: Table, prompts: PromptSet, folder: Path, device: torch.device
) -> Table:
    """Scores of the images as they lie on disk, 8 bit as they are."""
    for reward in rewards:
        move(reward, device)
    files = [folder / "images" / arm / name for arm, name in zip(table["arm"], table["file_name"], strict=True)]
    metadata = [prompts.metadata[i] for i in table["prompt_index"]]
    with bar("scoring", len(files)) as shown:
        return score_images(counted(files, shown), table["prompt"], rewards, metadata=metadata)


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Diffusers config without its private keys."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
