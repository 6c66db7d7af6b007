"""The online table: cells are what their configs say, sets and rounds are measured, and toy cells make the table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import (
    method_measures,
    method_runs,
    online,
    online_measures,
    online_plot,
    online_runs,
    online_start,
    online_table,
)
from benchmarks.online_measures import SCORED
from benchmarks.online_runs import OnlineCell
from benchmarks.scene_pictures import draw_pictures
from diffalign.data.prompts import read_prompts
from diffalign.errors import InputError, RunError
from diffalign.evaluate.score import read_image
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.rewards.gaussians import Gaussian
from diffalign.tiny import oracle, scenes
from diffalign.types import PairBatch

PROMPTS = 200


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder in the place of benchmarks/online/."""
    monkeypatch.setattr(online_runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(online_start, "start", lambda _, rounds: rounds * [dict.fromkeys(online_start.JUDGES, 0.5)])
    for folder in ("runs/tiny-sd", "docs", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def cells(*names, seeds=(0, 1)):
    rows = {row.name: row for row in online.ROWS}
    return [OnlineCell(model="tiny-sd", row=rows[name], seed=seed) for name in names for seed in seeds]


def scores(rate, seed):
    """Scores that beat a base of zeros on about a share `rate` of the prompts."""
    return np.where(np.random.default_rng(seed).random(PROMPTS) < rate, 1.0, -1.0).tolist()


def record(cell, rate, frechet=-0.1):
    own = {"score/jpeg": -2.0} if cell.row.reward == "jpeg" else {"score/clip": 60.0}
    rounds = [{"round": k, "images": 64 * k, "own": own, "clip": 60.0 + k, "oracle": 0.5 + k / 10} for k in (1, 2, 3)]
    change = {"value": 0.2, "base": 0.3, "change": frechet, "low": frechet - 0.05, "high": frechet + 0.05}
    return {
        "seed": cell.seed,
        "digest": method_runs.digest(cell.described()),
        "described": cell.described(),
        "environment": {},
        "scores": {name: scores(rate, cell.seed) for name in SCORED},
        "attributes": {"shape": 0.2},
        "movement": {"winner": 0.0, "loser": 0.0, "winner_base": 0.1, "loser_base": 0.1, "prediction_drift": 0.03},
        "pixel_distance": 0.05,
        "cosine_distance": 0.4,
        "sets": {"frechet": change, "vendi": {"value": 13.0, "base": 12.0, "change": 1.0, "low": 0.5, "high": 1.5}},
        "curve": rounds,
        "cost": {
            "seconds": 10.0,
            "cpu_seconds": 9.0,
            "sampling_seconds": 4.0,
            "update_seconds": 5.0,
            "process_peak_bytes": 1e9,
        },
    }


def fill(cells_, rates):
    base = {"digest": "x", "scores": {name: [0.0] * PROMPTS for name in SCORED}, "attributes": {"shape": 0.2}}
    online_runs.base_file("tiny-sd").write_text(json.dumps({**base, "sets": {"frechet": 0.3, "vendi": 12.0}}))
    for cell in cells_:
        cell.file.write_text(json.dumps(record(cell, rates[cell.name])))


def test_two_cells_make_the_table(runs):
    chosen = cells("d3po", "ddpo_jpeg", seeds=(0,))
    fill(chosen, {"d3po": 0.8, "ddpo_jpeg": 0.4})
    online_table.write(chosen, ["tiny-sd3, ddpo"], root=runs)
    page = runs / "docs" / "online-results.md"
    page.write_text(f"Before.\n{page.read_text()}After.\n")
    online_table.write(chosen, [], root=runs)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "| d3po | clip |" in text
    assert "| ddpo_jpeg ✗ | jpeg |" in text
    assert "Not as asked. ddpo_jpeg: nothing else was tried yet." in text
    model = json.loads((runs / "benchmarks" / "online.json").read_text())["models"]["tiny-sd"]
    good, bad = model["rows"]
    assert (good["raised"], good["beats_base"], good["as_asked"]) == (True, True, True)
    assert (bad["raised"], bad["as_asked"]) == (False, False)
    assert [point["images"] for point in good["curve"]] == [64, 128, 192]
    assert (runs / "docs" / "online.png").stat().st_size > 5000


def test_a_distance_is_better_when_smaller(runs):
    [cell] = cells("dragon_frechet", seeds=(0,))
    fill([cell], {"dragon_frechet": 0.4})
    base = method_runs.read(online_runs.base_file("tiny-sd"))
    fallen, risen = (online_table.summary(cell.row, "tiny-sd", [record(cell, 0.4, d)], base) for d in (-0.1, 0.1))
    assert (fallen["raised"], risen["raised"]) == (True, False)
    assert fallen["as_asked"]  # what the oracle says is not asked of it
    assert "0.3000 to 0.2000 (-0.1000: -0.1500 to -0.0500)" in online_table.markdown(
        {"tiny-sd": {"rows": [fallen], "base": base | {"scores": {}}, "missing": [], "stale": []}}, []
    )


@pytest.mark.parametrize(("low", "raised"), [(0.5, True), (-0.1, False)])
def test_diversity_is_better_when_larger(runs, low, raised):
    [cell] = cells("dragon_vendi", seeds=(0,))
    fill([cell], {"dragon_vendi": 0.4})
    one = record(cell, 0.4)
    one["sets"]["vendi"]["low"] = low
    found = online_table.summary(cell.row, "tiny-sd", [one], method_runs.read(online_runs.base_file("tiny-sd")))
    assert found["as_asked"] is raised


def test_seeds_are_pooled_and_a_changed_config_is_stale(runs):
    chosen = cells("d3po", "online_dpo")
    fill(chosen, {"d3po": 0.7, "online_dpo": 0.7})
    other = replace(chosen[2].row, changes=("method.beta=7",))
    table = online_table.collect([*chosen[:2], replace(chosen[2], row=other), chosen[3]])["tiny-sd"]
    assert [(row["row"], row["seeds"]) for row in table["rows"]] == [("d3po", [0, 1]), ("online_dpo", [1])]
    assert table["stale"] == ["online_dpo, seed 0"]
    pooled = table["rows"][0]["rewards"]["oracle"]["win_rate"]
    assert pooled == pytest.approx(np.mean(table["rows"][0]["oracle_win_rate_by_seed"]))


def test_the_plan_goes_seed_by_seed_and_names_what_is_not_there():
    found = online.plan(["tiny-sd", "tiny-sd3"], ["d3po", "flow_grpo"], (0, 1))
    assert [(c.model, c.name, c.seed) for c in found[:3]] == [
        ("tiny-sd", "d3po", 0),
        ("tiny-sd3", "d3po", 0),
        ("tiny-sd3", "flow_grpo", 0),
    ]
    assert [c.seed for c in found] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(InputError, match="did you mean 'd3po'"):
        online.plan(["tiny-sd"], ["d3pp"], (0,))
    with pytest.raises(InputError, match="missing: flow_grpo"):
        online.plan(["tiny-sd"], ["flow_grpo"], (0,))


def test_every_cell_has_settings_of_its_own_images(tmp_path):
    asked = {"clip": "clip:tiny-clip", "jpeg": "jpeg", "oracle": "oracle"}
    for cell in online.plan(list(method_runs.MODELS), None, (1,)):
        cfg = cell.settings()
        assert (cfg.seed, cfg.train.device, cfg.model.path) == (1, "cpu", cell.model)
        assert cfg.online is not None
        if cell.row.people:
            assert cfg.online.by_people
        elif cell.row.reward == "frechet":
            assert cfg.online.set_reward == "frechet:clip:tiny-clip"
            assert online_runs.placed(cfg, tmp_path).online.set_reference == str(online_runs.PICTURES)
        elif cell.row.reward == "vendi":
            assert cfg.online.set_reward == "vendi:clip:tiny-clip"
            assert online_runs.placed(cfg, tmp_path).online.set_reference is None
        else:
            assert cfg.online.rewards == (asked[cell.row.reward],)
        assert "runs" not in json.dumps(cell.described()).replace("runs/tiny-scenes", "")


def test_every_caption_has_its_exact_picture(tmp_path):
    folder = draw_pictures(tmp_path / "pictures")
    captions = read_prompts("tiny-train").prompts
    files = sorted(folder.iterdir())
    assert len(files) == len(captions) == 512
    assert all(scenes.split_of(scenes.parse(caption)) == "train" for caption in captions)
    pixels = read_image(files[7]).permute(1, 2, 0).numpy()
    assert oracle.judge(pixels, captions[7])["total"] > 0.9
    (files[0]).unlink()
    assert len(list(draw_pictures(folder).iterdir())) == 511  # what is there is not drawn again


def test_a_set_that_came_closer_has_a_change_below_none():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    numbers = online_measures.set_numbers(Gaussian(mean=torch.zeros(4), covariance=torch.eye(4)))
    found = online_measures.set_changes(x, x + 1, {"frechet": numbers["frechet"]}, resamples=50)["frechet"]
    assert found["base"] == pytest.approx(4, abs=0.6)
    assert found["low"] < found["change"] < found["high"] < -3
    same = online_measures.set_changes(x, x, numbers, resamples=20)
    assert {(one["change"], one["low"], one["high"]) for one in same.values()} == {(0.0, 0.0, 0.0)}


def make_round(folder, captions):
    (folder / "images").mkdir(parents=True)
    entries = []
    for place, caption in enumerate(captions):
        scene = scenes.parse(captions[0])  # the first is right, the others are mostly not
        scenes.render(scene).save(folder / "images" / f"{place:05d}-0.png")
        entries.append({"id": f"{place:05d}-0", "prompt": caption, "image": f"images/{place:05d}-0.png"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_the_oracle_plays_the_person_who_is_asked(tmp_path, monkeypatch):
    captions = read_prompts("tiny-train").prompts[:4]
    folder = tmp_path / "rounds" / "round-1"
    seen = []

    def run(cfg):
        seen.append(cfg.resume)
        if (folder / "labels.jsonl").is_file():
            return "finished"
        make_round(folder, captions)
        (folder / "labels-template.jsonl").touch()
        raise RunError("round 1 waits for people: label the 4 images")

    monkeypatch.setattr(online_runs.training, "run", run)
    [cell] = cells("d3po_people", seeds=(0,))
    assert online_runs.play(online_runs.placed(cell.settings(), tmp_path)) == "finished"
    assert seen == ["never", "latest"]
    labels = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert [one["id"] for one in labels] == [f"{i:05d}-0" for i in range(4)]
    assert all(isinstance(one["label"], int) and 0 <= one["label"] <= online_runs.GRADES for one in labels)
    assert labels[0]["label"] == online_runs.GRADES > max(one["label"] for one in labels[1:])


def test_another_error_than_waiting_for_people_ends_the_play(tmp_path, monkeypatch):
    def run(cfg):
        raise RunError("disk is full")

    monkeypatch.setattr(online_runs.training, "run", run)
    [cell] = cells("d3po_people", seeds=(0,))
    with pytest.raises(RunError, match="disk is full"):
        online_runs.play(online_runs.placed(cell.settings(), tmp_path))


def test_rounds_are_read_from_what_a_run_leaves(tmp_path):
    captions = read_prompts("tiny-train").prompts[:4]
    for number in (1, 2):
        make_round(tmp_path / "rounds" / f"round-{number}", captions)
    lines = [
        {"step": 0, "round": 1, "images": 4, "score/clip": 50.0, "score/clip/std": 1.0, "sampling_seconds": 2.0},
        {"step": 1, "loss": 0.7, "seconds": 0.5},
        {"step": 1, "round": 2, "images": 4, "set_plus": -0.5, "sampling_seconds": 3.0},
        {"step": 2, "loss": 0.6, "seconds": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = online_measures.curve(tmp_path)
    assert [(one["images"], one["own"]) for one in found] == [(4, {"score/clip": 50.0}), (8, {"set_plus": -0.5})]
    assert 0 < found[0]["oracle"] < 1
    assert online_measures.seconds(tmp_path) == {"sampling_seconds": 5.0, "update_seconds": 0.75}


def test_lines_are_smoothed_by_what_came_before():
    assert online_plot.smoothed([1.0, 3.0, 5.0]) == [1.0, 2.0, 3.0]
    assert online_plot.smoothed([0.0] * 5 + [5.0])[-1] == 1.0
    one = {"images": 64, "own": {"score/jpeg": -2.0}, "clip": 1.0, "start_jpeg": -1.5, "start_clip": 0.25}
    row = {"trained_on": "jpeg", "curve": [one]}
    assert online_plot.points(row, "jpeg") == ([64], [0.5])
    assert online_plot.points(row, "clip") == ([], [])
    assert online_plot.points({**row, "trained_on": "clip"}, "clip") == ([64], [0.75])
    assert online_plot.points({**row, "trained_on": "clip"}, "jpeg") == ([], [])


def test_a_round_of_the_base_model_is_the_first_round_of_a_run(tmp_path, monkeypatch):
    """All images of a group, by the same judges."""
    monkeypatch.setattr(online_start, "PER_CAPTION", 2)
    [cell] = cells("ddpo", seeds=(3,))
    cfg = online_runs.placed(cell.settings(), tmp_path / "run")
    sizes = replace(cfg.online, prompts=4, group=2, updates=1, steps=2, batch_size=8, window=None)
    cfg = replace(cfg, online=sizes, train=replace(cfg.train, steps=2, batch_size=2, accumulate=8))
    result = online_runs.training.run(cfg)
    rounds = online_measures.curve(result.folder)
    found = online_start.measure(replace(cfg, output=str(tmp_path / "base")), range(1, 3))
    assert found[0]["oracle"] == pytest.approx(rounds[0]["oracle"], abs=2e-3)  # a run's images have 8 bits
    assert found[0]["clip"] == pytest.approx(rounds[0]["clip"], abs=0.1)
    assert found[1]["clip"] != pytest.approx(found[0]["clip"], abs=0.1)


def test_rounds_of_the_base_model_are_made_once_for_all_that_sample_alike(runs, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(online_runs, "RUNS", runs / "runs")
    made = []

    def measure(cfg, numbers):
        made.append(list(numbers))
        return [{name: float(number) for name in online_start.JUDGES} for number in numbers]

    monkeypatch.setattr(online_start, "measure", measure)
    monkeypatch.setattr(online_start, "draw_pictures", lambda _: None)
    d3po, jpeg, ddpo = (cells(name, seeds=(0,))[0] for name in ("d3po", "d3po_jpeg", "ddpo"))
    curve = [{"round": k, "clip": 60.0} for k in (1, 2, 3)]
    found = online_start.with_start(d3po, curve)
    assert [one["start_clip"] for one in found] == [1.0, 2.0, 3.0]
    assert [one["clip"] for one in found] == [60.0] * 3
    online_start.start(jpeg, 2)
    assert len(online_start.start(jpeg, 5)) == 5
    online_start.start(ddpo, 1)
    online_start.start(replace(ddpo, seed=1), 1)
    assert made == [[1, 2, 3], [4, 5], [1], [1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d3po_people", "dragon_frechet"])
def test_a_cell_is_made_from_start_to_end(runs, monkeypatch, name):
    captions = method_measures.captions()[:12]

    def prepare(model, prompt_seed):
        """Random latents in the place of held-out pairs."""
        (runs / model).mkdir(exist_ok=True)
        source = ModelSource(path=model)
        cond = detect_family(source).encode_prompts(load_pipeline(source), list(captions[:4]))
        x = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        pairs = PairBatch(x_w=x[0], x_l=x[1], cond=cond, samples=(0, 1, 2, 3))
        tensors = {k: v.contiguous() for k, v in method_measures.pair_tensors(pairs).items()}
        save_file(tensors, runs / model / "pairs.safetensors")

    monkeypatch.setattr(method_measures, "captions", lambda seed: captions)
    monkeypatch.setattr(method_runs, "prepare_base", prepare)
    monkeypatch.setattr(method_runs, "CACHE", runs)
    monkeypatch.setattr(online_runs, "CACHE", runs)
    monkeypatch.setattr(online_runs, "PICTURES", runs / "pictures")
    small = ("online.prompts=2", "online.group=4", "online.updates=1", "online.steps=3", "online.batch_size=8")
    small += ("train.steps=2", "train.batch_size=4", "train.accumulate=1")
    [cell] = cells(name, seeds=(0,))
    cell = replace(cell, row=replace(cell.row, changes=small))
    made = online_runs.run(cell)
    assert json.loads(cell.file.read_text()) == made
    assert method_runs.is_current(cell, made)
    assert [one["images"] for one in made["curve"]] == [8, 16]
    assert all(len(values) == len(captions) for values in made["scores"].values())
    assert made["movement"]["prediction_drift"] > 0
    assert made["pixel_distance"] > 0
    online_table.write([cell], [], root=runs)
    assert f"| {name}" in (runs / "docs" / "online-results.md").read_text()


def test_a_number_of_sets_over_seeds_has_the_mean_of_the_ends():
    seeds = [{"value": 2.0, "base": 1.0, "change": 1.0, "low": -0.5, "high": 3.0},
             {"value": 4.0, "base": 1.0, "change": 3.0, "low": 2.5, "high": 4.0}]  # fmt: skip
    assert online_table.pooled(seeds) == {"value": 3.0, "base": 1.0, "change": 2.0, "low": 1.0, "high": 3.5}


def test_the_mean_of_the_ends_is_the_interval_of_seeds_that_move_together_and_wide_for_others():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 20_000))

    def bounds(changes):
        low, high = np.quantile(changes, (0.025, 0.975))
        return {"value": 0.0, "base": 0.0, "change": 0.0, "low": low, "high": high}

    def ends(*seeds):
        found = online_table.pooled([bounds(changes) for changes in seeds])
        return found["high"] - found["low"]

    def width(changes):
        return bounds(changes)["high"] - bounds(changes)["low"]

    assert ends(one, 2 * one) == pytest.approx(width((one + 2 * one) / 2))
    assert ends(one, 2 * two) > 1.2 * width((one + 2 * two) / 2)
