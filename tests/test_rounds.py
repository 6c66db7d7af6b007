"""Training in rounds: the pool, what is sampled for whom, and runs that were stopped in every phase."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffalign
from diffalign import fit, pool, rng, rounds
from diffalign.assemble import Parts, assemble, claim_folder
from diffalign.config import parse
from diffalign.data.selfsampled import Images
from diffalign.denoisers.unet import SD
from diffalign.errors import InputError, RunError
from diffalign.logbook import Logbook
from diffalign.models.policy import cast_frozen, load_policy, make_reference
from diffalign.pool import Pool
from tests import worlds
from tests.test_train import config, metrics, reloaded, same, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(24, ties=4))
    return root


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "BATCHES_PER_PART", 1)


def table(world: Path, output: Path, *, method: str = "seppo", count: int = 2, replay: str | None = None, **sections):
    """Rounds of two steps on few rows; the beta of `config` fits its random images."""
    sections["train"] = {"steps": 2 * count, **sections.get("train", {})}
    own = {"count": count, "steps": 2, "guidance": 2.0, "batch_size": 2, **sections.pop("rounds", {})}
    found = config(world, output, rounds=own, **sections)
    found["method"] = {"name": method, "beta": 100.0} | ({} if replay is None else {"replay": replay})
    return found


@pytest.fixture
def first_phase():
    """Makes (parts, first phase) of a run: sampled for, not trained."""
    books = []

    def make(cfg: dict, prepare: Callable[[Parts], object] = lambda parts: None) -> tuple[Parts, rounds.Phase]:
        parts = assemble(parse(cfg))
        prepare(parts)
        claim_folder(parts)
        books.append(Logbook(parts.folder / "metrics.jsonl", parts.accelerator, parts.metrics_offset))
        return parts, next(rounds.phases(parts, books[-1]))

    yield make
    for book in books:
        book.__exit__()


HELD = {"every": 2, "fraction": 0.3, "pairs": 1}


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_every_round_of_spin_starts_at_ln_2(world, tmp_path, model, trainable):
    result = diffalign.train(table(world, tmp_path / "run", method="spin", model=model, trainable=trainable))
    lines = metrics(result.folder)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[1] == losses[3] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert losses[2] != pytest.approx(losses[1], abs=1e-4)
    assert torch.isfinite(reloaded(world / model, result.export)).all()


def test_the_first_policy_as_reference_is_left_behind_in_the_second_round(world, tmp_path):
    lines = metrics(diffalign.train(table(world, tmp_path / "run", replay="first")).folder)
    assert [line["reference"] for line in lines if "round" in line] == [0, 0]
    assert next(line for line in lines if line["step"] == 3)["rewards/margins"] != 0


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_images_are_those_of_plain_diffusers_read_back_through_the_vae(world, tmp_path, first_phase, model, trainable):
    cfg = table(world, tmp_path / "run", model=model, trainable=trainable, replay="last", train={"steps": 4})
    cfg["data"] |= {"cache_dtype": "float32", "cache": str(tmp_path / "cache")}
    diffalign.train({**cfg, "train": {**cfg["train"], "steps": 2}, "rounds": {**cfg["rounds"], "count": 1}})
    cfg["resume"] = "latest"
    parts, _ = first_phase(cfg)
    images = Images(tmp_path / "run" / "rounds" / "round-2", "train")
    row = min(images.places)
    moments = plain_moments(world / model, parts, row, tmp_path / "run" / "rounds" / "policies")
    for stored, expected in zip(images.moments([row]), moments, strict=True):
        torch.testing.assert_close(stored, expected, atol=2e-3, rtol=1e-3)  # a pixel may round to its neighbour


def plain_moments(model: Path, parts, row: int, policies: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of the image that stock Diffusers makes of policy 1 and the row's noise, through a PNG's 8 bits."""
    from diffusers import AutoPipelineForText2Image, DDIMScheduler

    absent = {"text_encoder_3": None, "tokenizer_3": None} if parts.family.net == "transformer" else {}
    pipeline = AutoPipelineForText2Image.from_pretrained(model, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if parts.family.net == "unet":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    net = pipeline.components[parts.family.net]
    policy = load_file(policies / "policy-1.safetensors")
    if parts.cfg.train.trainable == "lora":
        from peft import LoraConfig

        targets = list(parts.family.lora_targets)
        net.add_adapter(LoraConfig(r=4, lora_alpha=8.0, target_modules=targets))
    missing = net.load_state_dict(policy, strict=False).missing_keys
    assert len(missing) + len(policy) == len(net.state_dict())
    noise = torch.randn(4, 8, 8, generator=rng.generator(0, "rollout", "train", 2, row))
    options = {"max_sequence_length": 24} if parts.family.net == "transformer" else {}
    image = pipeline(
        parts.collator.rows.prompt(row), latents=noise[None], num_inference_steps=2, guidance_scale=2.0,
        output_type="pil", **options,
    ).images[0]  # fmt: skip
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
    posterior = pipeline.vae.encode(pixels * 2 - 1).latent_dist
    return posterior.mean.detach(), posterior.std.detach()


def test_batches_join_winners_of_the_data_to_images_of_the_round(world, tmp_path, first_phase):
    parts, phase = first_phase(table(world, tmp_path / "run", data={"latents": "mean"}))
    images = Images(parts.folder / "rounds" / "round-1", "train")
    row = min(images.places)
    batch = phase.collator.batch([row], [0])
    scale = parts.collator.scale
    for x, (mean, _) in (
        (batch.x_w, parts.collator.rows.latents([row], [0], "w")),
        (batch.x_l, images.moments([row])),
    ):
        torch.testing.assert_close(x, (mean - scale.shift) * scale.scale, atol=0, rtol=0)


def test_exactly_the_rows_that_a_round_trains_on_are_sampled(world, tmp_path, monkeypatch):
    seen: list[set[int]] = []
    moments = Images.moments

    def recorded(self, rows):
        assert set(rows) <= set(self.places)
        seen.append((set(rows), set(self.places)))
        return moments(self, rows)

    monkeypatch.setattr(Images, "moments", recorded)
    diffalign.train(table(world, tmp_path / "run"))
    for steps in (seen[:2], seen[2:]):
        assert steps[0][0] | steps[1][0] == steps[0][1]


def test_the_cost_of_a_round_is_written_down(world, tmp_path, first_phase):
    rows: list[int] = []

    def count(parts: Parts) -> None:
        parts.net.register_forward_pre_hook(lambda net, args, kwargs: rows.append(len(args[0])), with_kwargs=True)

    parts, _ = first_phase(table(world, tmp_path / "run", validation=HELD), count)
    line = metrics(parts.folder)[0]
    assert (line["step"], line["round"], line["reference"], line["images"]) == (0, 1, 0, 4 + 1)
    assert sum(rows) == line["images"] * line["forwards_per_image"] == 5 * 2 * 2


@pytest.mark.parametrize("rows", ["pairs", "unpaired"])
def test_winners_alone_are_enough(world, tmp_path, rows):
    source = worlds.preference_rows(12)
    if rows == "unpaired":
        source = [{"prompt": r["caption"], "image": r["jpg_0"], "label": 1} for r in source]
    worlds.parquet(tmp_path / "rows.parquet", source)
    data = {"path": str(tmp_path / "rows.parquet"), "cache": str(tmp_path / "cache")}
    assert diffalign.train(table(world, tmp_path / "run", data=data)).step == 4


def test_the_export_holds_the_policy_alone(world, tmp_path):
    dpo = diffalign.train(config(world, tmp_path / "dpo", train={"steps": 1}))
    seppo = diffalign.train(table(world, tmp_path / "seppo"))
    one, two = (load_file(r.export / "pytorch_lora_weights.safetensors") for r in (dpo, seppo))
    assert one.keys() == two.keys()
    assert (reloaded(world / "sd", None) - reloaded(world / "sd", seppo.export)).abs().max() > 0


def test_uniform_replay_draws_every_earlier_policy_and_no_other():
    for number in range(1, 6):
        drawn = {rounds.replayed("uniform", number, seed) for seed in range(100)}
        assert drawn == set(range(number))
    assert [rounds.replayed("last", k, 0) for k in (1, 2, 3)] == [0, 1, 2]
    assert [rounds.replayed("first", k, 0) for k in (1, 2, 3)] == [0, 0, 0]


class Stop(Exception):
    """Someone pulled the plug."""


def stopping(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, nth: int) -> None:
    """Makes the n-th call of a function raise."""
    whole, count = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        count[0] += 1
        if count[0] == nth:
            raise Stop
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


MOMENTS = {
    "while the first images are sampled": (rounds.Sampler, "moments", 2),
    "between the second policy and its place in the pool": (pool, "_sha256", 3),
    "while the second images are sampled": (rounds.Sampler, "moments", 5),
    "after a checkpoint in the second round": (fit, "_backward", 4),
}
"""With four rows and one held-out one in each round and two images a part, there are three parts a round."""
MORE_MOMENTS = {
    "while the first policy is written": (pool, "save_shard", 1),
    "after the first images": (fit, "_backward", 1),
    "in the first round": (fit, "_backward", 2),
    "between the second policy and its images": (rounds, "sample", 2),
    "after the second images": (fit, "_backward", 3),
}


@pytest.fixture(scope="module")
def wholes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Runs that were not stopped, made when first asked for."""
    root = tmp_path_factory.mktemp("whole")
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, trainable: str) -> Path:
        if (model, trainable) not in made:
            place = root / f"{model}-{trainable}"
            made[model, trainable] = diffalign.train(resumable(world, place, model, trainable)).folder
        return made[model, trainable]

    return get


def resumable(world: Path, output: Path, model: str, trainable: str) -> dict:
    """A run with everything that has state, and a checkpoint inside the second round."""
    return table(
        world,
        output,
        model=model,
        trainable=trainable,
        validation=HELD,
        train={"ema_decay": 0.9},
        checkpoint={"every": 3, "keep_last": 9},
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_stopped_in_any_phase_ends_as_if_it_had_not_been(world, wholes, tmp_path, monkeypatch, moment):
    stopped_and_resumed(world, wholes, tmp_path, monkeypatch, MOMENTS[moment], ("sd", "lora"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("sd", "lora"), ("sd", "full"), ("sd3", "lora"), ("sd3", "full")], ids="-".join)
@pytest.mark.parametrize("moment", [*MOMENTS, *MORE_MOMENTS])
def test_any_run_stopped_in_any_phase_ends_as_if_it_had_not_been(world, wholes, tmp_path, monkeypatch, moment, kind):
    stopped_and_resumed(world, wholes, tmp_path, monkeypatch, (MOMENTS | MORE_MOMENTS)[moment], kind)


def stopped_and_resumed(world, wholes, tmp_path, monkeypatch, moment, kind):
    whole = wholes(*kind)
    cfg = resumable(world, tmp_path / "run", *kind)
    with monkeypatch.context() as patched:
        stopping(patched, *moment)
        with pytest.raises(Stop):
            diffalign.train(cfg)
    diffalign.train({**cfg, "resume": "latest"})
    compare(whole, tmp_path / "run")


def compare(a: Path, b: Path, step: int = 4) -> None:
    """Weights, optimizer, moving average, metrics, pool and export of two runs are equal bit for bit."""
    assert metrics(a) == metrics(b)
    names = [f"checkpoints/step-{step}/{name}.safetensors" for name in ("weights", "optimizer", "ema")]
    for name in [*names, *(f"rounds/policies/policy-{n}.safetensors" for n in (0, 1))]:
        assert same(load_file(a / name), load_file(b / name)), name
    x, y = (load_file(next((f / "export").rglob("*.safetensors"))) for f in (a, b))
    assert same(x, y)
    assert (a / "rounds/policies/pool.json").read_text() == (b / "rounds/policies/pool.json").read_text()


def test_parts_that_are_there_are_not_sampled_again(world, tmp_path, monkeypatch, first_phase):
    cfg = table(world, tmp_path / "run")
    with monkeypatch.context() as patched:
        stopping(patched, rounds.Sampler, "moments", 2)
        with pytest.raises(Stop):
            diffalign.train(cfg)
    assert len(list((tmp_path / "run/rounds/round-1").glob("train-*"))) == 1
    sampled, moments = [], rounds.Sampler.moments
    monkeypatch.setattr(
        rounds.Sampler, "moments", lambda self, split, rows: sampled.append(len(rows)) or moments(self, split, rows)
    )
    first_phase({**cfg, "resume": "latest"})
    assert sum(sampled) == 4 - 2


def test_a_run_from_an_older_checkpoint_makes_later_rounds_anew(world, tmp_path):
    cfg = table(world, tmp_path / "run", checkpoint={"every": 1, "keep_last": 9}, train={"ema_decay": 0.9})
    diffalign.train(cfg)
    first = weights(tmp_path / "run", 4)
    file = tmp_path / "run" / "rounds" / "policies" / "policy-1.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    diffalign.train({**cfg, "resume": "step-1"})
    assert same(weights(tmp_path / "run", 4), first)


def test_a_finished_run_can_get_more_rounds_of_the_same_length(world, tmp_path):
    whole = diffalign.train(table(world, tmp_path / "whole"))
    diffalign.train(table(world, tmp_path / "parts", count=1))
    longer = {**table(world, tmp_path / "parts"), "resume": "latest"}
    with pytest.raises(InputError, match=r"changed: train\.steps / rounds\.count \(2 then, 3 now\)"):
        diffalign.train({**longer, "train": {**longer["train"], "steps": 6}})
    parts = diffalign.train(longer)
    assert same(weights(whole.folder, 4), weights(parts.folder, 4))
    assert metrics(whole.folder) == metrics(parts.folder)


@pytest.fixture
def policies(tmp_path: Path) -> Pool:
    """Policies 0 and 1 of a run with one trained parameter."""
    found = Pool(tmp_path / "policies")
    for number in (0, 1):
        found.add(number, TRAINED)
    return found


TRAINED = {"w": torch.nn.Parameter(torch.ones(3))}


def test_a_pool_gives_back_what_was_put_in(policies):
    assert same(policies.policy(1, TRAINED), {"w": torch.ones(3)})


def test_an_empty_pool_is_one_clear_error(world, tmp_path):
    cfg = table(world, tmp_path / "run", replay="first", checkpoint={"every": 3})
    diffalign.train(cfg)
    for file in (tmp_path / "run/rounds/policies").iterdir():
        file.unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    with pytest.raises(RunError, match=r"policies must hold the policies of earlier rounds, got an empty pool; start"):
        diffalign.train({**cfg, "resume": "latest"})


def test_a_missing_policy_is_one_clear_error(policies):
    (policies.folder / "policy-0.safetensors").unlink()
    with pytest.raises(RunError, match=r"of earlier rounds, got none at policy-0\.safetensors; start the run anew"):
        policies.policy(0, TRAINED)


def test_a_damaged_policy_is_one_clear_error(policies):
    file = policies.folder / "policy-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"policy-0\.safetensors must be as it was written, got another SHA-256"):
        policies.policy(0, TRAINED)


@pytest.mark.parametrize("other", [{"v": torch.ones(3)}, {"w": torch.ones(4)}], ids=["name", "shape"])
def test_a_policy_of_another_network_is_one_clear_error(policies, other):
    with pytest.raises(RunError, match=r"policy-0\.safetensors must hold the parameters that this run trains, got 1"):
        policies.policy(0, {k: torch.nn.Parameter(v) for k, v in other.items()})


def test_a_damaged_index_is_one_clear_error(policies):
    policies.index.write_text("{")
    with pytest.raises(RunError, match=r"pool\.json must be as it was written, got no JSON"):
        policies.policy(0, TRAINED)


def test_a_damaged_part_is_one_clear_error(tmp_path):
    file = tmp_path / "train-00000000.safetensors"
    file.write_bytes(b"half a file")
    with pytest.raises(RunError, match=rf"{file.name} must be as it was written, got .*; remove it, and it is made"):
        Images(tmp_path, "train")


@pytest.mark.parametrize("cache", [False, True], ids=["live", "cached"])
def test_data_without_prompts_is_one_clear_error(world, tmp_path, cache):
    rows = [{**row, "caption": " " * (i % 2)} for i, row in enumerate(worlds.preference_rows(4))]
    worlds.parquet(tmp_path / "rows.parquet", rows)
    data = {"path": str(tmp_path / "rows.parquet"), "cache": str(tmp_path / "cache") if cache else False}
    with pytest.raises(
        InputError,
        match=r"data\.path must have prompts for method 'seppo', which samples an image for each; got 4 rows, all",
    ):
        diffalign.train(table(world, tmp_path / "run", data=data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": None}, r"config\.rounds must be there with method 'seppo', whose losers are images of an earlier"),
        ({"method": {"name": "sft"}}, r"config\.rounds must be left out with method 'sft'"),
        ({"rounds": {"count": 3}}, r"config\.train\.steps must be a multiple of rounds\.count, 3, got 4"),
        ({"rounds": {"count": 0}}, r"rounds\.count must be at least 1, got 0"),
        ({"rounds": {"count": 2, "guidance": 0.5}}, r"rounds\.guidance must be at least 1, which is off, got 0\.5"),
        ({"checkpoint": {"best": "loss"}, "validation": HELD}, r"config\.checkpoint\.best must be 'err_w' or left out"),
        ({"train": {"steps": 4, "reference": "ema"}}, r"config\.train\.reference must be left out .* 'seppo'"),
    ],
)
def test_a_config_that_does_not_fit_rounds_is_one_clear_error(tmp_path, change, message):
    found = {k: v for k, v in {**table(tmp_path, tmp_path), **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        parse(found)


def test_a_run_from_a_lora_has_it_in_its_first_reference_in_full_precision(world, tmp_path):
    first = diffalign.train(config(world, tmp_path / "first", train={"steps": 1}))
    cfg = table(world, tmp_path / "second", method="spin")
    cfg["model"]["lora"] = str(first.export)
    found = parse(cfg)
    policy = load_policy(found.model, SD, None, lora=found.lora, seed=0)
    cast_frozen(policy.net, torch.bfloat16)
    reference = make_reference(policy, adapted=True, moves=True).parameters
    trained = {name: p.detach() for name, p in policy.net.named_parameters() if p.requires_grad}
    assert same({name: p.detach() for name, p in reference.items()}, trained)
    assert all(p.dtype == torch.float32 for p in reference.values())


def test_the_pool_names_its_policies_by_digest(world, tmp_path):
    diffalign.train(table(world, tmp_path / "run"))
    index = json.loads((tmp_path / "run/rounds/policies/pool.json").read_text())
    assert list(index) == ["0", "1"]
    assert same(
        load_file(tmp_path / "run/rounds/policies/policy-1.safetensors"),
        load_file(tmp_path / "run/checkpoints/step-2/weights.safetensors"),
    )
