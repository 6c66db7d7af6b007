"""The command line: every wrong input is one line on stderr and status 2, and nothing is written or lost."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffalign import cli
from diffalign.strict import to_toml
from tests import worlds
from tests.test_train import config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    return root


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a command as a shell would; returns exit status, stdout and stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffalign", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return command


def changed(world: Path, tmp_path: Path, change: Callable[[dict, Path], object]) -> Path:
    """A config file of a short run, after a change."""
    table = config(world, tmp_path / "run", data={"cache": str(tmp_path / "cache")})
    change(table, tmp_path)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(table))
    return file


def rows(table: dict, tmp_path: Path, spoil: Callable[[list[dict]], object], count: int = 40) -> None:
    found = worlds.preference_rows(count)
    spoil(found)
    table["data"]["path"] = str(worlds.parquet(tmp_path / "p.parquet", found))


def without_rows(table: dict, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = worlds.parquet(tmp_path / "p.parquet", worlds.preference_rows(1))
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    table["data"]["path"] = str(file)


def folder(table: dict, tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """A copy of the model's folder, spoilt."""
    copy = tmp_path / "model"
    shutil.copytree(table["model"]["path"], copy)
    spoil(copy)
    table["model"]["path"] = str(copy)


def as_pickle(model: Path) -> None:
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()


def rename_class(model: Path) -> None:
    index = model / "model_index.json"
    table = json.loads(index.read_text())
    index.write_text(json.dumps({**table, "_class_name": "KandinskyPipeline"}))


def garbage(model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"garbage")


