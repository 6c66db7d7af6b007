"""Checkpoints in one file: the same model as its pipeline's folder, as start and as arm, for every family.

Files are written in the authors' layout by tests/originals.py and read by Diffusers' own converters.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import diffalign
from diffalign.config import parse
from diffalign.data.prepare import fingerprint
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.evaluate.arms import arm_source, base_source, find_arms
from diffalign.evaluate.sample import export
from diffalign.models.load import ModelSource, detect_family, load_net, load_pipeline
from diffalign.models.single_file import guess_home, is_checkpoint
from tests import originals, worlds
from tests.test_families import config, metrics
from tests.test_kohya import latents

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

WRITE: dict[str, tuple[Callable, Callable]] = {
    "sd": (worlds.sd, originals.sd_file),
    "sd_v": (partial(worlds.sd, prediction="v_prediction"), originals.sd_file),
    "sdxl": (worlds.sdxl, originals.sdxl_file),
    "sdxl_refiner": (worlds.sdxl_refiner, originals.refiner_file),
    "sd3": (partial(worlds.sd3_t5, second=32), originals.sd3_file),
    "flux": (worlds.flux, originals.flux_file),
    "flux_schnell": (worlds.flux_schnell, originals.flux_file),
}
WHOLE = [name for name in WRITE if name != "sdxl_refiner"]
HELD = {
    "sd": {"unet", "vae", "text_encoder"},
    "sdxl": {"unet", "vae", "text_encoder", "text_encoder_2"},
    "sdxl_refiner": {"unet", "vae", "text_encoder_2"},
    "sd3": {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"},
    "flux": {"transformer"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each name a pipeline's folder, its weights in one file, and a folder of its configs alone."""
    root = tmp_path_factory.mktemp("files")
    for name, (build, state_of) in WRITE.items():
        build(root / name)
        if name == "sd3":  # the authors' first CLIP has no projection of its own
            for folder in (root / name / "text_encoder",):
                weights = load_file(folder / "model.safetensors")
                weights["text_projection.weight"] = torch.eye(16)
                save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(state_of(load_pipeline(ModelSource(path=str(root / name)))), root / f"{name}.safetensors")
        held = HELD[detect_family(ModelSource(path=str(root / name))).name]
        shutil.copytree(root / name, root / f"{name}-configs")
        for part in held:
            for file in (root / f"{name}-configs" / part).glob("*.safetensors"):
                file.unlink()
    rows = worlds.preference_rows(8)
    worlds.parquet(root / "pairs.parquet", rows)
    return root


@pytest.fixture(autouse=True)
def _narrow(monkeypatch) -> None:
    from diffusers.loaders import single_file_model

    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    originals.at_width(monkeypatch, mapping["checkpoint_mapping_fn"], 32)


def source(world: Path, name: str) -> ModelSource:
    return ModelSource(path=str(world / f"{name}.safetensors"), config=str(world / f"{name}-configs"))


@pytest.mark.parametrize("name", WRITE)
def test_a_file_is_the_pipeline_that_it_was_made_of_bit_for_bit(world, name):
    folder = ModelSource(path=str(world / name))
    assert detect_family(source(world, name)) == detect_family(folder)
    ours, theirs = load_pipeline(source(world, name)), load_pipeline(folder)
    assert ours.components.keys() == theirs.components.keys()
    for part, module in theirs.components.items():
        assert type(ours.components[part]) is type(module)
        if isinstance(module, nn.Module):
            assert not ours.components[part].training
            weights, found = module.state_dict(), ours.components[part].state_dict()
            assert weights.keys() == found.keys()
            assert all(torch.equal(found[key], weight) for key, weight in weights.items()), part
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)
    if name in WHOLE:
        assert torch.equal(latents(ours), latents(theirs))


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_trains_as_its_pipeline_does_and_its_lora_fits_both(world, tmp_path, name):
    folder = config(world, tmp_path / "folder", name)
    file = config(world, tmp_path / "file", name)
    file["model"] = {"path": str(world / f"{name}.safetensors"), "config": str(world / f"{name}-configs")}
    file["data"]["cache"] = str(tmp_path / "cache")
    for table in (folder, file):
        table["train"]["steps"] = 1
    runs = [diffalign.train(table) for table in (folder, file)]
    assert metrics(runs[1].folder)[0]["err_w"] == metrics(runs[0].folder)[0]["err_w"]
    first, second = (load_file(next(run.export.glob("*.safetensors"))) for run in runs)
    assert all(torch.equal(second[key], weight) for key, weight in first.items())
    arm = arm_source(str(runs[1].folder), ModelSource(path="elsewhere"))
    assert (arm.path, arm.config) == (file["model"]["path"], file["model"]["config"])
    on_file, on_folder = load_pipeline(arm), load_pipeline(ModelSource(path=str(world / name), lora=arm.lora))
    assert torch.equal(latents(on_file), latents(on_folder))
    assert f'from_single_file("{arm.path}", config="{arm.config}")' in (runs[1].export / "README.md").read_text()


