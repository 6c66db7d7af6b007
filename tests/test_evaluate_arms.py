"""Arms beyond base and aligned: several, named, finished images, tiers, sweeps, sets, pairs of all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.data.prompts import PromptSet
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError, RunError
from diffalign.evaluate import EvaluationSettings, evaluate
from diffalign.evaluate.arms import find_arms, parse_arms
from diffalign.evaluate.generate import generate
from diffalign.evaluate.images import plan_of
from diffalign.evaluate.score import write_image
from diffalign.evaluate.settings import batch_size, sampling_of
from diffalign.types import Embedded, FunctionReward, RewardBatch, SetOutput
from tests.builders import tiny_sd_pipeline

PROMPTS = ["a red circle", "a blue star", "a green cross"]
QUICK = EvaluationSettings(images_per_prompt=2, steps=2, guidance=2.0, batch_size=4, device="cpu")


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


BRIGHT = FunctionReward(name="bright", function=brightness)
RED = FunctionReward(name="red", function=redness)


class Spread:
    """A set reward: the standard deviation of the images' brightness."""

    name, version, modality, licence = "spread", "1", "image", "-"
    requires, needs_reference, range = frozenset({"images"}), False, (0.0, 1.0)
    calls = 0

    def score_set(self, batches) -> SetOutput:
        Spread.calls += 1
        values = torch.cat([batch.images.mean((1, 2, 3)) for batch in batches])
        return SetOutput(score=float(values.std()), raw={"mean": float(values.mean())}, samples=len(values))

    def embed(self, batch: RewardBatch) -> Embedded:
        return Embedded(rows=batch.images.mean((1, 2, 3))[:, None], counts=(1,) * len(batch.images))

    def of_rows(self, embedded: Embedded) -> SetOutput:
        return SetOutput(score=float(embedded.rows.std()), samples=len(embedded.counts))

    def fit_reference(self, batches) -> None: ...
    def save_reference(self, file) -> None: ...
    def load_reference(self, file) -> None: ...
    def differentiable_score(self, batch: RewardBatch) -> torch.Tensor:
        return batch.images.mean((1, 2, 3)).std()

    def credit(self, batch: RewardBatch, mode: str = "loo") -> torch.Tensor:
        return torch.zeros(len(batch))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        tiny_sd_pipeline(seed=seed).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "one", "two")}


@pytest.fixture(scope="module")
def three(models, tmp_path_factory) -> Path:
    """Three arms, compared with each other, swept over two guidances, with a reward of sets."""
    folder = tmp_path_factory.mktemp("three") / "out"
    evaluate(
        models["base"],
        {"one": models["one"], "two": models["two"]},
        PROMPTS,
        rewards=[BRIGHT, RED, Spread()],
        output=folder,
        settings=replace(QUICK, pairwise=True, sweep=(1.0, 2.0)),
    )
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --- several arms


def test_every_arm_meets_the_base_and_then_every_other(three):
    found = results(three)
    assert found["arms"] == ["base", "one", "two"]
    assert [(c["arm"], c["against"]) for c in found["comparisons"]] == [
        ("one", "base"), ("two", "base"), ("two", "one")
    ]  # fmt: skip
    assert len(found["verdicts"]) == 3
    assert {r["arm"] for r in found["ratings"]} == {"base", "one", "two"}
    assert all(r["rating"] == 1000 for r in found["ratings"] if r["arm"] == "base" and r["rating"] is not None)


def test_all_arms_start_from_the_same_noise(three):
    table = pq.read_table(three / "scores.parquet").to_pydict()
    by_arm = [
        [h for h, a in zip(table["latent_sha256"], table["arm"], strict=True) if a == arm]
        for arm in ("base", "one", "two")
    ]
    assert by_arm[0] == by_arm[1] == by_arm[2]
    assert len(set(by_arm[0])) == 6


def test_correlations_stand_beside_several_rewards(three):
    for comparison in results(three)["comparisons"]:
        assert comparison["correlations"]["rewards"] == ["bright", "red"]
        assert comparison["correlations"]["matrix"][0][0] == pytest.approx(1)


