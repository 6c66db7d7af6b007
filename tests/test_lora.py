"""LoRA and the reference it gives: exactness, restoration, and an export that keeps its alpha."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from diffalign import _torchvision
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.models.lora import LoraSettings, adapter_layers, switched
from diffalign.models.policy import load_policy, make_reference
from diffalign.models.save import export_lora, trainable
from diffalign.rng import SampleRng
from diffalign.types import Cond, PairBatch
from tests import worlds

RNG = SampleRng(0, (0, 1))
NAMES = ("sd", "sd3")
"""Every other family takes the same roads in test_families."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"sd": worlds.sd(root / "sd"), "sd3": worlds.sd3(root / "sd3")}


def policy(folder, *, rank=4, alpha=None, full=False):
    source = ModelSource(path=str(folder))
    lora = None if full else LoraSettings(rank=rank, alpha=alpha)
    return load_policy(source, detect_family(source), None, lora=lora, seed=0)


def batch(name: str) -> PairBatch:
    rng = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (2, 24, 16)}
    if name == "sd3":
        shapes = {"prompt_embeds": (2, 48, 32), "pooled_prompt_embeds": (2, 32)}
    return PairBatch(
        x_w=torch.randn(2, 4, 8, 8, generator=rng),
        x_l=torch.randn(2, 4, 8, 8, generator=rng),
        cond=Cond({k: torch.randn(s, generator=rng) for k, s in shapes.items()}),
        samples=(0, 1),
    )


def grow(net) -> None:
    """Gives the adapter something to say."""
    rng = torch.Generator().manual_seed(1)
    for parameter in trainable(net).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_changes_nothing(folders, name):
    trained = policy(folders[name])
    out = DiffusionDPO()(trained, make_reference(trained, adapted=True).denoiser, batch(name), RNG)
    assert (out.metrics["rewards/margins"] == 0).all()
    assert out.metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_with_the_adapter_off_is_the_base_exactly(folders, name):
    trained, base = policy(folders[name]), policy(folders[name], full=True)
    grow(trained.net)
    reference = make_reference(trained, adapted=True).denoiser
    b, t = batch(name), trained.path.sample_t(RNG)
    assert torch.equal(reference(b.x_w, t, b.cond), base(b.x_w, t, b.cond))
    assert not torch.equal(trained(b.x_w, t, b.cond), base(b.x_w, t, b.cond))


def test_only_the_adapter_gets_a_gradient(folders):
    trained = policy(folders["sd"])
    reference = make_reference(trained, adapted=True).denoiser
    DiffusionDPO()(trained, reference, batch("sd"), RNG).loss.sum().backward()
    with_gradient = {n for n, p in trained.net.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable(trained.net))
    assert all("lora_" in n for n in with_gradient)


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_as_before_after_the_reference_ran_even_if_it_failed(folders, fails):
    trained = policy(folders["sd"])
    flags = {n: p.requires_grad for n, p in trained.net.named_parameters()}
    layers = adapter_layers(trained.net)
    state = [(x._disable_adapters, list(x.active_adapters)) for x in layers]
    with pytest.raises(RuntimeError) if fails else _nothing(), switched(layers, None):
        assert all(x.disable_adapters for x in layers)
        if fails:
            raise RuntimeError
    assert [(x._disable_adapters, list(x.active_adapters)) for x in layers] == state
    assert {n: p.requires_grad for n, p in trained.net.named_parameters()} == flags


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_full_policy_gets_a_frozen_copy_as_reference(folders):
    trained = policy(folders["sd"], full=True)
    reference = make_reference(trained, adapted=False).denoiser
    assert not any(p.requires_grad for p in reference.net.parameters())
    DiffusionDPO()(trained, reference, batch("sd"), RNG).loss.sum().backward()
    assert all(p.grad is None for p in reference.net.parameters())
    with torch.no_grad():
        next(trained.net.parameters()).add_(1)
    assert not torch.equal(next(trained.net.parameters()), next(reference.net.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_an_export_in_a_plain_pipeline_is_the_trained_model_bit_for_bit(folders, tmp_path, name, alpha):
    trained = policy(folders[name], rank=4, alpha=alpha)
    grow(trained.net)
    export_lora(trained.net, FAMILIES[name], tmp_path / "export")
    in_memory = load_pipeline(ModelSource(path=str(folders[name])), net=trained.net)
    again = load_pipeline(ModelSource(path=str(folders[name]), lora=str(tmp_path / "export")))
    assert torch.equal(image(in_memory), image(again))


def image(pipeline) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=rng, output_type="pt").images


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_new_process_that_knows_only_diffusers_gives_the_same_image(folders, tmp_path, name):
    trained = policy(folders[name], rank=4, alpha=8.0)
    grow(trained.net)
    export_lora(trained.net, FAMILIES[name], tmp_path / "export")
    here = image(load_pipeline(ModelSource(path=str(folders[name])), net=trained.net))
    parts = "text_encoder_3=None, tokenizer_3=None" if name == "sd3" else ""
    code = f"""
import runpy, sys, torch
shim = runpy.run_path({_torchvision.__file__!r})  # a torchvision for CUDA beside CPU torch breaks diffusers by itself
shim["declare_missing_operators"]()
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads({torch.get_num_threads()})
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], {parts})
pipeline.load_lora_weights(sys.argv[2])
rng = torch.Generator().manual_seed(0)
images = pipeline("a red circle", num_inference_steps=2, generator=rng, output_type="pt").images
save_file({{"images": images}}, sys.argv[3])
assert "diffalign" not in sys.modules
"""
    from safetensors.torch import load_file

    arguments = [str(folders[name]), str(tmp_path / "export"), str(tmp_path / "there.safetensors")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "there.safetensors")["images"], here)


