"""Diffusion-KTO: reference values (offline.md 21, losses.md 5), baselines over processes, utilities."""

from dataclasses import replace

import pytest
import torch

from diffalign.config import parse
from diffalign.errors import InputError
from diffalign.methods.diffusion_kto import DiffusionKTO, class_sums, kto_baseline, kto_loss
from diffalign.types import Shared
from tests.test_config import BASE
from tests.test_measure import PREDICTIONS, RNG, planted
from tests.toys import images, toy

GAIN = torch.tensor([0.001, -0.001, 0.002, -0.0005], dtype=torch.float64)
LABEL = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)


def baseline(gain=GAIN, label=LABEL, kind="mean") -> torch.Tensor:
    return kto_baseline(class_sums(gain, label), kind=kind)


def batch(label=LABEL):
    found = images()
    return replace(found, x_0=found.x_0.double(), label=label)


def step(method, gain=GAIN, label=LABEL, shared=None):
    x = batch(label)
    policy = planted([0.1] * len(gain), x.x_0[:1].expand(1, -1, -1, -1))
    policy = replace(policy, x_0=x.x_0, errors=(0.1 - gain).clone().requires_grad_())
    reference = replace(policy, errors=torch.full_like(gain, 0.1))
    return policy, method(policy, reference, x, RNG, shared or Shared())


def test_diffusion_kto_has_its_reference_values():
    _, out = step(DiffusionKTO())
    expected = [0.348645135334, 0.798186777740, 0.835483537104, 0.294214972163]
    assert out.metrics["kl"].tolist() == pytest.approx([0.000375] * 4, abs=1e-12)
    assert out.loss.tolist() == pytest.approx(expected, abs=1e-9)
    assert out.loss.mean().item() == pytest.approx(0.569132605585, abs=1e-9)


def test_the_vector_of_the_loss_tables_holds():
    gain, label = torch.tensor([2e-4, -1e-4], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = kto_loss(gain, label, torch.tensor(5e-5, dtype=torch.float64), beta=1000.0)
    assert loss.tolist() == pytest.approx([0.462570, 0.462570], abs=5e-7)


def test_the_row_of_the_loss_tables_holds():
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -2.0))
    gain, label = torch.stack([a, b]), torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = kto_loss(gain, label, torch.tensor(3.0, dtype=torch.float64), beta=0.1).sum()
    d_a, d_b = (g.item() / 0.1 for g in torch.autograd.grad(loss, (a, b)))
    assert (loss.item(), d_a, d_b) == pytest.approx((0.778853, -0.240261, 0.235004), abs=5.1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equal_policy_and_reference_have_every_loss_at_one_half_and_a_gradient(prediction):
    policy, reference = toy(prediction), toy(prediction)
    out = DiffusionKTO()(policy, reference, images(), RNG)
    assert out.loss.tolist() == [0.5] * 4
    assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 4
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


def test_good_images_are_drawn_in_and_bad_ones_pushed_out():
    policy, out = step(DiffusionKTO())
    grad = torch.autograd.grad(out.loss.sum(), policy.errors)[0]
    assert (grad[:2] > 0).all()
    assert (grad[2:] < 0).all()


def test_the_baseline_is_a_constant_to_the_gradient():
    policy, out = step(DiffusionKTO())
    z = out.metrics["kl"][0]
    grad = torch.autograd.grad(out.loss.sum(), policy.errors)[0]
    gain = GAIN.clone().requires_grad_()
    alone = torch.autograd.grad(kto_loss(gain, LABEL, z, beta=1000.0).sum(), gain)[0]
    torch.testing.assert_close(grad, -alone, atol=0, rtol=1e-6)
    assert not z.requires_grad


def test_the_mean_baseline_is_cut_at_zero_and_that_of_class_means_is_not():
    assert baseline(-GAIN).item() == 0
    assert baseline(-GAIN, kind="class_means").item() == pytest.approx(-0.000375, abs=1e-15)


def test_class_means_weigh_both_classes_alike_and_leave_out_one_that_is_absent():
    label = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    good, bad = GAIN[:3].mean().item(), GAIN[3].item()
    assert baseline(label=label, kind="class_means").item() == pytest.approx((good + bad) / 2, abs=1e-15)
    for sign in (1.0, -1.0):
        only = torch.full((4,), sign, dtype=torch.float64)
        assert baseline(label=only, kind="class_means").item() == pytest.approx(GAIN.mean().item(), abs=1e-15)


@pytest.mark.parametrize("kind", ["mean", "class_means"])
def test_the_baseline_is_over_the_micro_batch_of_all_processes(kind):
    parts = [(GAIN[:1], LABEL[:1]), (GAIN[1:], LABEL[1:])]
    sent = []
    for gain, label in parts:
        class_sums(gain, label, reduce=lambda total: sent.append(total) or total)
    both = sum(sent)
    found = [kto_baseline(class_sums(g, y, reduce=lambda total: both), kind=kind).item() for g, y in parts]
    assert found == pytest.approx([baseline(kind=kind).item()] * 2, abs=1e-15)


def test_a_methods_call_sums_over_processes():
    def twin(total):
        return total + torch.stack([torch.tensor([0.004, 0.0]), torch.tensor([4.0, 0.0])]).to(total)

    _, out = step(DiffusionKTO(), shared=Shared(reduce=twin))
    assert out.metrics["kl"][0].item() == pytest.approx((GAIN.sum().item() + 0.004) / 8, abs=1e-9)


@pytest.mark.parametrize(("utility", "steep", "flat"), [("loss_averse", -20.0, 20.0), ("risk_seeking", 20.0, -20.0)])
def test_utilities_are_steep_where_their_name_says(utility, steep, flat):
    x = torch.tensor([steep, flat], dtype=torch.float64, requires_grad=True)
    loss = kto_loss(
        x, torch.ones(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64), beta=1.0, utility=utility
    )
    grad = torch.autograd.grad(loss.sum(), x)[0]
    assert grad.tolist() == pytest.approx([-1.0, 0.0], abs=1e-6)


def test_the_sigmoid_utility_leaves_hopeless_images_alone():
    x = torch.tensor([-20.0], dtype=torch.float64, requires_grad=True)
    loss = kto_loss(x, torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64), beta=1.0)
    assert abs(torch.autograd.grad(loss.sum(), x)[0].item()) < 1e-8


