"""A reference that follows the policy, and one that may not: whole roads with LoRA and with full weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign.assemble import assemble
from diffalign.config import parse
from diffalign.errors import InputError
from diffalign.models.load import ModelSource, detect_family
from diffalign.models.lora import LoraSettings
from diffalign.models.policy import cast_frozen, load_policy, make_reference
from diffalign.models.save import trainable
from tests import worlds
from tests.test_config import BASE
from tests.test_train import config, metrics, reloaded, same, weights

DECAY = 0.9
LINEAR = {"name": "linear_dpo", "beta": 100.0}
BOTH = pytest.mark.parametrize("trainable", ["lora", "full"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    return root


def linear(world: Path, output: Path, trainable: str = "lora", *, steps: int = 3, decay: float = DECAY, **sections):
    train = {"steps": steps, "reference_decay": decay}
    table = config(world, output, trainable=trainable, train=train, **sections)
    table["method"] = LINEAR
    table["checkpoint"] = {"every": 1, "keep_last": 10}
    return table


def reference(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / "reference.safetensors")


@BOTH
def test_the_reference_is_the_average_of_the_policies_that_were_reached(world, tmp_path, trainable):
    table = linear(world, tmp_path / "run", trainable)
    average = {k: v.detach().clone() for k, v in assemble(parse(table)).parameters.items()}
    start = dict(average)
    folder = diffalign.train(table).folder
    for step in (1, 2, 3):
        policy, found = weights(folder, step), reference(folder, step)
        average = {k: DECAY * v + (1 - DECAY) * policy[k] for k, v in average.items()}
        assert found.keys() == average.keys()
        for name, value in average.items():
            torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6)
    # the released trainer for SD3 averages before the optimizer's step, which leaves the start after step 1
    assert not same(reference(folder, 1), start)


@BOTH
def test_the_policy_is_measured_against_the_average_and_not_the_start(world, tmp_path, trainable):
    moving = diffalign.train(linear(world, tmp_path / "ema", trainable, decay=0.0)).folder
    table = linear(world, tmp_path / "start", trainable)
    del table["train"]["reference_decay"]
    table["train"]["reference"] = "start"
    still = diffalign.train(table).folder
    assert metrics(moving)[0] == metrics(still)[0]
    assert [line["winner_gain"] for line in metrics(moving)] == pytest.approx([0.0] * 3, abs=1e-6)  # decay 0: itself
    assert abs(metrics(still)[1]["winner_gain"]) > 1e-6


@BOTH
def test_a_resumed_run_with_a_moving_reference_ends_as_one_that_was_not_stopped(world, tmp_path, trainable):
    whole = diffalign.train(linear(world, tmp_path / "whole", trainable, steps=6)).folder
    diffalign.train(linear(world, tmp_path / "parts", trainable, steps=3))
    parts = diffalign.train({**linear(world, tmp_path / "parts", trainable, steps=6), "resume": "latest"}).folder
    assert same(weights(whole, 6), weights(parts, 6))
    assert same(reference(whole, 6), reference(parts, 6))
    assert metrics(whole) == metrics(parts)


def test_the_decay_is_that_of_the_paper_unless_the_config_names_one(world, tmp_path):
    tables = {name: linear(world, tmp_path / name, steps=1, decay=0.995) for name in ("named", "default")}
    del tables["default"]["train"]["reference_decay"]
    named, default = (reference(diffalign.train(t).folder, 1) for t in tables.values())
    assert same(named, default)


def test_the_exported_lora_has_no_reference_in_it(world, tmp_path):
    moving = diffalign.train(linear(world, tmp_path / "ema"))
    table = linear(world, tmp_path / "start")
    del table["train"]["reference_decay"]
    table["train"]["reference"] = "start"
    still = diffalign.train(table)
    names, expected = (set(load_file(next(r.export.rglob("*.safetensors")))) for r in (moving, still))
    assert names == expected
    assert not any("reference" in name for name in names)
    trained, exported = (
        sorted(x.double().sum().item() for x in tensors.values())
        for tensors in (weights(moving.folder, 3), load_file(next(moving.export.rglob("*.safetensors"))))
    )
    assert exported == pytest.approx(trained, abs=1e-6)  # the policy's weights, and not the average
    assert torch.isfinite(reloaded(world / "sd", moving.export)).all()


def test_a_run_from_a_lora_starts_its_moving_reference_there(world, tmp_path):
    first = diffalign.train(config(world, tmp_path / "first", train={"steps": 3}))
    table = linear(world, tmp_path / "second", steps=2)
    table["model"] = {**table["model"], "lora": str(first.export)}
    second = diffalign.train(table).folder
    assert metrics(second)[0]["winner_gain"] == pytest.approx(0, abs=1e-6)
    started = {k: v.double().sum().item() for k, v in weights(first.folder, 3).items()}
    for name, value in reference(second, 1).items():
        assert value.double().sum().item() == pytest.approx(
            DECAY * started[name] + (1 - DECAY) * weights(second, 1)[name].double().sum().item(), abs=1e-5
        )


def test_a_moving_reference_is_float32_even_where_frozen_weights_are_not(world, tmp_path):
    """As on a GPU in bf16: 0.5 % of a small change is lost in eight bits."""
    first = diffalign.train(config(world, tmp_path / "first", train={"steps": 3}))
    source = ModelSource(path=str(world / "sd"), lora=str(first.export))
    policy = load_policy(source, detect_family(source), None, lora=LoraSettings(rank=4, alpha=8.0), seed=0)
    cast_frozen(policy.net, torch.bfloat16)
    moving, trained = make_reference(policy, adapted=True, moves=True), trainable(policy.net)
    assert moving.parameters.keys() == trained.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, trained[k]) for k, p in moving.parameters.items())
    assert not any(p.requires_grad for p in moving.parameters.values())
    moving.follow(trained, decay=0.995)


def test_diffusion_dpo_may_follow_a_moving_reference_too(world, tmp_path):
    table = config(world, tmp_path / "run", train={"steps": 2, "reference": "ema", "reference_decay": 0.5})
    lines = metrics(diffalign.train(table).folder)
    assert lines[0]["rewards/margins"] == 0
    assert lines[1]["rewards/margins"] != 0


def test_the_running_mean_of_rewards_survives_a_resume(world, tmp_path):
    def run(name: str, steps: int, resume: str = "never") -> Path:
        table = config(world, tmp_path / name, train={"steps": steps}, checkpoint={"every": 1})
        table["method"] = {"name": "diffusion_dpo", "beta": 100.0, "link": "bco_pair"}
        return diffalign.train({**table, "resume": resume}).folder

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, "latest")
    states = [json.loads((f / "checkpoints" / "step-4" / "state.json").read_text())["rewards"] for f in (whole, parts)]
    assert states[0] == states[1]
    assert states[0]["count"] == 4 * 2 * 2
    assert states[0]["total"] != 0
    assert same(weights(whole, 4), weights(parts, 4))
    assert metrics(whole) == metrics(parts)


@pytest.mark.parametrize("name", ["cpo", "mapo", "dmpo"])
def test_the_relatives_train_from_a_config(world, tmp_path, name):
    table = config(world, tmp_path / "run", train={"steps": 2})
    table["method"] = {"name": name, "safeguard": {"mu": 0.9}}
    lines = metrics(diffalign.train(table).folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 <= line["lambda_safe"] <= 1 for line in lines)


@pytest.mark.parametrize(
    ("method", "train", "message"),
    [
        (
            "diffusion_dpo",
            {"reference": "none"},
            r"train\.reference must be 'start' or 'ema' with method 'diffusion_dpo'",
        ),
        ("linear_dpo", {"reference": "none"}, r"train\.reference must be 'ema' or 'start' with method 'linear_dpo'"),
        (
            "sft",
            {"reference": "ema"},
            r"train\.reference must be left out with method 'sft', which measures against no",
        ),
        (
            "cpo",
            {"reference": "start"},
            r"train\.reference must be left out with method 'cpo', which measures against no",
        ),
        ("mapo", {"reference_decay": 0.9}, r"reference_decay must be left out unless the reference is 'ema', got 0\.9"),
        ("dmpo", {"reference_decay": 0.9}, r"reference_decay must be left out unless the reference is 'ema', got 0\.9"),
        ("linear_dpo", {"reference_decay": 1.0}, r"train\.reference_decay must be in \[0, 1\), got 1\.0"),
        ("linear_dpo", {"reference_decay": -0.1}, r"train\.reference_decay must be in \[0, 1\), got -0\.1"),
        ("linear_dpo", {"reference": "mean"}, r"train\.reference must be one of 'none', 'start', 'ema'"),
    ],
)
def test_a_reference_that_makes_no_sense_is_one_line_with_the_reason(method, train, message):
    with pytest.raises(InputError, match=message) as caught:
        parse({**BASE, "method": {"name": method}, "train": {"steps": 5, **train}})
    assert "\n" not in str(caught.value)
