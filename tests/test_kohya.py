"""LoRAs for other programs: what a reader of kohya's or PEFT's form adds to the weights is what was trained."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffalign import cli
from diffalign.denoisers import FAMILIES
from diffalign.denoisers.flux import to_kohya as flux_to_kohya
from diffalign.denoisers.kohya import Adapter
from diffalign.errors import InputError
from diffalign.evaluate.sample import export
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.models.lora import LoraSettings, adapter_layers, fuse
from diffalign.models.policy import load_policy
from diffalign.models.save import export_lora, trainable
from tests import originals, worlds
from tests.test_families import TEXTS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
        "time_emb_proj", "conv_shortcut")  # fmt: skip
FLUX_LINEAR = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
               "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
               "ff_context.net.2", "norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out",
               "x_embedder", "context_embedder", "linear_1", "linear_2", "norm_out.linear")  # fmt: skip
FLUX_BLOCKS = (*FLUX_LINEAR[:12], "norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp",
               "single_transformer_blocks.0.proj_out")  # fmt: skip
"""What Diffusers' reader puts into the transformer: it loses the rest for lack of a prefix."""
SD3_LINEAR = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
              "attn.add_v_proj", "attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
              "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
              "norm1_context.linear", "proj_out", "norm_out.linear", "context_embedder", "linear_1", "linear_2",
              "pos_embed.proj")  # fmt: skip
