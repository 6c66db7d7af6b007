"""A frozen network in 8 or 4 bits: what is rounded, what it costs, and that training on it is training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign import environment, recompute
from diffalign.bare import bare_net, encoding
from diffalign.checks import reference_kind
from diffalign.config import load, parse
from diffalign.counting import saved_bytes
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.fixed_draws import digest_of
from diffalign.leaner import leaner
from diffalign.methods import METHODS
from diffalign.models.load import ModelSource, detect_family, load_net, load_scheduler_config, pipeline_index
from diffalign.models.lora import LoraSettings
from diffalign.models.policy import cast_frozen, load_policy, make_reference
from diffalign.models.quantized import (
    Rounding,
    round_weights,
    rounded_linears,
    scales,
    stored_bytes,
    swap_linears,
    swapped_layers,
)
from diffalign.models.save import export_lora, trainable
from diffalign.placing import make_accelerator, place_net
from diffalign.rehearsal import rehearse
from diffalign.rng import SampleRng
from diffalign.types import Cond, PairBatch
from diffalign.workload import evaluations
from tests import worlds
from tests.test_lora import grow
from tests.test_plan import check_memory
from tests.test_train import config, metrics, reloaded, same, weights

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
BITS = ("8bit", "4bit")
NETS = ("sd", "sd3", "pixart", "flux", "dit")
BOUND = {"8bit": 0.02, "4bit": 0.2}
"""Relative error of a prediction; a single layer of normal weights is off by 0.004 to 0.01 and by 0.09."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    for name in NETS:
        getattr(worlds, name)(root / name)
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(12))
    return root


def rounding(bits: str, dtype: torch.dtype = torch.float32) -> Rounding:
    return Rounding(bits=bits, dtype=dtype, device=CPU)


def policy_of(world: Path, name: str, bits: str | None, dtype: torch.dtype = torch.float32, **source):
    """A policy with a LoRA that changes nothing yet, its frozen weights rounded."""
    where = ModelSource(path=str(world / name), **source)
    how = None if bits is None else rounding(bits, dtype)
    policy = load_policy(where, detect_family(where), None, lora=LoraSettings(rank=4, alpha=8.0), seed=0, rounding=how)
    round_weights(policy.net, CPU)
    return policy


def pairs_for(policy, world: Path, name: str) -> PairBatch:
    from diffalign.data.prepare import Encoders

    source = ModelSource(path=str(world / name))
    family = detect_family(source)
    words = ["red", "blue"] if name == "dit" else ["a red circle", "a blue square"]
    cond = Encoders(source, family, CPU).prompts(words)
    made = torch.Generator().manual_seed(3)
    x_w, x_l = (torch.randn(2, 4, 8, 8, generator=made) for _ in range(2))
    return PairBatch(x_w=x_w, x_l=x_l, cond=Cond(dict(cond.tensors)), samples=(0, 1))


def predicted(policy, batch: PairBatch) -> torch.Tensor:
    t = policy.path.sample_t(SampleRng(0, (0, 1)))
    return policy(batch.x_w, t, batch.cond)


@pytest.mark.parametrize("name", NETS)
def test_linear_layers_of_transformer_blocks_are_rounded_and_nothing_else(world, name):
    policy = policy_of(world, name, "4bit")
    kinds = {m: type(m).__name__ for m in swapped_layers(policy.net)}
    names = {n for n, m in policy.net.named_modules() if m in kinds}
    assert set(kinds.values()) == {"Linear4bit"}
    assert all("transformer_blocks." in n for n in names)
    ends = {
        "sd": {"attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2"},
        "sd3": {"attn.to_q", "attn.add_k_proj", "attn.to_add_out", "ff.net.2", "ff_context.net.2", "norm1.linear"},
        "pixart": {"attn1.to_q", "attn2.to_v", "ff.net.0.proj", "ff.net.2"},
        "flux": {"attn.to_q", "attn.add_q_proj", "ff.net.2", "norm.linear", "proj_mlp", "proj_out"},
        "dit": {"attn1.to_q", "ff.net.2", "norm1.linear"},
    }[name]
    bare = {n.removesuffix(".base_layer") for n in names}
    assert all(any(n.endswith("." + end) for n in bare) for end in ends)
    kept = ("time_emb", "timestep_embedder", "text_embedder", "caption_projection", "pos_embed", "context_embedder",
            "x_embedder", "norm_out", "proj_in", "conv", "class_embedder", "adaln_single")  # fmt: skip
    assert not any(word in n for n in names for word in kept)
    top = {"sd": "conv_out", "sd3": "proj_out", "pixart": "proj_out", "flux": "proj_out", "dit": "proj_out_2"}[name]
    assert type(getattr(policy.net, top)) in (torch.nn.Linear, torch.nn.Conv2d)
    source = ModelSource(path=str(world / name))
    assert set(rounded_linears(load_net(source, detect_family(source)))) == bare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["sd", "sd3", "pixart"])