def test_a_file_goes_where_a_denoiser_goes(world):
    other = worlds.sd(world / "sd-other", seed=7)
    beside = ModelSource(path=str(other), denoiser=str(world / "sd.safetensors"))
    net, native = load_net(beside, FAMILIES["sd"]), load_pipeline(ModelSource(path=str(world / "sd"))).unet
    assert all(torch.equal(net.state_dict()[key], weight) for key, weight in native.state_dict().items())
    vae = load_pipeline(ModelSource(path=str(other))).vae
    assert torch.equal(
        load_pipeline(beside).vae.state_dict()["quant_conv.weight"], vae.state_dict()["quant_conv.weight"]
    )


def test_text_encoders_and_vae_that_the_file_lacks_come_from_the_config(world, tmp_path):
    state = load_file(world / "sd.safetensors")
    save_file({k: v for k, v in state.items() if k.startswith("model.diffusion_model.")}, tmp_path / "net.safetensors")
    whole = replace(source(world, "sd"), path=str(tmp_path / "net.safetensors"), config=str(world / "sd"))
    assert torch.equal(latents(load_pipeline(whole)), latents(load_pipeline(ModelSource(path=str(world / "sd")))))
    with pytest.raises(
        InputError, match=r"'vae' is not in .*net\.safetensors'; model\.config must hold a \.safetensors"
    ):
        load_pipeline(replace(whole, config=str(world / "sd-configs")), only=("vae",))


def test_a_file_in_half_precision_is_read_into_float32(world, tmp_path):
    state = {name: tensor.half() for name, tensor in load_file(world / "sd.safetensors").items()}
    save_file(state, tmp_path / "half.safetensors")
    pipeline = load_pipeline(replace(source(world, "sd"), path=str(tmp_path / "half.safetensors")))
    native = load_pipeline(ModelSource(path=str(world / "sd")))
    for part in HELD["sd"]:
        weights = pipeline.components[part].state_dict()
        for name, tensor in native.components[part].state_dict().items():
            assert torch.equal(weights[name], tensor.half().float()), name


def test_a_file_becomes_a_pipeline_on_export(world, tmp_path):
    from diffusers import DiffusionPipeline

    export(source(world, "sd"), tmp_path / "pipeline")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(latents(stock), latents(load_pipeline(ModelSource(path=str(world / "sd")))))


# --- arms


def test_a_checkpoint_is_an_arm_with_the_bases_configs_and_a_lora_file_stays_one(world, tmp_path):
    file, base = world / "sd.safetensors", ModelSource(path=str(world / "sd"))
    assert is_checkpoint(str(file))
    assert arm_source(str(file), base) == ModelSource(path=str(file), config=str(world / "sd"))
    alone = source(world, "sd")
    assert arm_source(str(world / "sdxl.safetensors"), alone).config == alone.config
    assert base_source(str(file)) == ModelSource(path=str(file))
    run = diffalign.train(config(world, tmp_path / "run", "sd"))
    lora = next(run.export.glob("*.safetensors"))
    assert not is_checkpoint(str(lora))
    assert arm_source(str(lora), base) == replace(base, lora=str(lora))
    on_file = arm_source(str(lora), alone)
    assert torch.equal(latents(load_pipeline(on_file)), latents(load_pipeline(replace(base, lora=str(lora)))))


def test_what_a_file_is_depends_on_its_weights_and_its_configs(world, tmp_path):
    base = ModelSource(path=str(world / "sd"))
    copy = shutil.copy(world / "sd.safetensors", tmp_path / "copy.safetensors")
    changed = load_file(copy)
    changed["model.diffusion_model.out.2.bias"] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    found = find_arms(base, [str(world / "sd.safetensors"), str(copy), str(tmp_path / "changed.safetensors")])
    digests = [arm.digest() for arm in found]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3
    other = replace(found[1], source=replace(found[1].source, config=str(world / "sd_v-configs")))
    assert other.digest() != digests[1]
    marks = [fingerprint(str(f), None, ("vae",)) for f in (copy, tmp_path / "changed.safetensors")]
    assert marks[0] != marks[1]


