"""Images of the data among a round's own, or beside them: the share, the order, the loss, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign.data.orders import Order
from diffalign.errors import InputError
from diffalign.methods.curated import Curated
from diffalign.methods.online_dpo import OnlineDPO
from diffalign.methods.sft import SFT
from diffalign.online.collate import RoundCollator
from diffalign.online.real import Among, Beside, MixedOrder, real_before
from diffalign.types import ImageBatch
from tests import worlds
from tests.test_measure import RNG
from tests.test_online import PROMPTS, first_phase, metrics, table
from tests.test_train import same, weights
from tests.toys import images, pairs, toy

assert first_phase  # a fixture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(12))
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def mixed(world: Path, output: Path, method: dict, **sections) -> dict:
    data = {"path": str(world / "pairs.parquet"), "cache": str(world / "cache"), "prompt_dropout": 0.2}
    run = table(world, output, method=method, **{"train": {"steps": 4, "batch_size": 2, "accumulate": 2}, **sections})
    return {**run, "data": {**data, **sections.get("data", {})}}


# the order


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.29, 0.9, 1.0])
def test_a_share_of_the_stream_is_real_spread_evenly_and_both_streams_are_whole(share):
    own, real, count = Order(7, seed=1), Order(5, seed=2), 600
    order = MixedOrder(own, real, share)
    items = [order.item(sample) for sample in range(count)]
    theirs = [-1 - item for item in items if item < 0]
    ours = [item for item in items if item >= 0]
    assert abs(len(theirs) - share * count) < 1
    assert theirs == [Order(5, seed=2).item(i) for i in range(len(theirs))]
    assert ours == [Order(7, seed=1).item(i) for i in range(len(ours))]
    for start in range(0, count, 40):
        part = sum(item < 0 for item in items[start : start + 40])
        assert abs(part - 40 * share) < 1 + 1e-9
        assert real_before(start, share) == sum(item < 0 for item in items[:start])


def test_half_of_a_round_s_batches_are_rows_of_the_data_and_own_images_keep_their_turns(world, tmp_path, first_phase):
    parts, phase, batches = first_phase(mixed(world, tmp_path / "run", {"name": "curated", "real_share": 0.5}))
    among = phase.collator
    assert isinstance(among, Among)
    x_0 = among.own.store.x_0(range(4))
    kept = []
    for _ in range(4):
        batch = next(batches)
        assert batch.x_0.shape == (2, *x_0.shape[1:])
        own = [[i for i, x in enumerate(x_0) if torch.equal(x, row)] for row in batch.x_0]
        assert [len(found) for found in own] == [1, 0]  # every second sample is the data's
        kept += own[0]
        real = among.real.batch([among.real.order.item(batch.samples[1] // 2)], [batch.samples[1]])
        assert torch.equal(batch.x_0[1], real.x_0[0])
        assert all(torch.equal(batch.cond[name][1], value[0]) for name, value in real.cond.tensors.items())
    assert sorted(kept[:2]) == sorted(kept[2:]) == sorted(set(kept))  # one of each prompt, twice
    assert set(parts.online.prompts.prompts) == {row["caption"] for row in worlds.preference_rows(12)}


def test_without_a_share_batches_are_the_round_s_own(world, tmp_path, first_phase):
    run = table(world, tmp_path / "run", method={"name": "curated", "real_share": 0.0})
    _, phase, _ = first_phase(run)
    assert isinstance(phase.collator, RoundCollator)
    assert not Curated().needs.real
    assert not OnlineDPO().needs.real


# the loss


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_with_the_data_alone_a_run_is_sft_to_the_last_bit(world, tmp_path, model):
    data = {"cache": str(world / f"cache-{model}")}
    curated = mixed(world, tmp_path / "own", {"name": "curated", "real_share": 1.0}, model=model, data=data)
    sft = {k: v for k, v in curated.items() if k != "online"}
    sft |= {"method": {"name": "sft"}, "output": str(tmp_path / "sft")}
    diffalign.train(curated)
    diffalign.train(sft)
    assert same(weights(tmp_path / "own", 4), weights(tmp_path / "sft", 4))
    theirs = [line["err_w"] for line in metrics(tmp_path / "sft") if "loss" in line]
    assert [line["err_w"] for line in metrics(tmp_path / "own") if "loss" in line] == theirs


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_the_term_beside_a_pair_is_the_loss_of_sft(prediction):
    policy, reference = toy(prediction), toy(prediction, seed=1)
    real = images(seed=5)
    batch = replace(pairs(), real=ImageBatch(x_0=real.x_0, cond=real.cond, samples=real.samples))
    plain = OnlineDPO(winner_weight=0.3)(policy, reference, pairs(), RNG)
    found = OnlineDPO(winner_weight=0.3, real_weight=0.5)(policy, reference, batch, RNG)
    sft = SFT()(policy, None, batch.real, RNG)
    torch.testing.assert_close(found.loss - plain.loss, 0.5 * sft.loss)
    assert torch.equal(found.metrics["err_real"], sft.loss.detach())
    assert set(found.metrics) - set(plain.metrics) == {"err_real"}
    assert {"real.x_0", "x_w"} <= set(batch.tensors())


def test_a_run_has_a_row_of_the_data_beside_every_pair(world, tmp_path, first_phase):
    _, phase, batches = first_phase(mixed(world, tmp_path / "look", {"name": "online_dpo", "real_weight": 0.5}))
    assert isinstance(phase.collator, Beside)
    batch = next(batches)
    assert len(batch.real) == len(batch) == 2
    assert batch.real.samples == batch.samples
    result = diffalign.train(mixed(world, tmp_path / "run", {"name": "online_dpo", "real_weight": 0.5}))
    steps = [line for line in metrics(result.folder) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(0.6931471805599453 + 0.5 * steps[0]["err_real"], rel=1e-5)
    assert "Images of that data were trained on too." in (result.export / "README.md").read_text().replace("\n", " ")


# bad input


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "curated", "real_share": 1.5}, r"method\.real_share must be in \[0, 1\], got 1\.5"),
        ({"name": "online_dpo", "real_weight": -1.0}, r"method\.real_weight must be at least 0, got -1\.0"),
        ({"name": "online_dpo", "real_share": 0.5}, r"config\.method: unknown key 'real_share'"),
    ],
)
def test_a_share_or_a_weight_that_cannot_be_is_one_clear_error(world, tmp_path, method, message):
    with pytest.raises(InputError, match=message):
        diffalign.train(mixed(world, tmp_path / "run", method))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "prompts.txt"}, r"data\.path must be a parquet file, a folder of them, .* got '.*prompts\.txt'"),
        (
            {"swap_labels": True},
            r"config\.data\.swap_labels must be left out with method 'curated', which takes winners",
        ),
        (
            {"buckets": True},
            r"config\.data\.buckets must be left out with method 'curated', which takes winners of one",
        ),
        ({"sizes": "original"}, r"config\.data\.sizes must be left out with method 'curated', which takes winners"),
    ],
    ids=str,
)
def test_data_that_cannot_be_mixed_in_are_one_clear_error(world, tmp_path, data, message):
    told = {k: str(world / v) if k == "path" else v for k, v in data.items()}
    with pytest.raises(InputError, match=message):
        diffalign.train(mixed(world, tmp_path / "run", {"name": "curated", "real_share": 0.5}, data=told))


def test_a_loss_that_asks_for_images_of_the_data_must_get_them():
    with pytest.raises(ValueError, match=r"batch\.real must be images of the data with method\.real_weight, got None"):
        OnlineDPO(real_weight=0.5)(toy(), toy(seed=1), pairs(), RNG)
