"""How exactly the logit is known: differences formed element by element, margins of 0 at equal weights, the table."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import precision
from diffalign import losses
from diffalign.methods import METHODS
from diffalign.methods.measure import errors_between, image_errors, pair_errors
from diffalign.rng import SampleRng
from tests.toys import ON_DATA, images, pairs, toy

RNG = SampleRng(0, (0, 1, 2, 3))
DOCS = Path(__file__).parents[1] / "docs" / "precision.md"
ENCODERS = ("ncp_cpo", "ncp_sft")
"""Methods whose reference is looked through and makes no prediction."""
MEASURED = [n for n in (*ON_DATA, "online_dpo") if METHODS[n]().needs.references != ("none",) and n not in ENCODERS]
"""Methods on errors that have a margin over a reference."""


def predictions(change: float = 1e-3, size: int = 4):
    """(policy, reference, target) in float32, close to each other as early in training."""
    generator = torch.Generator().manual_seed(0)
    target, off, more = torch.randn(3, 2 * size, 4, 64, 64, generator=generator)
    return target + 0.4 * off + change * more, target + 0.4 * off, target


def between(pred, pred_ref, target):
    one = torch.ones(len(pred))
    return errors_between(pred, target, pred_ref, noise_level=one[: len(pred) // 2], factor=one)


def test_a_gain_has_more_digits_than_the_difference_of_two_errors():
    pred, pred_ref, target = predictions()
    true = losses.squared_error(pred_ref.double(), target.double()) - losses.squared_error(
        pred.double(), target.double()
    )
    e = between(pred, pred_ref, target)
    formed = torch.cat([e.gain_w, e.gain_l]).double()
    subtracted = torch.cat([e.err_ref_w - e.err_w, e.err_ref_l - e.err_l]).double()
    assert (2500 * (formed - true)).abs().max() < 2e-6
    assert (2500 * (subtracted - true)).abs().max() > 2e-5
    torch.testing.assert_close(subtracted, formed, atol=1e-7, rtol=0)


def test_what_is_reported_of_errors_is_as_before_and_has_no_gradient_of_the_gain():
    pred, pred_ref, target = predictions()
    e = between(pred, pred_ref, target)
    for found, prediction in (((e.err_w, e.err_l), pred), ((e.err_ref_w, e.err_ref_l), pred_ref)):
        assert torch.equal(torch.cat(found), losses.squared_error(prediction, target))


@pytest.mark.parametrize("single", [False, True])
def test_the_gradient_of_a_gain_is_that_of_minus_the_error_to_the_last_bit(single):
    def grads(of):
        policy, reference = toy(seed=1), toy()
        measure = image_errors if single else pair_errors
        e = measure(policy, reference, images() if single else pairs(), RNG)
        of(e).sum().backward()
        return [p.grad for p in policy.net.parameters()]

    gains = grads(lambda e: e.gain if single else e.gain_w + 3 * e.gain_l)
    errors = grads(lambda e: -e.err if single else -e.err_w + 3 * -e.err_l)
    assert all(torch.equal(a, b) for a, b in zip(gains, errors, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("name", MEASURED)
def test_at_equal_weights_every_margin_is_exactly_zero(name, prediction, bf16):
    method = METHODS[name]()
    if bf16 and method.needs.float32_features:
        return  # refused by the config
    batch = images() if method.needs.data == "labelled" else pairs()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        out = method(toy(prediction), toy(prediction), batch, RNG)
    assert out.metrics["rewards/margins"].tolist() == [0.0] * 4
    assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 4


def test_the_logit_of_rounded_outputs_is_exact_in_float32_alone():
    found = precision.of_outputs((4, 16, 16), pairs=4)["error"]
    assert found["float32"]["elements"] < 1e-5 < 1e-3 < found["float16"]["elements"] < found["bfloat16"]["elements"]


def test_the_table_in_the_docs_is_the_one_that_was_measured():
    found = json.loads(precision.OUT.read_text())
    text = DOCS.read_text()
    assert len(precision.rows(found)) == 7
    assert all(row in text for row in precision.rows(found))
