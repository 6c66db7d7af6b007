"""What the online table measures beside the method table's numbers: distances of sets, and a run's rounds."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import method_measures
from benchmarks.method_measures import JUDGES, Images
from diffalign import rewards
from diffalign.evaluate.score import image_files, read_image
from diffalign.evaluate.stats import percentile_interval
from diffalign.rewards.clip import CLIPEncoder
from diffalign.rewards.gaussians import Gaussian, frechet_distance
from diffalign.types import RewardBatch

SCORED = {**JUDGES, "jpeg": "jpeg"}
"""Rewards of single images by name."""
ROUND_JUDGES = {"oracle": "oracle", "clip": "clip:tiny-clip"}
"""Who looks at the images of every round, whatever the run was trained on."""
RESAMPLES = 300
"""Of the intervals of numbers of sets."""

Embeddings = Float[Tensor, "n d"]


def judge(images: Images, prompts: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(scores by reward, the oracle's attributes by name), one number an image."""
    scores, attributes = method_measures.judge(images, prompts)
    batch = RewardBatch(images=method_measures.as_tensor(images))
    found = rewards.load(SCORED["jpeg"]).score(batch).scores
    return {**scores, "jpeg": [round(value, 5) for value in found.tolist()]}, attributes


def reference(folder: Path) -> Gaussian:
    """Mean and covariance of pictures in tiny-clip's space."""
    pictures = torch.stack([read_image(file) for file in image_files(folder)])
    return Gaussian.of(CLIPEncoder("tiny-clip").embed_images(pictures))


def set_numbers(of: Gaussian) -> dict[str, Callable[[Embeddings], float]]:
    """Numbers of sets by name: Fréchet distance to a reference, Vendi score."""
    return {
        "frechet": lambda rows: float(frechet_distance(rows, of)),
        "vendi": lambda rows: method_measures.diversity(rows)["vendi"],
    }


def set_changes(
    arm: Embeddings, base: Embeddings, numbers: dict[str, Callable[[Embeddings], float]], *, resamples: int = RESAMPLES
) -> dict[str, dict[str, float]]:
    """By number: that of both sets, how it changed, and a 95 % interval of the change; draws of captions are shared."""
    draws = np.random.default_rng(0).integers(len(arm), size=(resamples, len(arm)))
    found = {}
    for name, number in numbers.items():
        changes = [number(arm[rows]) - number(base[rows]) for rows in map(torch.from_numpy, draws)]
        low, high = percentile_interval(np.array(changes))
        value, before = number(arm), number(base)
        found[name] = {"value": value, "base": before, "change": value - before, "low": low, "high": high}
    return found


Look = Callable[[Path, Sequence[Mapping[str, Any]]], dict[str, float]]
"""(folder of a round, lines of its manifest) -> what is said of its samples."""


def curve(folder: Path, look: Look | None = None) -> list[dict[str, Any]]:
    """The rounds of a run: samples made so far, what it was trained on, and what a look at the round says.

    Without a `look` it is that of `ROUND_JUDGES` at images.
    """
    look = look or _judged()
    found, images = [], 0
    for line in _lines(folder / "metrics.jsonl"):
        if "round" not in line:
            continue
        images += line["images"]
        place = folder / "rounds" / f"round-{line['round']}"
        own = {key: line[key] for key in line if key.startswith(("score/", "set_")) and key.count("/") < 2}
        seen = look(place, _lines(place / "manifest.jsonl"))
        found.append({"round": line["round"], "images": images, "own": own, **seen})
    return found


def _judged() -> Look:
    judges = {name: rewards.load(spec) for name, spec in ROUND_JUDGES.items()}

    def look(place: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        batch = RewardBatch(
            images=torch.stack([read_image(place / entry["image"]) for entry in entries]),
            prompts=[entry["prompt"] for entry in entries],
        )
        return {name: round(float(judge.score(batch).scores.mean()), 5) for name, judge in judges.items()}

    return look


def seconds(folder: Path) -> dict[str, float]:
    """Seconds of sampling (with judging, which goes on beside it) and of updates."""
    lines = _lines(folder / "metrics.jsonl")
    sampling = sum(line["sampling_seconds"] for line in lines if "round" in line)
    updates = sum(line["seconds"] for line in lines if "loss" in line)
    return {"sampling_seconds": round(sampling, 2), "update_seconds": round(updates, 2)}


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
