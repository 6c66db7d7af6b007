"""Fixed draws: what is drawn again and again, the reference's errors there, and steps without the reference."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign import config, fit, fixed_draws
from diffalign.data.batches import Collator, LatentScale, stream
from diffalign.data.cache import Share
from diffalign.errors import InputError, RunError
from diffalign.fixed_draws import known_draws, measure_with
from diffalign.methods import METHODS
from diffalign.methods.measure import Safeguard
from diffalign.models.lora import AdapterReference
from diffalign.rng import SampleRng
from diffalign.types import Cond
from tests import worlds
from tests.test_train import config as table
from tests.test_train import metrics, same, weights
from tests.toys import SHAPE, toy

ELIGIBLE = ["diffusion_dpo", "dmpo", "linear_dpo", "diffusion_kto"]


class Plain:
    """Stands in for the accelerator of one process without mixed precision."""

    device = torch.device("cpu")

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


class Rows:
    """Six pairs in memory."""

    marks = None

    def __len__(self):
        return 6

    def latents(self, rows, samples, member):
        x = torch.randn(2, 6, *SHAPE, generator=torch.Generator().manual_seed(0))["wl".index(member)]
        return x[list(rows)], torch.full((len(rows), *SHAPE), 0.1)

    def cond(self, rows, dropped):
        row_of = [0.0 if drop else row / 6 for row, drop in zip(rows, dropped, strict=True)]
        return Cond({"c": torch.tensor(row_of)[:, None].expand(-1, 3)})

    def prompt(self, row):
        return str(row)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A denoiser that says how many samples it was run on, with gradient and without."""

    inner: Any
    seen: dict[bool, int]

    @property
    def path(self):
        return self.inner.path

    @property
    def prediction(self):
        return self.inner.prediction

    def __call__(self, x_t, t, cond):
        out = self.inner(x_t, t, cond)
        self.seen[out.requires_grad] = self.seen.get(out.requires_grad, 0) + len(t)
        return out


def collator(kind="pairs") -> Collator:
    return Collator(rows=Rows(), kind=kind, scale=LatentScale(scale=1.0), seed=0, prompt_dropout=0.5)


def drawn(method, reference, count=2, batch_size=3):
    measure = measure_with(reference, method.needs.errors, 0, Plain())
    return known_draws(collator(method.needs.batches), count, measure, batch_size=batch_size)


def batches(source, number, batch_size=3):
    made = stream(source, batch_size=batch_size, accumulate=1, share=Share())
    return [next(made) for _ in range(number)]


