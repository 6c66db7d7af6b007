"""Encoders of the true classes: what they show, in which precision, and what they leave as it was."""

import json
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign.denoisers import FAMILIES
from diffalign.denoisers.features import join_levels
from diffalign.errors import InputError
from diffalign.methods.ncp_dpo import NCPDPO
from diffalign.methods.perception import Perception
from diffalign.models.load import ModelSource
from diffalign.models.lora import LoraSettings
from diffalign.models.policy import load_policy, make_reference
from diffalign.rng import SampleRng
from diffalign.types import Cond, Encoder, PairBatch
from tests import worlds

FAMILY = {"sd": "sd", "sd-v": "sd", "sd3": "sd3"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `sd`, `sd-v`, `sd3` and the file `pairs.parquet`."""
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd(root / "sd-v", prediction="v_prediction")
    worlds.sd3(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(24))
    return root


def policy_of(world: Path, model: str, *, lora: bool = True):
    """A denoiser, with a LoRA that changes something."""
    settings = LoraSettings(rank=4) if lora else None
    policy = load_policy(ModelSource(path=str(world / model)), FAMILIES[FAMILY[model]], None, lora=settings, seed=0)
    with torch.no_grad():
        for name, p in policy.net.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return policy


def inputs(policy, size: int = 2):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, 8, 8, generator=rng)
    if policy.prediction == "velocity":
        cond = {
            "prompt_embeds": torch.randn(size, 5, 32, generator=rng),
            "pooled_prompt_embeds": torch.randn(size, 32, generator=rng),
        }
        return x, torch.full((size,), 0.4), Cond(cond)
    return x, torch.full((size,), 400), Cond({"prompt_embeds": torch.randn(size, 5, 16, generator=rng)})


def down_path(net, x, t, text):
    """The down path of a U-Net, block by block."""
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D

    emb = net.time_embedding(net.time_proj(t))
    x = net.conv_in(x)
    levels = [x]
    for block in net.down_blocks:
        options = {"encoder_hidden_states": text} if isinstance(block, CrossAttnDownBlock2D) else {}
        x, _ = block(hidden_states=x, temb=emb, **options)
        levels.append(x)
    return [*levels, net.mid_block(x, emb, encoder_hidden_states=text)]


def test_a_unet_shows_its_first_convolution_and_its_down_blocks_and_the_middle_if_asked(world):
    policy = policy_of(world, "sd", lora=False)
    x, t, cond = inputs(policy)
    with torch.no_grad():
        found = policy.features(x, t, cond, mid=True)
        expected = down_path(policy.net, x, t, cond["prompt_embeds"])
        assert [tuple(f.shape[1:]) for f in found] == [(16, 8, 8), (16, 4, 4), (32, 4, 4), (32, 4, 4)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        without = policy.features(x, t, cond)
    assert len(without) == 3
    assert torch.equal(without[-1], found[2])


def test_a_transformer_shows_image_tokens_as_maps_after_each_of_its_first_blocks(world):
    policy = policy_of(world, "sd3", lora=False)
    net = policy.net
    x, t, cond = inputs(policy)
    with torch.no_grad():
        found = policy.features(x, t, cond, blocks=2)
        tokens, text = net.pos_embed(x), net.context_embedder(cond["prompt_embeds"])
        temb = net.time_text_embed(t * 1000, cond["pooled_prompt_embeds"])
        expected = [tokens]
        for block in net.transformer_blocks:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=temb)
            expected.append(tokens)
        half = policy.features(x, t, cond)
    assert [tuple(f.shape) for f in found] == [(2, 16, 4, 4)] * 3
    for level, tokens in zip(found, expected, strict=True):
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), tokens, atol=1e-6, rtol=1e-6)
        assert torch.equal(level[:, :, 1, 2], tokens[:, 1 * 4 + 2])
    assert len(half) == 2


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_nothing_runs_after_the_last_level_and_no_hook_stays(world, model):
    policy = policy_of(world, model, lora=False)
    net = policy.net
    x, t, cond = inputs(policy)
    last = net.conv_out if model == "sd" else net.proj_out
    before = last.register_forward_hook(lambda *_: pytest.fail("the pass must end before"))
    policy.features(x, t, cond)
    before.remove()
    with pytest.raises(RuntimeError):
        policy.features(x[:, :2], t, cond)  # fails inside the network
    assert not any(module._forward_hooks for module in net.modules())
    policy(x, t, cond)


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_features_are_float32_under_autocast_and_whatever_was_put_around_the_forward(world, model):
    policy = policy_of(world, model, lora=False)
    x, t, cond = inputs(policy)
    plain = policy.features(x, t, cond)

    def refuse(*args, **kwargs):
        raise AssertionError("accelerate's or the compiler's forward must be bypassed")

    policy.net.forward = refuse
    half = Cond({name: value.bfloat16() for name, value in cond.tensors.items()})
    with torch.autocast("cpu", torch.bfloat16):
        again = policy.features(x, t, cond)
        from_half = policy.features(x, t, half)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(f.dtype == torch.float32 for f in from_half)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_inputs_or_weights_below_float32_are_refused(world, model, dtype):
    policy = policy_of(world, model, lora=False)
    x, t, cond = inputs(policy)
    with pytest.raises(RuntimeError, match=f"inputs of a feature encoder must be float32, got {dtype}; its inputs lie"):
        policy.features(x.to(getattr(torch, dtype)), t, cond)
    policy.net.to(getattr(torch, dtype))
    with pytest.raises(RuntimeError, match=f"weights of a feature encoder must be float32, got {dtype}"):
        policy.features(x, t, cond)


@pytest.mark.parametrize("model", ["sd", "sd-v", "sd3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_references_features_are_the_base_models_and_so_is_their_gradient(world, model, checkpointing):
    policy = policy_of(world, model)
    base = policy_of(world, model, lora=False)
    x, t, cond = inputs(policy)
    if checkpointing:
        policy.net.enable_gradient_checkpointing()
    reference = make_reference(policy, adapted=True).denoiser
    assert isinstance(reference, Encoder)

    def gradient(encoder):
        x_s = x.clone().requires_grad_()
        seen = encoder.features(x_s, t, cond)[-1]
        seen.square().mean().backward()  # with the adapter on again
        return seen.detach(), x_s.grad

    base.net.requires_grad_(False)
    for a, b in zip(gradient(reference), gradient(base), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    assert policy.net.is_gradient_checkpointing is checkpointing
    assert all(p.grad is None for p in policy.net.parameters())
    assert not torch.equal(policy.features(x, t, cond)[-1], reference.features(x, t, cond)[-1])


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("model", ["sd", "sd-v", "sd3"])
def test_the_policy_gets_a_gradient_through_the_encoder_and_the_encoder_none(world, model, adapted):
    policy = policy_of(world, model, lora=adapted)
    reference = make_reference(policy, adapted=adapted).denoiser
    x, _, cond = inputs(policy, 4)
    batch = PairBatch(x_w=x, x_l=x.flip(0), cond=cond, samples=(0, 1, 2, 3))
    NCPDPO()(policy, reference, batch, SampleRng(0, batch.samples)).loss.mean().backward()
    trained = {name: p for name, p in policy.net.named_parameters() if p.requires_grad}
    assert trained
    assert sum(p.grad.abs().sum().item() for p in trained.values() if p.grad is not None) > 0
    assert all(p.grad is None for name, p in policy.net.named_parameters() if name not in trained)
    assert adapted or all(p.grad is None for p in reference.net.parameters())


def test_levels_are_joined_at_the_smallest_size_and_weighed_by_their_width():
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 8, 8, generator=rng, requires_grad=True)
    deep = torch.randn(2, 6, 4, 4, generator=rng, requires_grad=True)
    plain = join_levels([wide, deep])
    assert plain.shape == (2, 12 + 6, 4, 4)
    mean = (wide.square().sum() + deep.square().sum()) / (wide.numel() + deep.numel())
    torch.testing.assert_close(plain.square().mean(), mean)
    weighed = join_levels([wide, deep], normalize=True)
    torch.testing.assert_close(weighed[:, :12], plain[:, :12] * (6 / 12))
    torch.testing.assert_close(weighed[:, 12:], plain[:, 12:])
    pooled = join_levels([wide, deep], pool=True)
    torch.testing.assert_close(pooled.flatten(1), torch.cat([wide.mean((2, 3)), deep.mean((2, 3))], dim=1))
    assert torch.equal(join_levels([deep]), deep)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("sd", {"blocks": 1}, "method.perception.blocks must be left out with a U-Net, .* got 1"),
        ("sd3", {"mid": True}, "method.perception.mid must be false with a transformer"),
        ("sd3", {"blocks": 3}, "method.perception.blocks must be at most the transformer's 2, got 3"),
    ],
)
def test_options_of_another_kind_of_network_are_one_line(world, model, options, message):
    policy = policy_of(world, model, lora=False)
    with pytest.raises(InputError, match=message):
        policy.features(*inputs(policy), **options)


@pytest.mark.parametrize(
    ("model", "method", "perception", "trainable"),
    [
        ("sd", "ncp_dpo", {"mid": True, "multi_level": True, "normalize": True}, "lora"),
        ("sd-v", "ncp_dpo", {"pool": True}, "full"),
        ("sd3", "ncp_dpo", {"dt": 0.1, "multi_level": True}, "lora"),
        ("sd3", "ncp_dpo", {"at": "uniform"}, "full"),
        ("sd", "ncp_cpo", {"at": "uniform"}, "lora"),
        ("sd3", "ncp_cpo", {"blocks": 2}, "full"),
        ("sd", "ncp_sft", {}, "full"),
        ("sd3", "ncp_sft", {}, "lora"),
    ],
)
def test_a_run_trains_both_families(world, tmp_path, model, method, perception, trainable):
    table = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(world / model)},
        "data": {"path": str(world / "pairs.parquet"), "cache": str(world / f"cache-{model}")},
        "method": {"name": method, "perception": perception},
        "train": {
            "steps": 2,
            "batch_size": 2,
            "trainable": trainable,
            "device": "cpu",
            "gradient_checkpointing": trainable == "lora",
        },
        "optimizer": {"lr": 1e-2},
        "validation": {"every": 2, "fraction": 0.3, "pairs": 2},
        **({"lora": {"rank": 4}} if trainable == "lora" else {}),
    }
    result = diffalign.train(table)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["grad_norm"] > 0 and "perceptual/err_w" in line for line in steps)
    if method == "ncp_dpo":
        assert steps[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert steps[1]["rewards/margins"] != 0
        assert steps[1]["winner_gain"] != 0


def test_perception_options_change_what_is_measured(world):
    policy = policy_of(world, "sd", lora=False)
    reference = make_reference(policy, adapted=False).denoiser
    x, _, cond = inputs(policy, 4)
    batch = PairBatch(x_w=x, x_l=x.flip(0), cond=cond, samples=(0, 1, 2, 3))
    choices = [
        Perception(),
        Perception(mid=True),
        Perception(multi_level=True),
        Perception(multi_level=True, normalize=True),
        Perception(pool=True),
        Perception(at="uniform"),
    ]
    found = [
        NCPDPO(perception=p)(policy, reference, batch, SampleRng(0, batch.samples)).metrics["perceptual/err_w"].mean()
        for p in choices
    ]
    assert len({round(value.item(), 12) for value in found}) == len(choices)