def test_the_export_carries_rank_and_alpha(folders, tmp_path):
    from safetensors import safe_open

    trained = policy(folders["sd"], rank=4, alpha=8.0)
    export_lora(trained.net, FAMILIES["sd"], tmp_path / "export")
    with safe_open(tmp_path / "export" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == 8.0
    assert metadata["unet.r"] == 4


def test_a_target_that_matches_no_module_is_named(folders):
    source = ModelSource(path=str(folders["sd"]))
    with pytest.raises(InputError, match=r"lora.targets must name modules .*'to_x'"):
        load_policy(source, FAMILIES["sd"], None, lora=LoraSettings(targets=("to_q", "to_x")), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(rank=8), r"must equal those of model.lora \(4, 8"),
        (LoraSettings(rank=4, alpha=2.0), r"must equal"),
    ],
)
def test_a_start_from_a_lora_of_another_shape_is_refused(folders, tmp_path, settings, message):
    trained = policy(folders["sd"], rank=4, alpha=8.0)
    export_lora(trained.net, FAMILIES["sd"], tmp_path / "export")
    source = ModelSource(path=str(folders["sd"]), lora=str(tmp_path / "export"))
    with pytest.raises(InputError, match=message):
        load_policy(source, FAMILIES["sd"], None, lora=settings, seed=0)


def test_a_lora_on_the_text_encoder_is_not_a_start(folders, tmp_path):
    save_file({"text_encoder.x.lora_A.weight": torch.zeros(4, 16)}, tmp_path / "lora.safetensors")
    source = ModelSource(path=str(folders["sd"]), lora=str(tmp_path / "lora.safetensors"))
    with pytest.raises(InputError, match=r"model\.lora must adapt the denoiser only"):
        load_policy(source, FAMILIES["sd"], None, lora=LoraSettings(rank=4), seed=0)


def test_a_start_from_a_lora_has_the_sum_of_base_and_lora_as_reference(folders, tmp_path):
    first = policy(folders["sd"], rank=4, alpha=8.0)
    grow(first.net)
    export_lora(first.net, FAMILIES["sd"], tmp_path / "export")
    source = ModelSource(path=str(folders["sd"]), lora=str(tmp_path / "export"))
    second = load_policy(source, FAMILIES["sd"], None, lora=LoraSettings(rank=4), seed=0)
    reference = make_reference(second, adapted=True).denoiser
    b, t = batch("sd"), second.path.sample_t(RNG)
    expected = first(b.x_w, t, b.cond)
    assert torch.equal(reference(b.x_w, t, b.cond), expected)
    grow(second.net)
    assert torch.equal(reference(b.x_w, t, b.cond), expected)
    assert not torch.equal(second(b.x_w, t, b.cond), expected)
    assert len(trainable(second.net)) == len(trainable(first.net))


def test_replacing_the_network_keeps_path_and_prediction(folders):
    trained = policy(folders["sd"])
    other = replace(trained, net=torch.nn.Identity())
    assert (other.path, other.prediction) == (trained.path, trained.prediction)
