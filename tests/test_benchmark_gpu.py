"""The benchmark of true sizes: its networks are the published ones, and every family takes steps at a tenth of them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import CASES, KERNELS, clocks, measure, useful_flop
from benchmarks.gpu_worlds import WORLDS

FIRST = {case.world: case for case in reversed(CASES)}
"""One case of every world."""


@pytest.mark.parametrize("name", WORLDS)
def test_networks_have_the_parameters_of_the_published_ones(name):
    world = WORLDS[name]
    assert sum(p.numel() for p in world.bare_net().parameters()) == world.parameters


@pytest.mark.parametrize("name", WORLDS)
def test_every_family_takes_steps_at_a_tenth_of_its_size(name):
    row = measure(replace(FIRST[name], pairs=1, attention="sdpa"), tenth=True, steps=1, warmup=1)
    assert "failed" not in row, row["failed"]
    assert row["pairs_a_second"] > 0 < row["mfu"]
    assert row["parameters"] < WORLDS[name].parameters / 20
    assert row["flop_a_pair"] > 1e7


def test_full_weights_cost_more_and_fixed_draws_less():
    case, world = FIRST["sd15"], WORLDS["sd15"].tenth()
    lora, full, fixed = (
        useful_flop(world, replace(case, **more)) for more in ({}, {"full": True}, {"fixed_draws": True})
    )
    assert full > lora > fixed > full / 3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"full": True}, {"fixed_draws": True}, {"recompute": "selective"}], ids=str)
def test_every_kind_of_case_takes_steps(changes):
    row = measure(replace(FIRST["sd15"], pairs=1, **changes), tenth=True, steps=1, warmup=0)
    assert row["pairs_a_second"] > 0


def test_what_does_not_work_is_a_row_with_the_reason():
    row = measure(replace(FIRST["sd15"], attention="flash"), tenth=True, steps=1, warmup=0)
    assert row["failed"].startswith("InputError: config.train.attention must be a kernel that works here, got 'flash'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "full", "tflop"),
    [("sd15", False, 5.03), ("sd15", True, 6.42), ("sdxl", False, 41.7), ("pixart", False, 44.3), ("flux", False, 476)],
)
def test_the_work_of_a_pair_is_that_of_the_study(monkeypatch, name, full, tflop):
    monkeypatch.setattr(gpu, "RANK", 4)  # of the study's adapters
    found = useful_flop(WORLDS[name], replace(FIRST[name], full=full))
    assert found / 1e12 == pytest.approx(tflop, rel=0.005)


def test_the_table_has_every_setting_and_every_target():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for world in ("sd15", "sdxl"):
        lora = [c for c in CASES if c.world == world and not c.full and not c.fixed_draws and c.pairs > 1]
        assert {c.attention for c in lora} == {"sdpa", *KERNELS}
        assert {(c.channels_last, c.compile) for c in lora} == {(a, b) for a in (False, True) for b in (False, True)}
        assert any(c.full for c in CASES if c.world == world)
    assert set(FIRST) == set(WORLDS)
    assert all(c.must < c.lead for c in CASES if c.must is not None)


def test_clocks_are_rates():
    assert min(clocks(torch.device("cpu")).values()) > 0


@pytest.mark.slow
def test_it_writes_its_rows_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tenth", "--steps", "1", "--warmup", "0", "--out", str(out)]
    for cases in (["SD 1.5 LoRA, eager"], ["SD 1.5 LoRA, eager", "SD 1.5 LoRA, cudnn"]):
        subprocess.run([*command, "--cases", *cases], check=True, capture_output=True)
    found = json.loads(out.read_text())
    eager, cudnn = found["cases"]
    assert eager["pairs_a_second"] > 0
    assert cudnn["failed"]
    assert {"device_name", "packages", "commit"} <= set(found["environment"])
