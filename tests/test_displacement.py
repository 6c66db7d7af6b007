"""Likelihood displacement: seen in held-out errors with and without a reference, and said in log and report."""

import json
import logging

import pytest
import torch

import diffalign
from diffalign.evaluate import curves
from diffalign.rng import SampleRng
from diffalign.validation import Validation, entanglement, movement
from tests.test_train import config, metrics, world  # noqa: F401
from tests.toys import pairs, toy


def validation(deciles: dict | None = None, **measured: float) -> Validation:
    return Validation(metrics=measured, deciles=deciles or {})


@pytest.mark.parametrize(
    ("winner", "loser", "displaced"), [(-0.1, -0.2, True), (0.1, -0.2, False), (-0.1, 0.2, False), (0.1, 0.2, False)]
)
def test_displacement_is_both_errors_above_those_of_the_reference(winner, loser, displaced):
    found = movement(validation(), validation(winner_gain=winner, loser_gain=loser))
    assert found is not None
    assert (found.winner, found.loser, found.displaced) == (winner, loser, displaced)


def test_without_a_reference_errors_are_compared_with_those_at_the_start():
    first = validation({"err_w": [0.1, None], "err_l": [0.1, 0.2]}, err_w=0.1, err_l=0.1)
    last = validation({"err_w": [0.3, None], "err_l": [0.2, 0.2]}, err_w=0.2, err_l=0.4)
    found = movement(first, last)
    assert found is not None
    assert (found.winner, found.loser) == (pytest.approx(-0.1), pytest.approx(-0.3))
    assert found.deciles["winner"] == [pytest.approx(-0.2), None]
    assert found.displaced
    assert "the chosen ones most at noise decile 1 of 10" in found.sentence


def test_a_method_that_sees_no_rejected_images_cannot_displace():
    found = movement(validation(err_w=0.1), validation(err_w=0.2))
    assert found is not None
    assert found.loser is None
    assert not found.displaced
    assert movement(validation(loss=1.0), validation(loss=1.0)) is None


def test_gradients_of_a_pair_of_equal_images_point_the_same_way():
    policy, batch = toy(), pairs()
    same = type(batch)(x_w=batch.x_w, x_l=batch.x_w, cond=batch.cond, samples=batch.samples)
    found = entanglement(policy, same, SampleRng(0, batch.samples))
    assert found == {"grad_cos": pytest.approx(1.0), "grad_ratio": pytest.approx(1.0)}
    other = entanglement(policy, batch, SampleRng(0, batch.samples))
    assert -1 <= other["grad_cos"] < 0.9999
    assert all(p.grad is None for p in policy.net.parameters())


def test_the_angle_predicts_whether_a_small_step_of_plain_dpo_hurts_the_winner():
    from diffalign.methods.diffusion_dpo import DiffusionDPO
    from diffalign.methods.measure import pair_errors

    policy, batch, rng = toy(), pairs(1), SampleRng(0, (0,))
    found = entanglement(policy, batch, rng)
    before = pair_errors(policy, None, batch, rng).err_w.item()
    DiffusionDPO(beta=1.0)(policy, toy(), batch, rng).loss.sum().backward()
    with torch.no_grad():
        for p in policy.net.parameters():
            p -= 1e-3 * p.grad
    improved = pair_errors(policy, None, batch, rng).err_w.item() < before
    assert improved == (found["grad_ratio"] > found["grad_cos"])


def test_a_run_that_moves_both_up_says_so_in_log_and_report(world, tmp_path, caplog):  # noqa: F811
    hot = config(world, tmp_path / "run", optimizer={"lr": 0.3}, method={"name": "diffusion_dpo", "beta": 1.0})
    hot |= {"model": {"path": "tiny-sd"}, "data": {"path": "tiny-sd-pairs", "limit": 24}, "train": {"steps": 3}}
    hot["train"] |= {"batch_size": 2, "device": "cpu"}
    hot |= {"validation": {"every": 3, "fraction": 0.3, "pairs": 4}}  # a trained model gets worse wherever it is thrown
    with caplog.at_level(logging.WARNING, logger="diffalign.train"):
        diffalign.train(hot)
    held = [m["validation"] for m in metrics(tmp_path / "run") if "validation" in m]
    assert held[-1]["winner_gain"] < 0
    assert held[-1]["loser_gain"] < 0
    assert {"grad_cos", "grad_ratio"} <= held[-1].keys()
    assert "likelihood displacement" in caplog.text
    found = curves.read_training(tmp_path / "run")
    assert found is not None
    assert found.displaced
    assert found.charts[-1].title == "Gains by noise level at the end"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
