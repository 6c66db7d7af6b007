"""Attention kernels by name: what works here is found by running it, and what does not says why in one line."""

import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from diffalign import attention, cli
from diffalign.attention import NAMES, Trial, choose, fastest, head_dims, install, missing, trial, used
from diffalign.config import parse
from diffalign.errors import InputError
from diffalign.train import run
from tests import worlds
from tests.builders import tiny_sd_pipeline
from tests.test_train import config

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def unet():
    return tiny_sd_pipeline().unet


def shape(name, **sizes):
    """A network of the true class with the head dimensions of the published one, on the meta device."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name)(**sizes)


def test_head_dimensions_are_those_of_the_published_models():
    unet = shape("UNet2DConditionModel", sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert head_dims(unet) == attention.HEAD_DIMS["sd"]
    assert head_dims(shape("SD3Transformer2DModel", num_layers=2)) == attention.HEAD_DIMS["sd3"]


@pytest.mark.parametrize("dtype", attention.DTYPES)
def test_sdpa_works_on_a_cpu_in_every_type(dtype):
    found = trial("sdpa", 40, dtype, CPU)
    assert found.seconds is not None
    assert found.seconds > 0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("auto", "sdpa")])
def test_every_other_kernel_says_why_it_does_not_run_on_a_cpu(unet, name):
    assert trial(name, 40, "fp32", CPU).reason == "it needs a CUDA GPU, and this is a CPU"
    with pytest.raises(InputError, match=f"got '{name}': it needs a CUDA GPU, and this is a CPU"):
        choose(name, unet, "fp32", CPU)


def test_auto_is_sdpa_on_a_cpu_and_the_fastest_whole_one_elsewhere(unet):
    assert choose("auto", unet, "fp32", CPU) == "sdpa"

    def of(name, head_dim, seconds):
        return Trial(name=name, head_dim=head_dim, dtype="fp16", seconds=seconds)

    trials = [of("sdpa", 40, 3.0), of("sdpa", 160, 3.0), of("flash", 40, 1.0), of("flash", 160, None)]
    assert fastest(trials) == "sdpa"
    assert fastest([*trials, of("cudnn", 40, 4.0), of("cudnn", 160, 1.5)]) == "cudnn"


def test_a_kernel_that_cannot_do_a_head_dimension_is_one_line(unet, monkeypatch):
    monkeypatch.setattr(
        attention,
        "trial",
        lambda name, d, dtype, device: Trial(name=name, head_dim=d, dtype=dtype, seconds=None, reason="d must be 8n"),
    )
    monkeypatch.setattr(attention, "missing", lambda name, device: None)
    with pytest.raises(InputError, match="got 'flash' for heads of 4 in fp16: d must be 8n; "):
        choose("flash", shape("UNet2DConditionModel", **dict(unet.config) | {"attention_head_dim": 4}), "fp16", CUDA)


def test_a_package_that_is_missing_or_built_for_another_torch_is_named(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert missing("xformers", CUDA) == "the package 'xformers' is missing; pip install 'diffalign[xformers]'"
    assert missing("flash3", CUDA) == "the package 'flash_attn_interface' is missing"
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(_has_cpp_library=False))
    monkeypatch.setattr(attention.metadata, "version", lambda name: "0.0.35")
    assert f"xformers 0.0.35 is built for another torch than {torch.__version__}" in missing("xformers", CUDA)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(_has_cpp_library=True))
    assert missing("xformers", CUDA) is None


def test_a_kernel_alone_is_alone_inside_and_nowhere_else():
    flags = torch.backends.cuda
    before = (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled())
    with used("flash"):
        assert (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled()) == (
            True,
            False,
            False,
        )
    assert (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled()) == before
    with used("sdpa"):
        assert flags.math_sdp_enabled()


def test_a_unet_does_not_take_flash3(unet):
    with pytest.raises(InputError, match="a kernel that a U-Net takes, got 'flash3'"):
        install(unet, "flash3")
    install(unet, "cudnn")


def test_an_unknown_kernel_is_an_error(unet):
    with pytest.raises(InputError, match="must be one of auto, sdpa, flash"):
        choose("fast", unet, "fp32", CPU)


def test_a_run_records_what_auto_chose(tmp_path):
    worlds.sd(tmp_path / "sd")
    worlds.parquet(tmp_path / "pairs.parquet", worlds.preference_rows(8))
    table = config(tmp_path, tmp_path / "run")
    table["train"] = {**table["train"], "steps": 1, "attention": "auto"}
    run(parse(table))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["attention"] == "sdpa"


def test_env_says_what_works_here():
    found = CliRunner().invoke(cli.app, ["env"]).output
    assert "attention flash" in found
    assert "it needs a CUDA GPU" in " ".join(found.split())
