"""Metrics read every n steps: the same weights, and no update after a number that is not finite."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign.errors import RunError
from diffalign.fit import NotFinite, Totals, fit
from diffalign.methods.diffusion_dpo import DiffusionDPO
from tests import worlds
from tests.test_train import config, metrics, same, weights
from tests.toys import pairs, toy


def run(reads, *, bad=None, spoil=None, fused=True, steps=6):
    """(reports, weights after each step, error) of a short run; step `bad` is spoilt."""
    policy, calls = toy(), []

    class Method(DiffusionDPO):
        def __call__(self, *args):
            out = super().__call__(*args)
            calls.append(1)
            return spoil(out) if len(calls) == bad else out

    optimizer = torch.optim.AdamW(policy.net.parameters(), lr=1e-2, fused=fused)
    batches = (pairs(4, seed=i, first=4 * i) for i in range(steps))
    reports, states, error = [], [], None
    try:
        for report in fit(policy, toy(), Method(beta=10.0), batches, optimizer, steps=steps, reads=reads):
            reports.append(report)
            states.append([p.detach().clone() for p in policy.net.parameters()])
    except NotFinite as raised:
        error = raised
    states.append([p.detach().clone() for p in policy.net.parameters()])
    return reports, states, error


def of_loss(out):
    return type(out)(loss=out.loss * float("nan"), metrics=out.metrics, noise_level=out.noise_level)


def of_gradient(out):
    out.loss.register_hook(lambda grad: grad * float("inf"))
    return out


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reading_less_often_changes_no_weight_and_no_number(monkeypatch):
    counted, parted = [], Totals.parted
    every, states, _ = run(lambda step: True)
    monkeypatch.setattr(Totals, "parted", lambda *args, **kwargs: counted.append(1) or parted(*args, **kwargs))
    rare, other, _ = run(lambda step: step % 3 == 0)
    assert all(equal(a, b) for a, b in zip(states, other, strict=True))
    assert [bool(report.metrics) for report in rare] == [False, False, True] * 2
    assert (rare[2].metrics, rare[5].metrics) == (every[2].metrics, every[5].metrics)
    assert [report.samples for report in rare] == [4] * 6


def test_nothing_is_read_in_the_other_steps(monkeypatch):
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(1) or tolist(self))
    steps = fit(
        toy(), toy(), DiffusionDPO(), iter([pairs()] * 2), torch.optim.AdamW(toy().net.parameters(), fused=True),
        steps=2, reads=lambda step: step == 2,
    )  # fmt: skip
    next(steps)
    assert read == []
    next(steps)
    assert len(read) == 2


def test_no_more_than_a_few_steps_go_on_unread(monkeypatch):
    monkeypatch.setattr(sys.modules["diffalign.fit"], "MOST_UNREAD", 2)
    reports, _, _ = run(lambda step: False)
    assert [bool(report.metrics) for report in reports] == [False, True] * 3


@pytest.mark.parametrize(("spoil", "what"), [(of_loss, "loss"), (of_gradient, "gradient")])
def test_no_update_is_made_from_a_bad_step_on_and_the_next_read_names_it(spoil, what):
    _, good, _ = run(lambda step: True)
    reports, states, error = run(lambda step: step % 6 == 0, bad=3, spoil=spoil)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert str(error).startswith(f"{what} is not finite at step 3 ")
    assert error.batch.samples == (8, 9, 10, 11)
    assert all(equal(state, good[1]) for state in states[2:])  # what two steps made of them


def test_an_optimizer_that_cannot_hold_back_is_read_every_step():
    reports, _, error = run(lambda step: step % 6 == 0, bad=3, spoil=of_loss, fused=False)
    assert [bool(report.metrics) for report in reports] == [True, True]
    assert str(error).startswith("loss is not finite at step 3 ")


def test_a_run_that_logs_every_third_step_ends_the_same_and_keeps_its_bad_batch(tmp_path, monkeypatch):
    worlds.sd(tmp_path / "sd")
    worlds.parquet(tmp_path / "pairs.parquet", worlds.preference_rows(10))
    often = diffalign.train(config(tmp_path, tmp_path / "often", checkpoint={"every": 6}))
    rare = diffalign.train(config(tmp_path, tmp_path / "rare", train={"log_every": 3}, checkpoint={"every": 6}))
    assert same(weights(often.folder, 6), weights(rare.folder, 6))
    assert metrics(rare.folder) == metrics(often.folder)[2::3]

    call, count = DiffusionDPO.__call__, []

    def poisoned(self, *args):
        count.append(1)
        out = call(self, *args)
        return of_loss(out) if len(count) == 4 else out

    monkeypatch.setattr(DiffusionDPO, "__call__", poisoned)
    with pytest.raises(RunError, match=r"loss is not finite at step 4 \(nan\); no update was made, the batch is saved"):
        diffalign.train(config(tmp_path, tmp_path / "bad", train={"log_every": 3}, checkpoint={"every": 6}))
    assert load_file(tmp_path / "bad" / "bad-batch-0.safetensors")["samples"].tolist() == [6, 7]
    assert [line["step"] for line in metrics(tmp_path / "bad")] == [3]
    assert not list((tmp_path / "bad" / "checkpoints").glob("step-*"))
