"""From models to results.json: noise that belongs to a prompt, arms of every form, scores, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.data.prompts import PromptSet
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError, RunError
from diffalign.evaluate import EvaluationSettings, evaluate, form, preflight, score
from diffalign.evaluate.arms import arm_source, load_arm
from diffalign.evaluate.generate import generate, initial_latents, prompt_seed
from diffalign.evaluate.images import check_pairs
from diffalign.models.load import ModelSource
from diffalign.rewards.oracle import OracleReward
from diffalign.types import FunctionReward, RewardBatch, RewardOutput
from tests.builders import tiny_sd_pipeline

SD = FAMILIES["sd"]
PROMPTS = [
    "large red circle top, black background",
    "small blue star left, white background",
    "a small green cross at the bottom on a gray background",
]
QUICK = EvaluationSettings(images_per_prompt=1, steps=2, guidance=2.0, batch_size=4, device="cpu")


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


BRIGHT = FunctionReward(name="bright", function=brightness)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pipeline) -> Path:
    """Two pipelines on disk, and a LoRA, a denoiser and two runs on top of the first."""
    from peft import LoraConfig

    from diffalign.models.lora import lora_state
    from diffalign.models.save import export_full, export_lora

    folder = tmp_path_factory.mktemp("models")
    pipeline.save_pretrained(folder / "base")
    other = tiny_sd_pipeline(seed=1)
    other.save_pretrained(folder / "other")
    export_full(other.unet, SD, folder / "denoiser", dtype=torch.float32)
    adapted = tiny_sd_pipeline().unet
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert lora_state(adapted)
    export_lora(adapted, SD, folder / "lora")
    (folder / "weightless").mkdir()
    shutil.copy(folder / "denoiser" / "unet" / "config.json", folder / "weightless")
    for name, export in (("run", "lora"), ("full-run", "denoiser")):
        (folder / name).mkdir()
        shutil.copytree(folder / export, folder / name / "export")
        (folder / name / "config.toml").write_text(f'seed = 0\n[model]\npath = "{folder / "base"}"\n')
    return folder


# --- noise and images


def test_seeds_have_the_golden_value_and_differ_by_prompt_and_number():
    assert prompt_seed("bond", 0) == 2912219154208925953  # evaluation.md section 5
    assert len({prompt_seed(p, k) for p in ("bond", "bond ", "life") for k in range(3)}) == 9
    assert 2**62 < max(prompt_seed("bond", k) for k in range(20)) < 2**63


def test_latents_belong_to_their_seed_alone(pipeline):
    seeds = [3, 5, 2**63 - 1]
    shape = SD.latent_shape(pipeline.unet.config)
    whole = initial_latents(shape, seeds)
    assert whole.shape == (3, 4, 8, 8)
    for row, seed in enumerate(seeds):
        torch.testing.assert_close(initial_latents(shape, [seed])[0], whole[row], rtol=0, atol=0)


def made(pipeline, prompts: list[str], batch_size: int, k: int = 2) -> dict[tuple[str, int], torch.Tensor]:
    images = generate(pipeline, SD, prompts, images_per_prompt=k, steps=2, guidance=2.0, batch_size=batch_size)
    return {(prompts[i.prompt_index], i.k): i.image for i in images}


def test_images_do_not_depend_on_batch_size_or_order(pipeline):
    whole = made(pipeline, PROMPTS, 3)
    for other in (made(pipeline, PROMPTS, 1), made(pipeline, PROMPTS[::-1], 4), made(pipeline, PROMPTS[1:2], 1)):
        for place, image in other.items():
            # one 8-bit level: sums of convolutions differ in the last float32 bit with the batch size
            torch.testing.assert_close(image, whole[place], atol=1.01 / 255, rtol=0)
    assert (whole[PROMPTS[0], 0] - whole[PROMPTS[0], 1]).abs().max() > 0.05


def test_images_are_those_of_the_plain_pipeline_rounded_to_8_bit(pipeline):
    from diffusers import DDIMScheduler

    [ours] = generate(pipeline, SD, PROMPTS[:1], steps=3, guidance=4.0, batch_size=1)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    rng = torch.Generator().manual_seed(prompt_seed(PROMPTS[0], 0))
    theirs = pipeline(PROMPTS[0], generator=rng, num_inference_steps=3, guidance_scale=4.0, output_type="np").images[0]
    torch.testing.assert_close(ours.image.permute(1, 2, 0).numpy(), theirs, atol=0.51 / 255, rtol=0)
    assert torch.equal((ours.image * 255).round() / 255, ours.image)


def test_images_are_made_by_the_protocols_sampler_whatever_the_pipeline_came_with(pipeline):
    from diffusers import PNDMScheduler

    expected = made(pipeline, PROMPTS[:1], 1, 1)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    torch.testing.assert_close(made(pipeline, PROMPTS[:1], 1, 1), expected)


def test_an_image_that_is_not_finite_ends_the_work(pipeline, monkeypatch):
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, **kw: (decode(z, **kw)[0] * torch.nan,))
    with pytest.raises(RunError, match="image 0 of prompt 0 is not finite"):
        list(generate(pipeline, SD, PROMPTS[:1], steps=1, batch_size=1))


# --- arms


def test_every_form_of_an_arm_is_recognised(saved):
    base = ModelSource(path=str(saved / "base"))
    assert arm_source(str(saved / "other"), base) == ModelSource(path=str(saved / "other"))
    assert arm_source("org/model", base) == ModelSource(path="org/model")
    assert arm_source("tiny-sd", base) == ModelSource(path="tiny-sd")
    assert arm_source(str(saved / "lora"), base).lora == str(saved / "lora")
    [file] = (saved / "lora").glob("*.safetensors")
    assert arm_source(str(file), base) == ModelSource(path=base.path, lora=str(file))
    assert arm_source(str(saved / "denoiser"), base).denoiser == str(saved / "denoiser")
    assert arm_source(str(saved / "denoiser" / "unet"), base).denoiser == str(saved / "denoiser" / "unet")
    unrelated = ModelSource(path="elsewhere")
    assert arm_source(str(saved / "run"), unrelated) == ModelSource(path=base.path, lora=str(saved / "run" / "export"))
    assert arm_source(str(saved / "full-run"), unrelated).denoiser == str(saved / "full-run" / "export")


def test_a_denoiser_arm_has_its_weights_and_a_lora_arm_changes_the_output(saved):
    base = ModelSource(path=str(saved / "base"))
    other = load_arm(str(saved / "other"), base).unet.state_dict()
    denoiser = load_arm(str(saved / "denoiser" / "unet"), base).unet.state_dict()
    assert all(torch.equal(v, denoiser[k]) for k, v in other.items())
    plain, adapted = (made(load_arm(str(saved / name), base), PROMPTS[:1], 1, 1) for name in ("base", "lora"))
    assert (plain[PROMPTS[0], 0] - adapted[PROMPTS[0], 0]).abs().max() > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiny-sdd", "did you mean"),
        ("./nowhere/at/all", "must be a folder"),
        ("empty", "with none of them"),
        ("half-run", "must be a finished run"),
        ("model.ckpt", "a LoRA, got the file"),
    ],
)
def test_an_unusable_arm_ends_in_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half-run").mkdir()
    (tmp_path / "half-run" / "config.toml").write_text("seed = 0\n")
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=message) as caught:
        arm_source(spec, ModelSource(path="base"))
    assert "\n" not in str(caught.value)


# --- scores


def save_images(folder: Path, count: int, size: int = 8) -> torch.Tensor:
    images = torch.linspace(0, 1, count)[:, None, None, None].expand(count, 3, size, size)
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        score.write_image(image, folder / f"{i:05d}-0.png")
    return (images * 255).round() / 255


def test_an_image_survives_the_disk_bit_for_bit(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    score.write_image(image, tmp_path / "a.png")
    assert torch.equal(score.read_image(tmp_path / "a.png"), image)


def test_scores_do_not_depend_on_the_batch_size_even_with_mixed_image_sizes():
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, s, s, generator=rng) for s in (8, 8, 16, 8, 16, 16)]
    expected = [float(image.mean()) for image in images]
    for size in (1, 2, 16):
        assert score.score_images(images, None, [BRIGHT], batch_size=size)["bright"] == pytest.approx(expected)


def test_a_folder_of_numbered_images_is_scored_against_its_prompts(tmp_path):
    images = save_images(tmp_path / "images", 3)
    prompts = PromptSet(name="x", prompts=["a", "bb", "ccc"], metadata=[{}] * 3)
    by_length = FunctionReward(name="length", function=lambda images, texts: [float(len(t)) for t in texts])
    table = score.score_folder(tmp_path / "images", [BRIGHT, by_length], prompts)
    assert list(table) == ["prompt", "file", "prompt_index", "k", "bright", "length"]
    assert table["length"] == [1.0, 2.0, 3.0]
    assert table["bright"] == pytest.approx(images.mean((1, 2, 3)).tolist())


def test_prompts_may_lie_in_metadata_or_beside_the_images(tmp_path):
    save_images(tmp_path, 2)
    assert score.score_folder(tmp_path, [BRIGHT])["prompt"] == ["", ""]
    for i in range(2):
        (tmp_path / f"0000{i}-0.txt").write_text(f"text {i}\n")
    assert score.score_folder(tmp_path, [BRIGHT])["prompt"] == ["text 0", "text 1"]
    lines = [json.dumps({"file_name": f"0000{i}-0.png", "prompt": f"meta {i}"}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert score.score_folder(tmp_path, [BRIGHT])["prompt"] == ["meta 0", "meta 1"]


def test_components_have_their_own_columns_and_what_is_not_valid_is_nan(tmp_path):
    class Picky:
        name, version, requires, range = "picky", "1", frozenset({"images"}), (0.0, 1.0)
        modality, differentiable, licence = "image", False, "-"

        def score(self, batch: RewardBatch) -> RewardOutput:
            values = batch.images.mean((1, 2, 3))
            return RewardOutput(scores=values, raw={"part": 1 / (1 - values)}, valid=values > 0.2)

    table = score.score_images([torch.full((3, 4, 4), v) for v in (0.1, 0.5, 1.0)], None, [Picky()])
    np.testing.assert_equal(table, {"picky": [np.nan, 0.5, 1.0], "picky.part": [np.nan, 2.0, np.nan]})


def test_too_many_unjudged_images_end_the_scoring(tmp_path):
    save_images(tmp_path, 4)
    blind = FunctionReward(name="blind", function=lambda images, texts: [torch.nan] * len(images))
    with pytest.raises(RunError, match=r"'blind' could not judge 4 of 4 images.*00000-0\.png"):
        score.score_folder(tmp_path, [blind])


def test_an_unreadable_image_is_named(tmp_path):
    save_images(tmp_path, 1)
    (tmp_path / "00001-0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"00001-0\.png' must be a readable image"):
        score.score_folder(tmp_path, [BRIGHT])


def test_images_that_do_not_fit_the_prompts_are_refused(tmp_path):
    save_images(tmp_path, 3)
    with pytest.raises(InputError, match=r"one of 2 prompts, got 00002-0\.png"):
        score.score_folder(tmp_path, [BRIGHT], PromptSet(name="x", prompts=["a", "b"], metadata=[{}, {}]))
    with pytest.raises(InputError, match="got none in"):
        score.score_folder(tmp_path / "nowhere", [BRIGHT])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_survives_the_disk(tmp_path, suffix):
    import pandas

    file = tmp_path / f"t.{suffix}"
    score.write_table({"prompt": ['a, "b"', "é\nx"], "k": [0, 1], "clip": [0.1234567890123, float("nan")]}, file)
    read = pandas.read_parquet(file) if suffix == "parquet" else pandas.read_csv(file)
    assert read["prompt"].tolist() == ['a, "b"', "é\nx"]
    assert read["clip"][0] == 0.1234567890123
    assert np.isnan(read["clip"][1])
    with pytest.raises(InputError, match=r"\.parquet or \.csv"):
        score.write_table({"a": [1]}, tmp_path / "t.xlsx")


# --- the whole road


@pytest.fixture(scope="module")
def evaluated(saved, tmp_path_factory) -> Path:
    """base against other, three prompts (one given twice) and two seeds."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    settings = EvaluationSettings(images_per_prompt=2, steps=2, guidance=2.0, batch_size=4, device="cpu")
    evaluate(
        str(saved / "base"),
        str(saved / "other"),
        [*PROMPTS, PROMPTS[0]],
        rewards=[OracleReward(), BRIGHT],
        roles={"oracle": "labeller"},
        output=folder,
        settings=settings,
    )
    return folder