# --- refused


def without(name: str) -> Callable[[dict], dict]:
    return lambda state: {k: v for k, v in state.items() if k != name}


SPOILT: dict[str, tuple[Callable[[dict], dict], str]] = {
    "a weight missing": (
        without("model.diffusion_model.out.2.bias"),
        r"model\.path must hold all weights of unet and vae and text_encoder as .*, got .*, which lacks some",
    ),
    "a text encoder's weight missing": (
        without("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        r"model\.path must hold all weights of .*, which lacks some",
    ),
    "another shape": (
        lambda state: {**state, "model.diffusion_model.out.2.bias": torch.zeros(5)},
        r"model\.path must be a loadable model, got .*",
    ),
    "no denoiser": (
        lambda state: {k: v for k, v in state.items() if k.startswith("first_stage_model.")},
        r"model\.path must hold the unet of the family 'sd' in its authors' layout, weights whose names start with 'mo",
    ),
}


@pytest.mark.parametrize("mistake", SPOILT)
def test_a_spoilt_file_is_one_line(world, tmp_path, mistake):
    spoil, message = SPOILT[mistake]
    save_file(spoil(load_file(world / "sd.safetensors")), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(replace(source(world, "sd"), path=str(tmp_path / "x.safetensors")))
    assert "\n" not in str(caught.value)


def test_a_file_of_another_family_or_none_is_one_line(world, tmp_path):
    with pytest.raises(InputError, match="must hold the transformer of the family 'sd3'"):
        load_pipeline(replace(source(world, "sd"), config=str(world / "sd3")))
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"model\.path must be a loadable model"):
        load_pipeline(replace(source(world, "sd"), path=str(tmp_path / "x.safetensors")))
    worlds.pixart(tmp_path / "pixart")
    with pytest.raises(InputError, match="family 'pixart_sigma', which has no layout of a single file"):
        load_pipeline(replace(source(world, "sd"), config=str(tmp_path / "pixart")))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "no.safetensors"}, r"model\.path must be a folder, a hub id or a \.safetensors file that is there"),
        (
            {"path": "{sd}.safetensors", "config": "{sd}/unet"},
            r"model\.config must be the folder of a Diffusers pipeline",
        ),
        (
            {"path": "{sd}", "config": "{sd}"},
            r"model\.config must be left out unless model\.path is a \.safetensors file",
        ),
        ({"path": "{sd}.ckpt"}, r"model\.path must be safetensors weights, got the pickle checkpoint"),
    ],
)
def test_a_wrong_source_is_one_line(world, tmp_path, model, message):
    table = config(world, tmp_path / "run", "sd")
    table["model"] = {key: value.format(sd=world / "sd") for key, value in model.items()}
    with pytest.raises(InputError, match=message) as caught:
        detect_family(parse(table).model)
    assert "\n" not in str(caught.value)


def test_without_a_config_the_published_pipeline_of_the_layout_is_asked_for(world, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    layer = "conditioner.embedders.1.model.transformer.resblocks.9"
    marks = {
        "stabilityai/stable-diffusion-xl-base-1.0": f"{layer}.mlp.c_proj.bias",
        "black-forest-labs/FLUX.1-dev": "double_blocks.0.img_attn.norm.key_norm.scale",
    }
    for home, mark in marks.items():
        extra = {"guidance_in.in_layer.bias": torch.zeros(1), "img_in.weight": torch.zeros(1, 64)}
        save_file({mark: torch.zeros(1), **extra}, tmp_path / "x.safetensors")
        assert guess_home(str(tmp_path / "x.safetensors")) == home
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda path, **kw: asked.append(path) or {})
    with pytest.raises(InputError, match="must be a pipeline of a known family"):
        detect_family(ModelSource(path=str(world / "sd.safetensors")))
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]


def test_a_plan_needs_the_configs_of_a_file_alone(world, tmp_path):
    from diffalign.plan import plan

    table = config(world, tmp_path / "run", "sd")
    table["model"] = {"path": str(world / "sd.safetensors"), "config": str(world / "sd-configs")}
    found = plan(parse(table))
    unet = load_pipeline(ModelSource(path=str(world / "sd"))).unet
    assert found.family == "sd"
    assert found.rehearsal.parameters == sum(p.numel() for p in unet.parameters())