def test_a_sweep_has_the_same_and_the_best_guidance_of_each_arm(three):
    sweep = results(three)["sweep"]
    assert (sweep["guidances"], sweep["n_prompts"]) == ([1.0, 2.0], 3)
    assert len(sweep["points"]) == 2 * 3 * 2  # rewards, arms, guidances
    for reward in ("bright", "red"):
        means = {(p["arm"], p["guidance"]): p["mean"] for p in sweep["points"] if p["reward"] == reward}
        [best] = [
            c
            for c in sweep["comparisons"]
            if (c["kind"], c["arm"], c["against"], c["reward"]) == ("best", "one", "base", reward)
        ]
        assert means["one", best["guidance_arm"]] == max(means["one", 1.0], means["one", 2.0])
        assert means["base", best["guidance_against"]] == max(means["base", 1.0], means["base", 2.0])
        assert best["mean_arm"] == pytest.approx(means["one", best["guidance_arm"]])


def test_a_sweep_takes_the_images_that_are_there_already(three):
    assert not (three / "sweep" / "g2").exists()  # guidance 2 is the evaluation's own
    assert len(list((three / "sweep" / "g1" / "one").glob("*.png"))) == 3
    table = pq.read_table(three / "sweep.parquet").to_pydict()
    own = pq.read_table(three / "scores.parquet").to_pydict()
    same = [r for r in range(len(table["arm"])) if table["guidance"][r] == 2.0]
    first = [r for r in range(len(own["arm"])) if own["k"][r] == 0]
    assert [table["bright"][r] for r in same] == [own["bright"][r] for r in first]


def test_a_reward_of_sets_has_one_number_for_each_arm(three):
    sets = results(three)["sets"]
    assert [(s["reward"], s["arm"], s["samples"]) for s in sets] == [("spread", a, 6) for a in ("base", "one", "two")]
    table = pq.read_table(three / "scores.parquet").to_pydict()
    bright = torch.tensor([v for v, arm in zip(table["bright"], table["arm"], strict=True) if arm == "one"])
    assert sets[1]["score"] == pytest.approx(float(bright.std()), rel=1e-5)
    assert sets[1]["raw"]["mean"] == pytest.approx(float(bright.mean()), rel=1e-5)


def test_an_arm_and_a_reward_may_join_later_and_nothing_is_made_again(three, models, tmp_path):
    shutil.copytree(three, tmp_path / "out")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "images").rglob("*.png")}
    calls = Spread.calls
    evaluate(
        models["base"],
        {"one": models["one"], "again": models["two"]},
        PROMPTS,
        rewards=[BRIGHT, Spread(), FunctionReward(name="dark", function=lambda images, texts: -images.mean((1, 2, 3)))],
        output=tmp_path / "out",
        settings=replace(QUICK, images_per_prompt=3),
    )
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert results(tmp_path / "out")["arms"] == ["base", "one", "again"]
    assert Spread.calls == calls + 3  # more seeds are other sets
    two, again = (pq.read_table(f / "scores.parquet").to_pydict() for f in (three, tmp_path / "out"))
    old = {(a, i, k): v for a, i, k, v in zip(two["arm"], two["prompt_index"], two["k"], two["bright"], strict=True)}
    new = {(a, i, k): v for a, i, k, v in zip(*(again[c] for c in ("arm", "prompt_index", "k", "bright")), strict=True)}
    for i in range(3):
        for k in range(2):
            assert new["one", i, k] == old["one", i, k]
            assert new["again", i, k] == pytest.approx(old["two", i, k], abs=1 / 255)


# --- names


def test_arms_are_called_aligned_by_their_folders_or_as_they_were_named(models):
    one, two = models["one"], models["two"]
    assert [a.name for a in find_arms(models["base"], one)] == ["base", "aligned"]
    assert [a.name for a in find_arms(models["base"], [one])] == ["base", "aligned"]
    assert [a.name for a in find_arms(models["base"], [one, two, one])] == ["base", "one", "two", "one-2"]
    assert parse_arms([one]) == [one]
    assert parse_arms([f"dpo={one}", two]) == {"dpo": one, "two": two}


