"""The benchmark of Fréchet distances: all its ways give one number, and it writes its table."""

import json
import subprocess
import sys
import warnings

import pytest

from benchmarks.set_distances import SIZES, WAYS, build


def test_all_ways_give_one_number():
    world = build(SIZES["small"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [way(world) for way in WAYS.values()]
    assert found == pytest.approx([found[0]] * len(WAYS), rel=1e-6)
    assert found[0] > 0.1


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path):
    out = tmp_path / "sets.json"
    command = ["-m", "benchmarks.set_distances", "--size", "small", "--rounds", "1", "--warmup", "0", "--out", str(out)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    table = json.loads(out.read_text())
    assert [row["way"] for row in table["ways"]] == list(WAYS)
    assert (table["rows"], table["width"]) == (600, 48)
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 and row["off_ours"] < 1e-6 for row in table["ways"])
