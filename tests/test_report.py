"""The report and its verdict: what it says in each outcome, which pictures it shows, and that it fetches nothing."""

import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign import environment
from diffalign.data.prompts import by_hash
from diffalign.evaluate import charts, curves, plots
from diffalign.evaluate.album import Album, album
from diffalign.evaluate.comparison import Judge, compare
from diffalign.evaluate.report import python_call, write_report
from diffalign.evaluate.results import Results, SetDifference, direction, to_table, verdict
from diffalign.evaluate.score import Table, write_image

ROLES = {"person": "labeller", "eye": "held_out", "target": "trained_on"}


def judges(**roles: str) -> list[Judge]:
    return [Judge(name=n, spec=f"{n}:model", version="1", role=r, role_declared=True) for n, r in roles.items()]


def scores(shifts: dict[str, float], n: int = 60, k: int = 1, seed: int = 0) -> Table:
    """A table of both arms' scores; the aligned arm is better by `shifts`."""
    rng = np.random.default_rng(seed)
    places = [(i, j) for i in range(n) for j in range(k)]
    table: Table = {
        "arm": ["base"] * n * k + ["aligned"] * n * k,
        "prompt": [f"prompt number {i}" for i, _ in places] * 2,
        "prompt_index": [i for i, _ in places] * 2,
        "k": [j for _, j in places] * 2,
        "file_name": [f"{i:05d}-{j}.png" for i, j in places] * 2,
    }
    for name, shift in shifts.items():
        table[name] = [*rng.normal(0, 1, n * k).tolist(), *rng.normal(shift, 1, n * k).tolist()]
    return table


def results_of(table: Table, found: list[Judge], run: str | None = None) -> Results:
    comparison = compare(table, found, arm="aligned", against="base")
    source = dict.fromkeys(("path", "revision", "variant", "vae", "denoiser", "lora"), "m")
    scheduler = {"class": "DDIMScheduler", "beta_end": 0.012}
    return Results(
        arms=("base", "aligned"),
        n_prompts=max(table["prompt_index"]) + 1,
        n_seeds=max(table["k"]) + 1,
        comparisons=(comparison,),
        prompt_set={"name": "given", "sha256": "ab" * 32, "duplicates_dropped": 0},
        settings={
            "images_per_prompt": 1,
            "steps": 20,
            "guidance": 3.0,
            "batch_size": 8,
            "device": "cpu",
            "dtype": "float32",
            "seed": 0,
            "command": None,
            "height": 8,
            "width": 8,
        },
        models={
            "base": {"spec": "tiny-sd", "source": source, "run": None, "scheduler": scheduler},
            "aligned": {"spec": "runs/demo", "source": source, "run": run, "scheduler": scheduler},
        },
        latents_sha256="cd" * 32,
        environment=environment.describe(torch.device("cpu")),
    )


def draw(folder: Path, table: Table, size: int = 8) -> None:
    for arm in ("base", "aligned"):
        (folder / "images" / arm).mkdir(parents=True)
    for row, (arm, name) in enumerate(zip(table["arm"], table["file_name"], strict=True)):
        write_image(torch.full((3, size, size), row / len(table["arm"])), folder / "images" / arm / name)


def page(folder: Path, table: Table, run: str | None = None, size: int = 8, **changes: object) -> str:
    draw(folder, table, size)
    shown = {name: role for name, role in ROLES.items() if name in table}
    return write_report(replace(results_of(table, judges(**shown), run), **changes), table, folder).read_text()


def pictures(folder: Path, table: Table, *rewards: str, categories: list[str] | None = None) -> Album:
    draw(folder, table)
    return album(("base", "aligned"), rewards, table, folder, categories)


# --- the verdict


@pytest.mark.parametrize(
    ("shifts", "outcome", "opening"),
    [
        ({"person": 1.0}, "won", "Aligned beats base"),
        ({"person": 0.0}, "undecided", "No difference between aligned and base is shown"),
        ({"person": -1.0}, "lost", "Aligned is worse than base"),
    ],
)
def test_the_headline_says_what_the_interval_says(shifts, outcome, opening):
    comparison = results_of(scores(shifts), judges(person="labeller")).comparisons[0]
    said, total = verdict(comparison), comparison.rewards["person"].total
    assert said.outcome == outcome
    assert said.sentence.startswith(opening)
    for number in (total.win_rate, total.ci_low, total.ci_high):
        assert f"{100 * number:.1f}" in said.sentence
    assert "person (labeller)" in said.sentence


