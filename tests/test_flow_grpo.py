"""DDPO and Flow-GRPO on moves of toy rollouts: identities, directions, weights of moves, what is selected."""

from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.ddpo import DDPO
from diffalign.methods.flow_grpo import FlowGRPO
from diffalign.methods.policy_gradient import slope
from diffalign.rng import SampleRng, generator
from diffalign.sampling.rollout import initial_noise, log_probs, rollout
from diffalign.sampling.transitions import kl_divergence
from diffalign.types import Cond, OnlineMethod, Scored, TransitionBatch
from tests.moves import moves, rows, toy_for, walk_of
from tests.toys import SHAPE

FREE = {"kl": 0.0}
METHODS = {
    "ddpo": DDPO(),
    "grpo": FlowGRPO(**FREE),
    "kl": FlowGRPO(),
    "v_mse": FlowGRPO(kl_form="v_mse"),
    "mask": FlowGRPO(trust="mask", **FREE),
    "tempflow": FlowGRPO(step_weight="tempflow"),
    "code": FlowGRPO(kl_form="flow_grpo"),
    "guard": FlowGRPO(trust="guard", **FREE),
    "longcat": FlowGRPO(step_weight="longcat"),
}
ON_FLOWS = ("code", "guard", "longcat")
CASES = [(name, "flow_sde") for name in METHODS] + [(name, "ddim") for name in METHODS if name not in ON_FLOWS]


def run(method, policy, batch: TransitionBatch, reference=None):
    return method(policy, reference, batch, SampleRng(0, batch.samples))


def gradient(loss, policy) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(policy.net.parameters()))
    return torch.cat([g.flatten() for g in grads])


def log_prob(policy, batch: TransitionBatch) -> torch.Tensor:
    with torch.no_grad():
        move = batch.walk.transition(policy, batch.x_t, batch.step, batch.cond)
        return batch.walk.log_prob(move, batch.x_s)


