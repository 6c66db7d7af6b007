"""The link family: reference values (losses.md 12), identities (2, 3), limits, options, and the running mean."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from diffalign import losses
from diffalign.errors import InputError
from diffalign.fit import fit
from diffalign.losses import LINKS, PROPERTIES
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.diffusion_kto import kto_loss
from diffalign.methods.measure import ScoreUse
from diffalign.rng import SampleRng
from diffalign.types import RunningMean, Shared
from tests.toys import pairs, toy

A, B = 0.7, -0.2
OPTIONS = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}}
FAMILY = {name: losses.link(name, **OPTIONS.get(name, {})) for name in LINKS}
MARGIN_ONLY = [name for name, p in PROPERTIES.items() if p.margin_only]
SMOOTHED = ("cdpo", "robust", "exo_pair")
HS = (-8.0, -1.3, -0.2, 0.0, 0.4, 0.9, 3.0, 8.0)


def numbers(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in values)


def at(link, a: float, b: float = 0.0) -> float:
    return link(*numbers(a, b)).item()


def slope(link, h: float) -> float:
    w, lo = numbers(h, 0.0)
    return torch.autograd.grad(link(w, lo).sum(), w)[0].item()


def bernoulli_kl(p: float, q: float) -> float:
    return torch.distributions.kl_divergence(
        *(torch.distributions.Bernoulli(torch.tensor(x, dtype=torch.float64)) for x in (p, q))
    ).item()


@pytest.mark.parametrize(
    ("link", "value", "d_a", "d_b"),
    [
        ("sigmoid", 0.341154, -0.289050, 0.289050),
        ("hinge", 0.100000, -1.000000, 1.000000),
        ("ipo", 0.160000, 0.800000, -0.800000),
        ("cdpo", 0.431154, -0.189050, 0.189050),
        ("robust", 0.228654, -0.414050, 0.414050),
        ("exo_pair", 1.396102, -1.234390, 1.234390),
        ("nca_pair", 1.253849, 0.002282, 0.225083),
        ("bco_pair", 1.001325, -0.331812, 0.450166),
        (losses.link("bco_pair", delta=0.25), 0.986498, -0.389361, 0.389361),
        ("apo_zero", 0.781978, -0.221713, 0.247517),
        ("apo_down", 0.957238, 0.016213, 0.205500),
    ],
)
def test_links_have_the_values_and_gradients_of_the_reference_table(link, value, d_a, d_b):
    w, lo = numbers(A, B)
    loss = (FAMILY[link] if isinstance(link, str) else link)(w, lo)
    got = (loss, *torch.autograd.grad(loss.sum(), (w, lo)))
    for found, expected in zip(got, (value, d_a, d_b), strict=True):
        assert found.item() == pytest.approx(expected, abs=5.1e-7)  # the table has six digits


@pytest.mark.parametrize(("name", "value", "d_a", "d_b"), [("ipo", 16.0, 80.0, -80.0), ("sppo_hard", 13.0, 40.0, 60.0)])
def test_scaled_squares_are_trls_form_times_beta_squared(name, value, d_a, d_b):
    beta = 0.1
    w, lo = numbers(A, B)
    loss = FAMILY[name](w, lo) / beta**2
    got = (loss, *torch.autograd.grad(loss.sum(), (w, lo)))
    assert [x.item() for x in got] == pytest.approx([value, d_a, d_b], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, math.log(2)) for name in ("sigmoid", "cdpo", "robust")],
        ("hinge", 1.0),
        ("ipo", 0.25),
        *[(name, 2 * math.log(2)) for name in ("nca_pair", "bco_pair")],
        *[(name, 1.0) for name in ("apo_zero", "apo_down")],
        ("sppo_hard", 0.5),
        ("exo_pair", bernoulli_kl(0.5, 0.999)),
    ],
)
def test_links_have_their_known_value_where_policy_and_reference_agree(name, value):
    assert at(FAMILY[name], 0.0) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("rewards", [(1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (0.0, -1e4), (5e3, -5e3), (-1e4, -1e4)])
def test_links_and_gradients_stay_finite_far_from_zero_in_float32(name, rewards):
    w, lo = (torch.tensor([x], requires_grad=True) for x in rewards)
    loss = FAMILY[name](w, lo)
    grads = torch.autograd.grad(loss.sum(), (w, lo), allow_unused=True)
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("point", [(A, B), (-2.0, 1.5), (3.0, -0.4)])
def test_gradients_are_those_of_finite_differences(name, point):
    assert torch.autograd.gradcheck(FAMILY[name], numbers(*point))


@pytest.mark.parametrize("name", LINKS)
def test_links_of_the_margin_ignore_a_common_shift_and_the_others_do_not(name):
    changed = abs(at(FAMILY[name], A + 3.7, B + 3.7) - at(FAMILY[name], A, B))
    assert changed < 1e-12 if PROPERTIES[name].margin_only else changed > 1e-3


@pytest.mark.parametrize("name", LINKS)
def test_links_said_to_be_convex_are(name):
    points = torch.linspace(-6, 6, 13, dtype=torch.float64)
    w1, l1, w2, l2 = (x.flatten() for x in torch.meshgrid(points, points, points, points, indexing="ij"))
    link = FAMILY[name]
    excess = link((w1 + w2) / 2, (l1 + l2) / 2) - (link(w1, l1) + link(w2, l2)) / 2
    assert (excess.max().item() < 1e-9) == PROPERTIES[name].convex


@pytest.mark.parametrize("h", HS)
@pytest.mark.parametrize("e", [0.0, 0.1, 0.3])
def test_cdpo_and_robust_are_the_sigmoid_link_and_a_line(h, e):
    base = at(losses.sigmoid, h)
    assert at(losses.link("cdpo", label_smoothing=e), h) == pytest.approx(base + e * h, abs=1e-12)
    expected = base - e * h / (1 - 2 * e)
    assert at(losses.link("robust", label_smoothing=e), h) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("h", HS)
def test_cdpo_is_the_mixture_of_both_labels(h):
    mixture = 0.9 * at(losses.sigmoid, h) + 0.1 * at(losses.sigmoid, -h)
    assert at(FAMILY["cdpo"], h) == pytest.approx(mixture, abs=1e-12)


@pytest.mark.parametrize("h", HS)
def test_robust_is_unbiased_under_flipped_labels(h):
    mean = 0.9 * at(FAMILY["robust"], h) + 0.1 * at(FAMILY["robust"], -h)
    assert mean == pytest.approx(at(losses.sigmoid, h), abs=1e-12)


def test_robust_pushes_no_further_than_its_clip():
    assert slope(FAMILY["robust"], 9.9) < 0
    assert slope(FAMILY["robust"], 10.1) == 0
    assert at(FAMILY["robust"], 1e4) == at(FAMILY["robust"], 10.0)


def test_robust_without_its_clip_is_the_papers_and_falls_for_ever():
    paper = losses.link("robust", label_smoothing=0.1, max_margin=math.inf)
    assert slope(paper, 1e3) == pytest.approx(-0.1 / 0.8, abs=1e-12)


@pytest.mark.parametrize("h", HS)
@pytest.mark.parametrize("e", [0.05, 0.1, 0.2])
def test_cdpo_is_the_forward_and_exo_the_reverse_divergence_from_the_label(h, e):
    model, label = 1 / (1 + math.exp(-h)), 1 - e
    entropy = -e * math.log(e) - (1 - e) * math.log(1 - e)
    assert at(losses.link("cdpo", label_smoothing=e), h) - entropy == pytest.approx(
        bernoulli_kl(label, model), abs=1e-9
    )
    assert at(losses.link("exo_pair", label_smoothing=e), h) == pytest.approx(bernoulli_kl(model, label), abs=1e-9)


@pytest.mark.parametrize(("e", "goal"), [(0.05, 2.944), (0.1, 2.197), (0.2, 1.386), (0.001, 6.907)])
@pytest.mark.parametrize("name", ["cdpo", "exo_pair"])
def test_cdpo_and_exo_rest_at_the_logit_of_the_trust_in_labels(name, e, goal):
    link = losses.link(name, label_smoothing=e)
    assert math.log((1 - e) / e) == pytest.approx(goal, abs=5e-4)
    assert slope(link, math.log((1 - e) / e)) == pytest.approx(0, abs=1e-12)
    assert slope(link, goal - 0.1) < 0 < slope(link, goal + 0.1)


def test_exo_starts_with_a_quarter_of_its_goal_as_slope():
    assert slope(FAMILY["exo_pair"], 0.0) == pytest.approx(-1.727, abs=5e-4)


@pytest.mark.parametrize("delta", [-1.0, 0.0, 0.25, 2.0])
@pytest.mark.parametrize("rewards", [(A, B), (-1.0, 2.0), (3.0, 2.5)])
def test_bco_bounds_the_sigmoid_link_most_tightly_halfway(delta, rewards):
    a, b = rewards
    plain, here = at(losses.sigmoid, a, b), at(losses.link("bco_pair", delta=delta), a, b)
    assert here > plain
    assert here >= at(losses.link("bco_pair", delta=(a + b) / 2), a, b)


@pytest.mark.parametrize("rewards", [(A, B), (-1.0, 2.0), (3.0, 2.5)])
def test_sppo_is_half_an_ipo_and_a_penalty_on_common_drift(rewards):
    a, b = rewards
    assert at(losses.sppo_hard, a, b) == pytest.approx(0.5 * (a - b - 1) ** 2 + 0.5 * (a + b) ** 2, abs=1e-12)
    half_ipo = 0.5 * 4 * at(losses.ipo, (a - b) / 2)  # goal 1: ipo at half the reward
    drift_free = at(losses.sppo_hard, (a - b) / 2, (b - a) / 2)
    assert drift_free == pytest.approx(half_ipo, abs=1e-12)


def test_nca_rests_with_the_winner_at_log_two():
    w, lo = numbers(math.log(2), -3.0)
    assert torch.autograd.grad(losses.nca_pair(w, lo).sum(), w)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rewards", [(A, B), (-1.0, 2.0), (3.0, 2.5)])
def test_kto_without_a_baseline_summed_over_the_pair_is_apo_zero(rewards):
    gain, label = torch.tensor(rewards, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    summed = kto_loss(gain, label, torch.zeros((), dtype=torch.float64), beta=1.0).sum().item()
    assert summed == pytest.approx(at(losses.apo_zero, *rewards), abs=1e-12)


def test_apo_down_lowers_the_winner_too_where_it_is_well_ahead():
    w, lo = numbers(0.5, -3.0)
    grad_w, grad_l = torch.autograd.grad(losses.apo_down(w, lo).sum(), (w, lo))
    assert grad_w.item() > 0
    assert grad_l.item() > 0


@pytest.mark.parametrize("name", LINKS)
def test_a_label_that_is_certain_leaves_every_link_as_it_is(name):
    w, lo = numbers(A, B)
    soft = losses.soft_label(FAMILY[name], w, lo, torch.ones(1, dtype=torch.float64))
    assert soft.item() == pytest.approx(at(FAMILY[name], A, B), abs=1e-12)


@pytest.mark.parametrize("h", HS)
def test_a_soft_label_with_the_sigmoid_link_is_cdpo_and_has_its_table_value(h):
    w, lo = numbers(h, 0.0)
    soft = losses.soft_label(losses.sigmoid, w, lo, torch.full((1,), 0.9, dtype=torch.float64))
    assert soft.item() == pytest.approx(at(FAMILY["cdpo"], h), abs=1e-12)
    w, lo = numbers(A, B)
    soft = losses.soft_label(losses.sigmoid, w, lo, torch.full((1,), 0.8, dtype=torch.float64))
    got = (soft, *torch.autograd.grad(soft.sum(), (w, lo)))
    assert [x.item() for x in got] == pytest.approx([0.521154, -0.089050, 0.089050], abs=5.1e-7)


def test_links_have_trls_names_and_defaults():
    trl = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down".split()
    assert set(trl) | {"cdpo"} == set(LINKS)
    assert set(LINKS) == set(PROPERTIES)
    assert losses.link("exo_pair") is losses.exo_pair
    assert at(losses.exo_pair, A, B) == at(FAMILY["exo_pair"], A, B)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sigmoid",
            {"label_smoothing": 0.1},
            r"does not take option 'label_smoothing'; it belongs to cdpo, exo_pair, robust",
        ),
        ("hinge", {"delta": 0.1}, r"does not take option 'delta'; it belongs to bco_pair"),
        ("robust", {}, r"link 'robust' needs option 'label_smoothing'"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ("robust", {"label_smoothing": 0.1, "max_margin": 0.0}, r"max_margin must be positive, got 0"),
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing of exo_pair must be in \(0, 0\.5\), got 0"),
        ("bco_pair", {"delta": "mean"}, r"link\.delta must be a number, got 'mean'"),
        ("nca_pear", {}, r"did you mean 'nca_pair'"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line_with_the_reason(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        losses.link(name, **options)
    assert "\n" not in str(caught.value)


def test_only_bco_without_a_delta_follows_the_mean():
    assert losses.follows_mean(losses.link("bco_pair"))
    assert not losses.follows_mean(losses.link("bco_pair", delta=0.0))
    assert not any(losses.follows_mean(link) for name, link in FAMILY.items() if name != "bco_pair")


def test_the_threshold_of_bco_is_the_mean_of_all_rewards_before():
    method = DiffusionDPO(beta=10.0, link=losses.bco_pair)
    policy, reference, batch = toy(seed=1), toy(), pairs()
    before = RunningMean(total=6.0, count=20.0)
    out = method(policy, reference, batch, SampleRng(0, batch.samples), Shared(rewards=before))
    rewards = torch.cat([out.metrics["rewards/chosen"], out.metrics["rewards/rejected"]])
    expected = losses.bco_pair(out.metrics["rewards/chosen"], out.metrics["rewards/rejected"], delta=0.3)
    torch.testing.assert_close(out.loss.detach(), expected)
    assert out.rewards.count == 28
    assert out.rewards.mean == pytest.approx((6.0 + rewards.double().sum().item()) / 28, abs=1e-9)


def test_the_running_mean_goes_from_step_to_step_through_the_loop():
    method = DiffusionDPO(beta=10.0, link=losses.bco_pair)
    batches = [
        pairs(4, seed=0, first=0),
        pairs(4, seed=1, first=4),
        pairs(4, seed=2, first=8),
        pairs(4, seed=3, first=12),
    ]
    policy, reference = toy(seed=1), toy()
    optimizer = torch.optim.SGD(policy.net.parameters(), lr=0.0)
    reports = list(fit(policy, reference, method, iter(batches), optimizer, steps=2, accumulate=2))
    seen, loss = [], []
    for batch in batches:  # by hand, with the policy as it was: the learning rate is 0
        out = DiffusionDPO(beta=10.0)(policy, reference, batch, SampleRng(0, batch.samples))
        w, lo = out.metrics["rewards/chosen"], out.metrics["rewards/rejected"]
        delta = sum(seen) / len(seen) if seen else 0.0
        loss.append(losses.bco_pair(w, lo, delta=delta).mean().item())
        seen += w.tolist() + lo.tolist()
    assert [r.rewards.count for r in reports] == [16, 32]
    assert reports[1].rewards.mean == pytest.approx(sum(seen) / 32, abs=1e-6)
    expected = [(loss[0] + loss[1]) / 2, (loss[2] + loss[3]) / 2]
    assert [r.metrics["loss"] for r in reports] == pytest.approx(expected, abs=1e-6)


def test_other_links_keep_no_running_mean():
    batch = pairs()
    out = DiffusionDPO()(toy(seed=1), toy(), batch, SampleRng(0, batch.samples))
    assert out.rewards is None


def scored(gap: float):
    batch = pairs()
    return replace(batch, score_w=torch.full((4,), gap), score_l=torch.zeros(4))


@pytest.mark.parametrize("name", LINKS)
def test_every_link_takes_soft_labels_and_margins_from_scores(name):
    batch, rng = scored(0.4), SampleRng(0, (0, 1, 2, 3))
    link = FAMILY[name]
    plain = DiffusionDPO(beta=10.0, link=link)(toy(seed=1), toy(), batch, rng)
    w, lo = plain.metrics["rewards/chosen"], plain.metrics["rewards/rejected"]
    p = 1 / (1 + math.exp(-0.4 / 0.5))
    soft = DiffusionDPO(beta=10.0, link=link, scores=ScoreUse(soft=0.5))(toy(seed=1), toy(), batch, rng)
    torch.testing.assert_close(soft.loss.detach(), p * link(w, lo) + (1 - p) * link(lo, w))
    shifted = DiffusionDPO(beta=10.0, link=link, scores=ScoreUse(margin=2.0))(toy(seed=1), toy(), batch, rng)
    torch.testing.assert_close(shifted.loss.detach(), link(w - 0.8, lo))


def test_an_offset_of_half_a_nat_has_its_table_value():
    w, lo = numbers(A, B)
    loss = losses.sigmoid(w - 0.5, lo)
    got = (loss, *torch.autograd.grad(loss.sum(), (w, lo)))
    assert [x.item() for x in got] == pytest.approx([0.513015, -0.401312, 0.401312], abs=5.1e-7)


def test_link_options_survive_as_bound_arguments():
    link = losses.link("robust", label_smoothing=0.2)
    assert isinstance(link, partial)
    assert losses.link_name(link) == "robust"