@pytest.mark.parametrize(
    ("low", "rate", "high", "side"),
    [(0.51, 0.6, 0.7, "better"), (0.49, 0.6, 0.7, "open"), (0.3, 0.4, 0.51, "open"), (0.3, 0.4, 0.49, "worse")],
)
def test_a_side_is_taken_by_the_whole_interval_only(low, rate, high, side):
    total = results_of(scores({"person": 0.0}), judges(person="labeller")).comparisons[0].rewards["person"].total
    assert direction(replace(total, ci_low=low, win_rate=rate, ci_high=high)) == side


def test_the_headline_prefers_the_labeller_then_the_held_out():
    comparison = results_of(scores({"target": 1.0, "eye": 1.0, "person": 1.0}), judges(**ROLES)).comparisons[0]
    assert "by person" in verdict(comparison).sentence
    without = replace(comparison, rewards={n: r for n, r in comparison.rewards.items() if n != "person"})
    assert "by eye" in verdict(without).sentence
    only = replace(comparison, rewards={"target": comparison.rewards["target"]})
    assert any("a held-out reward is needed" in note for note in verdict(only).notes)


def test_a_held_out_reward_that_fell_is_named_beside_a_win():
    comparison = results_of(
        scores({"person": 1.0, "eye": -1.0}), judges(person="labeller", eye="held_out")
    ).comparisons[0]
    said = verdict(comparison)
    assert (said.outcome, said.regressed) == ("won", ("eye",))
    assert any(note.startswith("eye (held out) fell") for note in said.notes)


def test_judges_of_one_role_that_disagree_make_no_winner():
    comparison = results_of(scores({"a": 1.0, "b": -1.0}), judges(a="held_out", b="held_out")).comparisons[0]
    assert verdict(comparison).outcome == "mixed"


def test_roles_that_nobody_declared_are_said_to_be_assumed():
    judge = replace(judges(eye="held_out")[0], role_declared=False)
    said = verdict(results_of(scores({"eye": 1.0}), [judge]).comparisons[0])
    assert any("Nobody declared whether training saw eye" in note for note in said.notes)


@pytest.mark.parametrize(
    ("low", "high", "optimised", "words"),
    [
        (0.01, 0.03, False, ["is better: +0.02 (95 % interval +0.01 to +0.03)"]),
        (-0.03, -0.01, False, ["fell: -0.02 (95 % interval -0.03 to -0.01)"]),
        (-0.01, 0.03, True, ["shows no difference", "Training optimised it"]),
        (None, None, False, ["has no interval: +0.02, above 0 is better."]),
    ],
)
def test_rewards_of_sets_stand_beside_the_headline(low, high, optimised, words):
    apart = SetDifference(
        reward="fad", spec="fad:x", version="1", arm="aligned", against="base", samples=60,
        difference=-0.02 if high is not None and high < 0 else 0.02, low=low, high=high, resamples=1000,
        optimised=optimised,
    )  # fmt: skip
    comparison = results_of(scores({"person": 1.0}), judges(person="labeller")).comparisons[0]
    [note] = set(verdict(comparison, [apart, replace(apart, arm="other")]).notes) - set(verdict(comparison).notes)
    assert note.startswith("fad:x of all 60 together")
    assert all(word in note for word in words)
    assert optimised or "Training" not in note


def test_results_are_strict_json_with_null_for_what_is_undefined():
    table = scores({"person": 0.0})
    table["person"] = [0.0] * 60 + [1.0] * 60
    found = json.loads(json.dumps(to_table(results_of(table, judges(person="labeller"))), allow_nan=False))
    reward = found["comparisons"][0]["rewards"]["person"]
    assert (reward["win_rate"], reward["elo"], reward["d_z"]) == (1.0, None, None)