@pytest.mark.parametrize("utility", ["sigmoid", "loss_averse", "risk_seeking"])
@pytest.mark.parametrize("gain", [-1e4, 0.0, 1e4])
def test_losses_are_finite_far_from_zero_in_float32(utility, gain):
    x = torch.tensor([gain], requires_grad=True)
    loss = kto_loss(x, torch.ones(1), torch.zeros(()), beta=1.0, utility=utility)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_weights_multiply_the_losses_of_their_class():
    plain, weighed = (step(m)[1].loss for m in (DiffusionKTO(), DiffusionKTO(weight_good=2.0, weight_bad=0.5)))
    torch.testing.assert_close(weighed / plain, torch.tensor([2.0, 2.0, 0.5, 0.5], dtype=torch.float64))


def test_a_shift_of_both_models_errors_changes_nothing():
    x = batch()
    a, b = (planted([e], x.x_0) for e in (0.10, 0.11))
    c, d = (planted([e + 0.05], x.x_0) for e in (0.10, 0.11))
    torch.testing.assert_close(DiffusionKTO()(a, b, x, RNG).loss, DiffusionKTO()(c, d, x, RNG).loss, atol=1e-9, rtol=0)


def test_means_of_the_metrics_are_the_releases_numbers():
    _, out = step(DiffusionKTO(), label=torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    means = {k: v.mean().item() for k, v in out.metrics.items()}
    assert means["likelihood"] == pytest.approx(GAIN.mean().item(), abs=1e-12)
    assert means["diff_pos"] == pytest.approx(GAIN[:3].mean().item(), abs=1e-12)
    assert means["diff_neg"] == pytest.approx(GAIN[3].item(), abs=1e-12)
    assert means["rewards/chosen"] == pytest.approx(1000 * GAIN[:3].mean().item(), abs=1e-9)
    assert means["share_pos"] == 0.75


def test_images_without_labels_are_named():
    with pytest.raises(InputError, match=r"must say of each image whether it is good .* got no labels"):
        DiffusionKTO()(toy(), toy(), replace(images(), label=None), RNG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0\.0"),
        ({"weight_bad": -1.0}, r"method\.weight_bad must be at least 0, got -1\.0"),
        ({"weight_good": 0.0, "weight_bad": 0.0}, r"weight_good must be positive where weight_bad is 0"),
        ({"utility": "kahneman"}, r"config\.method\.utility must be one of 'sigmoid', 'loss_averse', 'risk_seeking'"),
        ({"baseline": "median"}, r"config\.method\.baseline must be one of 'mean', 'class_means'"),
        ({"link": "sigmoid"}, r"link must be left out with method 'diffusion_kto': its loss is not a link"),
        ({"safeguard": {"mu": 0.9}}, r"safeguard must be left out with method 'diffusion_kto': it has no winner"),
        ({"scores": {"soft": 1.0}}, r"scores must be left out with method 'diffusion_kto'"),
        ({"share_noise": True}, r"share_noise must be left out with method 'diffusion_kto'"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line_with_the_reason(options, message):
    with pytest.raises(InputError, match=message) as caught:
        parse({**BASE, "method": {"name": "diffusion_kto", **options}})
    assert "\n" not in str(caught.value)