def test_an_evaluation_leaves_its_files(evaluated):
    assert {p.name for p in evaluated.iterdir()} == {
        "prompts.jsonl", "manifest.json", "journal", "images", "scores.parquet", "report.html",
        "summary.md", "results.json",
    }  # fmt: skip
    assert len(list((evaluated / "images" / "aligned").glob("*.png"))) == 6


def test_results_hold_the_promised_keys(evaluated):
    found = json.loads((evaluated / "results.json").read_text())
    assert (found["version"], found["protocol"], found["arms"]) == (2, "p2-paired-v1", ["base", "aligned"])
    assert (found["n_prompts"], found["n_seeds"], found["prompt_set"]["duplicates_dropped"]) == (3, 2, 1)
    [comparison] = found["comparisons"]
    assert (comparison["arm"], comparison["against"]) == ("aligned", "base")
    assert set(comparison["rewards"]) == {"oracle", "bright"}
    for reward in comparison["rewards"].values():
        assert {"mean_arm", "mean_against", "win_rate", "ci_low", "ci_high", "p", "n", "role"} <= set(reward)
    assert comparison["rewards"]["oracle"]["role"] == "labeller"
    assert comparison["rewards"]["bright"]["role"] == "held_out"
    assert comparison["rewards"]["bright"]["role_declared"] is False
    assert set(comparison["rewards"]["oracle"]["attributes"]) >= {"shape", "colour", "count"}