# --- the page


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    text = page(tmp_path, scores({"person": 1.0, "eye": 0.0}))
    assert "<script" not in text
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_opens_with_the_verdict(tmp_path):
    table = scores({"person": 1.0, "eye": -1.0, "target": 2.0})
    text = html.unescape(page(tmp_path, table)).replace("\N{NO-BREAK SPACE}", " ")
    said = verdict(results_of(table, judges(**ROLES)).comparisons[0])
    assert said.sentence in text
    assert all(note in text for note in said.notes)
    assert "A reward that training never saw fell" in text
    assert text.index(said.sentence) < text.index("<table>")


def test_what_a_prompt_says_is_text_not_markup(tmp_path):
    table = scores({"person": 0.0}, n=2)
    table["prompt"] = ["<script>alert(1)</script>", "a & b"] * 2
    text = page(tmp_path, table)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_gallery_is_chosen_by_hash_and_shows_the_first_seed(tmp_path):
    table = scores({"person": 0.0}, n=60, k=2)
    cards = pictures(tmp_path, table, "person").unselected()
    expected = sorted({*table["prompt"]}, key=lambda p: hashlib.sha256(p.encode()).hexdigest())[:48]
    assert [card.prompt for card in cards] == expected
    assert {card.k for card in cards} == {0}
    assert [picture.arm for picture in cards[0].pictures] == ["base", "aligned"]


def test_a_gallery_card_shows_the_scores_of_its_own_two_images(tmp_path):
    table = scores({"person": 0.0}, n=5, k=2)
    for card in pictures(tmp_path, table, "person").unselected():
        rows = [r for r in range(20) if table["prompt"][r] == card.prompt and table["k"][r] == 0]
        assert card.scores == (("person", (table["person"][rows[0]], table["person"][rows[1]])),)


def test_largest_changes_are_the_ends_and_the_middle_and_no_prompt_comes_twice(tmp_path):
    table = scores({"person": 0.0}, n=40, k=3)
    comparison = results_of(table, judges(person="labeller")).comparisons[0]
    found = pictures(tmp_path, table, "person").largest_changes(comparison, "person")
    gains = (np.array(table["person"][120:]) - np.array(table["person"][:120])).reshape(40, 3).mean(axis=1)
    order = [f"prompt number {i}" for i in np.argsort(-gains)]
    assert [card.prompt for card in found["Largest gains"]] == order[:12]
    assert [card.prompt for card in found["Largest losses"]] == order[:-13:-1]
    assert [card.prompt for card in found["In the middle"]] == order[14:26]
    assert f"person +{gains.max():.3f} over 3 seeds" == found["Largest gains"][0].note


def test_nothing_is_a_large_change_where_nothing_changed(tmp_path):
    table = scores({"person": 0.0}, n=4)
    table["person"] = [0.5] * 8
    assert "None." in page(tmp_path, table)


def test_small_images_are_enlarged_by_whole_multiples_and_large_ones_shrunk(tmp_path):
    small = page(tmp_path / "a", scores({"person": 0.0}, n=2), size=48)
    assert 'class="pixels" width="96"' in small
    assert "data:image/png" in small
    large = page(tmp_path / "b", scores({"person": 0.0}, n=2), size=640)
    assert 'class="pixels"' not in large
    assert "data:image/jpeg" in large


def test_samplers_that_differ_are_pointed_out(tmp_path):
    table = scores({"person": 0.0}, n=3)
    models = {k: dict(v) for k, v in results_of(table, judges(person="labeller")).models.items()}
    models["aligned"]["scheduler"] = {"class": "DDIMScheduler", "beta_end": 0.02}
    text = page(tmp_path, table, models=models)
    assert "not sampled alike" in text
    assert "beta_end: 0.012 and 0.02" in text
    assert "not sampled alike" not in page(tmp_path / "b", table)


def test_the_call_to_reproduce_is_python_and_names_the_roles(tmp_path):
    call = python_call(
        results_of(scores({"person": 0.0, "eye": 0.0}), judges(person="labeller", eye="held_out")), tmp_path
    )
    compile(call, "report", "exec")
    assert "roles={'person': 'labeller', 'eye': 'held_out'}" in call


# --- training


