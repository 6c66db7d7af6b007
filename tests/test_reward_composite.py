"""Rewards in a sum: invariances of normalised scores, SciPy's ranks, and samples that a part could not judge."""

import math
import tomllib

import pytest
import scipy.stats
import torch

from diffalign.errors import InputError
from diffalign.rewards.composite import CompositeReward, Part, flat_groups, is_pointwise, normalise
from diffalign.types import FunctionReward, RewardBatch, RewardOutput

NAN = math.nan
GROUPS = [3, 3, 1, 3, 1, 1, 3, 7]


def drawn(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


class Given:
    """Scores as they are given, by the batch's metadata."""

    version, modality, licence = "1", "image", "MIT"
    requires = frozenset({"metadata"})
    differentiable = False

    def __init__(self, name: str, bounds: tuple[float, float] = (0.0, 10.0)):
        self.name, self.range = name, bounds

    def score(self, batch):
        scores = torch.tensor([row[self.name] for row in batch.metadata], dtype=torch.float32)
        return RewardOutput(scores=scores, raw={"half": scores / 2})


def batch(groups: list[int] | None = None, **columns: object) -> RewardBatch:
    """A batch whose `Given` rewards have these scores."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return RewardBatch(metadata=rows, group_ids=groups)


def composite(how: str = "group", **weights: float) -> CompositeReward:
    return CompositeReward([Part(reward=Given(name), weight=w, normalise=how) for name, w in weights.items()])


# --- one reward's scores


def test_z_scores_have_mean_0_and_std_1_in_each_group():
    z = normalise(drawn().double(), "group", group_ids=GROUPS)
    for group in (1, 3):
        own = z[[g == group for g in GROUPS]]
        assert own.mean().item() == pytest.approx(0, abs=1e-12)
        assert own.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert z[7] == 0


def test_z_scores_are_scipys():
    x = drawn().double()
    expected = torch.from_numpy(scipy.stats.zscore(x.numpy()))
    torch.testing.assert_close(normalise(x, "batch"), expected)
    torch.testing.assert_close(normalise(x, "group", group_ids=[5] * 8), expected)


@pytest.mark.parametrize("how", ["batch", "group", "rank"])
@pytest.mark.parametrize(("a", "b"), [(100.0, 0.0), (1e-3, -7.0), (3.0, 1e3), (1e-6, 0.0)])
def test_relative_scales_do_not_know_the_unit_and_origin_of_a_score(how, a, b):
    x = drawn().double()
    torch.testing.assert_close(
        normalise(a * x + b, how, group_ids=GROUPS), normalise(x, how, group_ids=GROUPS), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("how", ["batch", "group", "rank"])
def test_turning_a_score_around_turns_its_place_around(how):
    x = drawn()
    torch.testing.assert_close(normalise(-x, how, group_ids=GROUPS), -normalise(x, how, group_ids=GROUPS))


@pytest.mark.parametrize("how", ["none", "batch", "group", "fixed", "rank"])
def test_the_order_of_the_batch_does_not_matter(how):
    given = {"mean": 0.5, "std": 2.0} if how == "fixed" else {}
    x = drawn()
    x[2] = NAN
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    whole = normalise(x, how, group_ids=GROUPS, **given)
    moved = normalise(x[order], how, group_ids=[GROUPS[i] for i in order], **given)
    torch.testing.assert_close(moved, whole[order], equal_nan=True)


@pytest.mark.parametrize("how", ["batch", "group", "rank"])
def test_a_score_that_is_not_there_has_no_part_in_the_others(how):
    x = drawn()
    x[1], x[4], x[7] = NAN, math.inf, -math.inf
    kept = [0, 2, 3, 5, 6]
    out = normalise(x, how, group_ids=GROUPS)
    torch.testing.assert_close(out[kept], normalise(x[kept], how, group_ids=[GROUPS[i] for i in kept]))
    assert out[[1, 4, 7]].isnan().all()


@pytest.mark.parametrize("how", ["batch", "group", "rank"])
def test_equal_scores_say_nothing_and_give_0(how):
    x = torch.full((8,), 26.1)
    assert normalise(x, how, group_ids=GROUPS).tolist() == [0.0] * 8
    assert normalise(torch.tensor([0.1]), how, group_ids=[2]).tolist() == [0.0]
    assert normalise(torch.tensor([NAN, NAN]), how, group_ids=[0, 0]).isnan().all()
    assert normalise(torch.zeros(0), how, group_ids=[]).shape == (0,)


def test_groups_that_say_nothing_are_counted():
    x = torch.tensor([1.0, 1.0, 2.0, 3.0, NAN, NAN, 4.0, 5.0, 5.0, NAN])
    groups = [0, 0, 1, 1, 2, 2, 3, 4, 4, 4]
    assert flat_groups(x, groups) == 3  # 0, 3 and 4; nobody judged 2
    assert flat_groups(x) == 0
    assert flat_groups(x[[0, 1, 4]]) == 1
    assert flat_groups(torch.zeros(0)) == 0


def test_small_differences_on_a_large_score_are_not_lost():
    x = torch.tensor([16777214.0, 16777215.0, 16777216.0])
    assert normalise(x, "batch").tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    tiny = torch.tensor([1e-300, 2e-300, 3e-300], dtype=torch.float64)
    assert normalise(tiny, "batch").tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])


def test_ranks_are_scipys_with_ties_in_the_middle():
    x = torch.tensor([2.0, 2.0, 1.0, 5.0, -0.0, 0.0, 2.0, 9.0])
    place = torch.from_numpy(scipy.stats.rankdata(x.numpy()))
    torch.testing.assert_close(normalise(x, "rank").double(), (2 * place - 9) / 7)
    assert normalise(x, "rank").tolist() == pytest.approx([1 / 7, 1 / 7, -3 / 7, 5 / 7, -6 / 7, -6 / 7, 1 / 7, 1.0])


def test_ranks_in_groups_are_those_of_each_group_alone():
    x = torch.tensor([4.0, 1.0, 8.0, 1.0, 8.0, 2.0, 3.0, 0.0])
    out = normalise(x, "rank", group_ids=GROUPS)
    for group in set(GROUPS):
        own = [g == group for g in GROUPS]
        torch.testing.assert_close(out[own], normalise(x[own], "rank"))
    assert out[[0, 1, 3, 6]].tolist() == pytest.approx([1.0, -2 / 3, -2 / 3, 1 / 3])


def test_ranks_do_not_follow_a_stretched_score():
    x = drawn()
    torch.testing.assert_close(normalise(x.exp(), "rank"), normalise(x, "rank"))


def test_fixed_is_the_same_for_every_batch():
    x = torch.tensor([21.0, NAN, 23.0])
    assert normalise(x, "fixed", mean=22.0, std=0.5).tolist() == pytest.approx([-2.0, NAN, 2.0], nan_ok=True)
    assert normalise(x[:1], "fixed", mean=22.0, std=0.5).tolist() == [-2.0]
    assert normalise(x, "none").tolist() == pytest.approx([21.0, NAN, 23.0], nan_ok=True)


@pytest.mark.parametrize(
    ("how", "given", "message"),
    [
        ("grop", {}, "must be one of none, batch, group, fixed, rank, got 'grop'; did you mean 'group'"),
        ("group", {}, "must get group_ids, got none"),
        ("group", {"group_ids": [1, 2]}, "one entry per score, 8, got 2"),
        ("fixed", {}, "must get a finite mean and a positive std, got None and None"),
        ("fixed", {"mean": 0.0, "std": 0.0}, "positive std, got 0.0 and 0.0"),
        ("fixed", {"mean": NAN, "std": 1.0}, "finite mean"),
        ("batch", {"std": 1.0}, "must get no mean and std, which belong to 'fixed'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(how, given, message):
    with pytest.raises(InputError, match=message):
        normalise(drawn(), how, **given)


# --- the sum


def test_the_sum_does_not_know_the_units_of_its_parts():
    a, b = drawn(seed=1), drawn(seed=2)
    one = composite(a=1.0, b=0.5).score(batch(GROUPS, a=a.tolist(), b=b.tolist())).scores
    other = composite(a=1.0, b=0.5).score(batch(GROUPS, a=(100 * a - 3).tolist(), b=(0.01 * b + 20).tolist())).scores
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # the scores come in as float32
    assert one[7] == 0


def test_the_sum_is_that_of_its_parts_by_weight():
    whole = batch(GROUPS, a=drawn(seed=1).tolist(), b=drawn(seed=2).tolist())
    a, b = composite(a=1.0).score(whole).scores, composite(b=1.0).score(whole).scores
    torch.testing.assert_close(composite(a=2.0, b=-0.5).score(whole).scores, 2 * a - 0.5 * b)


def test_every_part_is_kept_raw_with_its_components():
    out = composite(a=2.0, b=1.0).score(batch([0, 0], a=[1.0, 3.0], b=[4.0, NAN]))
    assert out.raw["a"].tolist() == [1.0, 3.0]
    assert out.raw["a.half"].tolist() == [0.5, 1.5]
    assert set(out.raw) == {"a", "a.half", "b", "b.half"}
    assert out.raw["b"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("how", ["group", "batch", "rank", "none"])
def test_a_sample_that_a_part_could_not_judge_is_left_out_as_if_it_were_not_there(how):
    a, b = drawn(seed=1), drawn(seed=2)
    b[3] = NAN
    kept = [i for i in range(8) if i != 3]
    out = composite(how, a=1.0, b=1.0).score(batch(GROUPS, a=a.tolist(), b=b.tolist()))
    alone = composite(how, a=1.0, b=1.0).score(batch([GROUPS[i] for i in kept], a=a[kept].tolist(), b=b[kept].tolist()))
    assert out.valid.tolist() == [i != 3 for i in range(8)]
    assert out.scores[3].isnan()
    torch.testing.assert_close(out.scores[kept], alone.scores)


def test_a_sample_that_a_part_calls_invalid_is_invalid_whatever_its_number():
    class Doubtful(Given):
        def score(self, batch):
            return RewardOutput(scores=torch.tensor([0.0, 1.0, 2.0]), valid=torch.tensor([True, True, False]))

    out = CompositeReward([Part(reward=Doubtful("a"), normalise="none")]).score(batch(a=[0, 0, 0]))
    assert out.valid.tolist() == [True, True, False]
    assert out.scores[:2].tolist() == [0.0, 1.0]
    assert out.scores[2].isnan()
    assert out.raw["a"][2].isnan()


def test_the_order_of_samples_moves_their_sums_along():
    a, b = drawn(seed=1), drawn(seed=2)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    whole = composite(a=1.0, b=2.0).score(batch(GROUPS, a=a.tolist(), b=b.tolist())).scores
    moved = batch([GROUPS[i] for i in order], a=a[order].tolist(), b=b[order].tolist())
    torch.testing.assert_close(composite(a=1.0, b=2.0).score(moved).scores, whole[order])


def test_flat_groups_are_counted_by_part():
    reward = composite(a=1.0, b=1.0)
    for _ in range(2):
        reward.score(batch([0, 0, 1, 1], a=[1.0, 1.0, 2.0, 2.0], b=[1.0, 2.0, 3.0, 3.0]))
    assert reward.flat == {"a": 4, "b": 2}
    plain = composite("none", a=1.0)
    plain.score(batch(a=[1.0, 1.0]))
    assert plain.flat == {}


def test_it_says_whether_it_compares_samples_what_it_needs_and_between_what_it_lies():
    assert not composite("group", a=1.0).pointwise
    assert composite("none", a=1.0).pointwise
    assert composite("group", a=1.0).requires == {"metadata", "group_ids"}
    assert composite("batch", a=1.0).requires == {"metadata"}
    assert composite("none", a=1.0, b=-2.0).range == (-20.0, 10.0)
    assert composite("rank", a=0.5, b=-2.0).range == (-2.5, 2.5)
    assert composite("group", a=1.0).range == (-math.inf, math.inf)
    fixed = CompositeReward([Part(reward=Given("a"), weight=-1.0, normalise="fixed", mean=5.0, std=5.0)])
    assert fixed.range == (-1.0, 1.0)
    assert fixed.version == "-1 x fixed (mean 5, std 5) a [1]"
    nested = CompositeReward([Part(reward=composite("rank", a=1.0), normalise="none")])
    assert not nested.pointwise
    assert is_pointwise(Given("a"))


def test_groups_that_are_needed_and_absent_are_an_error():
    with pytest.raises(InputError, match="reward 'composite' must get group_ids, got none"):
        composite(a=1.0).score(batch(a=[1.0, 2.0]))


class Bright(Given):
    """Mean brightness, with a gradient."""

    requires = frozenset({"images"})
    differentiable = True

    def score(self, batch):
        return RewardOutput(scores=self.differentiable_score(batch).detach())

    def differentiable_score(self, batch):
        return batch.images.mean((1, 2, 3))


def test_a_pointwise_sum_of_differentiable_parts_has_the_gradient_of_its_sum():
    reward = CompositeReward(
        [
            Part(reward=Bright("a"), weight=2.0, normalise="none"),
            Part(reward=Bright("b"), weight=-3.0, normalise="fixed", mean=0.2, std=0.5),
        ]
    )
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = reward.differentiable_score(RewardBatch(images=images))
    torch.testing.assert_close(scores.detach(), reward.score(RewardBatch(images=images.detach())).scores)
    scores.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, (2.0 - 6.0) / 12))
    assert reward.differentiable
    assert not CompositeReward([Part(reward=Bright("a"))]).differentiable
    with pytest.raises(InputError, match="got 'a' with 'batch'"):
        CompositeReward([Part(reward=Bright("a"), normalise="batch")]).differentiable_score(RewardBatch(images=images))


# --- from a config


def test_a_sum_is_made_from_tables_as_toml_gives_them():
    config = tomllib.loads(
        """
        [[parts]]
        reward = "clip:tiny-clip"
        weight = 1
        options = { scale = "cos" }
        [[parts]]
        reward = "oracle"
        weight = -0.5
        normalise = "fixed"
        mean = 0.5
        std = 0.1
        name = "truth"
        """
    )
    reward = CompositeReward.of(config["parts"])
    clip, oracle = reward.parts
    assert (clip.name, clip.weight, clip.normalise) == ("clip", 1.0, "group")
    assert clip.reward.version == "tiny-clip, cos"
    assert (oracle.name, oracle.reward.name, oracle.mean, oracle.std) == ("truth", "oracle", 0.5, 0.1)
    assert reward.requires == {"images", "prompts", "group_ids"}
    assert reward.licence == "MIT (weights of OpenAI and LAION); -"


def test_a_reward_as_an_object_is_taken_as_it_is():
    given = Given("a")
    [part] = CompositeReward.of([{"reward": given, "weight": 2.0, "normalise": "batch"}]).parts
    assert part.reward is given


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "must have parts, got none"),
        ([{"weight": 1.0}], r"parts\[0\]: missing key 'reward'"),
        ([{"reward": "oracle"}, {"reward": "clip", "wieght": 1.0}], r"parts\[1\]: unknown key 'wieght'; did you mean"),
        ([{"reward": "oracl"}], "did you mean 'oracle'"),
        ([{"reward": "oracle", "weight": "1"}], r"parts\[0\].weight must be a number, got '1'"),
        ([{"reward": "oracle", "weight": 0.0}], "part 'oracle': weight must be finite and not 0, got 0.0"),
        ([{"reward": "oracle", "weight": NAN}], "weight must be finite"),
        ([{"reward": "oracle", "normalise": "grop"}], "part 'oracle': normalise must be one of .*'group'"),
        ([{"reward": "oracle", "mean": 1.0}], "must get no mean and std"),
        ([{"reward": "oracle", "normalise": "fixed", "mean": 1.0}], "positive std, got 1.0 and None"),
        ([{"reward": "oracle"}, {"reward": "oracle"}], "different names without '.', got 'oracle'"),
        ([{"reward": "oracle", "name": "a.b"}], "different names without '.', got 'a.b'"),
        ([{"reward": "oracle", "options": {"x": 1}}], "must get options that its class takes"),
        ([{"reward": 3}], r"parts\[0\].reward must be a spec with options, or a reward without, got 3"),
    ],
)
def test_a_mistake_in_a_table_is_one_line_with_its_place(tables, message):
    with pytest.raises(InputError, match=message) as caught:
        CompositeReward.of(tables)
    assert "\n" not in str(caught.value)


def test_images_and_audio_do_not_add_up():
    heard = Given("b")
    heard.modality = "audio"
    with pytest.raises(InputError, match="parts of one modality, got audio and image"):
        CompositeReward([Part(reward=Given("a")), Part(reward=heard)])


def test_a_function_is_a_part_like_any_other():
    reward = FunctionReward(name="red", function=lambda images, prompts: images[:, 0].mean((1, 2)))
    out = CompositeReward([Part(reward=reward, normalise="batch")]).score(
        RewardBatch(images=torch.rand(4, 3, 2, 2), prompts=["a"] * 4)
    )
    assert out.scores.mean().item() == pytest.approx(0, abs=1e-6)
