"""Noise paths against diffusers' schedulers, round trips between parametrisations, and how t is drawn."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign import paths
from diffalign.errors import InputError
from diffalign.paths import DDPMPath, FlowPath, TimestepSampling
from diffalign.rng import SampleRng
from tests.toys import ddpm, flow, sd_alpha_bar

PREDICTIONS = ["epsilon", "v_prediction", "sample", "velocity"]
T = torch.tensor([0, 100, 500, 999])


def case(prediction):
    """(path in float64, t, x_0, eps) for one prediction type."""
    path = flow() if prediction == "velocity" else DDPMPath(alpha_bar=sd_alpha_bar())
    t = torch.tensor([0.01, 0.3, 0.9, 0.999], dtype=torch.float64) if prediction == "velocity" else T
    rng = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    return path, t, x_0, eps


def test_the_ddpm_path_is_that_of_diffusers():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    path = DDPMPath(alpha_bar=scheduler.alphas_cumprod)
    x_0, eps = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(paths.add_noise(path, x_0, eps, T), scheduler.add_noise(x_0, eps, T))
    velocity = paths.target(path, "v_prediction", x_0, eps, T)
    torch.testing.assert_close(velocity, scheduler.get_velocity(x_0, eps, T))


def test_the_flow_path_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = scheduler.sigmas[torch.tensor([10, 400, 900])]
    x_0, eps = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    ours = paths.add_noise(flow(), x_0, eps, sigma)
    torch.testing.assert_close(ours, scheduler.scale_noise(x_0, sigma * 1000, eps), atol=1e-5, rtol=0)


def test_the_shifted_levels_are_the_schedulers_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    level = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(FlowPath(shift=3.0).at(level), scheduler.sigmas[:1000].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_target_gives_back_sample_and_noise(prediction):
    path, t, x_0, eps = case(prediction)
    x_t = paths.add_noise(path, x_0, eps, t)
    pred = paths.target(path, prediction, x_0, eps, t)
    back_x0, back_eps = paths.to_x0_eps(path, prediction, pred, x_t, t)
    torch.testing.assert_close(back_x0, x_0, atol=1e-9, rtol=0)
    torch.testing.assert_close(back_eps, eps, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", ["eps", "x0"])
def test_the_error_factor_is_the_ratio_of_errors_after_conversion(prediction, space):
    path, t, x_0, eps = case(prediction)
    x_t = paths.add_noise(path, x_0, eps, t)
    true = paths.target(path, prediction, x_0, eps, t)
    pred = true + torch.randn(true.shape, dtype=torch.float64)
    converted = paths.to_x0_eps(path, prediction, pred, x_t, t)[("x0", "eps").index(space)]
    other = {"x0": x_0, "eps": eps}[space]
    native = (pred - true).square().flatten(1).mean(1)
    elsewhere = (converted - other).square().flatten(1).mean(1)
    torch.testing.assert_close(paths.error_factor(path, prediction, space, t), elsewhere / native, atol=0, rtol=1e-8)


def test_error_factors_match_the_reference_values():
    vp = DDPMPath(alpha_bar=torch.tensor([0.6], dtype=torch.float64))
    zero = torch.tensor([0])
    assert paths.error_factor(vp, "epsilon", "x0", zero).item() == pytest.approx(2 / 3, abs=1e-12)
    assert paths.error_factor(vp, "epsilon", "v", zero).item() == pytest.approx(5 / 3, abs=1e-12)
    t = torch.tensor([0.3], dtype=torch.float64)
    assert paths.error_factor(flow(), "velocity", "eps", t).item() == pytest.approx(0.49, abs=1e-12)
    assert paths.error_factor(flow(), "velocity", "x0", t).item() == pytest.approx(0.09, abs=1e-12)


def test_at_pure_noise_an_error_in_v_is_one_in_x0_and_none_in_eps():
    zero_snr = DDPMPath(alpha_bar=torch.tensor([0.6, 0.0]))
    for path, prediction, t in ((zero_snr, "v_prediction", torch.tensor([1])), (flow(), "velocity", torch.ones(1))):
        assert paths.error_factor(path, prediction, "x0", t).tolist() == [1.0]
        assert paths.error_factor(path, prediction, "eps", t).tolist() == [0.0]


@pytest.mark.parametrize("path", [ddpm(), flow(), flow(3.0)], ids=["ddpm", "flow", "shifted flow"])
def test_the_draw_of_t_does_not_depend_on_the_batch(path):
    together = path.sample_t(SampleRng(7, (0, 1, 2, 3)))
    apart = torch.cat([path.sample_t(SampleRng(7, (i,))) for i in range(4)])
    assert torch.equal(together, apart)


def test_t_stays_in_the_range_that_the_config_names():
    path = DDPMPath(
        alpha_bar=sd_alpha_bar().float(), timesteps=TimestepSampling(distribution="uniform", low=0.2, high=0.4)
    )
    t = path.sample_t(SampleRng(0, tuple(range(2000))))
    assert t.min() >= 200
    assert t.max() < 400
    assert t.unique().numel() > 190  # the range is used, all of it


def test_logit_normal_levels_have_their_median_at_the_mean_of_the_logit():
    sampling = TimestepSampling(distribution="logit_normal", mean=1.0)
    u = sampling.draw(SampleRng(0, tuple(range(4000))))
    logit = (u / (1 - u)).log()
    assert logit.median().item() == pytest.approx(1.0, abs=0.06)
    assert logit.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "low < high"),
        ({"distribution": "logit_normal", "std": 0.0}, "std must be positive"),
        ({"distribution": "uniform", "mean": 1.0}, "must be left out"),
    ],
)
def test_timestep_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TimestepSampling(**options)