MISTAKES: dict[str, tuple[Callable[[dict, Path], object], str]] = {
    "unknown key": (lambda t, p: t["method"].update(betta=1.0), "unknown key 'betta'; did you mean 'beta'?"),
    "wrong type": (lambda t, p: t["optimizer"].update(lr="1e-4"), "config.optimizer.lr must be a number, got '1e-4'"),
    "unknown method": (lambda t, p: t["method"].update(name="dpo2"), "must be a known method, got 'dpo2'"),
    "unknown family": (
        lambda t, p: folder(t, p, rename_class),
        "got 'KandinskyPipeline'; known families: sd (StableDiffusionPipeline), sdxl (StableDiffusionXLPipeline)",
    ),
    "column missing": (
        lambda t, p: rows(t, p, lambda r: [x.pop("label_0") for x in r]),
        "which misses label_0",
    ),
    "unreadable image": (lambda t, p: rows(t, p, lambda r: r[3].update(jpg_0=b"x")), "first: row 3: "),
    "every pair a tie": (lambda t, p: rows(t, p, lambda r: [x.update(label_0=0.5) for x in r]), "got 40 rows: 40 ties"),
    "empty data set": (without_rows, "data.path must have rows, got none"),
    "prompt not text": (
        lambda t, p: rows(t, p, lambda r: [x.update(caption=7) for x in r]),
        "data.path must have text prompts, got int 7 in row 0",
    ),
    "no data": (lambda t, p: t["data"].update(path=str(p / "no.parquet")), "data.path must exist, got"),
    "no model": (lambda t, p: t["model"].update(path=str(p)), "model.path must be the folder of a Diffusers pipeline"),
    "model folder incomplete": (
        lambda t, p: folder(t, p, lambda m: shutil.rmtree(m / "unet")),
        "model.path must hold the component 'unet' of its model_index.json, missing in",
    ),
    "no weights": (
        lambda t, p: folder(t, p, lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").unlink()),
        "model.path must hold a .safetensors file in",
    ),
    "pickle in the folder": (
        lambda t, p: folder(t, p, as_pickle),
        "must be safetensors weights, got the pickle checkpoint",
    ),
    "pickle as model": (
        lambda t, p: t["model"].update(path="weights.ckpt"),
        "got the pickle checkpoint 'weights.ckpt'",
    ),
    "pickle as denoiser": (lambda t, p: t["model"].update(denoiser="x/unet.bin"), "model.denoiser must be safetensors"),
    "pickle as lora": (lambda t, p: t["model"].update(lora="x/lora.pt"), "model.lora must be safetensors weights"),
    "weights that are none": (lambda t, p: folder(t, p, garbage), "model.path must be a loadable model, got"),
    "GPU that is not there": (
        lambda t, p: t["train"].update(device="cuda"),
        "config.train.device must be a device of this machine, got 'cuda'",
    ),
    "fp16 without a GPU": (
        lambda t, p: t["train"].update(precision="fp16"),
        "config.train.precision must be 'no' or 'bf16'",
    ),
    "output with other files": (
        lambda t, p: _write(Path(t["output"]) / "notes.txt"),
        "config.output must be a new folder or one of a run",
    ),
    "resume of nothing": (lambda t, p: t.update(resume="step-100"), "config.resume must name a checkpoint"),
    "no held-out prompts": (
        lambda t, p: t.update(validation={"every": 1, "fraction": 0.001}),
        "validation.fraction must leave prompts on both sides",
    ),
    "unpaired data for a pair method": (
        lambda t, p: t["data"].update(
            path=str(worlds.parquet(p / "p.parquet", [{"prompt": "a", "image": worlds.png(0), "label": True}]))
        ),
        "must have pairs for this method",
    ),
    "unknown lora target": (lambda t, p: t["lora"].update(targets=["to_z"]), "got 'to_z', which matches none"),
}


def _write(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("mine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these inputs are right on a machine with a GPU")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_training_input_is_one_line_and_status_2_and_writes_nothing(world, tmp_path, run, mistake):
    change, message = MISTAKES[mistake]
    file = changed(world, tmp_path, change)
    before = listing(tmp_path)
    status, _, err = run("train", file)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert message in lines[0]
    assert "Traceback" not in err
    written = {name for name in listing(tmp_path) - before if not name.startswith("cache")}
    assert written == set()
    if mistake != "no held-out prompts":  # found when all prompts are known; the cache is whole then, and stays
        assert listing(tmp_path) == before


def listing(place: Path) -> set[str]:
    return {str(p.relative_to(place)) for p in place.rglob("*")}


def test_a_missing_config_is_one_line(run):
    status, _, err = run("train", "no_such_config")
    assert status == 2
    assert "error: config must be a file or a shipped name, got 'no_such_config'" in err


def test_a_missing_extra_is_named_with_its_install_line(world, tmp_path, run, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    file = changed(world, tmp_path, lambda t, p: t["optimizer"].update(name="adamw8bit"))
    status, _, err = run("train", file)
    assert status == 2
    assert "which is missing; pip install 'diffalign[8bit]'" in err


def test_the_folder_of_another_run_is_one_line_and_the_run_stays(world, tmp_path, run):
    file = changed(world, tmp_path, lambda t, p: t["train"].update(steps=1))
    cli.app(["train", str(file)], standalone_mode=False)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    status, _, err = run("train", file)
    assert status == 2
    assert "with a run at step 1; set resume" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_run_that_fails_ends_with_status_1(world, tmp_path, run, monkeypatch):
    from diffalign.methods.diffusion_dpo import DiffusionDPO

    whole = DiffusionDPO.__call__

    def poisoned(self, *arguments):
        out = whole(self, *arguments)
        return type(out)(loss=out.loss * float("nan"), metrics=out.metrics, noise_level=out.noise_level)

    monkeypatch.setattr(DiffusionDPO, "__call__", poisoned)
    status, _, err = run("train", changed(world, tmp_path, lambda t, p: None))
    assert status == 1
    assert err.splitlines()[-1].startswith("error: loss is not finite at step 1 (nan); no update was made")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "{sd}", "--reward", "clipp", "--out", "x.csv"], "'clip'"),
        (["score", "{sd}", "--reward", "oracle", "--out", "x.txt"], "must be written to a .parquet or .csv file"),
        (["score", "{sd}", "--reward", "oracle", "--out", "x.csv"], "images must be a folder with"),
        (["sample", "{sd}", "--prompts", "nothing.txt", "--out", "x"], "nothing.txt"),
        (["sample", "nothing-here", "--out", "x"], "must be a folder, a .safetensors file, a hub id or a shipped name"),
        (["evaluate", "{sd}", "{sd}", "--reward", "nobody", "--out", "x"], "nobody"),
        (["data", "check", "nothing.parquet"], "data.path must exist"),
        (["data", "filter", "nothing.parquet", "--out", "x.parquet"], "add --absolute-winners"),
        (["data", "filter", "nothing.parquet", "--absolute-winners", "--out", "x.parquet"], "data.path must exist"),
        (["data", "score", "{pairs}", "--reward", "clipp", "--out", "x.parquet"], "'clip'"),
        (["data", "relabel", "{pairs}", "--reward", "oracle", "--out", "x.csv"], "out must be a .parquet file"),
        (["data", "unpair", "{pairs}", "--out", "{pairs}"], "which exists"),
        (["serve-reward", "clipp"], "'clip'"),
        (["serve-reward", "oracle", "--option", "model"], "--option must have the form key=value, got 'model'"),
        (["serve-reward", "oracle", "--host", "203.0.113.1"], "must be free and of this machine, got 203.0.113.1:8100"),
        (["plan", "tiny_sd_diffusion_dpo", "--memory", "lots"], "--memory must be a size such as 24GB, got 'lots'"),
        (["plan", "tiny_sd_diffusion_dpo", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["plan", "no_such_config"], "config must be a file or a shipped name, got 'no_such_config'"),
        (["plan", "tiny_sd_diffusion_dpo", "--json", "plan.txt"], "--json must be a .json file, got 'plan.txt'"),
        (["export", "{sd}/unet", "--out", "x"], "which goes on top of one; name it as base"),
    ],
)
def test_a_wrong_input_of_other_commands_is_one_line(world, tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*[a.format(sd=world / "sd", pairs=world / "pairs.parquet") for a in arguments])
    assert status == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert listing(tmp_path) == set()


