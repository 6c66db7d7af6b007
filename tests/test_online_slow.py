"""Online runs that are killed in every phase, and runs of two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import worlds
from tests.test_online import PROMPTS, table
from tests.test_processes import run as run_processes
from tests.test_train import metrics, same, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


CODE = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import diffalign
from diffalign import checkpoint, fit, pool
from diffalign.online import sampling, store

table, moment = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def dying(owner, name, nth):
    # Replaces a function by one that kills this very process at its n-th call, half-way through its work.
    whole, count = getattr(owner, name), [0]
    def wrapper(*args, **kwargs):
        count[0] += 1
        if count[0] == nth:
            if name in ("save_file", "write_bytes"):
                open(args[1] if name == "save_file" else args[0], "wb").write(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)
    setattr(owner, name, wrapper)

if moment:
    owner, name, nth = moment
    owners = {"checkpoint": checkpoint, "fit": fit, "pool": pool, "store": store, "Store": store.Store,
              "sampling": sampling}
    dying(owners[owner], name, nth)
diffalign.train(table)
"""


def run(cfg: dict, moment: list | None) -> int:
    """Exit status of a training process that kills itself at a moment; negative is a signal."""
    command = [sys.executable, "-c", CODE, json.dumps(cfg), json.dumps(moment)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr[-2000:]
    return result.returncode


def ddpo(world: Path, output: Path) -> dict:
    """Two rounds of two updates whose old log-probs are computed again."""
    online = {"guidance": 2.0, "batch_size": 3}
    return table(world, output, method="ddpo", online=online, train={"accumulate": 4, "ema_decay": 0.9})


def nft(world: Path, output: Path) -> dict:
    """Two rounds of two updates with a slow copy of the policy."""
    online = {"steps": 8, "prompts": 2, "group": 2}
    return table(world, output, model="sd3", method="diffusion_nft", online=online, train={"accumulate": 7})


RUNS = {"ddpo": ddpo, "nft": nft}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody killed, in processes of the same kind."""
    root = tmp_path_factory.mktemp("whole")
    for name, make in RUNS.items():
        assert run(make(world, root / name), None) == 0
    return {name: root / name for name in RUNS}


MOMENTS = {
    "while an image is written": ["store", "write_bytes", 3],
    "while rollouts are written": ["store", "save_shard", 2],
    "while scores are written": ["Store", "write_scores", 2],
    "in the first step": ["fit", "_backward", 1],
    "while a checkpoint is written": ["checkpoint", "save_file", 2],
    "in the second round, while it is sampled": ["sampling", "rollout", 4],
    "in the second round, while it is trained": ["fit", "_backward", 10],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_on_its_own_images_ends_as_if_it_had_not_been(world, whole, tmp_path, moment, name):
    killed = RUNS[name](world, tmp_path / "run")
    assert run(killed, MOMENTS[moment]) == -signal.SIGKILL
    assert run({**killed, "resume": "latest"}, None) == 0
    assert same(weights(whole[name], 4), weights(tmp_path / "run", 4))
    x, y = (load_file(f / "checkpoints" / "step-4" / "optimizer.safetensors") for f in (whole[name], tmp_path / "run"))
    assert same(x, y)
    assert metrics(whole[name]) == metrics(tmp_path / "run")


def test_a_round_of_pairs_read_by_another_process_has_the_same_log_probs_bit_for_bit(world, tmp_path):
    whole, killed = (table(world, tmp_path / name, train={"steps": 2, "accumulate": 2}) for name in ("whole", "killed"))
    assert run(whole, None) == 0
    assert run(killed, ["fit", "_backward", 3]) == -signal.SIGKILL  # after a step; the second starts from the disk
    assert run({**killed, "resume": "latest"}, None) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert same(weights(tmp_path / "whole", 2), weights(tmp_path / "killed", 2))


@pytest.mark.parametrize(("model", "method"), [("sd", "d3po"), ("sd", "ddpo"), ("sd3", "diffusion_nft")])
def test_two_processes_make_the_groups_and_take_the_steps_of_one(world, tmp_path, model, method):
    online = {"prompts": 4, "group": 2, "steps": 4 if method != "diffusion_nft" else 8, "batch_size": 2, "updates": 1}
    turns = 7 if method == "diffusion_nft" else 4
    total = {"d3po": 4, "ddpo": 8, "diffusion_nft": 8}[method] * turns  # rows at all their moves
    common = {"model": model, "method": method, "online": online}
    one = table(world, tmp_path / "one", train={"steps": 2, "batch_size": 4, "accumulate": total // 4}, **common)
    two = table(world, tmp_path / "two", train={"steps": 2, "batch_size": 2, "accumulate": total // 4}, **common)
    run_processes(one, 1, tmp_path)
    run_processes(two, 2, tmp_path)
    for number in (1, 2):
        a, b = (tmp_path / name / "rounds" / f"round-{number}" for name in ("one", "two"))
        assert (a / "manifest.jsonl").read_text() == (b / "manifest.jsonl").read_text()
        if number == 1:  # later rounds come from policies that were summed in another order
            for file in sorted(a.glob("scores-*.json")):
                assert json.loads(file.read_text()) == json.loads((b / file.name).read_text())
            assert {f.name: f.read_bytes() for f in a.glob("images/*")} == {
                f.name: f.read_bytes() for f in b.glob("images/*")
            }
    x, y = (weights(tmp_path / name, 2) for name in ("one", "two"))
    for key in x:  # sums in another order; AdamW divides by the gradient's size, which magnifies it
        torch.testing.assert_close(x[key], y[key], atol=3e-4, rtol=0)
    assert os.path.isdir(tmp_path / "two" / "export")