def test_every_pair_comes_back_at_its_own_draws_and_no_others():
    seen = {}
    for batch in batches(drawn(METHODS["diffusion_dpo"](), toy(), count=2), 12):
        for i, number in enumerate(batch.samples):
            seen.setdefault(number, []).append(torch.cat([batch.x_w[i].flatten(), batch.cond["c"][i]]))
    assert sorted(seen) == list(range(12))  # 6 pairs, 2 draws
    assert all(len(rows) == 3 and torch.equal(rows[0], row) for rows in seen.values() for row in rows)
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("name", ELIGIBLE)
def test_a_step_with_known_errors_is_the_step_of_a_run_that_asks_the_reference(name, prediction):
    method = METHODS[name](beta=100.0, error_space="eps")
    reference = toy(prediction)
    for batch in batches(drawn(method, reference), 4):
        rng, outs = SampleRng(0, batch.samples), []
        for known in (batch, replace(batch, err_ref=None)):
            policy = toy(prediction, seed=1)
            out = method(policy, reference, known, rng)
            out.loss.mean().backward()
            outs.append((out, [p.grad for p in policy.net.parameters()]))
        (ours, grads), (asked, asked_grads) = outs
        torch.testing.assert_close(ours.loss, asked.loss, atol=1e-6, rtol=1e-6)
        for a, b in zip(grads, asked_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # a weight of the loss may differ by a last digit
        for key in ours.metrics.keys() & {"err_w", "err_l", "err"}:
            assert torch.equal(ours.metrics[key], asked.metrics[key])
        for key in ours.metrics.keys() & {"err_ref_w", "err_ref_l", "winner_gain", "loser_gain"}:
            torch.testing.assert_close(ours.metrics[key], asked.metrics[key], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ELIGIBLE)
def test_at_equal_weights_margins_are_exactly_zero(name):
    method = METHODS[name]()
    for batch in batches(
        drawn(method, toy(), batch_size=4), 3, batch_size=4
    ):  # the last draws of a piece are filled up
        out = method(toy(), toy(), batch, SampleRng(0, batch.samples))
        assert out.metrics["rewards/margins"].tolist() == [0.0] * 4


def test_independent_noise_and_scores_of_the_method_count():
    method = METHODS["diffusion_dpo"](share_noise=False)
    own, shared = (drawn(m, toy()).errors for m in (method, METHODS["diffusion_dpo"]()))
    assert torch.equal(own[..., 0], shared[..., 0])
    assert not torch.equal(own[..., 1], shared[..., 1])


def test_a_step_runs_two_denoiser_samples_a_pair_and_none_of_the_reference():
    method = METHODS["diffusion_dpo"]()
    before, policy_seen, reference_seen = {}, {}, {}
    source = drawn(method, Counted(inner=toy(), seen=before))
    assert before == {False: 2 * 6 * 2}  # once: 2 images, 6 pairs, 2 draws
    policy, reference = Counted(inner=toy(), seen=policy_seen), Counted(inner=toy(), seen=reference_seen)
    for batch in batches(source, 5):
        method(policy, reference, batch, SampleRng(0, batch.samples))
    assert policy_seen == {True: 5 * 3 * 2}
    assert reference_seen == {}


def test_an_error_that_is_not_finite_is_named_with_its_items():
    with pytest.raises(
        RunError, match=r"errors of the reference must be finite at all fixed draws, got .* items \[0, 1"
    ):
        known_draws(collator(), 1, lambda batch: torch.full((3, 2), float("nan")), batch_size=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(10))
    return root


def run_table(world, output, **train):
    sections = {"train": {"steps": 4, "fixed_draws": 2, **train}, "data": {"cache": str(output.parent / "cache")}}
    return table(world, output, validation={"every": 4, "fraction": 0.3, "pairs": 2}, **sections)


def test_a_run_asks_the_reference_once_a_draw_and_goes_on_after_a_kill(world, tmp_path, monkeypatch):
    calls, ask = [], AdapterReference.__call__

    def counted(self, x_t, t, cond):
        calls.append(len(t))
        return ask(self, x_t, t, cond)

    monkeypatch.setattr(AdapterReference, "__call__", counted)
    monkeypatch.setattr(fixed_draws, "BATCHES_PER_PART", 1)
    whole = diffalign.train(run_table(world, tmp_path / "a" / "whole"))
    lines = [line for line in metrics(whole.folder) if "loss" in line]
    assert lines[0]["rewards/margins"] == 0
    assert lines[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    [folder] = (tmp_path / "a" / "cache" / "reference").iterdir()
    parts = sorted(folder.glob("part-*"))
    validations = 2 * 10 * 2 * 2  # at steps 0 and 4, in ten deciles, two pairs
    assert sum(calls) == len(parts) * 4 + validations  # a part is one batch of two pairs
    calls.clear()

    save, saved = fixed_draws.save_shard, []

    def dying(*args):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(args)
        save(*args)

    monkeypatch.setattr(fixed_draws, "save_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        diffalign.train(run_table(world, tmp_path / "b" / "run"))
    monkeypatch.setattr(fixed_draws, "save_shard", save)
    calls.clear()
    again = diffalign.train({**run_table(world, tmp_path / "b" / "run"), "resume": "latest"})
    assert sum(calls) == (len(parts) - 3) * 4 + validations
    assert same(weights(whole.folder, 4), weights(again.folder, 4))
    assert [line for line in metrics(again.folder) if "loss" in line] == lines

    calls.clear()
    diffalign.train(run_table(world, tmp_path / "a" / "second"))
    assert sum(calls) == validations  # another run finds them in the cache
    diffalign.train(run_table(world, tmp_path / "a" / "third", batch_size=1))
    assert len(list((tmp_path / "a" / "cache" / "reference").iterdir())) == 2  # another key is kept beside
    assert all(torch.isfinite(load_file(part)["errors"]).all() for part in parts)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"fixed_draws": 0}}, "config.train.fixed_draws must be at least 1, got 0"),
        ({"method": {"name": "cpo", "beta": 1.0}}, "method 'cpo', which measures against no reference; got 4"),
        ({"method": {"name": "inpo"}}, "'inpo', which asks more of its reference than its errors at a draw; got 4"),
        ({"method": {"name": "ncp_dpo"}}, "'ncp_dpo', which asks more of its reference"),
        (
            {"method": {"name": "linear_dpo"}},
            r"with a reference that moves, got 4 and 'ema'; set train\.reference = \"start\"",
        ),
        (
            {"method": {"name": "spin"}, "rounds": {"count": 2}},
            "must be left out with a reference that moves, got 4 and 'pool'",
        ),
        ({"data": {"cache": False}}, "config.data.cache must not be false with train.fixed_draws, whose errors are"),
    ],
)
def test_runs_that_need_more_of_the_reference_are_refused(tmp_path, sections, message):
    made = table(tmp_path, tmp_path / "run", train={"fixed_draws": 4})
    for name, section in sections.items():
        made[name] = section if name == "method" else {**made.get(name, {}), **section}
    with pytest.raises(InputError, match=message):
        config.parse(made)


def test_fit_learns_from_known_errors_and_a_safeguard_asks_the_policy_alone():
    method = METHODS["diffusion_dpo"](beta=10.0, safeguard=Safeguard(mu=0.9))
    policy, reference = toy(), toy()
    source = stream(drawn(method, reference), batch_size=3, accumulate=1, share=Share())
    optimizer = torch.optim.AdamW(policy.net.parameters(), lr=1e-3)
    reports = list(fit.fit(policy, reference, method, source, optimizer, steps=8))
    assert reports[0].metrics["rewards/margins"] == 0
    assert reports[-1].metrics["rewards/margins"] > 0
    assert "kl_w" not in reports[0].metrics
