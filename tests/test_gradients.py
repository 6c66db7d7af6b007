"""Gradients of every method's loss in the errors it measures, against finite differences in float64."""

from dataclasses import replace

import pytest
import torch

import diffalign
from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.rng import SampleRng
from tests.test_measure import exact, planted
from tests.test_train import config, world  # noqa: F401
from tests.toys import images

RNG = SampleRng(0, (0, 1))
OPTIONS = {
    "cpo": {"beta": 50.0},
    "diffusion_dpo": {"beta": 500.0},
    "dmpo": {"beta": 500.0},
    "linear_dpo": {"beta": 1e5},  # far beyond its clip, where the weight is constant: elsewhere it is cut off by design
    "mapo": {},
    "seppo": {"beta": 500.0, "flip": "indicator"},
    "spin": {"beta": 500.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_of_a_pair_loss_is_right(name):
    batch, method = exact(2), METHODS[name](**OPTIONS[name])
    reference = planted((0.101, 0.119), batch.x_w, batch.x_l)
    start = planted((0.100, 0.120), batch.x_w, batch.x_l)

    def loss(errors):
        return method(replace(start, errors=errors), reference, batch, RNG).loss

    assert torch.autograd.gradcheck(loss, start.errors, atol=1e-4)


@pytest.mark.parametrize("utility", ["sigmoid", "loss_averse", "risk_seeking"])
def test_the_gradient_of_a_labelled_loss_is_right_where_its_baseline_rests_at_0(utility):
    x = images(2)
    batch = replace(x, x_0=x.x_0.double(), label=torch.tensor([1.0, -1.0]))
    method = METHODS["diffusion_kto"](beta=100.0, utility=utility)
    reference, start = planted([0.10], batch.x_0), planted([0.11], batch.x_0)  # no gain anywhere, so z = 0 nearby too

    def loss(errors):
        return method(replace(start, errors=errors), reference, batch, RNG).loss

    assert torch.autograd.gradcheck(loss, start.errors, atol=1e-4)


def test_a_batch_of_one_has_no_mean_to_be_measured_against(world, tmp_path):  # noqa: F811
    alone = config(world, tmp_path / "run", method={"name": "diffusion_kto", "beta": 100.0}, train={"batch_size": 1})
    with pytest.raises(
        InputError, match=r"train\.batch_size must be at least 2 over all processes with method 'diffusion_kto'"
    ):
        diffalign.train(alone)
