"""Repositories of the hub without the hub: denoisers alone, and what is said of what cannot be had."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, errors

import diffalign
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.evaluate import EvaluationSettings, evaluate
from diffalign.evaluate.arms import arm_source, base_source
from diffalign.models import reading
from diffalign.models.load import ModelSource, detect_family, load_net, load_pipeline
from diffalign.models.reading import one_line
from diffalign.types import FunctionReward
from tests import worlds
from tests.test_families import config, metrics
from tests.test_kohya import latents

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

REPO = "someone/dpo-unet"
ERRORS = {
    "gated": (
        errors.GatedRepoError,
        "may read, got 'someone/dpo-unet', which is gated; accept its terms on https://hugg",
    ),
    "missing": (errors.RepositoryNotFoundError, "which is neither; a private one needs a login"),
    "revision": (errors.RevisionNotFoundError, "must have the revision that is asked for"),
    "not cached": (errors.LocalEntryNotFoundError, r"which is neither; fetch it .* \(hf download someone/dpo-unet\)"),
    "offline": (errors.OfflineModeIsEnabled, "or be in the hub's cache while the hub is out of reach"),
}


def raised(kind: type[Exception]) -> Exception:
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no")
    request = SimpleNamespace(url="https://huggingface.co/x", method="GET")
    return kind("no", response=SimpleNamespace(status_code=403, headers={}, request=request))


def unreachable(monkeypatch, kind: type[Exception]) -> None:
    """Every way to the hub ends in the same error; loaders make words of their own of it."""
    import diffusers.configuration_utils as configs

    def fails(*args: object, **options: object) -> None:
        raise raised(kind)

    monkeypatch.setattr(configs, "hf_hub_download", fails)
    monkeypatch.setattr(HfApi, "model_info", fails)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, the second's denoiser also alone: at its folder's top, and in `unet/`."""
    root = tmp_path_factory.mktemp("hub")
    worlds.sd(root / "sd")
    worlds.sd(root / "other", seed=1)
    shutil.copytree(root / "other" / "unet", root / "top")
    shutil.copytree(root / "other" / "unet", root / "inside" / "unet")
    worlds.sd3(root / "sd3")
    worlds.sdxl(root / "sdxl")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(16, ties=2))
    return root


@pytest.fixture
def hub(monkeypatch) -> dict[str, Path]:
    """Repositories by id, each a local folder behind the loaders of U-Nets and pipelines."""
    from diffusers import UNet2DConditionModel

    there: dict[str, Path] = {}

    def listed(self: HfApi, repo: str, revision: str | None = None) -> SimpleNamespace:
        if repo not in there:
            raise raised(errors.RepositoryNotFoundError)
        files = [f.relative_to(there[repo]).as_posix() for f in there[repo].rglob("*") if f.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    monkeypatch.setattr(HfApi, "model_info", listed)
    for name in ("load_config", "from_pretrained"):
        real = getattr(UNet2DConditionModel, name)
        monkeypatch.setattr(
            UNet2DConditionModel, name, lambda path, real=real, **options: real(str(there.get(path, path)), **options)
        )
    return there


# --- a denoiser alone


@pytest.mark.parametrize("place", ["top", "inside", "hub top", "hub inside", "other"])
def test_a_denoiser_alone_takes_the_place_of_the_pipelines(world, hub, place):
    spec = str(world / place)
    if place.startswith("hub"):
        hub[REPO] = world / place.removeprefix("hub ")
        spec = REPO
    source = ModelSource(path=str(world / "sd"), denoiser=spec)
    other = load_pipeline(ModelSource(path=str(world / "other"))).unet.state_dict()
    found = load_pipeline(source)
    assert all(torch.equal(found.unet.state_dict()[key], weight) for key, weight in other.items())
    assert not torch.equal(latents(found), latents(load_pipeline(replace(source, denoiser=None))))


def test_a_denoiser_alone_is_start_and_reference(world, hub, tmp_path):
    hub[REPO] = world / "inside"
    table = config(world, tmp_path / "run", "sd")
    table["model"]["denoiser"] = REPO
    run = diffalign.train(table)
    lines = metrics(run.folder)
    assert lines[0]["rewards/margins"] == 0.0
    plain = metrics(diffalign.train(config(world, tmp_path / "plain", "sd")).folder)
    assert lines[0]["err_ref_w"] != plain[0]["err_ref_w"]
    arm = arm_source(str(run.folder), ModelSource(path="elsewhere"))
    assert (arm.path, arm.denoiser, arm.lora) == (str(world / "sd"), REPO, str(run.folder / "export"))


def test_a_repository_is_the_arm_that_its_files_say(world, hub, tmp_path):
    base = ModelSource(path=str(world / "sd"), lora="x")
    for name, files in {
        "a/pipeline": ["model_index.json", "unet/config.json"],
        "a/inside": ["README.md", "unet/config.json"],
        "a/top": ["config.json"],
        "a/transformer": ["transformer/config.json"],
        "a/lora": ["pytorch_lora_weights.safetensors"],
        "a/peft": ["adapter_config.json", "adapter_model.safetensors"],
        "a/other": ["weights.safetensors"],
    }.items():
        hub[name] = tmp_path / name
        for file in files:
            (hub[name] / file).parent.mkdir(parents=True, exist_ok=True)
            (hub[name] / file).touch()
    assert arm_source("a/pipeline", base) == ModelSource(path="a/pipeline")
    for name in ("a/inside", "a/top", "a/transformer"):
        assert arm_source(name, base) == ModelSource(path=base.path, denoiser=name)
    for name in ("a/lora", "a/peft"):
        assert arm_source(name, base) == ModelSource(path=base.path, lora=name)
    assert arm_source("a/other", base) == ModelSource(path="a/other")
    with pytest.raises(InputError, match="base must be a pipeline or a run, got 'a/inside', which goes on top of one"):
        base_source("a/inside")
    with pytest.raises(InputError, match=r"model must be a folder or a repository of the hub, got 'a/none'"):
        arm_source("a/none", base)


def test_out_of_reach_the_cache_says_what_a_repository_is(world, monkeypatch):
    unreachable(monkeypatch, errors.OfflineModeIsEnabled)
    base = ModelSource(path=str(world / "sd"))
    assert arm_source(REPO, base) == ModelSource(path=REPO)
    cached = {"unet/config.json": "/cache/unet/config.json"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name, revision=None: cached.get(name))
    assert arm_source(REPO, base) == replace(base, denoiser=REPO)


def test_a_denoiser_of_the_hub_is_compared_with_its_base(world, hub, tmp_path):
    hub[REPO] = world / "inside"
    reward = FunctionReward(name="bright", function=lambda images, prompts: images.mean((1, 2, 3)))
    settings = EvaluationSettings(images_per_prompt=1, steps=2, guidance=2.0, batch_size=2, device="cpu")
    evaluate(
        str(world / "sd"), {"hub": REPO, "folder": str(world / "top"), "whole": str(world / "other")}, ["a red circle"],
        rewards=[reward], output=tmp_path / "out", settings=settings,
    )  # fmt: skip
    images = {arm: next((tmp_path / "out" / "images" / arm).glob("*.png")).read_bytes() for arm in ("hub", "folder")}
    assert images["hub"] == images["folder"]
    about = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["hub"]
    assert about["source"]["denoiser"] == REPO


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_denoiser_of_another_class_is_one_line(world, hub, where):
    hub[REPO] = world / "sd3" / "transformer"
    spec = REPO if where == "hub" else str(hub[REPO])
    source = ModelSource(path=str(world / "sd"), denoiser=spec)
    message = r"model\.denoiser must be a UNet2DConditionModel, as the family 'sd' has, got .*, a SD3Transformer2DModel"
    with pytest.raises(InputError, match=message) as caught:
        load_net(source, FAMILIES["sd"])
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"must hold a UNet2DConditionModel, a config\.json and weights, in unet/ or at"
    ):
        load_net(replace(source, denoiser=str(world / "sd3")), FAMILIES["sd"])