def test_every_key_of_results_is_documented(evaluated):
    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values())) if value else set()
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    found = json.loads((evaluated / "results.json").read_text())
    for part in ("environment", "models"):  # described as a whole
        found.pop(part)
    found["manifest"].pop("arms")
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    free = {"oracle", "bright", "shape", "colour", "size", "place", "background", "count"}
    assert {key for key in keys(found) - free if f"`{key}`" not in text} == set()


def test_scoring_the_stored_images_again_gives_the_stored_scores(evaluated):
    table = pq.read_table(evaluated / "scores.parquet").to_pydict()
    again = score.score_folder(evaluated / "images" / "aligned", [OracleReward(), BRIGHT])
    rows = [r for r, arm in enumerate(table["arm"]) if arm == "aligned"]
    assert again["prompt"] == [table["prompt"][r] for r in rows]
    for name in ("oracle", "oracle.shape", "bright"):
        assert again[name] == pytest.approx([table[name][r] for r in rows], abs=1e-6)


def test_both_arms_start_from_the_same_noise(evaluated):
    table = pq.read_table(evaluated / "scores.parquet").to_pydict()
    hashes = table["latent_sha256"]
    assert hashes[:6] == hashes[6:]
    assert len(set(hashes)) == 6
    mixed_up = {**table, "latent_sha256": [*hashes[:6], *hashes[7:], hashes[6]]}
    with pytest.raises(RunError, match="same latents, got other ones in base and aligned"):
        check_pairs(mixed_up, ["base", "aligned"])