@pytest.mark.parametrize(
    ("aligned", "message"),
    [({}, "at least one arm"), ({"base": "one"}, "not 'base'"), ({"a/b": "one"}, "names of arms must be letters")],
)
def test_names_that_cannot_be_folders_are_refused(models, aligned, message):
    with pytest.raises(InputError, match=message):
        find_arms(models["base"], {name: models[spec] for name, spec in aligned.items()})
    with pytest.raises(InputError, match="'a' twice"):
        parse_arms(["a=x", "a=y"])


def test_a_digest_is_of_what_the_model_is_not_of_where_it_lies(models, tmp_path):
    shutil.copytree(models["one"], tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("words")
    found = find_arms(models["base"], [models["one"], str(tmp_path / "copy"), models["two"]])
    digests = [arm.digest() for arm in found]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3
    config = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert found[2].digest() != digests[1]


# --- finished images


def compare_folders(base: str, aligned: str, tmp_path: Path, **changes: object) -> dict:
    asked = {"prompts": PROMPTS, "rewards": [BRIGHT], "settings": QUICK, **changes}
    evaluate(base, aligned, output=tmp_path / "out", **asked)
    return results(tmp_path / "out")


def bright(found: dict) -> dict:
    """Measures of the first comparison, without the correction for other rewards."""
    measures = found["comparisons"][0]["rewards"]["bright"]
    return {name: value for name, value in measures.items() if name != "p_holm"}


def test_finished_images_score_as_the_models_that_made_them(three, tmp_path):
    found = compare_folders(str(three / "images" / "base"), str(three / "images" / "one"), tmp_path)
    assert bright(found) == bright(results(three))
    assert found["latents_sha256"] == results(three)["latents_sha256"]
    assert (found["settings"]["steps"], found["settings"]["height"]) == (None, 64)
    assert found["models"]["base"]["scheduler"]["class"] == "finished images"
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:500]


def test_numbered_images_without_metadata_and_of_other_formats_are_taken_over_too(three, tmp_path):
    for arm in ("base", "one"):
        (tmp_path / arm).mkdir()
        for file in (three / "images" / arm).glob("*.png"):
            Image.open(file).save(tmp_path / arm / f"{file.stem}.webp", lossless=True)
    found = compare_folders(str(tmp_path / "base"), str(tmp_path / "one"), tmp_path)
    assert found["latents_sha256"] is None
    assert bright(found) == bright(results(three))


def test_a_model_may_meet_finished_images(three, models, tmp_path):
    found = compare_folders(str(three / "images" / "base"), models["one"], tmp_path)
    assert bright(found) == bright(results(three))


def test_finished_images_that_do_not_fit_are_named(three, models, tmp_path):
    base, one = str(three / "images" / "base"), tmp_path / "one"
    shutil.copytree(three / "images" / "one", one)
    with pytest.raises(
        InputError, match=r"base must have an image of every prompt.*without 3 of 9, the first of 'a red"
    ):
        compare_folders(base, str(one), tmp_path, settings=replace(QUICK, images_per_prompt=3))
    with pytest.raises(InputError, match="sweep must be of models, got base, aligned"):
        compare_folders(base, str(one), tmp_path, settings=replace(QUICK, sweep=(1.0,)))
    with pytest.raises(InputError, match="aligned must be a pipeline or a run where the base is a folder of images"):
        compare_folders(base, str(Path(models["one"]) / "unet"), tmp_path)
    for file in one.glob("*.png"):
        Image.open(file).resize((32, 32)).save(file)
    with pytest.raises(InputError, match=r"images of one size, got .*\(64, 64\).*\(32, 32\)"):
        compare_folders(base, str(one), tmp_path)