def test_train_sample_score_and_export_are_one_road(world, tmp_path):
    file = changed(world, tmp_path, lambda t, p: t["train"].update(steps=1))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    reward = "tests.test_cli:brightness"
    small = ["--steps", "2", "--batch-size", "2"]
    for command in (
        ["train", file, "train.steps=2"],
        ["sample", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "images", *small],
        ["score", tmp_path / "images", "--reward", reward, "--out", tmp_path / "scores.csv"],
        ["export", tmp_path / "run", "--out", tmp_path / "pipeline"],
        ["evaluate", world / "sd", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", "--reward", reward,
         "--held-out", "brightness", "--out", tmp_path / "run", *small],
    ):  # fmt: skip
        cli.app([str(word) for word in command], standalone_mode=False)
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    assert (tmp_path / "scores.csv").read_text().startswith("prompt,file,prompt_index,k,brightness\n")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["comparisons"][0]["rewards"]["brightness"]["role"] == "held_out"
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:500]
    assert (tmp_path / "run" / "checkpoints").is_dir()
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline").unet is not None


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A user's reward: a plain function."""
    return images.mean((1, 2, 3))


def test_data_check_says_what_is_there(world):
    result = CliRunner().invoke(cli.app, ["data", "check", str(world / "pairs.parquet")])
    assert result.exit_code == 0
    for words in ("pickapic", "40", "ties", "first image wins", "16x16"):
        assert words in result.output


def test_list_and_env_name_what_there_is():
    found = CliRunner().invoke(cli.app, ["list"]).output
    assert all(name in found for name in ("diffusion_dpo", "sd3", "oracle", "tiny_sd_diffusion_dpo", "tiny-clip"))
    found = CliRunner().invoke(cli.app, ["env"]).output
    assert all(name in found for name in ("torch", "diffusers", "extra 8bit", "device"))


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert CliRunner().invoke(cli.app, ["--version"]).output == f"diffalign {version('diffalign')}\n"


def test_the_command_line_has_not_changed():
    """A change of this list is a change for every user: it needs a line in the changelog."""
    import typer

    def words(command: object) -> dict:
        return {
            name: sorted(p.name for p in c.params) for name, c in command.commands.items() if not hasattr(c, "commands")
        }

    group = typer.main.get_command(cli.app)
    made = ["batch_size", "device", "guidance", "images_per_prompt", "limit", "out_dir", "prompts", "steps"]
    assert words(group) == {
        "demo": ["audio"],
        "env": [],
        "evaluate": sorted(
            [
                *made,
                "aligned",
                "base",
                "dtype",
                "encoder",
                "fresh",
                "heard_hz",
                "held_out",
                "labeller",
                "mono",
                "pairwise",
                "reference",
                "reward",
                "seconds",
                "sweep",
                "tier",
                "trained_on",
            ]
        ),
        "export": ["base", "form", "model", "out_dir"],
        "list": [],
        "plan": ["config", "json_file", "memory", "overrides", "processes", "timed"],
        "sample": sorted([*made, "base", "model"]),
        "reference": ["device", "heard_hz", "images", "mono", "option", "out_file", "reward"],
        "score": ["batch_size", "device", "images", "out_file", "prompts", "reward"],
        "serve-reward": ["device", "host", "name", "option", "port"],
        "train": ["config", "overrides"],
    }
    source = ["limit", "out_file", "path", "split"]
    assert words(group.commands["data"]) == {
        "check": ["bucket_step", "limit", "path", "resolution", "split", "streaming"],
        "filter": ["absolute_winners", "all_losers", *source],
        "relabel": sorted([*source, "batch_size", "device", "reward"]),
        "score": sorted([*source, "batch_size", "device", "reward"]),
        "unpair": sorted([*source, "mixed"]),
    }