def run_with(folder: Path, winner: float, loser: float, validation: bool) -> Path:
    folder.mkdir()
    lines = []
    for step in range(1, 101):
        share = step / 100
        values = {"loss": 0.7 - 0.1 * share, "winner_gain": winner * share, "loser_gain": loser * share}
        lines.append({"step": step, **values, "rewards/accuracies": 0.5, "rewards/margins": 0.0, "deciles": {}})
        if validation and step % 50 == 0:
            lines.append({"step": step, "validation": {**values, "loss": 0.6}, "deciles": {}})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(("winner", "loser", "displaced"), [(-1.0, -2.0, True), (1.0, -2.0, False), (1.0, 2.0, False)])
def test_likelihood_displacement_is_both_gains_below_zero_at_the_end(tmp_path, winner, loser, displaced, validation):
    found = curves.read_training(run_with(tmp_path / "run", winner, loser, validation))
    assert found is not None
    assert found.displaced is displaced
    assert found.end["winner_gain"] == pytest.approx(winner * (1.0 if validation else 0.955))
    assert found.end_of == ("held-out pairs at step 100" if validation else "the last 10 training steps")
    assert [chart.title for chart in found.charts] == [
        "Loss", "Preference accuracy", "Margin", "Gains over the reference"
    ]  # fmt: skip


def test_the_page_shows_training_and_warns_of_displacement(tmp_path):
    table = scores({"person": 1.0}, n=4)
    bad, good = run_with(tmp_path / "bad", -1.0, -2.0, True), run_with(tmp_path / "good", 1.0, -2.0, True)
    assert "Likelihood displacement" in page(tmp_path / "a", table, run=str(bad))
    fine = page(tmp_path / "b", table, run=str(good))
    assert "Likelihood displacement" not in fine
    assert fine.count('<svg class="lines"') == 4
    assert "<h2>Training</h2>" not in page(tmp_path / "c", table)


def test_a_run_that_logged_nothing_or_other_metrics_has_the_charts_that_it_can(tmp_path):
    assert curves.read_training(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    found = curves.read_training(tmp_path)
    assert found is not None
    assert [chart.title for chart in found.charts] == ["Loss"]
    assert not found.displaced


# --- charts


def test_a_win_rate_is_drawn_in_proportion_with_one_half_in_the_middle():
    total = results_of(scores({"person": 0.0}), judges(person="labeller")).comparisons[0].rewards["person"].total
    total = replace(total, ci_low=0.4, win_rate=0.55, ci_high=0.65)
    assert plots.reach([total]) == 0.2
    low, high = drawn_at(plots.interval_row(total, 0.2), 'line class="range open"')
    [dot] = drawn_at(plots.interval_row(total, 0.2), "circle")
    assert (low - 50) / (dot - 50) == pytest.approx(-2, abs=0.01)
    assert (high - 50) / (dot - 50) == pytest.approx(3, abs=0.01)
    start, width = drawn_at(plots.bar_row(replace(total, win_rate=0.4), 0.2), "rect")
    assert start + width == pytest.approx(50)
    assert start == pytest.approx(low) == pytest.approx(26)  # the ends of the axis lie at 2 and 98 %
    assert plots.reach([replace(total, ci_high=1.0)]) == 0.5


def drawn_at(svg: str, element: str) -> list[float]:
    tag = re.search(f"<{element}[^>]*>", svg)
    assert tag
    return [float(v) for v in re.findall(r'(?:x1|x2|cx|x|width)="([\d.]+)%"', tag[0])]


def test_smoothing_keeps_constants_and_ends_and_lowers_noise():
    rng = np.random.default_rng(0)
    flat = charts._smooth([(float(i), 3.0) for i in range(50)])
    assert [y for _, y in flat] == pytest.approx([3.0] * 50)
    noisy = charts._smooth([(float(i), y) for i, y in enumerate(rng.normal(size=200).tolist())])
    assert np.std([y for _, y in noisy]) < 0.5
    assert [x for x, _ in noisy] == list(range(200))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.0031, 0.0007), (0.5, 0.5), (0.0, 0.0), (-3.0, 1200.0)])
def test_ticks_are_few_round_and_cover_the_range(low, high):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 6
    assert np.diff(ticks) == pytest.approx(np.diff(ticks)[0])


def test_hash_order_is_that_of_the_bytes():
    prompts = [f"p{i}" for i in range(20)]
    assert [prompts[i] for i in by_hash(prompts)] == sorted(prompts, key=lambda p: hashlib.sha256(p.encode()).digest())