def test_finished_images_from_other_noise_are_no_pairs(three, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(three / "images" / "one", one)
    lines = [json.loads(line) for line in (one / "metadata.jsonl").read_text().splitlines()]
    lines[0]["latent_sha256"] = "0" * 64
    (one / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(RunError, match="other ones in base and aligned"):
        compare_folders(str(three / "images" / "base"), str(one), tmp_path)


# --- defaults


SIZE = {"height": 512, "width": 512}


def test_what_nobody_chose_is_the_familys_and_the_tiers():
    open_ = EvaluationSettings()
    assert (open_.seeds, EvaluationSettings(tier="quick").seeds, replace(open_, images_per_prompt=2).seeds) == (4, 1, 2)
    sd, sd3 = (sampling_of(open_, FAMILIES[name], SIZE, "cpu") for name in ("sd", "sd3"))
    assert (sd.steps, sd.guidance, sd3.steps, sd3.guidance) == (50, 7.5, 28, 7.0)  # evaluation.md 5.3
    chosen = sampling_of(replace(open_, steps=20, guidance=1.0), FAMILIES["sd"], SIZE, "cpu")
    assert (chosen.steps, chosen.guidance) == (20, 1.0)
    assert [batch_size(None, (4, side, side)) for side in (8, 64, 128, 512)] == [64, 8, 2, 1]
    assert batch_size(3, (4, 8, 8)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tier": "slow"}, "tier must be one of"), ({"sweep": (1.0, 1.0)}, "each guidance once")],
)
def test_settings_of_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        EvaluationSettings(**changes)


def test_the_quick_tier_takes_the_quick_prompts_with_one_seed(three, tmp_path):
    many = PromptSet(name="many", prompts=PROMPTS, metadata=[{"category": c} for c in "aab"])
    found = compare_folders(
        str(three / "images" / "base"), str(three / "images" / "one"), tmp_path, prompts=many,
        settings=replace(QUICK, tier="quick", images_per_prompt=None),
    )  # fmt: skip
    assert (found["tier"], found["n_prompts"], found["n_seeds"]) == ("quick", 3, 1)


def test_rows_that_share_a_prompt_have_noise_of_their_own():
    twice = PromptSet(name="x", prompts=["a", "b", "a"], metadata=[{}] * 3, indexed=True)
    numbers = {(p.index, p.k): p.number for p in plan_of(twice, 2).places}
    assert numbers == {(0, 0): 0, (0, 1): 1, (1, 0): 0, (1, 1): 1, (2, 0): 2, (2, 1): 3}


def test_batches_hold_one_seed_number_and_more_seeds_leave_the_first_as_they_were():
    prompts = PromptSet(name="x", prompts=list("abcde"), metadata=[{}] * 5)
    few, more = plan_of(prompts, 1).batches(2), plan_of(prompts, 3).batches(2)
    assert [len(b) for b in more] == [2, 2, 1] * 3
    assert more[:3] == few
    assert sorted((p.index, p.k) for b in more for p in b) == [(i, k) for i in range(5) for k in range(3)]


def test_a_reference_is_asked_for_where_one_is_needed_and_only_there(three, tmp_path):
    class Needy(Spread):
        name, needs_reference = "needy", True

    base = str(three / "images" / "base")
    with pytest.raises(InputError, match="'needy' must have a reference set"):
        compare_folders(base, base, tmp_path, rewards=[BRIGHT, Needy()])
    with pytest.raises(InputError, match="reference must belong to"):
        compare_folders(base, base, tmp_path, settings=replace(QUICK, reference="x.safetensors"))
    with pytest.raises(InputError, match="of single images, got spread of sets alone"):
        compare_folders(base, base, tmp_path, rewards=[Spread()])


@pytest.mark.slow
def test_one_model_with_other_seeds_is_no_better_and_no_worse_than_itself(tmp_path):
    prompts = [f"a picture of thing {i}" for i in range(60)]
    pipeline, many = tiny_sd_pipeline(), PromptSet(name="x", prompts=prompts, metadata=[{}] * 60)
    made = generate(pipeline, FAMILIES["sd"], prompts, images_per_prompt=2, steps=2, guidance=2.0, batch_size=16)
    for item in made:
        folder = tmp_path / f"seed-{item.k}"
        folder.mkdir(exist_ok=True)
        write_image(item.image, folder / f"{item.prompt_index:05d}-0.png")
    found = compare_folders(
        str(tmp_path / "seed-0"), str(tmp_path / "seed-1"), tmp_path, prompts=many, rewards=[BRIGHT, RED],
        settings=replace(QUICK, images_per_prompt=1),
    )  # fmt: skip
    for measured in found["comparisons"][0]["rewards"].values():
        assert measured["ci_low"] < 0.5 < measured["ci_high"]
        assert measured["tie_share"] < 0.1
