"""The rollout benchmark's plain loop is no straw man: its moves are the kernel's, and its loss is ours."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import rollouts
from benchmarks.plain_rollouts import BETA, CLIP, PlainRollouts
from benchmarks.step import PLAIN
from benchmarks.worlds import SIZES, build
from diffalign.denoisers.guided import Guided
from diffalign.denoisers.unet import SD
from diffalign.methods.d3po import D3PO
from diffalign.rng import SampleRng
from diffalign.types import Cond, TransitionPairs

CPU = torch.device("cpu")
SMALL = replace(SIZES["tiny"], pairs=2)
HOW = {"steps": 4, "guidance": 3.0}


@pytest.fixture(scope="module")
def world():
    return build(SMALL, random=True)


@pytest.fixture(scope="module")
def plain(world):
    torch.manual_seed(0)
    made = PlainRollouts(world, CPU, **HOW)
    made.sample()
    with torch.no_grad():
        for parameter in made.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def test_the_stock_pipelines_moves_are_those_of_the_kernel(world, plain):
    ours = rollouts.Ours(world, rollouts.VARIANTS[-1], CPU, **HOW)
    ways = torch.stack([torch.cat(way) for way in plain.walked])  # [4, N + 1, C, H, W]
    assert ways.shape[:2] == (4, HOW["steps"] + 1)
    cond = ours.cond.rows(torch.tensor([0, 1, 0, 1]))
    for move in range(HOW["steps"] - 1):
        step = torch.full((4,), move)
        with torch.no_grad():
            found = ours.walk.transition(ours.policy, ways[:, move], step, cond)
        noise = (ways[:, move + 1] - found.mean) / found.std.view(-1, 1, 1, 1)
        assert noise.square().mean() == pytest.approx(1, abs=0.12)
        assert noise.mean() == pytest.approx(0, abs=0.12)


def test_the_plain_loss_is_ours(world, plain):
    ours = rollouts.Ours(world, rollouts.VARIANTS[-1], CPU, **HOW)
    config, uncond = dict(plain.scheduler.config), Cond({"prompt_embeds": plain.conditions(0)[1]})
    policy, reference = (
        Guided(denoiser=SD.make_denoiser(net, config, None), uncond=uncond, guidance=3.0)
        for net in (plain.unet, plain.reference)
    )
    better, worse = plain.walked[1], plain.walked[3]
    text = plain.conditions(1)[0]
    cond, none = Cond({"prompt_embeds": text}), uncond["prompt_embeds"]
    for move in (0, 2):
        step = torch.tensor([move])
        with torch.no_grad():
            found = ours.walk.transition(policy, better[move], step, cond)
            log_prob = plain.log_prob(plain.unet, better[move], better[move + 1], move, text, none)
            # the reference's own move is said to be the better one, the policy's the worse: the loss is above log 2
            x_s_w = ours.walk.transition(reference, better[move], step, cond).mean
            x_s_l = ours.walk.transition(policy, worse[move], step, cond).mean
        expected = ours.walk.log_prob(found, better[move + 1])
        torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
        batch = TransitionPairs(
            x_t_w=better[move],
            x_s_w=x_s_w,
            x_t_l=worse[move],
            x_s_l=x_s_l,
            step=step,
            cond=cond,
            walk=ours.walk,
            samples=(0,),
        )
        loss = plain.loss(better[move], x_s_w, worse[move], x_s_l, move, text, none)
        out = D3PO(beta=BETA, clip=CLIP)(policy, reference, batch, SampleRng(0, (0,)))
        torch.testing.assert_close(loss, out.loss.mean(), rtol=1e-6, atol=1e-6)
        assert loss > 0.6931472 + 1e-5


def test_all_ways_make_the_same_images_and_the_same_first_loss(world):
    made = [rollouts.Ours(world, variant, CPU, **HOW) for variant in rollouts.VARIANTS]
    images = [torch.cat(one.sample()) for one in made]
    for other in images[1:]:
        torch.testing.assert_close(images[0], other, rtol=1e-4, atol=1e-4)
    assert [one.train([0, 1]) for one in made] == pytest.approx([0.693147] * 3, abs=1e-5)


def test_a_table_is_written_of_medians_of_ratios(tmp_path, monkeypatch):
    monkeypatch.setitem(rollouts.SIZES, "tiny", replace(SMALL, shipped=None))
    out = tmp_path / "rollouts.json"
    words = ["rollouts", "--worlds", "tiny", "--rounds", "1", "--warmup", "0", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    rollouts.main()
    [table] = json.loads(out.read_text())["worlds"]
    for phase in ("sampling", "training"):
        assert [one["loop"] for one in table[phase]] == [PLAIN, *(v.name for v in rollouts.VARIANTS)]
        assert table[phase][0]["times_plain"] == 1
    found = rollouts.row("x", [1.0, 2.0, 4.0], [2.0, 8.0, 4.0], "images_a_second", 6)
    assert (found["images_a_second"], found["times_plain"], found["times_plain_range"]) == (3.0, 2.0, [1.0, 4.0])