def test_predictions_are_near_those_of_whole_weights_and_equal_to_the_reference(world, name, bits, dtype):
    policy, whole = policy_of(world, name, bits, dtype), policy_of(world, name, None)
    batch = pairs_for(policy, world, name)
    reference = make_reference(policy, adapted=True).denoiser
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        pred = predicted(policy, batch)
        assert pred.requires_grad
        assert torch.equal(pred.detach(), reference(batch.x_w, policy.path.sample_t(SampleRng(0, (0, 1))), batch.cond))
        loss = METHODS["diffusion_dpo"](beta=5000.0)(policy, reference, batch, SampleRng(0, (0, 1)))
    assert loss.metrics["rewards/margins"].abs().max() == 0
    with torch.no_grad():
        exact = predicted(whole, batch)
    error = float((pred.detach() - exact).norm() / exact.norm())
    print(f"{name} {bits} {dtype}: {error:.4f}")
    assert 0 < error < BOUND[bits] + (0.01 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["sd", "sd3", "pixart"])
def test_the_adapter_learns_and_what_is_under_it_stays(world, name, bits):
    policy = policy_of(world, name, bits)
    batch = pairs_for(policy, world, name)
    frozen = {n: p.detach().clone() for n, p in policy.net.named_parameters() if not p.requires_grad}
    levels = [s.clone() for s in scales(policy.net)]
    parameters = trainable(policy.net)
    assert all(".lora_" in n and p.dtype == torch.float32 for n, p in parameters.items())
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-2)
    reference = make_reference(policy, adapted=True).denoiser
    method, losses = METHODS["diffusion_dpo"](beta=100.0), []
    for _ in range(3):
        out = method(policy, reference, batch, SampleRng(0, (0, 1)))
        out.loss.mean().backward()
        losses.append(float(out.loss.mean().detach()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert losses[2] < losses[1] < losses[0]
    after = dict(policy.net.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    assert all(torch.equal(a, b) for a, b in zip(scales(policy.net), levels, strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("model", ["sd", "sd3", "pixart"])
def test_a_run_trains_resumes_bit_for_bit_and_exports_for_whole_weights(world, tmp_path, model, bits):
    train = {"quantize": bits, "precision": "bf16" if model == "sd3" else "no"}
    whole = diffalign.train(config(world, tmp_path / "whole", model=model, train={**train, "steps": 4}))
    half = config(world, tmp_path / "half", model=model, train={**train, "steps": 2})
    diffalign.train(half)
    half["train"]["steps"], half["resume"] = 4, "latest"
    again = diffalign.train(half)
    assert same(weights(whole.folder, 4), weights(again.folder, 4))
    assert metrics(whole.folder) == metrics(again.folder)
    assert metrics(whole.folder)[0]["rewards/margins"] == 0
    assert metrics(whole.folder)[1]["rewards/margins"] != 0
    assert "bitsandbytes" in json.loads((whole.folder / "environment.json").read_text())
    if model != "pixart":  # whose export plain Diffusers has no loader for
        before, after = reloaded(world / model, None), reloaded(world / model, whole.export)
        assert torch.isfinite(after).all()
        assert (before - after).abs().max() > 0
        return
    from diffalign.models.load import load_pipeline

    source = ModelSource(path=str(world / model), lora=str(whole.export))
    net = load_pipeline(source).transformer
    assert not swapped_layers(net)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_a_second_lora_and_a_moving_reference_live_on_rounded_weights(world, tmp_path, bits):
    first, lora = policy_of(world, "sd", None), tmp_path / "lora"
    for number, parameter in enumerate(trainable(first.net).values()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    export_lora(first.net, FAMILIES["sd"], lora)
    policy = policy_of(world, "sd", bits, lora=str(lora))
    reference = make_reference(policy, adapted=True, moves=True)
    batch = pairs_for(policy, world, "sd")
    t = policy.path.sample_t(SampleRng(0, (0, 1)))
    off = make_reference(policy_of(world, "sd", bits), adapted=True).denoiser(batch.x_w, t, batch.cond)
    assert torch.equal(predicted(policy, batch).detach(), reference.denoiser(batch.x_w, t, batch.cond))
    assert not torch.equal(predicted(policy, batch).detach(), off)
    assert reference.parameters.keys() == trainable(policy.net).keys()


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart"])
@pytest.mark.parametrize("bits", BITS)
def test_a_plan_counts_the_bytes_that_are_there(world, name, bits):
    table = config(world, Path("nowhere"), model=name, train={"quantize": bits})
    cfg = parse(table)
    family = detect_family(cfg.model)
    policy = policy_of(world, name, bits)
    net = place_net(policy.net, cfg, make_accelerator(cfg), adapted=True)
    there = [p for n, p in net.named_parameters() if ".lora_" not in n]
    real = sum(t.nbytes for t in (*there, *net.buffers(), *scales(net)))
    inputs = encoding(cfg, family, pipeline_index(cfg.model, weights=False))
    shell = family.make_denoiser(bare_net(cfg, family), load_scheduler_config(cfg.model), cfg.timesteps)
    work = evaluations(cfg.method, shell, reference=reference_kind(cfg) != "none")
    found = rehearse(cfg, family, inputs, work, device="cpu")
    plain = rehearse(
        parse({**table, "train": {**table["train"], "quantize": "none"}}), family, inputs, work, device="cpu"
    )
    assert found.weights == real
    assert found.weights < plain.weights
    for count in ("parameters", "trainable", "trained", "adapters", "forward", "backward", "reference"):
        assert getattr(found, count) == getattr(plain, count)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["tiny_sd_diffusion_dpo", "tiny_sd3_diffusion_dpo"])
def test_memory_is_what_a_real_step_holds(name, bits):
    cfg = load(name, ["train.batch_size=4", f'train.quantize="{bits}"'])
    family = detect_family(cfg.model)
    policy = load_policy(cfg.model, family, cfg.timesteps, lora=cfg.lora, seed=cfg.seed, rounding=rounding(bits))
    check_memory(cfg, family, policy)


@pytest.mark.slow
def test_flux_in_four_bits_is_a_third_of_its_size_in_sixteen():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True)
    rounded = rounded_linears(net)
    inside = sum(m.weight.numel() for m in rounded.values())
    every = sum(p.numel() for p in net.parameters())
    assert every == 11_901_408_320
    assert inside / every > 0.99
    stored = sum(stored_bytes(m.weight, "4bit") for m in rounded.values()) + 2 * (every - inside)
    assert 6.6e9 < stored < 6.9e9
    assert 1.19e10 < sum(stored_bytes(m.weight, "8bit") for m in rounded.values()) + 2 * (every - inside) < 1.21e10


def test_sixteen_bits_for_the_rest_leave_rounded_weights_alone(world):
    policy = policy_of(world, "sd3", "4bit", torch.bfloat16)
    codes = [layer.weight.detach().clone() for layer in swapped_layers(policy.net)]
    cast_frozen(policy.net, torch.bfloat16)
    assert all(torch.equal(a.weight, b) for a, b in zip(swapped_layers(policy.net), codes, strict=True))
    assert policy.net.proj_out.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert predicted(policy, pairs_for(policy, world, "sd3")).isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_channels_last_and_checkpointing_change_nothing_but_memory(world, bits):
    table = config(
        world, Path("nowhere"), train={"quantize": bits, "channels_last": True, "gradient_checkpointing": True}
    )
    plain, changed = policy_of(world, "sd", bits), policy_of(world, "sd", bits)
    cfg = parse(table)
    place_net(changed.net, cfg, make_accelerator(cfg), adapted=True)
    batch = pairs_for(plain, world, "sd")
    tolerance = {"8bit": 2e-3, "4bit": 1e-4}[bits]  # other kernels move an input a little, and int8 by a whole level
    torch.testing.assert_close(predicted(plain, batch), predicted(changed, batch), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_selective_recompute_on_rounded_weights_is_the_same_to_the_last_bit(world, name, bits, dtype):
    policy = policy_of(world, name, bits, dtype)
    grow(policy.net)
    batch, found = pairs_for(policy, world, name), []
    for kind in (False, "selective"):
        recompute.use(policy.net, kind)
        policy.net.zero_grad()
        own = [*policy.net.parameters(), *policy.net.buffers(), *scales(policy.net)]
        with saved_bytes(own) as kept, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = predicted(policy, batch)
        out.square().mean().backward()
        found.append((out.detach(), {n: p.grad.clone() for n, p in trainable(policy.net).items()}, kept()))
    (plain, grads, all_of_it), (again, same_grads, less) = found
    assert torch.equal(plain, again)
    assert all(torch.equal(grads[n], g) for n, g in same_grads.items())
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0
    assert less < all_of_it


def test_fixed_draws_of_other_weights_are_other_draws(world):
    digests = {digest_of(make_reference(policy_of(world, "sd", bits), adapted=True)) for bits in (None, *BITS)}
    assert len(digests) == 3
    first, second = (policy_of(world, "sd", "4bit") for _ in range(2))
    for layer in swapped_layers(second.net):
        layer.weight.quant_state.absmax.mul_(2)  # the same codes at another scale
    assert digest_of(make_reference(first, adapted=True)) != digest_of(make_reference(second, adapted=True))


def test_rounding_is_offered_once_there_is_a_lora(world):
    cfg = parse(config(world, Path("nowhere"), train={"batch_size": 1}))
    offered = [keys[0] for keys, _, _ in leaner(cfg)]
    eight, four = (offered.index(f'train.quantize="{bits}"') for bits in BITS)
    assert offered.index('train.precision="bf16"') < eight < four < offered.index('optimizer.name="adamw8bit"')
    four_bit = replace(cfg, train=replace(cfg.train, quantize="4bit"))
    assert not any("quantize" in keys[0] for keys, _, _ in leaner(four_bit))
    full = parse(config(world, Path("nowhere"), trainable="full"))
    assert not any("quantize" in keys[0] for keys, _, _ in leaner(full))
    *_, (_, _, last) = leaner(full, gathered=True)
    assert (last.train.trainable, last.train.quantize) == ("lora", "4bit")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": "full", "quantize": "4bit"}, r'quantize must be "none" with train.trainable = "full"'),
        (
            {"fixed_draws": 2, "quantize": "8bit"},
            r"quantize must be 'none' or '4bit' with train.fixed_draws, got '8bit'",
        ),
        ({"quantize": "2bit"}, r"train.quantize must be one of 'none', '8bit', '4bit', got '2bit'"),
    ],
)
def test_what_cannot_be_rounded_is_one_line(world, changes, words):
    table = config(world, Path("nowhere"), trainable=changes.get("trainable", "lora"), train=changes)
    with pytest.raises(InputError, match=words):
        parse(table)


def test_features_are_not_compared_on_rounded_weights(world):
    table = config(world, Path("nowhere"), train={"quantize": "8bit"})
    table["method"] = {"name": "ncp_dpo"}
    with pytest.raises(
        InputError, match=r"quantize must be 'none' with method 'ncp_dpo', whose features lie too close"
    ):
        parse(table)


def test_a_missing_bitsandbytes_is_named_with_its_extra(world, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    with pytest.raises(InputError, match=r"config.train.quantize must have .* pip install 'diffalign\[8bit\]'"):
        policy_of(world, "sd", "4bit")


def test_a_bitsandbytes_that_does_not_work_is_named_as_such(world, monkeypatch):
    import bitsandbytes

    assert environment.bitsandbytes_fault(CPU) is None

    def broken(*arguments, **named):
        raise RuntimeError("Configured CUDA binary not found\nat /somewhere")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    assert environment.bitsandbytes_fault(CPU) == "RuntimeError: Configured CUDA binary not found at /somewhere"
    with pytest.raises(
        InputError, match=r"must have a bitsandbytes that works on cpu, got .*: RuntimeError: Configured"
    ):
        policy_of(world, "sd", "8bit")


def test_nothing_is_said_of_casts_at_every_call(world, caplog):
    import bitsandbytes

    layer = torch.nn.Module()
    layer.transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    swap_linears(layer, rounding("8bit"))
    round_weights(layer, CPU)
    with caplog.at_level("WARNING"):
        assert isinstance(layer.transformer_blocks[0], bitsandbytes.nn.Linear8bitLt)
        assert layer.transformer_blocks[0](torch.randn(1, 3, 8)).shape == (1, 3, 8)
    assert not [r for r in caplog.records if "cast" in r.getMessage()]