def test_a_denoiser_of_the_class_that_takes_other_conditions_is_one_line(world):
    source = ModelSource(path=str(world / "sd"), denoiser=str(world / "sdxl"))
    message = r"take and give what the denoiser of model\.path does, got .* with cross_attention_dim 48 in place of 16"
    with pytest.raises(InputError, match=message):
        load_net(source, FAMILIES["sd"])


def test_a_denoiser_named_as_model_is_told_where_it_belongs(world):
    for place in ("top", "inside"):
        with pytest.raises(
            InputError, match=r"without model_index\.json; a denoiser alone is named as model\.denoiser"
        ):
            detect_family(ModelSource(path=str(world / place)))


def test_a_denoiser_without_weights_is_one_line(world, tmp_path):
    shutil.copytree(world / "top", tmp_path / "bare")
    (tmp_path / "bare" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.denoiser must hold a \.safetensors file in"):
        load_net(ModelSource(path=str(world / "sd"), denoiser=str(tmp_path / "bare")), FAMILIES["sd"])


# --- what cannot be had


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("key", ["path", "denoiser", "vae", "arm"])
def test_a_repository_that_cannot_be_had_is_one_line(world, monkeypatch, case, key):
    kind, message = ERRORS[case]
    unreachable(monkeypatch, kind)
    base = ModelSource(path=str(world / "sd"))
    load = {
        "arm": lambda: detect_family(arm_source(REPO, base)),
        "path": lambda: detect_family(ModelSource(path=REPO)),
        "denoiser": lambda: load_pipeline(replace(base, denoiser=REPO)),
        "vae": lambda: load_pipeline(replace(base, vae=REPO)),
    }
    with pytest.raises(InputError, match=message) as caught:
        load[key]()
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("model must" if key == "arm" and case in ("gated", "missing") else "model.")


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_hub_said_is_found_behind_what_a_loader_made_of_it(case):
    kind, message = ERRORS[case]

    def load(chained: bool) -> None:
        with one_line("model.lora", REPO):
            try:
                raise raised(kind)
            except Exception as error:
                raise OSError("Can't load it.\nMany lines.") from (error if chained else None)

    for chained in (False, True):
        with pytest.raises(InputError, match=message):
            load(chained)


def test_another_failure_keeps_the_loaders_words():
    with pytest.raises(InputError, match=r"model\.lora must be a loadable model, got 'someone/dpo-unet': Two lines\."):
        with one_line("model.lora", REPO):
            raise OSError("Two\nlines.")


def test_a_connection_that_fails_is_said_so():
    from huggingface_hub.errors import HTTPError

    with pytest.raises(InputError, match="while the hub is out of reach"), one_line("model.path", REPO):
        raise HTTPError("no route")
    assert reading._hub_message("model.path", REPO, ValueError("x")) is None
