"""Networks that take turns on a device: the same numbers, one at a time, and none while the denoiser runs."""

import gc
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign.assemble import assemble
from diffalign.config import parse
from diffalign.data.batches import LatentScale
from diffalign.data.prepare import Encoders
from diffalign.errors import InputError
from diffalign.grids import save_grid
from diffalign.leaner import leaner
from diffalign.models.load import ModelSource, detect_family, load_net
from diffalign.models.offload import Turns
from diffalign.plan import GIB, plan
from diffalign.settings import SampleSettings
from tests import worlds
from tests.test_online import table
from tests.test_train import config, metrics, same, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3_t5(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(12))
    (root / "prompts.txt").write_text("a red circle\na blue square\n")
    return root


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What comes to the device and goes from it, in order."""
    seen: list[str] = []
    bring, park = Turns.bring, Turns.park

    def watched_bring(self, net):
        if net is not self.here:
            bring(self, net)
            seen.append(type(net).__name__)

    def watched_park(self):
        if self.here is not None:
            seen.append("-")
        park(self)

    monkeypatch.setattr(Turns, "bring", watched_bring)
    monkeypatch.setattr(Turns, "park", watched_park)
    return seen


def test_encoders_come_one_after_another_and_say_the_same(world, moves):
    source = ModelSource(path=str(world / "sd3"))
    family = detect_family(source)
    plain, turns = Encoders(source, family, CPU), Encoders(source, family, CPU, offload=True)
    cond, same_cond = plain.prompts(["", "a red circle"]), turns.prompts(["", "a red circle"])
    assert all(torch.equal(same_cond[name], tensor) for name, tensor in cond.tensors.items())
    clip = "CLIPTextModelWithProjection"
    assert moves == [clip, "-", clip, "-", "T5EncoderModel"]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(plain.images(pixels), turns.images(pixels), strict=True))
    z, scale = torch.randn(1, 4, 8, 8), LatentScale(scale=1.5, shift=0.1)
    assert torch.equal(plain.decode(z, scale), turns.decode(z, scale))
    turns.rest()
    turns.rest()
    assert moves[5:] == ["-", "AutoencoderKL", "-"]


def test_what_comes_is_a_copy_and_what_is_at_home_stays():
    net = torch.nn.Linear(3, 3).requires_grad_(False)
    home = net.weight.data_ptr()
    turns = Turns(CPU)
    turns.add([net])
    turns._home[net] = [(t, t.data) for t in net.parameters()]
    net.weight.data = net.weight.data.clone()  # a device's copy
    turns.here = net
    turns.end()
    assert net.weight.data_ptr() == home
    assert not hasattr(net, "_hf_hook")
    assert net(torch.ones(1, 3)).shape == (1, 3)
    assert turns.here is None


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_pictures_are_the_same_and_the_denoiser_runs_alone(world, tmp_path, moves, model):
    source = ModelSource(path=str(world / model))
    family = detect_family(source)
    net = load_net(source, family)
    settings = SampleSettings(every=1, prompts=("a red circle", "blue"), steps=2, guidance=2.0)
    whole = save_grid(tmp_path / "whole", 1, source, family, net, settings).read_bytes()
    assert moves == []
    places: list[list[str]] = []
    handle = net.register_forward_pre_hook(lambda module, arguments: places.append(moves[-1:]))
    assert save_grid(tmp_path / "turns", 1, source, family, net, settings, offload=True).read_bytes() == whole
    handle.remove()
    assert len(places) == 2
    assert all(before == ["-"] for before in places)  # the last that was there has gone
    assert moves[-2:] == ["AutoencoderKL", "-"]
    assert not hasattr(net, "_hf_hook")


def test_a_run_is_the_same_with_and_without_and_steps_need_no_encoder(world, tmp_path, moves):
    samples = {"every": 2, "prompts": ["a red circle"], "steps": 2}
    options = {"model": "sd3", "data": {"cache": True}}
    first = diffalign.train(config(world, tmp_path / "plain", **options, samples=samples, train={"steps": 2}))
    assert moves == []
    turns = config(world, tmp_path / "turns", **options, train={"steps": 2, "offload": True})
    assemble(parse(turns))
    assert {"AutoencoderKL", "T5EncoderModel"} <= set(moves)
    assert moves[-1] == "-"
    built = len(moves)
    second = diffalign.train(turns)
    assert moves[built:] == []  # the cache is there, and no step asks for more
    third = diffalign.train({**turns, "output": str(tmp_path / "again"), "samples": samples})
    assert len(moves) > built
    assert same(weights(first.folder, 2), weights(second.folder, 2))
    assert metrics(first.folder) == metrics(second.folder)
    grids = [(run.folder / "samples" / "step-000002.png").read_bytes() for run in (first, third)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("offload", [False, True])
def test_encoders_are_let_go_once_the_cache_is_built(world, tmp_path, offload):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    gc.collect()
    before = [o for o in gc.get_objects() if type(o) in (AutoencoderKL, CLIPTextModel)]
    parts = assemble(parse(config(world, tmp_path / "run", data={"cache": True}, train={"offload": offload})))
    gc.collect()
    after = [o for o in gc.get_objects() if type(o) in (AutoencoderKL, CLIPTextModel)]
    assert len(after) == len(before)
    assert parts.collator is not None


def test_rounds_are_the_same_and_leave_the_device_to_their_steps(world, tmp_path, moves):
    first = diffalign.train(table(world, tmp_path / "plain"))
    assert moves == []
    second = diffalign.train(table(world, tmp_path / "turns", train={"offload": True}))
    assert same(weights(first.folder, 4), weights(second.folder, 4))
    assert moves == ["CLIPTextModel", "-", "AutoencoderKL", "-"] * 2  # prompts, images; then the steps of the round


def test_a_plan_counts_the_largest_encoder_alone(world, tmp_path):
    cfg = parse(config(world, tmp_path / "run", model="sd3", train={"device": "auto", "batch_size": 1}))
    together = plan(cfg, memory=24 * GIB)
    _, costs, changed = next(c for c in leaner(cfg) if "train.offload=true" in c[0])
    alone = plan(changed, memory=24 * GIB)
    inputs = together.encoding
    assert 0 < inputs.largest < inputs.weights
    assert together.memory.building_cache - alone.memory.building_cache == inputs.weights - inputs.largest
    assert alone.memory.stays == together.memory.stays
    assert costs == "a slower start"
    on_cpu = [plan(parse(config(world, tmp_path / "run", train={"offload": on}))).memory for on in (False, True)]
    assert on_cpu[0].building_cache == on_cpu[1].building_cache


def test_encoding_at_every_step_does_not_take_turns(world, tmp_path):
    with pytest.raises(
        InputError, match=r"train.offload must be false with data.cache = false, which encodes at every"
    ):
        parse(config(world, tmp_path / "run", data={"cache": False}, train={"offload": True}))
