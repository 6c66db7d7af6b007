"""Inversion: identities of one move and of the way up and down, oracles, and what only the released code does."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import paths
from diffalign.errors import InputError
from diffalign.paths import DDPMPath, FlowPath, TimestepSampling
from diffalign.rng import SampleRng
from diffalign.sampling.inversion import Ladder, clean_level, climb, draw_t, invert, level_at, posterior_std
from diffalign.types import Cond
from tests.toys import SHAPE, ddpm, flow, pairs, sd_alpha_bar, toy

EXACT_DDPM = DDPMPath(alpha_bar=sd_alpha_bar())
PREDICTIONS = ["epsilon", "v_prediction", "velocity"]
RELEASE = Ladder(mode="release", eta=0.0)


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model that always tells the same noise, and keeps the t that it was asked at."""

    eps: Tensor
    path: Any = EXACT_DDPM
    prediction: Any = "epsilon"
    asked: list = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.append(t.tolist())
        return self.eps[cond["row"]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A flow whose velocity is a function of the sample alone."""

    path: Any
    prediction: Any = "velocity"

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.sin(x_t) + 0.5 * t.reshape(-1, 1, 1, 1)


def rows(size: int) -> Cond:
    return Cond({"row": torch.arange(size), "c": torch.zeros(size, 3)})


def randn(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(prediction: str, *shares: float) -> Tensor:
    """t at these shares of the noise range."""
    if prediction == "velocity":
        return torch.tensor(shares, dtype=torch.float64)
    return (torch.tensor(shares, dtype=torch.float64) * 1000).round().long()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_move_from_clean_finds_the_noise_that_the_model_predicts_at_the_image(prediction):
    model, batch = toy(prediction), pairs(3)
    t = times(prediction, 0.402, 0.05, 0.999).to(torch.float32 if prediction == "velocity" else torch.long)
    found = invert(model, batch.x_w, t, batch.cond, Ladder(levels=1))
    with torch.no_grad():
        pred = model(batch.x_w, torch.zeros_like(t), batch.cond)
    eps = batch.x_w + pred if prediction == "velocity" else pred  # at the clean level v of a DDPM is eps itself
    torch.testing.assert_close(found.eps, eps, atol=2e-5, rtol=1e-4)  # divided by sigma_50 = 0.22
    assert found.forwards.tolist() == [1.0] * 3


def test_one_move_from_clean_is_exact_in_float64():
    eps, x_0 = randn(1), randn(1, seed=1)
    found = invert(Known(eps=eps), x_0, torch.tensor([402]), rows(1), Ladder(levels=1))
    torch.testing.assert_close(found.eps, eps, atol=1e-9, rtol=0)


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("levels", [1, 4, 10])
def test_the_way_up_with_constant_noise_is_add_noise_and_the_way_down_gives_the_image_back(levels, renoise):
    eps, x_0, t = randn(2), randn(2, seed=1), torch.tensor([402, 999])
    model = Known(eps=eps)
    found = invert(model, x_0, t, rows(2), Ladder(levels=levels, renoise=renoise))
    torch.testing.assert_close(found.x_t, paths.add_noise(EXACT_DDPM, x_0, eps, t), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.eps, eps, atol=1e-9, rtol=0)
    x, level = found.x_t, level_at(EXACT_DDPM, t)
    for s in (300, 200, 50):
        below = level_at(EXACT_DDPM, torch.full_like(t, s))
        x, level = climb(model, x, rows(2), level, below), below
    x = climb(model, x, rows(2), level, clean_level(t))
    torch.testing.assert_close(x, x_0, atol=1e-9, rtol=0)


def test_on_a_flow_with_constant_velocity_the_way_up_is_a_straight_line():
    v, x_0, t = randn(2), randn(2, seed=1), torch.tensor([0.402, 0.95], dtype=torch.float64)
    found = invert(Known(eps=v, path=flow(), prediction="velocity"), x_0, t, rows(2))
    torch.testing.assert_close(found.x_t, x_0 + t.reshape(-1, 1, 1, 1) * v, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.eps, x_0 + v, atol=1e-9, rtol=0)  # v = eps - x_0


def test_the_last_level_of_a_ladder_is_t_itself_and_the_first_the_clean_image():
    model = Known(eps=randn(1))
    invert(model, randn(1), torch.tensor([402]), rows(1))
    assert model.asked == [[0], [100], [200], [300], [400]]


def test_a_shifted_flow_has_the_same_even_ladder():
    model = Known(eps=randn(1), path=flow(shift=3.0), prediction="velocity")
    invert(model, randn(1), torch.tensor([0.35], dtype=torch.float64), rows(1))
    assert [t[0] for t in model.asked] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_inversion_of_a_flow_is_the_samplers_euler_reversed():
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, x_0 = Line(path=flow()), randn(1)
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[1e-9, 0.25, 0.5, 0.75])
    euler.sigmas = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.8], dtype=torch.float64)  # upwards, which it does not mind
    euler.timesteps = euler.sigmas[:-1] * 1000
    x = x_0
    for t in euler.timesteps:
        x = euler.step(model(x, t[None] / 1000, rows(1)), t, x, return_dict=False)[0].double()
    found = invert(model, x_0, torch.tensor([0.8], dtype=torch.float64), rows(1), Ladder(levels=4))
    torch.testing.assert_close(found.x_t, x, atol=1e-5, rtol=0)  # the scheduler works in float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("t", "last"), [(402, 501), (999, 901), (1, 1), (901, 901)])
def test_release_mode_walks_the_ladder_of_diffusers_inverse_scheduler(prediction, t, last):
    from diffusers import DDIMInverseScheduler

    oracle = DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    oracle.set_timesteps(10)
    path = DDPMPath(alpha_bar=oracle.alphas_cumprod)
    asked = []

    class Model:
        def __call__(self, x_t, t, cond):
            asked.append(t.item())
            return torch.cos(x_t) + 0.001 * t.reshape(-1, 1, 1, 1)

    Model.path, Model.prediction = path, prediction
    x_0 = randn(1).float()
    found = invert(Model(), x_0, torch.tensor([t]), rows(1), RELEASE)
    sources, asked[:] = list(asked), []
    x = x_0
    for goal in range(1, last + 1, 100):  # its steps name the goal; the model is told the source
        x = oracle.step(Model()(x, torch.tensor([goal - 100]), rows(1)), goal, x).prev_sample
    assert sources == list(range(-99, last, 100))
    torch.testing.assert_close(found.x_t, x, atol=1e-5, rtol=1e-5)


def test_release_mode_at_402_stands_at_501_and_takes_it_for_402():
    n, clean = randn(1), randn(1, seed=1)
    at = lambda t: level_at(EXACT_DDPM, torch.tensor([t]))  # noqa: E731
    x_0 = at(0).alpha * clean + at(0).sigma * n  # the image, seen as a sample at index 0, whose noise is n
    found = invert(Known(eps=n), x_0, torch.tensor([402]), rows(1), RELEASE)
    torch.testing.assert_close(found.x_t, at(501).alpha * clean + at(501).sigma * n, atol=1e-9, rtol=0)
    inverted = (found.x_t - at(501).alpha * x_0) / at(501).sigma
    torch.testing.assert_close(found.eps, 1.11927 * inverted - 0.16387 * x_0, atol=5e-5, rtol=0)
    assert found.forwards.tolist() == [6.0]


def test_exact_mode_at_402_stands_at_402_and_tau_is_the_inverted_noise():
    n, x_0, t = randn(1), randn(1, seed=1), torch.tensor([402])
    found = invert(Known(eps=n), x_0, t, rows(1))
    torch.testing.assert_close(found.x_t, paths.add_noise(EXACT_DDPM, x_0, n, t), atol=1e-9, rtol=0)
    assert found.forwards.tolist() == [5.0]


@pytest.mark.parametrize(
    ("prediction", "ladder"),
    [
        *product(PREDICTIONS, [Ladder(), Ladder(levels=5, renoise=True)]),
        *product(["epsilon", "v_prediction"], [RELEASE, Ladder(mode="release")]),
    ],
)
def test_every_sample_of_a_batch_climbs_to_its_own_t_as_if_alone(prediction, ladder):
    model, batch = toy(prediction), pairs(4)
    t = times(prediction, 0.402, 0.95, 0.07, 0.402).to(torch.float32 if prediction == "velocity" else torch.long)
    together = invert(model, batch.x_w, t, batch.cond, ladder, noise=SampleRng(0, batch.samples).normal)
    for i in range(4):
        one = slice(i, i + 1)
        noise = SampleRng(0, (i,)).normal
        alone = invert(model, batch.x_w[one], t[one], batch.cond.rows(one), ladder, noise=noise)
        torch.testing.assert_close(together.x_t[one], alone.x_t, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.eps[one], alone.eps, atol=1e-4, rtol=1e-4)
        assert together.forwards[i] == alone.forwards[0]


def test_a_rung_runs_only_the_samples_that_are_still_below_their_t():
    model = Known(eps=randn(3))
    invert(model, randn(3), torch.tensor([250, 850, 100]), rows(3), Ladder(levels=10))
    assert [len(t) for t in model.asked] == [3, 2, 2, 1, 1, 1, 1, 1, 1]


def test_renoise_doubles_the_forwards_and_corrects_with_the_mean_of_two_predictions():
    model, x_0, t = Line(path=flow()), randn(1), torch.tensor([0.5], dtype=torch.float64)
    found = invert(model, x_0, t, rows(1), Ladder(levels=1, renoise=True))
    first = torch.sin(x_0)
    second = torch.sin(x_0 + 0.5 * first)
    torch.testing.assert_close(found.x_t, x_0 + 0.5 * (first + second) / 2, atol=1e-9, rtol=0)
    assert found.forwards.tolist() == [2.0]
    assert invert(model, x_0, t, rows(1), Ladder(levels=5, renoise=True)).forwards.tolist() == [6.0]


def test_release_noise_has_the_deviation_of_the_ddim_posterior():
    from diffusers import DDIMScheduler

    oracle = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    path = DDPMPath(alpha_bar=oracle.alphas_cumprod)
    for low in (1, 401, 801):
        ours = posterior_std(*(level_at(path, torch.tensor([s])) for s in (low, low + 100)))
        assert ours.item() == pytest.approx(oracle._get_variance(low + 100, low).sqrt().item(), rel=1e-4)
    model, x_0, t = Known(eps=torch.zeros(1, *SHAPE), path=path), torch.zeros(1, *SHAPE), torch.tensor([1])
    drawn = randn(1).float()
    noisy = invert(model, x_0, t, rows(1), Ladder(mode="release"), noise=lambda like, purpose: drawn)
    std = oracle._get_variance(1, -99).sqrt().item()
    torch.testing.assert_close(noisy.x_t, 0.1 * std * drawn, atol=1e-6, rtol=1e-3)


def test_each_rung_draws_noise_of_its_own():
    purposes = []

    def noise(like, purpose):
        purposes.append(purpose)
        return torch.zeros_like(like)

    invert(Known(eps=randn(1)), randn(1), torch.tensor([250]), rows(1), Ladder(mode="release"), noise=noise)
    assert len(set(purposes)) == len(purposes) == 4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_gradient_flows_into_the_inversion(prediction):
    model, batch = toy(prediction), pairs(2)
    t = draw_t(model.path, SampleRng(0, batch.samples), Ladder())
    found = invert(model, batch.x_w.requires_grad_(), t, batch.cond)
    assert not found.x_t.requires_grad
    assert not found.eps.requires_grad


def test_the_images_that_came_in_are_left_as_they_are():
    model, batch = toy(), pairs(2)
    before = batch.x_w.clone()
    invert(model, batch.x_w, torch.tensor([900, 300]), batch.cond)
    assert torch.equal(batch.x_w, before)


@pytest.mark.parametrize("path", [ddpm(), flow(), FlowPath(shift=3.0)])
def test_in_exact_mode_t_is_drawn_from_a_tenth_of_the_range_upwards(path):
    rng = SampleRng(0, tuple(range(2000)))
    path = type(path)(**{**vars(path), "timesteps": TimestepSampling(distribution="uniform")})
    plain, t = path.sample_t(rng), draw_t(path, rng, Ladder(levels=5))
    assert t.dtype == plain.dtype
    assert path.noise_level(t).min() == pytest.approx(0.1, abs=6e-4)
    above = plain >= path.rungs(10)[1]
    assert torch.equal(t[above], plain[above])
    assert torch.equal(draw_t(path, rng, RELEASE), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, r"method\.levels must be at least 1, got 0"),
        ({"eta": 0.1}, r"method\.eta must be left out in mode 'exact'.*got 0\.1"),
        ({"eta": -0.1, "mode": "release"}, r"method\.eta must be at least 0, got -0\.1"),
    ],
)
def test_a_ladder_that_cannot_be_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        Ladder(**options)


@pytest.mark.parametrize(
    ("prediction", "ladder", "message"),
    [
        ("sample", Ladder(), r"must predict epsilon, v or velocity to be inverted, got prediction_type 'sample'"),
        ("velocity", RELEASE, r"method\.mode must be 'exact' on a flow"),
        ("epsilon", Ladder(mode="release"), r"noise must be given with eta 0\.1, got None"),
        ("epsilon", Ladder(mode="release", eta=0.0, levels=800), r"method\.levels must be at most 500"),
    ],
)
def test_what_cannot_be_inverted_is_one_clear_error(prediction, ladder, message):
    model, batch = toy(prediction), pairs(2)
    with pytest.raises(InputError, match=message):
        invert(model, batch.x_w, model.path.at(torch.tensor([0.5, 0.5])), batch.cond, ladder)