BUILD = {
    "sd": worlds.sd,
    "sd_v": partial(worlds.sd, prediction="v_prediction"),
    "sdxl": worlds.sdxl,
    "sdxl_refiner": worlds.sdxl_refiner,
    "sd3": worlds.sd3,
    "sd35": partial(worlds.sd3, dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux": worlds.flux,
    "pixart": worlds.pixart,
    "dit": worlds.dit,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kohya")
    for name, build in BUILD.items():
        build(root / name)
    return root


def trained(world: Path, folder: Path, name: str, targets: tuple[str, ...] | None = None) -> ModelSource:
    """A LoRA of rank 4 and alpha 6 with something to say, exported as a run exports it."""
    source = ModelSource(path=str(world / name))
    family = detect_family(source)
    settings = LoraSettings(rank=4, alpha=6.0, targets=targets)
    net = load_policy(source, family, None, lora=settings, seed=0).net
    rng = torch.Generator().manual_seed(1)
    for parameter in trainable(net).values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng)
    export_lora(net, family, folder)
    return replace(source, lora=str(folder))


def latents(pipeline) -> torch.Tensor:
    family = next(f for f in FAMILIES.values() if type(pipeline).__name__ in f.pipelines)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return family.sample(pipeline, TEXTS, x, steps=3, guidance=2.0, decoded=False)


def kohya(source: ModelSource, folder: Path) -> Path:
    file = folder / "kohya.safetensors"
    export(source, file, "kohya")
    return file


def flux_reader(monkeypatch) -> None:
    from diffusers.loaders import lora_conversion_utils

    originals.at_width(monkeypatch, lora_conversion_utils._convert_kohya_flux_lora_to_diffusers, 32)


# --- what Diffusers reads


@pytest.mark.parametrize("targets", [None, "wide"])
@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl", "flux"])
def test_a_kohya_file_in_the_stock_pipeline_gives_the_latents_of_our_export(
    world, tmp_path, monkeypatch, name, targets
):
    flux_reader(monkeypatch)
    wide = FLUX_BLOCKS if name == "flux" else UNET
    source = trained(world, tmp_path / "lora", name, None if targets is None else wide)
    file = kohya(source, tmp_path)
    stock = load_pipeline(ModelSource(path=source.path))
    base = latents(stock)
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    ours = latents(load_pipeline(source))
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(latents(stock), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_a_kohya_file_is_a_start_and_an_arm_of_ours_too(world, tmp_path, monkeypatch, name):
    flux_reader(monkeypatch)
    source = trained(world, tmp_path / "lora", name)
    again = replace(source, lora=str(kohya(source, tmp_path)))
    torch.testing.assert_close(latents(load_pipeline(again)), latents(load_pipeline(source)), atol=1e-5, rtol=0)
    family = detect_family(source)
    config = load_policy(again, family, None, lora=LoraSettings(rank=4), seed=0).net.peft_config["default"]
    assert config.r == 4


def test_the_refiners_lora_is_read_back_too(world, tmp_path):
    source = trained(world, tmp_path / "lora", "sdxl_refiner", UNET)
    file = kohya(source, tmp_path)
    ours, theirs = load_pipeline(source).unet, load_pipeline(replace(source, lora=str(file))).unet
    for net in (ours, theirs):
        fuse(net)
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_alpha_is_that_of_the_adapter_and_three_times_it_where_three_are_one(world, tmp_path, name):
    state = load_file(kohya(trained(world, tmp_path / "lora", name), tmp_path))
    stems = {key.split(".")[0] for key in state}
    assert all(stem.startswith("lora_unet_") for stem in stems)
    assert len(state) == 3 * len(stems)
    for stem in stems:
        joined = 3 if stem.endswith(("qkv", "linear1")) else 1
        assert state[f"{stem}.alpha"].item() == 6.0 * joined
        assert state[f"{stem}.lora_down.weight"].shape[0] == state[f"{stem}.lora_up.weight"].shape[1] == 4 * joined


def test_flux_at_its_true_width_is_read_back_module_by_module():
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    linears = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    rng = torch.Generator().manual_seed(0)
    adapters = {
        name: Adapter(
            down=torch.randn(2, m.in_features, generator=rng),
            up=torch.randn(m.out_features, 2, generator=rng),
            scale=1.5,
        )
        for name, m in linears.items()
    }
    for left in ([], ["single_transformer_blocks.0.attn.to_k"], ["single_transformer_blocks.0.proj_mlp"]):
        some = {name: adapter for name, adapter in adapters.items() if name not in left}
        back = FluxPipeline.lora_state_dict(flux_to_kohya(net, some))
        for name, module in linears.items():
            x = torch.randn(module.in_features, generator=rng)
            key = f"transformer.{name}" if f"transformer.{name}.lora_A.weight" in back else name
            down, up = (back[f"{key}.lora_{m}.weight"] for m in "AB")
            expected = 1.5 * (adapters[name].up @ (adapters[name].down @ x)) if name in some else torch.zeros(len(up))
            torch.testing.assert_close(up @ (down @ x), expected, atol=1e-3, rtol=1e-5)  # values of some hundreds


# --- what it does not read: the authors' layout with the file added to it, through Diffusers' own converter


@pytest.mark.parametrize("name", ["sd3", "sd35"])
@pytest.mark.parametrize("targets", [None, "wide"])
def test_sd3s_file_on_the_authors_weights_is_our_export_on_diffusers(world, tmp_path, name, targets):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    wide = tuple(t for t in SD3_LINEAR if name == "sd35" or not t.startswith("attn2"))
    source = trained(world, tmp_path / "lora", name, None if targets is None else wide)
    stock, ours = load_pipeline(ModelSource(path=source.path)), load_pipeline(source)
    expected = latents(ours)
    assert (latents(stock) - expected).abs().max() > 1e-3
    merged = merge(originals.sd3(stock.transformer), load_file(kohya(source, tmp_path)))
    stock.transformer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(merged))
    torch.testing.assert_close(latents(stock), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [None, "wide"])
def test_fluxs_file_on_the_authors_weights_is_our_export_on_diffusers(world, tmp_path, monkeypatch, targets):
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    originals.at_width(monkeypatch, convert, 32)
    source = trained(world, tmp_path / "lora", "flux", None if targets is None else FLUX_LINEAR)
    stock, ours = load_pipeline(ModelSource(path=source.path)), load_pipeline(source)
    merged = merge(originals.flux(stock.transformer), load_file(kohya(source, tmp_path)))
    stock.transformer.load_state_dict(convert(merged))
    torch.testing.assert_close(latents(stock), latents(ours), atol=1e-5, rtol=0)


def merge(weights: dict, lora: dict) -> dict:
    """What every program that reads kohya's form does."""
    names = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_"): name for name in weights}
    for stem in {key.split(".")[0] for key in lora}:
        down, up = lora[f"{stem}.lora_down.weight"], lora[f"{stem}.lora_up.weight"]
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weights[names[stem]].shape)
        weights[names[stem]] = weights[names[stem]] + lora[f"{stem}.alpha"] / len(down) * delta
    return weights


