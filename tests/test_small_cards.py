"""Configs for cards of 24 GB fit them, counted at the true sizes of their models."""

import pytest

from diffalign import shipped
from diffalign.config import load
from diffalign.plan import GIB, parse_memory, plan
from tests import true_folders

CONFIGS = sorted(file.stem for file in shipped.configs().glob("*_24gb.toml"))


def test_there_are_some():
    assert CONFIGS == ["flux_diffusion_dpo_lora_24gb", "sdxl_diffusion_dpo_lora_24gb"]


@pytest.mark.parametrize("name", CONFIGS)
def test_they_train_as_the_configs_for_large_cards_do(name):
    small, large = load(name), load(name.removesuffix("_24gb"))
    assert (small.method, small.lora, small.optimizer) == (large.method, large.lora, large.optimizer)
    assert small.train.steps == large.train.steps
    assert small.train.precision == large.train.precision
    batches = [c.train.batch_size * c.train.accumulate for c in (small, large)]
    assert batches[0] == batches[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_they_fit_and_need_what_they_set(name, tmp_path):
    family = name.split("_")[0]
    folder = getattr(true_folders, family)(tmp_path / family)
    found = plan(load(name, [f"model.path={folder}"]), memory=parse_memory("24GB"))
    memory, inputs = found.memory, found.encoding
    print(name, {k: round(v / GIB, 2) for k, v in found.table()["memory"].items()}, round(inputs.peak / GIB, 2))
    assert found.fits
    assert found.change is None
    if family == "flux":
        assert inputs.largest == true_folders.T5_XXL_BYTES
        assert memory.weights == pytest.approx(6.32 * GIB, rel=0.01)
    assert memory.building_cache == inputs.largest + inputs.peak
