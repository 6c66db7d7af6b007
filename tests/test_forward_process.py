"""What methods that noise their own samples share: t, noise, errors, advantages and the choice of levels."""

from dataclasses import replace

import pytest
import torch

from diffalign import paths
from diffalign.errors import InputError
from diffalign.methods.forward_process import (
    adaptive_error,
    by_sign,
    count_levels,
    draw_levels,
    forward_metrics,
    renoise,
    select_images,
    weighted_kl,
)
from diffalign.rng import SampleRng
from tests.forward import ADVANTAGE, PREDICTIONS, RNG, own, scored
from tests.toys import flow, toy


class Seen:
    """A denoiser that keeps what it was called with."""

    def __init__(self, prediction="velocity"):
        self.inner = toy(prediction)
        self.path, self.prediction = self.inner.path, self.inner.prediction

    def __call__(self, x_t, t, cond):
        self.x_t, self.t = x_t, t
        return self.inner(x_t, t, cond)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_t_is_the_batchs_own_or_else_the_paths(prediction):
    seen, batch = Seen(prediction), own(prediction)
    renoise(seen, None, batch, RNG)
    assert torch.equal(seen.t, batch.t)
    renoise(seen, None, own(prediction, t=None), RNG)
    assert torch.equal(seen.t, seen.path.sample_t(RNG))


def test_images_of_a_group_share_t_and_noise_where_asked_and_nowhere_else():
    seen = Seen()
    batch = own(group=(3, 3, 5, 5), t=None, x_0=own().x_0[:1].repeat(4, 1, 1, 1))
    renoise(seen, None, batch, RNG, share_in_group=True)
    assert torch.equal(seen.t[0], seen.t[1])
    assert torch.equal(seen.x_t[2], seen.x_t[3])
    assert not torch.equal(seen.x_t[0], seen.x_t[2])
    renoise(seen, None, batch, RNG)
    assert seen.t.unique().numel() == 4


def test_the_noise_of_a_group_does_not_depend_on_the_batch_it_is_in():
    batch, seen = own(group=(3, 3, 5, 5)), Seen()
    renoise(seen, None, batch, RNG, share_in_group=True)
    together = seen.x_t[2:]
    rows = slice(2, 4)
    alone = replace(batch, x_0=batch.x_0[rows], cond=batch.cond.rows(rows), samples=batch.samples[rows],
                    advantage=ADVANTAGE[rows], t=batch.t[rows], group=(5, 5))  # fmt: skip
    renoise(seen, None, alone, SampleRng(0, (2, 3)), share_in_group=True)
    assert torch.equal(seen.x_t, together)


@pytest.mark.parametrize("group", [None, (1, 1)])
def test_a_batch_that_does_not_say_what_belongs_together_is_refused(group):
    with pytest.raises(InputError, match=r"batch\.group must have 4 numbers, one an image, got"):
        renoise(toy("velocity"), None, own(group=group), RNG, share_in_group=True)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_residuals_in_x0_are_those_of_the_clean_images_that_predictions_imply(prediction):
    seen, batch = Seen(prediction), own(prediction)
    f = renoise(seen, None, batch, RNG, error_space="x0")
    implied, _ = paths.to_x0_eps(seen.path, seen.prediction, f.pred, seen.x_t, batch.t)
    torch.testing.assert_close(f.residual(f.pred), batch.x_0 - implied, atol=2e-5, rtol=1e-4)  # float32 at alpha 0.1
    torch.testing.assert_close(f.error(f.pred), (batch.x_0 - implied).square().mean((1, 2, 3)), atol=0, rtol=1e-4)


def test_pure_noise_is_a_level_like_any_other():
    f = renoise(toy("velocity"), None, own(), RNG, error_space="x0")
    at_one = renoise(toy("velocity"), None, own(t=torch.ones(4)), RNG, error_space="x0")
    assert at_one.factor.tolist() == [1.0] * 4
    assert torch.isfinite(at_one.residual(at_one.pred)).all()
    torch.testing.assert_close(f.factor, own().t.square())


def test_the_adaptive_error_is_linear_in_the_residual_and_its_weight_has_no_gradient():
    residual = torch.tensor([[0.06, -0.72, 0.0]], dtype=torch.float64, requires_grad=True)
    value = adaptive_error(residual)
    assert value.item() == pytest.approx(0.6692307692, abs=1e-10)
    assert adaptive_error(3 * residual).item() == pytest.approx(3 * value.item())
    grad = torch.autograd.grad(value.sum(), residual)[0]
    torch.testing.assert_close(grad, 2 * residual.detach() / 3 / 0.26)


def test_the_adaptive_weight_of_a_perfect_prediction_stays_finite():
    residual = torch.zeros(2, 3, requires_grad=True)
    adaptive_error(residual).sum().backward()
    assert residual.grad.abs().max() == 0


