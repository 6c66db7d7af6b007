"""Two processes (gloo) take the same steps as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign.data.selfsampled import Images
from tests import worlds
from tests.test_train import config, metrics, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    return root


CODE = "import json, sys, torch; torch.set_num_threads(1); import diffalign; diffalign.train(json.loads(sys.argv[1]))"


def run(table: dict, processes: int, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(CODE)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = (
        [*launcher, str(script), json.dumps(table)]
        if processes > 1
        else [sys.executable, str(script), json.dumps(table)]
    )
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_two_processes_give_the_weights_of_one(world, tmp_path, model, trainable):
    validation = {"every": 2, "fraction": 0.3, "pairs": 5}
    common = {"model": model, "trainable": trainable, "validation": validation, "optimizer": {"lr": 1e-3}}
    one = config(world, tmp_path / "one", train={"steps": 4, "batch_size": 4}, **common)
    two = config(world, tmp_path / "two", train={"steps": 4, "batch_size": 1, "accumulate": 2}, **common)
    one["data"]["cache"], two["data"]["cache"] = str(tmp_path / "cache-1"), str(tmp_path / "cache-2")
    run(one, 1, tmp_path)
    run(two, 2, tmp_path)
    a, b = (weights(tmp_path / name, 4) for name in ("one", "two"))
    start = {k: torch.zeros_like(v) for k, v in a.items()}
    moved = max((a[k] - start[k]).abs().max() for k in a)
    for name in a:  # sums in another order; AdamW divides by the gradient's size, which magnifies it
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)
    assert moved > 1e-3
    for x, y in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        kind = x.get("validation", x), y.get("validation", y)
        assert kind[0]["err_w"] == pytest.approx(kind[1]["err_w"], rel=1e-4)
        assert kind[0]["loss"] == pytest.approx(kind[1]["loss"], abs=2e-3)
        assert x.get("samples") == y.get("samples")


def test_two_processes_sample_and_train_the_rounds_of_one(world, tmp_path):
    own = {"count": 2, "steps": 2, "guidance": 2.0, "batch_size": 1}
    common = {"optimizer": {"lr": 1e-3}, "rounds": own, "validation": {"every": 2, "fraction": 0.3, "pairs": 5}}
    one = config(world, tmp_path / "one", train={"steps": 4, "batch_size": 4}, **common)
    two = config(world, tmp_path / "two", train={"steps": 4, "batch_size": 1, "accumulate": 2}, **common)
    for table, processes in ((one, 1), (two, 2)):
        table["method"] = {"name": "seppo", "beta": 100.0}
        table["data"]["cache"] = str(tmp_path / f"cache-{processes}")
        run(table, processes, tmp_path)
    a, b = (weights(tmp_path / name, 4) for name in ("one", "two"))
    for name in a:  # sums in another order; AdamW divides by the gradient's size, which magnifies it
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)
    lines = [[m for m in metrics(tmp_path / name) if "round" in m] for name in ("one", "two")]
    assert lines[0] == lines[1]
    first, second = (Images(tmp_path / name / "rounds" / "round-2", "train") for name in ("one", "two"))
    assert first.places.keys() == second.places.keys()
    for row in first.places:
        for x, y in zip(first.moments([row]), second.moments([row]), strict=True):
            torch.testing.assert_close(x, y, atol=2e-2, rtol=1e-2)  # the policies of round 2 differ in last digits


def test_one_process_can_resume_what_two_began(world, tmp_path):
    table = config(world, tmp_path / "run", train={"steps": 2, "batch_size": 2})
    run(table, 2, tmp_path)
    run({**table, "resume": "latest", "train": {**table["train"], "steps": 4}}, 1, tmp_path)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_processes_whose_inversions_differ_in_length_take_the_same_steps_as_one(world, tmp_path):
    """A process that has fewer forwards to make must not leave the other one waiting."""
    method = {"name": "inpo", "beta": 20.0, "levels": 6}
    common = {"model": "sd3", "method": method, "optimizer": {"lr": 1e-3}}
    one = config(world, tmp_path / "one", train={"steps": 3, "batch_size": 2}, **common)
    two = config(world, tmp_path / "two", train={"steps": 3, "batch_size": 1}, **common)
    run(one, 1, tmp_path)
    run(two, 2, tmp_path)
    for x, y in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert x["err_w"] == pytest.approx(y["err_w"], rel=1e-3)
        assert x["forwards"] == y["forwards"]
