"""What stands beside the scores in results.json: diversity, drift and checks, of arms that are folders of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.evaluate import EvaluationSettings, evaluate
from diffalign.evaluate.results import Results
from diffalign.types import Embedded, FunctionReward, RewardBatch

PROMPTS = [f"a scene number {i}" for i in range(12)]
SEEDS = 4
SETTINGS = EvaluationSettings(images_per_prompt=SEEDS, device="cpu", encoder="tests.test_evaluate_examine:Means")


class Means:
    """An encoder that sees the mean colours of the four quarters."""

    version, modality = "means of quarters", "image"

    def embed(self, batch: RewardBatch) -> Embedded:
        assert batch.images is not None
        rows = torch.nn.functional.adaptive_avg_pool2d(batch.images, 2).flatten(1) + 0.01
        return Embedded(rows=rows, counts=(1,) * len(rows))

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        return self.embed(batch)


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


BRIGHT = FunctionReward(name="bright", function=brightness)
RED = FunctionReward(name="red", function=lambda images, prompts: images[:, 0].mean((1, 2)))


def pictures() -> np.ndarray:
    """[prompts, seeds, h, w, 3], noise around colours of their own."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(0.2, 0.6, (len(PROMPTS), SEEDS, 2, 2, 3))
    return (colours.repeat(8, 2).repeat(8, 3) + rng.normal(0, 0.05, (len(PROMPTS), SEEDS, 16, 16, 3))).clip(0, 1)


def save(folder: Path, images: np.ndarray) -> str:
    folder.mkdir(parents=True)
    for i, row in enumerate(images):
        for k, image in enumerate(row):
            Image.fromarray((image * 255).round().astype(np.uint8)).save(folder / f"{i:05d}-{k}.png")
    return str(folder)


def compare(tmp_path: Path, base: np.ndarray, arm: np.ndarray, **roles: str) -> Results:
    places = save(tmp_path / "base", base), save(tmp_path / "arm", arm)
    return evaluate(*places, PROMPTS, rewards=[BRIGHT, RED], output=tmp_path / "out", roles=roles, settings=SETTINGS)


def flags(results: Results) -> set[str]:
    return {check.name for check in results.comparisons[0].checks if check.flagged}


def test_equal_arms_do_not_drift_keep_their_diversity_and_raise_no_flag(tmp_path):
    images = pictures()
    results = compare(tmp_path, images, images, bright="trained_on")
    [comparison] = results.comparisons
    assert all(drift.mean == pytest.approx(0, abs=1e-6) for drift in comparison.drift)
    assert {drift.metric for drift in comparison.drift} == {"1 - cosine", "mean absolute difference of pixels"}
    assert {found.metric for found in comparison.diversity} == {"vendi", "mean 1 - cosine of pairs"}
    assert all(
        found.ratio == pytest.approx(1) and found.encoder == "means of quarters" for found in comparison.diversity
    )
    assert flags(results) == set()
    table = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"held_out:red", "prior_damage", "safety"} <= {check["name"] for check in table["comparisons"][0]["checks"]}


def test_images_that_became_alike_are_flagged_when_the_reward_rose(tmp_path):
    base = pictures()
    arm = np.broadcast_to(base.mean(1, keepdims=True) * 0.9 + 0.2, base.shape)
    results = compare(tmp_path, base, arm, bright="trained_on", red="held_out")
    assert "diversity:vendi" in flags(results)
    [vendi, _] = results.comparisons[0].diversity
    assert vendi.value_arm == pytest.approx(1, abs=1e-3)
    assert vendi.ratio < 0.9 < vendi.value_base


def test_what_fell_with_a_reward_that_fell_too_is_damage_but_no_hacking(tmp_path):
    base = pictures()
    arm = np.broadcast_to(base.mean(1, keepdims=True) * 0.5, base.shape)
    results = compare(tmp_path, base, arm, bright="trained_on", red="held_out")
    assert flags(results) == set()
    assert any("no reward hacking" in check.sentence for check in results.comparisons[0].checks)


def test_without_an_encoder_what_needs_one_is_said_not_to_be_measured(tmp_path):
    images = pictures()[:, :1]
    places = save(tmp_path / "base", images), save(tmp_path / "arm", images)
    settings = EvaluationSettings(images_per_prompt=1, device="cpu")
    results = evaluate(*places, PROMPTS, rewards=[BRIGHT], output=tmp_path / "out", settings=settings)
    [comparison] = results.comparisons
    assert comparison.diversity == ()
    assert [drift.metric for drift in comparison.drift] == ["mean absolute difference of pixels"]
    said = {check.name: check for check in comparison.checks}
    assert said["diversity:vendi"].flagged is None
    assert said["diversity:vendi"].sentence == "Not measured: no encoder of images was given."
