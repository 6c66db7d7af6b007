"""Shipped configs of runs on own images: their rounds come out even, on the processes that their commands name."""

import re
from dataclasses import replace

import pytest

from diffalign import shipped
from diffalign.config import load
from diffalign.denoisers.stable_audio_3 import STABLE_AUDIO_3
from diffalign.models.load import ModelSource
from diffalign.online.parts import make_walk
from diffalign.online_checks import check_work

PUBLISHED = {
    "ddpo": {"clip_range": 1e-4, "clip_advantage": 5.0, "advantage": "per_prompt"},
    "d3po": {"beta": 0.1, "clip": 0.1, "pairs": "all"},
    "flow_grpo": {"kl": 0.04, "clip_advantage": 5.0, "advantage": "global_std", "trust": "clip"},
    "diffusion_nft": {"beta": 1.0, "kl_weight": 1e-4, "decay_type": 1, "level_fraction": 0.99},
    "awm": {"weighting": "ghuber", "kl_weight": 1e-3, "old_kl_weight": 1.0, "level_fraction": 0.9, "level_count": 6},
    "dgpo": {"beta": 100.0, "kl_weight": 1e-3, "clip": 0.01, "level_first": 7, "level_count": 4},
    "crd": {"beta": 1.0, "kl_weight": 0.1, "loss": "mse"},
}
"""What the papers or their released code run with."""
FILES = sorted(f for f in shipped.configs().glob("*.toml") if "[online]" in f.read_text())


def test_every_method_on_own_images_has_a_config():
    from diffalign.methods import METHODS

    on_prompts = {name for name, method in METHODS.items() if method().needs.data == "prompts"}
    assert {load(file).method.__class__ for file in FILES} == {METHODS[name] for name in on_prompts}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_left_out_of_a_config_is_as_published(name):
    from diffalign.methods import METHODS

    held = vars(METHODS[name]())
    assert {key: held[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_round_comes_out_even_on_the_processes_of_the_command(file):
    cfg, text = load(file), file.read_text()
    sound, flow = "audio" in file.stem, "sd3" in file.stem
    source = ModelSource(path="tiny-sd3" if flow or sound else "tiny-sd")
    walk = make_walk(cfg.online, cfg.method.needs, source, family=STABLE_AUDIO_3 if sound else None)
    found = re.search(r"--num_processes (\d+)", text)
    processes = int(found[1]) if found else 1
    check_work(cfg, cfg.online, walk, processes)
    one = re.search(r"# The same on one device: .*?train\.accumulate=(\d+)", text, re.DOTALL)
    assert (one is None) == (processes == 1)
    if one is not None:
        assert int(one[1]) == processes * cfg.train.accumulate
        check_work(replace(cfg, train=replace(cfg.train, accumulate=int(one[1]))), cfg.online, walk, 1)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_readme_names_every_one(file):
    assert f"`{file.stem}`" in (file.parent / "README.md").read_text()
