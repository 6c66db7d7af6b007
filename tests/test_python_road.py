"""The Python road of the README, on the shipped tiny world."""

import json

import pytest
import torch

import diffalign
from diffalign.data.prompts import read_prompts
from diffalign.errors import InputError


def test_train_then_evaluate_then_score(tmp_path):
    steps = ["train.steps=2", "train.batch_size=2", "data.limit=40", "validation.pairs=2", "validation.fraction=0.3"]
    result = diffalign.train("tiny_sd_diffusion_dpo", f"output={tmp_path / 'run'}", *steps)
    prompts = read_prompts("tiny").prompts[:2]
    results = diffalign.evaluate(
        "tiny-sd",
        str(result.folder),
        prompts,
        rewards=["oracle", "clip:tiny-clip"],
        output=tmp_path / "run",
        roles={"oracle": "labeller", "clip": "held_out"},
        steps=2,
        guidance=2.0,
    )
    assert set(results.comparisons[0].rewards) == {"oracle", "clip"}
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["n_prompts"] == 2
    assert written["comparisons"][0]["rewards"]["oracle"]["role"] == "labeller"


def test_a_reward_is_a_function_of_images_and_prompts():
    reward = diffalign.load_reward("clip:tiny-clip")
    prompts = read_prompts("tiny").prompts[:3]
    images = torch.rand(3, 3, 64, 64)
    scores = reward(images, prompts)
    assert scores.shape == (3,)
    from PIL import Image

    pictures = [Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in images]
    torch.testing.assert_close(reward(pictures, prompts), scores, atol=1e-3, rtol=0)


def test_a_config_may_be_a_table_a_file_or_a_name(tmp_path):
    from diffalign.config import load
    from diffalign.settings import TrainConfig

    assert isinstance(load("tiny_sd_diffusion_dpo"), TrainConfig)
    with pytest.raises(InputError, match="overrides must come with a config file or name"):
        diffalign.train({}, "train.steps=2")


def test_a_setting_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=r"unknown setting 'guidence'; did you mean 'guidance'\?"):
        diffalign.evaluate("tiny-sd", "tiny-sd", rewards=["oracle"], output=tmp_path / "x", guidence=2.0)