def test_both_are_online_methods():
    assert isinstance(DDPO(), OnlineMethod)
    assert isinstance(FlowGRPO(), OnlineMethod)


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_on_the_policy_that_made_the_moves_every_ratio_is_1_and_the_loss_minus_its_advantage(name, kernel):
    policy, method = toy_for(kernel), METHODS[name]
    batch = moves(policy, walk_of(kernel), [1])
    out = run(method, policy, batch, reference=policy)
    for metric, value in {"ratio": 1, "approx_kl": 0, "clipfrac": 0, "log_prob_gap": 0}.items():
        assert torch.equal(out.metrics[metric], torch.full((4,), float(value))), metric
    assert torch.equal(out.metrics["policy_loss"], -batch.advantage)
    if "kl_loss" in out.metrics:
        assert torch.equal(out.metrics["kl_loss"], torch.zeros(4))
    assert all(m.shape == (4,) and not m.requires_grad for m in out.metrics.values())
    assert torch.equal(out.noise_level, torch.full((4,), 0.75))


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_without_advantages_there_is_no_gradient_at_the_reference(name, kernel):
    policy, method = toy_for(kernel), METHODS[name]
    batch = moves(policy, walk_of(kernel), [0, 2], advantage=torch.zeros(8))
    grad = gradient(run(method, policy, batch, reference=toy_for(kernel)).loss.sum(), policy)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_a_small_step_makes_moves_of_better_images_likelier_and_lowers_the_loss(name, kernel):
    policy, start, method = toy_for(kernel), toy_for(kernel), METHODS[name]
    batch = moves(policy, walk_of(kernel), [1, 2])
    before, at = run(method, policy, batch, reference=start).loss.mean(), log_prob(policy, batch)
    grad = torch.autograd.grad(before, list(policy.net.parameters()))
    norm = sum(g.square().sum() for g in grad).sqrt()
    size = 3e-6 if method == METHODS["guard"] else 1e-4  # so that few ratios leave the range
    with torch.no_grad():
        for p, g in zip(policy.net.parameters(), grad, strict=True):
            p -= size * g / norm
    assert (batch.advantage * (log_prob(policy, batch) - at)).sum() > 0
    assert run(method, policy, batch, reference=start).loss.double().mean() <= before.double()


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_the_policy_alone_has_gradient(name, kernel):
    policy, reference = toy_for(kernel), toy_for(kernel, seed=1)
    batch = moves(policy, walk_of(kernel))
    run(METHODS[name], policy, batch, reference=reference).loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(name, kernel):
    policy, reference, method = toy_for(kernel), toy_for(kernel, seed=1), METHODS[name]
    batch = moves(policy, walk_of(kernel), [0, 1, 2])  # [12]
    whole = gradient(run(method, policy, batch, reference).loss.mean(), policy)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = TransitionBatch(
        **{k: getattr(batch, k)[order] for k in ("x_t", "x_s", "step", "log_prob_old", "advantage", "mean_old")},
        samples=tuple(order.tolist()),
        cond=batch.cond.rows(order),
        walk=batch.walk,
    )
    parts = [run(method, policy, rows(shuffled, slice(i, i + 3)), reference).loss.mean() / 4 for i in range(0, 12, 3)]
    added = sum(gradient(part, policy) for part in parts)
    torch.testing.assert_close(added, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("kernel", ["flow_sde", "ddim"])
def test_a_move_beyond_the_range_has_no_gradient_and_is_counted_by_its_side(kernel):
    policy, changed = toy_for(kernel), toy_for(kernel, seed=1)
    batch = moves(policy, walk_of(kernel), [1])
    gap = log_prob(changed, batch) - batch.log_prob_old
    assert (gap.abs() > 1e-3).all()
    done = replace(batch, advantage=gap.sign())  # each already moved the way it should
    out = run(DDPO(), changed, done)
    assert gradient(out.loss.sum(), changed).abs().max() == 0
    assert torch.equal(out.metrics["clipfrac"], torch.ones(4))
    assert torch.equal(out.metrics["clipfrac_gt_one"], (gap > 0).float())
    assert torch.equal(out.metrics["clipfrac_lt_one"], (gap < 0).float())
    torch.testing.assert_close(out.metrics["approx_kl"], 0.5 * gap.square())
    back = run(DDPO(), changed, replace(batch, advantage=-gap.sign()))
    assert gradient(back.loss.sum(), changed).abs().max() > 0
    far = run(FlowGRPO(trust="mask", **FREE), changed, done)
    assert torch.equal(far.loss, torch.zeros(4))
    assert torch.equal(far.metrics["clipfrac"], torch.ones(4))
    near = run(FlowGRPO(trust="mask", clip_range=1e9, **FREE), changed, done)
    torch.testing.assert_close(near.loss, -done.advantage * near.metrics["ratio"])


@pytest.mark.parametrize("kernel", ["flow_sde", "ddim"])
def test_the_kl_pulls_towards_the_reference(kernel):
    policy, reference = toy_for(kernel), toy_for(kernel, seed=1)
    batch = moves(policy, walk_of(kernel), [1, 3], advantage=torch.zeros(8))
    method = FlowGRPO(kl=0.5)
    out = run(method, policy, batch, reference)
    torch.testing.assert_close(out.loss.detach(), 0.5 * out.metrics["kl_loss"])
    assert (out.metrics["kl_loss"] > 0).all()
    grad = torch.autograd.grad(out.loss.mean(), list(policy.net.parameters()))
    with torch.no_grad():
        for p, g in zip(policy.net.parameters(), grad, strict=True):
            p -= 1e-4 * g
    assert run(method, policy, batch, reference).loss.mean() < out.loss.mean()


def test_the_weight_of_longcat_lets_all_moves_of_the_flow_sde_pull_alike():
    walk, policy, steps = walk_of("flow_sde", 10, eta=0.7), toy_for("flow_sde"), torch.arange(1, 9)
    pull = slope(walk, steps, policy).abs() / walk.stds[steps]
    batch = moves(policy, walk, steps.tolist(), size=1)
    weight = FlowGRPO(step_weight="longcat")._weight(batch)
    torch.testing.assert_close(weight * pull, torch.full((8,), (1 + 0.7**2 / 2) / 0.7))
    assert pull.max() > 10 * pull.min()


def test_the_guard_lets_all_moves_of_the_flow_sde_pull_alike():
    walk, policy, steps = walk_of("flow_sde", 10, eta=0.7), toy_for("flow_sde"), torch.arange(1, 9)
    batch = moves(policy, walk, steps.tolist(), size=1)
    pull = slope(walk, steps, policy).abs()  # of the guarded log-ratio, up to the noise
    torch.testing.assert_close(FlowGRPO(trust="guard")._weight(batch) * pull, torch.full((8,), 1 + 0.7**2 / 2))


def test_the_weight_of_tempflow_makes_the_pull_of_a_move_its_length_and_is_1_on_average():
    walk, policy, steps = walk_of("flow_sde", 10, eta=0.7), toy_for("flow_sde"), torch.arange(9)
    weight = FlowGRPO(step_weight="tempflow")._weight(moves(policy, walk, steps.tolist(), size=1))
    assert weight.mean().item() == pytest.approx(1, abs=1e-6)  # the last of ten has no noise
    pull = (weight * slope(walk, steps, policy).abs() / walk.stds[:9] / walk.length(steps))[1:]
    torch.testing.assert_close(pull, pull[:1].expand(8))


def test_longcat_weighs_the_kl_by_the_square():
    policy, reference, walk = toy_for("flow_sde"), toy_for("flow_sde", seed=1), walk_of("flow_sde")
    batch = moves(policy, walk, [1, 2])
    method = FlowGRPO(step_weight="longcat", kl=0.5)
    out, weight = run(method, policy, batch, reference), method._weight(batch)
    expected = weight * out.metrics["policy_loss"] + 0.5 * weight.square() * out.metrics["kl_loss"]
    torch.testing.assert_close(out.loss.detach(), expected)


# rounds


def scored(scores: list[float], group: list[int]) -> Scored:
    names = [f"prompt {g}" for g in range(max(group) + 1)]
    return Scored(scores={"r": torch.tensor(scores)}, weights={"r": 1.0}, group=torch.tensor(group), prompts=names)


def test_images_are_selected_with_their_advantages():
    round_of = scored([1.0, -1.0, 2.0, 0.0, 5.0, 5.0], [0, 0, 0, 0, 1, 1])
    chosen = FlowGRPO(advantage="group").select(round_of, generator(0))
    assert chosen.places.tolist() == [[0], [1], [2], [3]]
    assert chosen.weight.tolist() == pytest.approx([0.44717, -1.34152, 1.34152, -0.44717], abs=1e-5)
    assert chosen.metrics["zero_std_ratio"] == 0.5
    every = DDPO().select(round_of, generator(0))  # met for the first time: against the round
    assert len(every.places) == 6
    assert every.weight[4] == every.weight[5] > 1
    assert FlowGRPO(extremes=1).select(round_of, generator(0)).places.flatten().tolist() == [1, 2]


def test_a_kl_inside_the_reward_is_taken_off_every_score():
    round_of = scored([1.0, -1.0, 2.0, 0.0, 5.0, 5.0], [0, 0, 0, 0, 1, 1])
    told = {"advantage": "group", **FREE}
    plain = FlowGRPO(**told).select(round_of, generator(0))
    agreed = FlowGRPO(kl_reward=2.0, **told).select(replace(round_of, log_ratio=torch.zeros(6)), generator(0))
    assert torch.equal(agreed.weight, plain.weight)
    log_ratio = torch.tensor([0.5, -1.0, 0.0, 0.25, 0.3, -0.3])
    found = FlowGRPO(kl_reward=2.0, **told).select(replace(round_of, log_ratio=log_ratio), generator(0))
    by_hand = FlowGRPO(**told).select(scored([0.0, 1.0, 2.0, -0.5, 4.4, 5.6], [0, 0, 0, 0, 1, 1]), generator(0))
    torch.testing.assert_close(found.weight, by_hand.weight)
    assert found.places.flatten().tolist() == list(range(6))
    assert found.weight[4] < 0 < found.weight[5]  # of equal images the one that the reference would not make loses


@pytest.mark.parametrize("kernel", ["flow_sde", "ddim"])
def test_the_mean_of_the_log_ratio_of_a_way_is_the_kl_of_the_walk(kernel):
    policy, reference, walk = toy_for(kernel), toy_for(kernel, seed=1), walk_of(kernel)
    seeds = tuple(range(400))
    cond = Cond({"c": torch.zeros(len(seeds), 3)})
    way = rollout(policy, walk.kernel, walk.schedule, cond, seeds, x_init=initial_noise(seeds, SHAPE))
    with torch.no_grad():
        ratio = (way.log_prob - log_probs(reference, walk.kernel, walk.schedule, way)).double().sum(1)
        kl = torch.zeros(len(seeds), dtype=torch.float64)
        for i in way.steps:
            at = torch.full((len(seeds),), i)
            p, q = (walk.transition(model, way.states(i)[0], at, cond) for model in (policy, reference))
            kl += kl_divergence(p, q).double()
    assert kl.mean() > 0
    assert ratio.mean() == pytest.approx(kl.mean().item(), abs=4 * (ratio - kl).std().item() / len(seeds) ** 0.5)


def test_a_constant_reward_selects_nothing():
    for method in (DDPO(), FlowGRPO()):
        chosen = method.select(scored([3.0] * 4, [0, 0, 1, 1]), generator(0))
        assert chosen.places.shape == (0, 1)
        assert chosen.weight.shape == (0,)
        assert chosen.metrics["zero_std_ratio"] == 1


def test_a_group_of_one_is_for_ddpo_alone():
    lone = scored([1.0, 2.0, 4.0], [0, 1, 2])
    assert len(DDPO().select(lone, generator(0)).places) == 3
    assert (DDPO().needs.group_at_least, FlowGRPO().needs.group_at_least) == (1, 2)
    assert DDPO(advantage="group").needs.group_at_least == 2
    with pytest.raises(InputError, match="group must hold at least 2 images of every prompt"):
        FlowGRPO().select(lone, generator(0))


def test_what_they_need_follows_from_their_options():
    assert DDPO().needs.references == ("none",)
    assert FlowGRPO().needs.references == ("start", "ema")
    assert FlowGRPO(**FREE).needs.references == ("none",)
    assert [FlowGRPO(trust=t).needs.mean_old for t in ("clip", "guard", "mask")] == [False, True, True]
    assert FlowGRPO().needs.items == DDPO().needs.items == "transitions"
    assert FlowGRPO(kl_reward=0.1, **FREE).needs.references == ("start", "ema")
    assert [FlowGRPO(kl_reward=w).needs.log_ratio for w in (0.0, 0.1)] == [False, True]


# bad input


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (DDPO, {"clip_range": 0.0}, "method.clip_range must be positive, got 0.0"),
        (DDPO, {"clip_advantage": -1.0}, "method.clip_advantage must be positive, got -1.0"),
        (DDPO, {"advantage": "batch", "min_count": 4}, "method.buffer_size and .min_count must be left out"),
        (FlowGRPO, {"kl": -0.1}, "method.kl must be at least 0, got -0.1"),
        (FlowGRPO, {"clip_range": -1e-4}, "method.clip_range must be positive, got -0.0001"),
        (FlowGRPO, {"kl_reward": -1.0}, "method.kl_reward must be at least 0, got -1.0"),
        (
            FlowGRPO,
            {"kl_reward": 1.0, "advantage": "win_rate"},
            "method.kl_reward must be 0 with advantage = 'win_rate'",
        ),
        (FlowGRPO, {"extremes": 0}, "method.extremes must be at least 1, got 0"),
        (FlowGRPO, {"trust": "guard", "step_weight": "longcat"}, "method.step_weight must be 'none' with trust"),
    ],
)
def test_options_that_cannot_be_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        method(**options)


