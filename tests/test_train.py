"""Whole roads on random pipelines of the true classes: train, resume, export, reload."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign.errors import InputError, RunError
from diffalign.logbook import TIME_FIELDS
from tests import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `sd`, `sd-v`, `sd3` and the file `pairs.parquet`: 40 rows of which 4 are ties."""
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd(root / "sd-v", prediction="v_prediction")
    worlds.sd3(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    return root


def config(world: Path, output: Path, *, model: str = "sd", trainable: str = "lora", **sections) -> dict:
    """A short run on the CPU; sections are merged into the defaults."""
    table = {
        "output": str(output),
        "model": {"path": str(world / model)},
        "data": {"path": str(world / "pairs.parquet"), "cache": str(world / f"cache-{model}"), "prompt_dropout": 0.2},
        "method": {"name": "diffusion_dpo", "beta": 100.0},
        "train": {"steps": 6, "batch_size": 2, "trainable": trainable, "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 2},
    }
    if trainable == "lora":
        table["lora"] = {"rank": 4, "alpha": 8.0}
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section} if isinstance(section, dict) else section
    return table


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without the fields that tell time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


@pytest.mark.parametrize("method", ["diffusion_dpo", "sft"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("model", ["sd", "sd-v", "sd3"])
def test_every_family_trains_and_exports_what_diffusers_loads(world, tmp_path, model, trainable, method):
    beta = {"beta": 100.0} if method == "diffusion_dpo" else {}
    table = config(world, tmp_path / "run", model=model, trainable=trainable, train={"steps": 2})
    table["method"] = {"name": method, **beta}
    result = diffalign.train(table)
    lines = metrics(result.folder)
    assert [line["step"] for line in lines] == [1, 2]
    if method == "diffusion_dpo":
        assert lines[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert lines[1]["rewards/margins"] != 0
    before, after = reloaded(world / model, None), reloaded(world / model, result.export)
    assert torch.isfinite(after).all()
    assert (before - after).abs().max() > 0


def reloaded(model: Path, export: Path | None) -> torch.Tensor:
    """Pixels of one prompt by plain Diffusers, with an export or without."""
    from diffusers import DiffusionPipeline

    sd3 = json.loads((model / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    net = "transformer" if sd3 else "unet"
    parts = {"text_encoder_3": None, "tokenizer_3": None} if sd3 else {}
    pipeline = DiffusionPipeline.from_pretrained(model, **parts)
    if export is not None and (export / net).is_dir():
        cls = type(pipeline.components[net])
        pipeline.register_modules(**{net: cls.from_pretrained(export, subfolder=net)})
    elif export is not None:
        pipeline.load_lora_weights(export)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=rng, output_type="pt").images


def test_a_resumed_run_ends_as_the_run_that_was_not_stopped(world, tmp_path):
    whole = diffalign.train(config(world, tmp_path / "whole"))
    first = config(world, tmp_path / "parts", train={"steps": 3}, checkpoint={"every": 3})
    diffalign.train(first)
    first["train"]["steps"] = 6
    parts = diffalign.train({**first, "resume": "latest"})
    assert same(weights(whole.folder, 6), weights(parts.folder, 6))
    assert metrics(whole.folder) == metrics(parts.folder)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_resuming_keeps_optimizer_and_moving_average(world, tmp_path, trainable):
    options = {"trainable": trainable, "train": {"ema_decay": 0.9, "steps": 4}}
    whole = diffalign.train(config(world, tmp_path / "whole", **options))
    table = config(world, tmp_path / "parts", **options)
    diffalign.train({**table, "train": {**table["train"], "steps": 2}})
    parts = diffalign.train({**table, "resume": "latest"})
    for name in ("weights", "optimizer", "ema"):
        a, b = (load_file(r.folder / "checkpoints" / "step-4" / f"{name}.safetensors") for r in (whole, parts))
        assert same(a, b), name
    assert same(
        load_file(next(whole.export.rglob("*.safetensors"))), load_file(next(parts.export.rglob("*.safetensors")))
    )


def test_resuming_with_a_changed_config_names_the_changed_keys(world, tmp_path):
    table = config(world, tmp_path / "run", train={"steps": 2})
    diffalign.train(table)
    changed = {**table, "resume": "latest", "optimizer": {"lr": 5e-3}, "method": {"name": "sft"}}
    with pytest.raises(InputError, match=r"changed: method.beta .*optimizer.lr \(0.01 then, 0.005 now\)"):
        diffalign.train(changed)


def test_the_folder_of_another_run_is_left_alone(world, tmp_path):
    table = config(world, tmp_path / "run", train={"steps": 2})
    diffalign.train(table)
    before = metrics(tmp_path / "run")
    with pytest.raises(InputError, match=r"must be a new folder, .* with a run at step 2; set resume"):
        diffalign.train(table)
    assert metrics(tmp_path / "run") == before


def test_accumulated_small_batches_take_the_steps_of_one_large_batch(world, tmp_path):
    large = diffalign.train(config(world, tmp_path / "a", train={"steps": 3, "batch_size": 8}))
    small = diffalign.train(config(world, tmp_path / "b", train={"steps": 3, "batch_size": 1, "accumulate": 8}))
    a, b = weights(large.folder, 3), weights(small.folder, 3)
    for name in a:  # sums in another order, amplified by AdamW's first steps
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)
    assert metrics(large.folder)[0]["err_w"] == pytest.approx(metrics(small.folder)[0]["err_w"], rel=1e-5)


def test_training_from_a_cache_loads_neither_vae_nor_text_encoder(world, tmp_path, monkeypatch):
    import diffusers
    import transformers

    diffalign.train(config(world, tmp_path / "first", train={"steps": 1}))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished cache must be enough")

    for cls in (diffusers.AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", refuse)
    diffalign.train(config(world, tmp_path / "second", train={"steps": 1}))
    assert same(weights(tmp_path / "first", 1), weights(tmp_path / "second", 1))


def test_without_a_cache_the_first_losses_are_those_with_one(world, tmp_path):
    cached = diffalign.train(config(world, tmp_path / "a", train={"steps": 2}, data={"cache_dtype": "float32",
                             "cache": str(tmp_path / "cache")}))  # fmt: skip
    live = diffalign.train(config(world, tmp_path / "b", train={"steps": 2}, data={"cache": False}))
    for x, y in zip(metrics(cached.folder), metrics(live.folder), strict=True):
        assert x["err_w"] == pytest.approx(y["err_w"], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_without_an_update(world, tmp_path, monkeypatch):
    from diffalign.methods.diffusion_dpo import DiffusionDPO

    call, count = DiffusionDPO.__call__, []

    def poisoned(self, policy, reference, batch, rng, shared):
        out = call(self, policy, reference, batch, rng)
        count.append(1)
        return out if len(count) < 4 else type(out)(
            loss=out.loss * float("nan"), metrics=out.metrics, noise_level=out.noise_level
        )  # fmt: skip

    monkeypatch.setattr(DiffusionDPO, "__call__", poisoned)
    with pytest.raises(
        RunError, match=r"loss is not finite at step 4 \(nan\); no update was made, the batch is saved in"
    ):
        diffalign.train(config(world, tmp_path / "run", train={"steps": 6}))
    batch = load_file(tmp_path / "run" / "bad-batch-0.safetensors")
    assert batch["samples"].tolist() == [6, 7]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_full_disk_keeps_the_last_whole_checkpoint(world, tmp_path, monkeypatch):
    import errno

    from diffalign import checkpoint

    save = checkpoint.save_file

    def full(tensors, file, *args, **kwargs):
        if ".step-4." in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="the disk is full; the last whole checkpoint is step-2"):
        diffalign.train(config(world, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    assert diffalign.train({**config(world, tmp_path / "run"), "resume": "latest"}).step == 6


def test_only_the_last_and_the_best_checkpoint_stay(world, tmp_path):
    table = config(
        world,
        tmp_path / "run",
        train={"steps": 6},
        validation={"every": 2, "fraction": 0.3, "pairs": 4},
        checkpoint={"every": 1, "keep_last": 1, "best": "winner_gain"},
    )
    result = diffalign.train(table)
    held = {line["step"]: line["validation"]["winner_gain"] for line in metrics(result.folder) if "validation" in line}
    best = max((step for step in held if step), key=held.get)
    assert result.step == best
    kept = {p.name for p in (result.folder / "checkpoints").iterdir()}
    assert kept == {"step-6", f"step-{best}"}


def test_held_out_prompts_are_not_trained_on(world, tmp_path):
    from diffalign.data.batches import held_out

    table = config(world, tmp_path / "run", train={"steps": 1}, validation={"every": 1, "fraction": 0.5, "pairs": 100})
    from diffalign.assemble import assemble
    from diffalign.config import parse

    parts = assemble(parse(table))
    prompts = parts.collator.rows.table.prompts
    trained = {prompts[i] for i in parts.collator.rows.table.prompt[parts.collator.rows.rows].tolist()}
    kept = {prompts[i] for i in parts.held.rows.table.prompt[parts.held.rows.rows].tolist()}
    assert trained
    assert kept
    assert not trained & kept
    assert all(held_out(text, 0.5) for text in kept)


def test_a_grid_of_samples_is_made_at_milestones(world, tmp_path):
    samples = {"every": 2, "prompts": ["a red circle", "a blue square"], "steps": 2, "guidance": 2.0}
    result = diffalign.train(config(world, tmp_path / "run", train={"steps": 2}, samples=samples))
    assert sorted(p.name for p in (result.folder / "samples").iterdir()) == ["step-000000.png", "step-000002.png"]


def test_a_run_can_start_from_the_lora_of_another_which_is_its_reference_too(world, tmp_path):
    first = diffalign.train(config(world, tmp_path / "first", train={"steps": 3}))
    table = config(world, tmp_path / "second", model="sd", train={"steps": 2})
    table["model"]["lora"] = str(first.export)
    second = diffalign.train(table)
    assert metrics(second.folder)[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert metrics(second.folder)[0]["err_w"] != pytest.approx(metrics(first.folder)[0]["err_w"], abs=1e-4)
    a, b = (reloaded(world / "sd", r.export) for r in (first, second))
    assert (a - b).abs().max() > 0


def test_a_run_can_start_from_a_fine_tuned_denoiser_which_is_its_reference_too(world, tmp_path):
    first = diffalign.train(config(world, tmp_path / "first", trainable="full", train={"steps": 3}))
    table = config(world, tmp_path / "second", train={"steps": 2})
    table["model"]["denoiser"] = str(first.export)
    second = diffalign.train(table)
    assert metrics(second.folder)[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert metrics(second.folder)[0]["err_ref_w"] != pytest.approx(metrics(first.folder)[0]["err_ref_w"], abs=1e-4)


def test_another_vae_gives_other_latents(world, tmp_path):
    worlds.sd(tmp_path / "other", seed=5)
    table = config(world, tmp_path / "run", train={"steps": 1})
    table["model"]["vae"] = str(tmp_path / "other")
    with pytest.raises(InputError, match=r"data.cache must be a cache of this model, .* differs in vae"):
        diffalign.train(table)
    table["data"]["cache"] = str(tmp_path / "cache")
    plain = diffalign.train(config(world, tmp_path / "plain", train={"steps": 1}))
    assert metrics(diffalign.train({**table, "resume": "latest"}).folder)[0]["err_w"] != pytest.approx(
        metrics(plain.folder)[0]["err_w"], abs=1e-4
    )


def test_the_model_card_says_what_it_is(world, tmp_path):
    result = diffalign.train(config(world, tmp_path / "run", train={"steps": 1}))
    text = (result.export / "README.md").read_text()
    header = text.split("---")[1]
    assert "library_name: diffusers" in header
    assert f'base_model: "{world / "sd"}"' in header
    assert "- diffusion_dpo" in header
    assert "40 rows, of which 36 were used; dropped: 4 tie" in text
    assert "load_lora_weights" in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_steps": 4}, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"schedule": "cosine", "warmup_steps": 0}, [1.0, None, None, None, 0.5, None, None, None]),
    ],
)
def test_the_learning_rate_follows_its_schedule(settings, expected):
    from diffalign.settings import OptimizerSettings
    from diffalign.train import lr_factor

    got = [lr_factor(OptimizerSettings(lr=1.0, **settings), step, 8) for step in range(8)]
    assert all(e is None or g == pytest.approx(e) for g, e in zip(got, expected, strict=True))