def test_a_model_against_itself_is_all_ties(saved, tmp_path):
    base = str(saved / "base")
    results = evaluate(base, base, PROMPTS[:2], rewards=[BRIGHT], output=tmp_path / "out", settings=QUICK)
    total = results.comparisons[0].rewards["bright"].total
    assert (total.win_rate, total.mean_difference, total.p, total.tie_share) == (0.5, 0.0, 1.0, 1.0)


def test_an_earlier_evaluation_is_replaced_if_asked_for_and_anything_else_is_not(saved, tmp_path, monkeypatch):
    base, out = str(saved / "base"), tmp_path / "out"
    evaluate(base, base, PROMPTS[:2], rewards=[BRIGHT], output=out, settings=QUICK)
    evaluate(base, base, PROMPTS[:1], rewards=[BRIGHT], output=out, settings=replace(QUICK, fresh=True))
    assert len(list((out / "images" / "base").glob("*.png"))) == 1
    (out / "notes.md").write_text("mine")
    evaluate(base, base, PROMPTS[:1], rewards=[BRIGHT], output=out, settings=QUICK)
    assert (out / "notes.md").read_text() == "mine"
    mine = tmp_path / "mine"
    (mine / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="with images"):
        evaluate(base, base, PROMPTS[:1], rewards=[BRIGHT], output=mine, settings=QUICK)
    assert (mine / "images").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "at least one reward"),
        ({"rewards": [BRIGHT, BRIGHT]}, "different names"),
        ({"roles": {"brigth": "held_out"}}, "did you mean 'bright'"),
        ({"roles": {"bright": "friend"}}, "roles must be one of labeller"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a cat"], "rewards": [OracleReward()]}, "prompt 0: .*a cat"),
        ({"settings": EvaluationSettings(device="cuda")}, "no GPU is there"),
        ({"settings": EvaluationSettings(device="abacus")}, "device must be auto"),
        ({"base": "lora"}, "base must be a pipeline or a run"),
        ({"aligned": "weightless"}, r"must hold a \.safetensors file"),
    ],
)
def test_what_is_wrong_is_said_before_an_image_is_made(saved, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = {"base": "base", "aligned": "other", "prompts": PROMPTS, "rewards": [BRIGHT], "settings": QUICK, **changes}
    for arm in ("base", "aligned"):
        asked[arm] = str(saved / asked[arm])
    with pytest.raises(InputError, match=message):
        evaluate(output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        EvaluationSettings(steps=0)
    with pytest.raises(InputError, match="dtype must be one of"):
        EvaluationSettings(dtype="float8")


def test_models_of_other_latent_shapes_cannot_be_paired(saved, tmp_path):
    shutil.copytree(saved / "base", tmp_path / "wide")
    config = tmp_path / "wide" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 16}))
    sources = {"base": ModelSource(path=str(saved / "base")), "aligned": ModelSource(path=str(tmp_path / "wide"))}
    with pytest.raises(InputError, match=r"latents of one shape, got .*\(4, 16, 16\)"):
        form.common_size(sources)


def test_prompts_given_twice_count_once():
    kept, repeated = preflight.distinct(["b", "a", "b", "c", "a"])
    assert (kept.prompts, repeated) == (["b", "a", "c"], 2)


def test_labels_are_taken_where_every_prompt_has_one():
    rows = [{"Category": "x", "challenge": "1", "Note": "n"}, {"Category": "y", "challenge": "", "Note": "n"}]
    found = preflight.labels_of(PromptSet(name="p", prompts=["a", "b"], metadata=rows))
    assert found == {"Category": ["x", "y"]}


def test_images_of_other_modes_are_read_as_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert score.read_image(tmp_path / "a.png").shape == (3, 4, 4)
