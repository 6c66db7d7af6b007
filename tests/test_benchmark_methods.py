"""The method table: what it measures is what it says, and finished runs are pooled, sorted and told from stale ones."""

import json

import numpy as np
import pytest
import torch

from benchmarks import method_measures as measures
from benchmarks import method_runs, method_table, methods
from benchmarks.method_runs import Cell, Row
from diffalign.errors import InputError
from diffalign.tiny import scenes
from tests.toys import pairs, toy

PROMPTS = 200


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder in the place of benchmarks/methods/."""
    monkeypatch.setattr(method_runs, "RUNS", tmp_path / "runs")
    (tmp_path / "runs" / "tiny-sd").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    return tmp_path


def cells(*names, seeds=(0, 1, 2)):
    rows = {row.name: row for row in methods.ROWS}
    return [Cell(model="tiny-sd", row=rows[name], seed=seed) for name in names for seed in seeds]


def scores(rate, seed):
    """Scores that beat a base of zeros on about a share `rate` of the prompts."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(PROMPTS) < rate, 1.0, -1.0).tolist()


def record(cell, rate):
    return {
        "seed": cell.seed,
        "digest": method_runs.digest(cell.described()),
        "described": cell.described(),
        "environment": {},
        "scores": {name: scores(rate, cell.seed) for name in measures.JUDGES},
        "attributes": {"shape": 0.2},
        "movement": {"winner": -0.01, "loser": 0.02, "winner_base": 0.1, "loser_base": 0.1, "prediction_drift": 0.03},
        "pixel_distance": 0.05,
        "diversity": {"cosine_distance": 0.4, "vendi": 20.0},
        "cost": {
            "seconds": 10.0,
            "cpu_seconds": 9.0,
            "step_peak_bytes": 1e8,
            "process_peak_bytes": 1e9,
            "evaluations_a_pair": measures.Work().record(1),
        },
    }


def fill(cells_, rates):
    base = {"scores": {name: [0.0] * PROMPTS for name in measures.JUDGES}, "attributes": {"shape": 0.2}}
    base |= {"diversity": {"cosine_distance": 0.4, "vendi": 20.0}, "digest": "x"}
    method_runs.base_file("tiny-sd").write_text(json.dumps(base))
    for cell in cells_:
        cell.file.write_text(json.dumps(record(cell, rates[cell.row.name])))


def test_captions_are_distinct_and_held_out():
    found = measures.captions()
    assert len(set(found)) == measures.PROMPTS >= 500
    assert all(scenes.split_of(scenes.parse(caption)) == "held_out" for caption in found)


def test_nothing_moves_where_the_policy_is_the_base():
    same = toy("velocity")
    moved = measures.movement(same, same, pairs(), levels=(0.2, 0.7))
    assert (moved["winner"], moved["loser"], moved["prediction_drift"]) == (0.0, 0.0, 0.0)
    assert moved["winner_base"] > 0


def test_movement_tells_winners_from_losers():
    batch, policy, base = pairs(), toy(seed=1), toy()
    moved = measures.movement(policy, base, batch)
    turned = measures.movement(policy, base, type(batch)(**{**vars(batch), "x_w": batch.x_l, "x_l": batch.x_w}))
    assert moved["winner"] != moved["loser"]
    # the noise is the same, drawn by place; sums are taken in another order
    assert turned["winner"] == pytest.approx(moved["loser"], abs=1e-5)


def test_pairs_come_back_from_a_file_as_they_were():
    batch = pairs()
    again = measures.pair_batch(measures.pair_tensors(batch))
    torch.testing.assert_close(again.x_w, batch.x_w)
    torch.testing.assert_close(again.cond["c"], batch.cond["c"])


def test_diversity_of_equal_images_is_none_and_of_orthogonal_ones_is_their_number():
    same = measures.diversity(torch.eye(8)[:1].repeat(8, 1))
    apart = measures.diversity(torch.eye(8))
    assert (same["cosine_distance"], same["vendi"]) == pytest.approx((0.0, 1.0), abs=1e-9)
    assert (apart["cosine_distance"], apart["vendi"]) == pytest.approx((1.0, 8.0))


def test_passes_are_counted_with_and_without_gradient_and_partial_ones_apart():
    denoiser = toy()
    batch = pairs(size=6)
    t = torch.zeros(6, dtype=torch.long)
    with measures.counting(denoiser.net, ("first", "last")) as work:
        denoiser(batch.x_w, t, batch.cond)
        with torch.no_grad():
            denoiser(batch.x_w[:3], t[:3], batch.cond.rows(slice(0, 3)))
            denoiser.net.first(torch.zeros(2, 6, 4, 4))
        work.paused = True
        denoiser(batch.x_w, t, batch.cond)
    denoiser(batch.x_w, t, batch.cond)
    assert work.record(3) == pytest.approx(
        {
            "with_gradient": 2.0,
            "without_gradient": 1.0,
            "partial_with_gradient": 0.0,
            "partial_without_gradient": 2 / 3,
        }
    )