@pytest.mark.parametrize(("key", "name"), [("kl_form", "code"), ("trust", "guard"), ("step_weight", "longcat")])
def test_options_for_flows_are_refused_on_a_ddpm_model(key, name):
    policy = toy_for("ddim")
    with pytest.raises(InputError, match=f"method.{key} must fit a model that predicts 'epsilon', got .*for flows"):
        run(METHODS[name], policy, moves(policy, walk_of("ddim"), [1]), policy)


def test_a_kl_inside_the_reward_is_refused_without_log_ratios():
    with pytest.raises(ValueError, match=r"scored\.log_ratio must be there for a KL inside the reward, got None"):
        FlowGRPO(kl_reward=1.0, **FREE).select(scored([1.0, 2.0], [0, 0]), generator(0))


@pytest.mark.parametrize("trust", ["guard", "mask"])
def test_a_bound_by_means_is_refused_without_them(trust):
    policy = toy_for("flow_sde")
    batch = replace(moves(policy, walk_of("flow_sde"), [1]), mean_old=None)
    with pytest.raises(ValueError, match=rf"batch\.mean_old must be given with trust = '{trust}', got None"):
        run(FlowGRPO(trust=trust, **FREE), policy, batch)


def test_a_move_without_noise_has_no_ratio():
    policy = toy_for("flow_sde")
    batch = moves(policy, walk_of("flow_sde"), [1])
    with pytest.raises(InputError, match="eta must be positive where a log-prob is asked for"):
        run(DDPO(), policy, replace(batch, step=torch.full((4,), 4)))