def test_parts_of_other_ranks_and_scales_and_parts_without_a_lora_keep_their_change():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)

    def adapter(rank: int, scale: float) -> Adapter:
        return Adapter(down=torch.randn(rank, 16, generator=rng), up=torch.randn(16, rank, generator=rng), scale=scale)

    q, v = adapter(2, 0.5), adapter(3, 2.0)
    names = {"transformer_blocks.0.attn.to_q": q, "transformer_blocks.0.attn.to_v": v}
    state = FAMILIES["sd3"].to_kohya(net, names)
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert state.keys() == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    delta = state[f"{stem}.alpha"] / 5 * state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
    expected = torch.cat([0.5 * q.up @ q.down, torch.zeros(16, 16), 2.0 * v.up @ v.down])
    torch.testing.assert_close(delta, expected)


# --- PEFT's form


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "dit"])
def test_pefts_own_reader_gives_our_weights_from_a_peft_folder(world, tmp_path, name):
    from peft import PeftModel

    source = trained(world, tmp_path / "lora", name)
    export(source, tmp_path / "peft", "peft")
    assert {f.name for f in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    family = detect_family(source)
    part = family.net
    plain = load_pipeline(ModelSource(path=source.path), only=(part,)).components[part]
    theirs = PeftModel.from_pretrained(plain, tmp_path / "peft").merge_and_unload().state_dict()
    ours = load_pipeline(source, only=(part,)).components[part]
    fuse(ours)
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(theirs[key], weight) for key, weight in ours.state_dict().items())


# --- refused


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_pixart_and_dit_have_no_kohya_form(world, tmp_path, name):
    source = trained(world, tmp_path / "lora", name)
    with pytest.raises(InputError, match=r"format must be 'peft' with the family '\w+', .* got 'kohya'"):
        export(source, tmp_path / "x.safetensors", "kohya")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("out", "form", "message"),
    [
        ("x", "koyha", "must be one of diffusers, kohya, peft, got 'koyha'; did you mean 'kohya'"),
        ("x", "kohya", "must be a .safetensors file with the format 'kohya'"),
        ("x.safetensors", "peft", "must be a folder with the format 'peft'"),
        ("x.safetensors", "kohya", "got whole weights"),
        ("there", "diffusers", "must be new, got"),
    ],
)
def test_a_wrong_export_is_one_line(world, tmp_path, out, form, message):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        export(ModelSource(path=str(world / "sd")), tmp_path / out, form)
    assert "\n" not in str(caught.value)


def test_a_module_without_a_name_in_kohyas_form_is_named(world, tmp_path):
    source = trained(world, tmp_path / "lora", "flux", ("attn.to_q",))
    net = load_pipeline(source).transformer
    name = next(n for n, m in net.named_modules() if m in adapter_layers(net))
    odd = {re.sub(r"to_q", "to_other", name): Adapter(down=torch.ones(1, 1), up=torch.ones(1, 1), scale=1.0)}
    with pytest.raises(
        InputError, match=r"that kohya files have a name for, got 'transformer_blocks\.0\.attn\.to_other'"
    ):
        FAMILIES["flux"].to_kohya(net, odd)


def test_a_dora_has_no_kohya_form(world, tmp_path):
    from peft import LoraConfig

    source = ModelSource(path=str(world / "sd"))
    net = load_pipeline(source).unet
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), adapter_name="default")
    from diffalign.models.save import export_kohya

    with pytest.raises(InputError, match="must have a down and an up matrix and no more for kohya's form, got 'down_"):
        export_kohya(net, FAMILIES["sd"], tmp_path / "x.safetensors")


def test_a_lora_that_adapts_nothing_is_refused_not_ignored(world, tmp_path):
    source = trained(world, tmp_path / "lora", "sd3")
    file = kohya(source, tmp_path)
    with pytest.raises(InputError, match=r"in a form that Diffusers reads for the family 'sd3', .* adapts nothing"):
        load_pipeline(replace(source, lora=str(file)))
    save_file({"transformer.lora_of_nothing": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"model\.lora must be"):
        load_pipeline(replace(source, lora=str(tmp_path / "odd.safetensors")))


def test_the_command_exports_a_lora_on_its_base(world, tmp_path):
    source = trained(world, tmp_path / "lora", "sd")
    words = ["export", source.lora, "--base", source.path, "--format", "kohya", "--out", tmp_path / "k.safetensors"]
    cli.app([str(word) for word in words], standalone_mode=False)
    assert load_file(tmp_path / "k.safetensors").keys() == load_file(kohya(source, tmp_path)).keys()
