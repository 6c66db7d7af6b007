"""The benchmark's plain loop is no straw man: its work is pinned to the FLOP, and its loss is ours."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.ours import Encoded, Ours, Variant
from benchmarks.overhead import share_outside, switching
from benchmarks.plain import SLOPE, Plain
from benchmarks.step import OURS, PLAIN, VARIANTS, merged, pinned_flop
from benchmarks.worlds import SIZES, build
from diffalign.counting import count_flop, fake_mode
from diffalign.denoisers.unet import SD
from diffalign.fixed_draws import FixedDraws
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.measure import PairErrors
from diffalign.rng import SampleRng
from diffalign.types import Cond, PairBatch


@pytest.mark.parametrize("name", ["tiny", "fifth"])
def test_the_plain_loop_does_the_pinned_work(name):
    sizes = SIZES[name]
    assert pinned_flop(sizes) == (sizes.flop, sizes.encoder_flop)


def test_the_plain_loop_does_the_work_of_the_published_script():
    fifth = SIZES["fifth"]
    assert fifth.flop / 1e9 == pytest.approx(fifth.published_gflop, rel=0.005)


def test_the_plain_loss_is_ours(monkeypatch):
    plain = Plain(build(SIZES["tiny"], random=True), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    x_0, text = plain.latents()[[0, 1, 16, 17]], plain.embeddings()[:2]
    eps, t = torch.randn(2, *x_0.shape[1:], generator=generator), torch.tensor([100, 700])
    errors = {}

    def keep(x_t, t, text, noise):
        errors[len(errors)] = found = type(plain)._errors(plain, x_t, t, text, noise)
        return found

    monkeypatch.setattr(plain, "_errors", keep)
    loss, _ = plain.loss(x_0, text, eps, t)
    (err_w, err_l), (ref_w, ref_l) = errors[0].chunk(2), errors[1].chunk(2)
    measured = PairErrors(err_w=err_w, err_l=err_l, err_ref_w=ref_w, err_ref_l=ref_l, noise_level=t / 1000)
    monkeypatch.setattr("diffalign.methods.diffusion_dpo.pair_errors", lambda *a, **k: measured)
    batch = PairBatch(x_w=x_0[:2], x_l=x_0[2:], cond=Cond({}), samples=(0, 1))
    denoiser = SD.make_denoiser(plain.unet, dict(plain.scheduler.config), None)
    ours = DiffusionDPO(beta=2 * SLOPE)(denoiser, denoiser, batch, SampleRng(seed=0, samples=(0, 1)))
    torch.testing.assert_close(loss, ours.loss.mean())
    assert abs(loss.item() - 0.6931) > 1e-3


def test_a_step_costs_four_passes_a_pair_from_a_cache_and_two_with_fixed_draws(monkeypatch):
    def known(collator, count, measure, *, batch_size):
        return FixedDraws(collator=collator, errors=torch.zeros(len(collator), count, 2, dtype=torch.float64))

    monkeypatch.setattr("benchmarks.ours.known_draws", known)
    sizes, flop = SIZES["fifth"], {}
    world = build(sizes, random=True)
    latents = torch.zeros(2 * sizes.pairs, 4, 32, 32)
    cache = Encoded(mean=latents, std=latents, text=torch.zeros(sizes.pairs, 77, 152))
    for draws in (None, 4):
        ours = Ours(world, Variant(name="counted", **OURS, fixed_draws=draws), torch.device("cpu"), cache)
        batch = next(ours.batches)
        with fake_mode():
            flop[draws] = count_flop(lambda ours=ours, batch=batch: ours.backward(batch))
            x_t, t, cond = torch.cat([batch.x_w, batch.x_l]), torch.zeros(8).long(), batch.cond.repeat(2)
            forward = count_flop(lambda ours=ours, given=(x_t, t, cond): ours.reference(*given))
    assert flop == {None: sizes.flop - sizes.encoder_flop, 4: sizes.flop - sizes.encoder_flop - forward}
    assert [round(value / 1e9, 1) for value in flop.values()] == [225.3, 156.7]


def test_a_run_of_a_part_leaves_the_rest_of_the_file_as_it_is(tmp_path):
    def table(world, **rows):
        names = {"plain": PLAIN, "first": VARIANTS[0].name, "last": VARIANTS[-1].name}
        return {"world": world, "loops": [{"loop": names[name], "value": value} for name, value in rows.items()]}

    file = tmp_path / "step.json"
    assert merged(file, [table("fifth", plain=1)]) == [table("fifth", plain=1)]
    file.write_text(json.dumps({"worlds": [table("tiny", plain=1), table("fifth", plain=1, last=2)]}))
    found = merged(file, [table("fifth", plain=3, first=4)])
    assert found == [table("tiny", plain=1), table("fifth", plain=3, first=4, last=2)]


def test_every_adapted_layer_is_switched():
    found = switching(3, rounds=1)
    assert found["layers"] == 3
    assert found["flags_ms"] >= 0 < found["library_ms"]


def test_the_share_outside_the_networks_is_what_a_step_spends_elsewhere():
    class Loop:
        net = torch.nn.Linear(4, 4)
        wasted = 0.0

        def step(self):
            self.net(torch.ones(1, 4)).sum().backward()
            end = time.process_time() + self.wasted
            while time.process_time() < end:
                pass

    loop = Loop()
    share_outside(loop)
    loop.wasted = 0.05
    assert 0.8 < share_outside(loop)["share"] < 1
    assert not loop.net._forward_hooks
    assert not loop.net._forward_pre_hooks


def test_every_variant_has_a_name_of_its_own():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert all(isinstance(variant, Variant) for variant in VARIANTS)


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path):
    out = tmp_path / "step.json"
    command = ["-m", "benchmarks.step", "--worlds", "tiny", "--rounds", "1", "--warmup", "1", "--out", str(out)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    [world] = json.loads(out.read_text())["worlds"]
    assert [row["loop"] for row in world["loops"][1:]] == [variant.name for variant in VARIANTS]
    assert all(row["times_plain"] > 0 and row["saved_activations"] > 0 for row in world["loops"])
