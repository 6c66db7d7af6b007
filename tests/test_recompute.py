"""Selective recompute: the same numbers to the last bit, less kept, and nothing that happens in between matters."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from diffalign import recompute
from diffalign.config import parse
from diffalign.counting import Memory, saved_bytes
from diffalign.errors import InputError
from diffalign.fit import fit
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.models.lora import LoraSettings, adapter_layers, switched
from diffalign.models.policy import load_policy, make_reference
from diffalign.models.save import trainable
from diffalign.rng import SampleRng
from diffalign.types import PairBatch
from tests import worlds
from tests.test_lora import grow
from tests.test_train import config

FAMILIES = {
    "sd": worlds.sd,
    "sdxl": worlds.sdxl,
    "sd3": worlds.sd3_t5,
    "pixart_sigma": worlds.pixart,
    "flux": worlds.flux,
    "dit": worlds.dit,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, built = tmp_path_factory.mktemp("recompute"), {}

    def folder(name: str) -> Path:
        if name not in built:
            built[name] = FAMILIES[name](root / name)
        return built[name]

    return folder


def model(folder: Path, *, full: bool = False):
    """A policy whose adapter says something, and latents, t and conditions for it."""
    source = ModelSource(path=str(folder))
    family = detect_family(source)
    policy = load_policy(source, family, None, lora=None if full else LoraSettings(rank=4), seed=0)
    if not full:
        grow(policy.net)
    texts = ["green", "7"] if family.name == "dit" else ["a red circle", "small blue square on white"]
    cond = family.encode_prompts(load_pipeline(source), texts)
    channels = family.latent_shape(policy.net.config)[0]
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy, x, policy.path.sample_t(SampleRng(0, (0, 1))), cond


def passed(policy, x, t, cond, kind, *, between=lambda net: None, cast=nullcontext):
    """(prediction, gradients by name, bytes kept) of a copy of the policy that recomputes as `kind` says."""
    net = copy.deepcopy(policy.net)
    recompute.use(net, kind)
    with saved_bytes([*net.parameters(), *net.buffers()]) as kept, cast():
        out = replace(policy, net=net)(x, t, cond)
    between(net)
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}, kept()


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_and_gradients_are_the_same_to_the_last_bit_and_less_is_kept(folders, name, full, bf16):
    given = model(folders(name), full=full)
    cast = partial(torch.autocast, "cpu", torch.bfloat16) if bf16 else nullcontext
    plain, selective = (passed(*given, kind, cast=cast) for kind in (False, "selective"))
    assert plain[1]
    assert same(plain, selective)
    assert selective[2] < 0.75 * plain[2]


def test_what_is_counted_as_kept_is_what_is_there_after_the_forward_pass(folders):
    policy, x, t, cond = model(folders("sd"))
    net = copy.deepcopy(policy.net)
    recompute.use(net, "selective")
    own = [*net.parameters(), *net.buffers()]
    with Memory([*own, x, t, *cond.tensors.values()]) as memory, saved_bytes(own) as kept:
        out = replace(policy, net=net)(x, t, cond)
    assert kept() == pytest.approx(memory.now, rel=0.05)
    del out
    assert memory.now < 0.02 * kept()


def test_adapters_that_are_switched_before_the_backward_pass_change_nothing(folders):
    given = model(folders("sd"))
    plain = passed(*given, False)

    def switch(net):
        for layer in adapter_layers(net):
            layer._disable_adapters = True

    assert same(plain, passed(*given, "selective", between=switch))


def test_steps_with_an_adapter_off_reference_end_at_the_same_weights(folders):
    policy, x, _, cond = model(folders("sd"))
    ends = []
    for kind in (False, "selective"):
        own = replace(policy, net=copy.deepcopy(policy.net))
        recompute.use(own.net, kind)
        reference = make_reference(own, adapted=True).denoiser
        optimizer = torch.optim.AdamW(trainable(own.net).values(), lr=1e-3)
        batches = iter([PairBatch(x_w=x, x_l=x.flip(0), cond=cond, samples=(2 * i, 2 * i + 1)) for i in range(2)])
        margins = [
            r.metrics["rewards/margins"] for r in fit(own, reference, DiffusionDPO(), batches, optimizer, steps=2)
        ]
        ends.append((margins, [p.detach() for p in trainable(own.net).values()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


class Dropped(nn.Module):
    """Norm, product, activation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(nn.functional.dropout(nn.functional.silu(self.up(self.norm(x))), 0.5))


def test_random_numbers_are_drawn_once():
    net, x = Dropped(), torch.randn(4, 8)
    grads, states = [], []
    for tape in (nullcontext, recompute.recomputed):
        torch.manual_seed(0)
        net.zero_grad()
        with tape():
            out = net(x)
        out.sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
        states.append(torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(*states)


def test_a_second_backward_pass_and_a_second_derivative_are_right():
    net, x = Dropped().eval(), torch.randn(4, 8, requires_grad=True)
    found = []
    for tape in (nullcontext, recompute.recomputed):
        torch.manual_seed(0)
        with tape():
            out = net(x).square().sum()
        [first] = torch.autograd.grad(out, x, create_graph=True)
        [again] = torch.autograd.grad(out, x, retain_graph=True)
        [second] = torch.autograd.grad(first.square().sum(), x)
        found.append((first.detach(), again, second))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_change_in_place_of_what_is_needed_again_is_an_error():
    weight, start = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with recompute.recomputed():
        out = nn.functional.silu(start * 2) @ weight
    start.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(4, 8\) was changed in place .*; set it to true or false"):
        out.sum().backward()


def test_a_change_in_place_of_a_cheap_result_counts():
    weight, start = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    grads = []
    for tape in (nullcontext, recompute.recomputed):
        weight.grad = None
        with tape():
            hidden = nn.functional.silu(start)
            hidden.mul_(3)
            (hidden @ weight).sum().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_a_copy_runs_itself_and_a_pass_without_gradient_has_no_tape(folders, monkeypatch):
    policy, x, t, cond = model(folders("sd"))
    recompute.use(policy.net, "selective")
    other = copy.deepcopy(policy.net)
    assert other.forward.__self__ is other
    monkeypatch.setattr(recompute, "recomputed", lambda: pytest.fail("no tape is needed"))
    with torch.no_grad(), switched(adapter_layers(policy.net), None):
        policy(x, t, cond)


@pytest.mark.parametrize("kind", [True, False, "selective"])
def test_a_config_says_what_is_computed_again(tmp_path, kind):
    table = config(tmp_path, tmp_path / "run", train={"gradient_checkpointing": kind})
    assert parse(table).train.gradient_checkpointing == kind


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"gradient_checkpointing": "some"}, "must be true or false or one of 'selective', got 'some'"),
        ({"gradient_checkpointing": "selective", "compile": True}, "must be true or false with train.compile"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(tmp_path, train, message):
    with pytest.raises(InputError, match=f"config.train.gradient_checkpointing {message}"):
        parse(config(tmp_path, tmp_path / "run", train=train))
