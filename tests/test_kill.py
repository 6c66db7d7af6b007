"""Runs that are really killed, with SIGKILL, at many moments, and what they are after they went on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import worlds
from tests.test_train import config, metrics, same, weights

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    return root


def table(world: Path, output: Path, trainable: str) -> dict:
    """A run with everything that has state: moving average, validation, best checkpoint, own cache."""
    options = {
        "train": {"steps": STEPS, "ema_decay": 0.9},
        "validation": {"every": 3, "fraction": 0.3, "pairs": 4},
        "checkpoint": {"every": 2, "best": "loss"},
        "data": {"cache": str(output.parent / f"{output.name}-cache")},
    }
    return config(world, output, trainable=trainable, **options)


CODE = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import diffalign
from diffalign import checkpoint, fit, pool, rounds
from diffalign.data import cache

table, moment = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def dying(owner, name, nth):
    # Replaces a function by one that kills this very process at its n-th call, half-way through its work.
    whole, count = getattr(owner, name), [0]
    def wrapper(*args, **kwargs):
        count[0] += 1
        if count[0] == nth:
            if name == "save_file":
                open(args[1], "wb").write(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)
    setattr(owner, name, wrapper)

if moment:
    owner, name, nth = moment
    modules = {"checkpoint": checkpoint, "cache": cache, "fit": fit, "pool": pool, "rounds": rounds}
    owners = {**modules, "sampler": rounds.Sampler}
    dying(owners[owner], name, nth)
diffalign.train(table)
"""


def run(table: dict, moment: list | None) -> int:
    """Exit status of a training process that kills itself at a moment; negative is a signal."""
    arguments = [json.dumps(table), json.dumps(moment)]
    result = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr[-2000:]
    return result.returncode


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody killed, in processes of the same kind."""
    root = tmp_path_factory.mktemp("whole")
    for trainable in ("lora", "full"):
        assert run(table(world, root / trainable, trainable), None) == 0
    return {trainable: root / trainable for trainable in ("lora", "full")}


MOMENTS = {
    "while the first images are encoded": ["cache", "save_shard", 1],
    "while prompts are encoded": ["cache", "save_shard", 2],
    "in the first step, before any checkpoint": ["fit", "_backward", 1],
    "during a step": ["fit", "_backward", 5],
    "while a checkpoint's weights are written": ["checkpoint", "save_file", 4],
    "while a checkpoint's optimizer is written": ["checkpoint", "save_file", 5],
    "in the last step": ["fit", "_backward", STEPS],
}


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(world, whole, tmp_path, moment, trainable):
    killed = table(world, tmp_path / "run", trainable)
    assert run(killed, MOMENTS[moment]) == -signal.SIGKILL
    assert run({**killed, "resume": "latest"}, None) == 0
    compare(whole[trainable], tmp_path / "run")


def in_rounds(world: Path, output: Path, trainable: str) -> dict:
    """The same run in two rounds; one part of images is 16 batches of one."""
    found = table(world, output, trainable)
    found["method"] = {"name": "seppo", "beta": 100.0}
    found["rounds"] = {"count": 2, "steps": 2, "guidance": 2.0, "batch_size": 1}
    found["checkpoint"]["best"] = "err_w"
    return found


ROUND_MOMENTS = {
    "while the first policy is written": ["pool", "save_shard", 1],
    "while images are sampled": ["sampler", "moments", 3],
    "while images are written": ["rounds", "save_shard", 1],
    "between the second policy and its place in the pool": ["pool", "_sha256", 3],
    "between the second policy and its images": ["rounds", "sample", 2],
    "while the second images are sampled": ["sampler", "moments", 22],
    "in the second round": ["fit", "_backward", 6],
}


@pytest.fixture(scope="module")
def whole_rounds(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rounds")
    for trainable in ("lora", "full"):
        assert run(in_rounds(world, root / trainable, trainable), None) == 0
    return {trainable: root / trainable for trainable in ("lora", "full")}


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("moment", ROUND_MOMENTS)
def test_a_run_in_rounds_killed_in_any_phase_ends_as_if_it_had_not_been(
    world, whole_rounds, tmp_path, moment, trainable
):
    killed = in_rounds(world, tmp_path / "run", trainable)
    assert run(killed, ROUND_MOMENTS[moment]) == -signal.SIGKILL
    assert run({**killed, "resume": "latest"}, None) == 0
    compare(whole_rounds[trainable], tmp_path / "run")


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_run_that_is_killed_from_outside_again_and_again_ends_the_same(world, whole, tmp_path, trainable):
    killed = {**table(world, tmp_path / "run", trainable), "resume": "latest"}
    rng = torch.Generator().manual_seed(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", CODE, json.dumps(killed), "null"], stderr=subprocess.DEVNULL)
        time.sleep(3 + 4 * torch.rand((), generator=rng).item())
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            break
    assert run(killed, None) == 0
    compare(whole[trainable], tmp_path / "run")


def compare(a: Path, b: Path) -> None:
    """Weights, optimizer, moving average, metrics and export of two runs are equal bit for bit."""
    assert same(weights(a, STEPS), weights(b, STEPS))
    for name in ("optimizer", "ema"):
        x, y = (load_file(f / "checkpoints" / f"step-{STEPS}" / f"{name}.safetensors") for f in (a, b))
        assert same(x, y), name
    assert metrics(a) == metrics(b)
    x, y = (load_file(next((f / "export").rglob("*.safetensors"))) for f in (a, b))
    assert same(x, y)
    assert {p.name for p in (a / "checkpoints").iterdir()} == {p.name for p in (b / "checkpoints").iterdir()}