def test_rows_are_pooled_over_seeds_and_sorted_by_their_win_rate(runs):
    chosen = cells("sft", "shuffled", "diffusion_dpo")
    fill(chosen, {"sft": 0.6, "shuffled": 0.48, "diffusion_dpo": 0.8})
    table = method_table.collect(chosen)["tiny-sd"]
    assert [row["row"] for row in table["rows"]] == ["diffusion_dpo", "sft", "shuffled"]
    best = table["rows"][0]
    oracle = best["rewards"]["oracle"]
    assert oracle["win_rate"] == pytest.approx(np.mean(best["oracle_win_rate_by_seed"]))
    assert oracle["ci_low"] < oracle["win_rate"] < oracle["ci_high"]
    assert best["beats_base"]
    assert not table["rows"][-1]["beats_base"]


def test_three_seeds_have_a_narrower_interval_than_one(runs):
    chosen = cells("diffusion_dpo")
    fill(chosen, {"diffusion_dpo": 0.7})
    [pooled] = method_table.collect(chosen)["tiny-sd"]["rows"]
    [single] = method_table.collect(chosen[:1])["tiny-sd"]["rows"]
    widths = [row["rewards"]["oracle"]["ci_high"] - row["rewards"]["oracle"]["ci_low"] for row in (pooled, single)]
    assert widths[0] < 0.75 * widths[1]


def test_a_run_from_before_a_key_was_there_is_still_one_of_its_default():
    [cell] = cells("diffusion_dpo", seeds=(0,))
    held = record(cell, 0.6)
    del held["described"]["config"]["data"]["prompt_dropout"]
    assert not method_runs.is_current(cell, held)  # the config says 0.1, the default is another
    held = record(cell, 0.6)
    del held["described"]["config"]["train"]["channels_last"]
    assert method_runs.is_current(cell, held)
    held["described"]["config"]["train"]["key_of_long_ago"] = 1
    assert not method_runs.is_current(cell, held)


def test_a_run_of_another_config_is_stale_and_made_again(runs, capsys):
    chosen = cells("diffusion_dpo", seeds=(0,))
    fill(chosen, {"diffusion_dpo": 0.7})
    assert methods.open_cells(chosen, again=False) == []
    assert methods.open_cells(chosen, again=True) == chosen
    other = Row(name="diffusion_dpo", config="diffusion_dpo", changes=("method.beta=7",))
    changed = [Cell(model="tiny-sd", row=other, seed=0)]
    assert methods.open_cells(changed, again=False) == changed
    assert "stale, made again: tiny-sd, diffusion_dpo, seed 0" in capsys.readouterr().out
    table = method_table.collect(changed)["tiny-sd"]
    assert (table["rows"], table["stale"]) == ([], ["diffusion_dpo, seed 0"])


def test_labels_by_lot_are_another_run(runs):
    true, lot = cells("diffusion_dpo", "shuffled", seeds=(0,))
    assert method_runs.digest(true.described()) != method_runs.digest(lot.described())


def test_all_rows_get_the_same_updates_and_pairs():
    for cell in methods.plan(list(method_runs.MODELS), None, (1,)):
        settings = cell.settings()
        images = 2 if settings.method.needs.data == "labelled" else 1
        assert (settings.train.steps, settings.train.batch_size) == (method_runs.STEPS, images * method_runs.BATCH)
        assert (settings.train.accumulate, settings.seed) == (1, 1)


def test_the_first_seed_of_everything_comes_first():
    assert [cell.seed for cell in methods.plan(["tiny-sd"], ["sft", "diffusion_dpo"], (0, 1))] == [0, 0, 1, 1]


def test_a_row_without_a_config_is_an_error_when_asked_for(monkeypatch):
    monkeypatch.setattr(methods, "ROWS", (*methods.ROWS, Row(name="nothing", config="nothing")))
    with pytest.raises(InputError, match="missing: tiny_sd_nothing"):
        methods.plan(["tiny-sd"], ["nothing"], (0,))
    with pytest.raises(InputError, match="did you mean 'diffusion_dpo'"):
        methods.plan(["tiny-sd"], ["difusion_dpo"], (0,))
    assert "nothing" not in {cell.row.name for cell in methods.plan(["tiny-sd"], None, (0,))}


def test_the_page_keeps_what_is_written_around_the_table(runs):
    chosen = cells("sft", "diffusion_dpo", seeds=(0,))
    fill(chosen, {"sft": 0.5, "diffusion_dpo": 0.8})
    method_table.write(chosen, ["tiny-sd3, sft"], root=runs)
    page = runs / "docs" / "methods.md"
    page.write_text(f"Before.\n{page.read_text()}After.\n")
    method_table.write(chosen[:1], [], root=runs)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "| sft (control) |" in text
    assert "diffusion_dpo |" not in text
    assert "Does not beat base. sft" in text
    assert json.loads((runs / "benchmarks" / "methods.json").read_text())["models"]["tiny-sd"]["rows"]
    assert (runs / "docs" / "methods.png").stat().st_size > 5000


def test_a_page_without_its_markers_is_an_error():
    with pytest.raises(ValueError, match="must hold the lines"):
        method_table.between("no markers", "table")