def test_the_kl_is_0_at_the_reference_and_nothing_without_a_weight():
    pred = torch.randn(2, 4, 3, 3)
    assert weighted_kl(pred, pred.clone(), 0.5).tolist() == [0.0, 0.0]
    assert weighted_kl(pred, None, 0.0).tolist() == [0.0, 0.0]
    torch.testing.assert_close(weighted_kl(pred, pred + 0.1, 0.5), torch.full((2,), 0.005))
    with pytest.raises(InputError, match="reference must be given to a method with a KL weight"):
        weighted_kl(pred, None, 0.5)


def test_advantages_are_above_the_prompts_mean_in_units_of_the_rounds_spread():
    chosen = select_images(scored([1.0, -1.0, 2.0, 0.0, 5.0, 5.0], [0, 0, 0, 0, 1, 1]))
    spread = torch.tensor([1.0, -1.0, 2.0, 0.0, 5.0, 5.0], dtype=torch.float64).std(correction=0) + 1e-4
    torch.testing.assert_close(chosen.weight, (torch.tensor([0.5, -1.5, 1.5, -0.5]) / spread).float())
    assert chosen.places.tolist() == [[0], [1], [2], [3]]
    assert chosen.metrics.items() >= {"zero_std_ratio": 0.5, "trained_prompt_num": 1.0}.items()


def test_equal_scores_are_left_out_although_their_float_mean_is_off_by_a_digit():
    equal = torch.full((24,), 0.1, dtype=torch.float64)
    nothing = select_images(replace(scored([0.1] * 24, [0] * 24), scores={"clip": equal}))
    assert nothing.places.shape == (0, 1)
    assert nothing.weight.shape == (0,)
    assert nothing.metrics["zero_std_ratio"] == 1.0


def test_advantages_are_clipped():
    chosen = select_images(scored([0.0] * 199 + [1.0], [0] * 200))
    assert chosen.weight.max() == 5.0


def test_prompts_of_one_image_each_have_nothing_to_be_compared_with():
    with pytest.raises(InputError, match=r"group must hold at least 2 images of every prompt"):
        select_images(scored([1.0, 2.0], [0, 1]))


def test_a_prompt_that_has_one_image_left_is_skipped():
    assert select_images(scored([1.0, 2.0, 9.0], [0, 0, 1])).places.tolist() == [[0], [1]]


def test_means_by_sign_are_over_the_images_of_that_sign():
    found = by_sign("err", torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([1.0, 1.0, -1.0, 0.0]))
    assert found["err_pos"].mean() == 1.5
    assert found["err_neg"].mean() == 3.0
    assert found["err"].mean() == 4.0
    none = by_sign("err", torch.ones(2), torch.ones(2))
    assert none["err_neg"].tolist() == [0.0, 0.0]


def test_metrics_are_detached_and_0_where_models_agree():
    same = toy("velocity")
    found = forward_metrics(renoise(same, same, own(), RNG, old=same), ADVANTAGE)
    assert all(v.shape == (4,) and not v.requires_grad for v in found.values())
    assert all(found[name].abs().max() == 0 for name in ("kl_div", "old_kl_div", "old_deviate", "old_deviate_max"))
    torch.testing.assert_close(found["norm_ratio"], torch.ones(4))
    assert torch.equal(found["err"], found["err_ref"])
    without = forward_metrics(renoise(same, None, own(), RNG), ADVANTAGE)
    assert set(without) == {"x0_norm", "x0_norm_max", "err", "err_pos", "err_neg"}


def test_levels_are_drawn_without_repeats_and_in_another_order_for_each_image():
    draws = {draw_levels(9, 9, torch.Generator().manual_seed(i)) for i in range(5)}
    assert len(draws) == 5
    assert all(sorted(d) == list(range(9)) for d in draws)
    assert len(draw_levels(7, 4, torch.Generator().manual_seed(0))) == 4


def test_more_levels_than_there_are_is_an_error():
    assert count_levels(9, None, "moves") == 9
    with pytest.raises(InputError, match=r"method\.level_count must be at most 3, as many as there are moves, got 4"):
        count_levels(3, 4, "moves")


def test_predictions_of_reference_and_old_policy_carry_no_gradient():
    policy, reference, old = (toy("velocity", seed=i) for i in range(3))
    f = renoise(policy, reference, own(), RNG, old=old)
    assert f.pred.requires_grad
    assert not f.pred_ref.requires_grad
    assert not f.pred_old.requires_grad


def test_the_path_of_a_flow_needs_no_shift_to_train_at_a_walks_levels():
    seen = Seen()
    seen.path = flow(3.0)
    renoise(seen, None, own(), RNG)
    assert torch.equal(seen.t, own().t)
