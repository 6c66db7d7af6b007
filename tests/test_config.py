"""Configs: strict, one line for every mistake, and a round trip through TOML."""

import re
import tomllib
from pathlib import Path

import pytest

from diffalign import config, shipped
from diffalign.config import dump, load, parse
from diffalign.errors import InputError
from diffalign.strict import changed_keys, section_class, to_toml

BASE = {
    "output": "runs/x",
    "model": {"path": "tiny-sd"},
    "data": {"path": "tiny-sd-pairs"},
    "method": {"name": "diffusion_dpo", "beta": 100.0},
    "train": {"steps": 5},
    "optimizer": {"lr": 1e-4},
}


def changed(key: str, value: object) -> dict:
    """The base config with one dotted key set, or removed where the value is None."""
    table = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    *sections, last = key.split(".")
    place = table
    for section in sections:
        place = place.setdefault(section, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return table


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.betta", 3.0, r"config\.method: unknown key 'betta'; did you mean 'beta'\?"),
        ("train.stesp", 3, r"config\.train: unknown key 'stesp'; did you mean 'steps'\?"),
        ("modle.path", "x", r"config: unknown key 'modle'; did you mean 'model'\?"),
        ("train.steps", None, r"config\.train: missing key 'steps'"),
        ("model", None, r"config: missing key 'model'"),
        ("method.name", "difusion_dpo", r"must be a known method, got 'difusion_dpo'; did you mean 'diffusion_dpo'\?"),
        ("method.name", "zzz", r"got 'zzz'; choose from .*diffusion_dpo, .*sft"),
        ("method.link", "sigmoyd", r"did you mean 'sigmoid'\?"),
        ("method.link", {"name": "sigmoid", "label_smoothing": 0.1}, "does not take option 'label_smoothing'"),
        ("method.link", "cdpo", "needs option 'label_smoothing'"),
        ("method.error_space", "epsilon", r"must be one of 'native', 'eps', 'x0', 'v', got 'epsilon'"),
        ("optimizer.lr", "1e-4", r"config\.optimizer\.lr must be a number, got '1e-4'"),
        ("train.steps", 2.5, r"config\.train\.steps must be an integer, got 2.5"),
        ("train.steps", True, r"config\.train\.steps must be an integer, got True"),
        ("train.precision", "fp8", r"must be one of 'no', 'bf16', 'fp16', got 'fp8'"),
        ("data.cache", 3, r"config\.data\.cache must be a string or true or false, got 3"),
        ("lora.targets", ["a", 3], r"config\.lora\.targets must be a list of strings"),
        ("train", 3, r"config\.train must be a table, got 3"),
        ("track", "tensorboard", r"config\.track must be a list of strings, got 'tensorboard'"),
        ("method.beta", -1.0, r"method\.beta must be positive, got -1\.0"),
        ("train.batch_size", 0, r"config\.train\.batch_size must be at least 1, got 0"),
        ("optimizer.lr", 0.0, r"config\.optimizer\.lr must be positive, got 0\.0"),
        ("timesteps.low", 2.0, "low < high"),
        ("timesteps", {"distribution": "uniform", "mean": 1.0}, "must be left out when u is uniform"),
        ("data.prompt_dropuot", 0.1, r"did you mean 'prompt_dropout'\?"),
        ("data.columns", {"captoin": "x"}, r"got 'captoin'; did you mean 'caption'\?"),
        ("data.flip", True, r"data\.variants must be at least 2 with random crop or flip"),
        ("checkpoint.best", "loss", r"must be left out without \[validation\]"),
        ("train.ema_decay", 1.5, r"ema_decay must be in \(0, 1\)"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(key, value, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(changed(key, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"steps": 5, "trainable": "full"}, "lora": {"rank": 4}}, r"config\.lora must be left out"),
        (
            {"train": {"steps": 5, "trainable": "full"}, "model": {"path": "x", "lora": "y"}},
            r"config\.model\.lora must be left",
        ),
        ({"data": {"path": "x", "cache": False, "streaming": True}}, "both need the cache"),
    ],
)
def test_values_that_exclude_each_other_are_an_error_with_the_reason(table, message):
    with pytest.raises(InputError, match=message):
        parse({**BASE, **table})


def test_integers_are_numbers():
    assert parse(changed("method.beta", 100)).method.beta == 100.0


def test_the_resolved_config_reads_back_as_itself():
    table = changed("method.link", {"name": "cdpo", "label_smoothing": 0.1})
    table["validation"] = {"every": 10}
    table["data"]["columns"] = {"caption": 'te"xt'}
    table["timesteps"] = {"low": 0.1, "distribution": "logit_normal"}
    first = parse(table)
    text = to_toml(dump(first))
    assert dump(parse(tomllib.loads(text))) == dump(first)


def test_overrides_set_keys_by_their_path(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(to_toml(BASE))
    overrides = ["train.steps=7", "method.link=hinge", "output=elsewhere/run", "lora.rank=8", "data.cache=false"]
    found = load(file, overrides)
    assert (found.train.steps, found.output, found.lora.rank, found.data.cache) == (7, "elsewhere/run", 8, False)
    assert dump(found)["method"]["link"] == "hinge"


@pytest.mark.parametrize("override", ["train.steps", "=3"])
def test_an_override_without_key_and_value_is_named(tmp_path, override):
    file = tmp_path / "c.toml"
    file.write_text(to_toml(BASE))
    with pytest.raises(InputError, match=r"override must have the form section\.key=value"):
        load(file, [override])


def test_a_missing_config_is_named_with_the_nearest_shipped_one():
    with pytest.raises(InputError, match=r"got 'tiny_sd_difusion_dpo'; did you mean 'tiny_sd_diffusion_dpo'\?"):
        load("tiny_sd_difusion_dpo")


def test_broken_toml_is_named_with_its_place(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("output = \n")
    with pytest.raises(InputError, match=r"must be valid TOML: .*line 1"):
        load(file)


@pytest.mark.parametrize("file", sorted(shipped.configs().glob("*.toml")), ids=lambda f: f.stem)
def test_every_shipped_config_loads_and_opens_with_its_source(file):
    load(file)
    comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
    text = " ".join(comment)
    for word in ("diffalign train", "Hardware", "Expected", "Seen"):
        assert word in text, f"{file.name} must say {word!r} in its opening comment"


@pytest.mark.parametrize("file", sorted(shipped.configs().glob("*.toml")), ids=lambda f: f.stem)
def test_the_commands_in_a_configs_header_train_the_same_samples_a_step(file):
    lines = [line.lstrip("# ").rstrip("\\ ") for line in file.read_text().splitlines() if line.startswith("#")]
    command = r"(?:(?:nproc_per_node=|num_processes )(\d+) -m )?diffalign train ([\w/.]+)((?: [a-z_.]+=\S+)*)"
    found = re.findall(command, " ".join(lines))
    several = any(processes for processes, _, _ in found)
    batches = set()
    for processes, name, words in found:
        train = load(name.removeprefix("configs/"), words.split()).train
        if Path(name).stem == file.stem:
            batches.add(train.batch_size * train.accumulate * int(processes or 1))
    assert len(batches) == 1 or not several


def test_changed_keys_are_named_with_both_values():
    old, new = dump(parse(BASE)), dump(parse(changed("optimizer.lr", 2e-4)))
    assert changed_keys(old, new) == ["optimizer.lr (0.0001 then, 0.0002 now)"]


def test_every_section_is_documented():
    import dataclasses

    for field in dataclasses.fields(config.TrainConfig):
        cls = section_class(field.type)
        assert cls is None or cls.__doc__
