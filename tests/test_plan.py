"""A plan says what is there: its FLOPs are the pinned ones, its bytes those that a real step holds."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.step import peak_of
from benchmarks.worlds import _SCHEDULER, _TEXT, _UNET, _VAE, SIZES, build
from diffalign import cli, cli_plan, shipped
from diffalign.assemble import make_accelerator, make_optimizer, make_reference, place_net
from diffalign.checks import reference_kind
from diffalign.config import load, parse
from diffalign.counting import Memory, autocast, count_flop, fake_mode, saved_bytes
from diffalign.denoisers.unet import SD
from diffalign.errors import InputError, RunError
from diffalign.fit import fit
from diffalign.leaner import leaner
from diffalign.models.load import detect_family, load_scheduler_config, pipeline_index
from diffalign.models.lora import add_lora
from diffalign.models.policy import load_policy
from diffalign.models.save import trainable
from diffalign.plan import CONTEXT, GIB, SPARE, Plan, optimizer_bytes, parse_memory, plan, planned_device
from diffalign.rehearsal import Encoding, bare_net, encoding, random_batches, rehearse
from diffalign.strict import apply_override
from diffalign.train import run
from diffalign.workload import Evaluations, evaluations
from tests import worlds
from tests.builders import tiny_tokenizer
from tests.test_train import config as run_config
from tests.toys import ON_DATA

CONFIGS = sorted(f.stem for f in shipped.configs().glob("tiny_*.toml") if "[online]" not in f.read_text())
"""Runs on data; work of runs on own images is not counted."""
SD15_FLOP = 0.803e12


def configs_only(folder: Path, *, sizes: str) -> Path:
    """A Stable Diffusion folder of a benchmark world's sizes with configs and a tokenizer, and no weights."""
    made = SIZES[sizes]
    parts = {
        "unet": {"_class_name": "UNet2DConditionModel", "sample_size": made.pixels // 8, **_UNET, **made.unet},
        "vae": {"_class_name": "AutoencoderKL", "sample_size": made.pixels, **_VAE, **made.vae},
        "text_encoder": {"model_type": "clip_text_model", **_TEXT, **made.text},
        "scheduler": {"_class_name": "DDPMScheduler", "steps_offset": 1, "clip_sample": False, **_SCHEDULER},
    }
    for name, table in parts.items():
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(table))
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = made.text.get("max_position_embeddings", 77)
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configs_only(tmp_path_factory.mktemp("tiny") / "sd", sizes="tiny")


@pytest.fixture(scope="module")
def fifth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configs_only(tmp_path_factory.mktemp("fifth") / "sd", sizes="fifth")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configs_only(tmp_path_factory.mktemp("sd15") / "sd", sizes="sd15")


def config(model: Path, **changes: dict) -> dict:
    """A run of four pairs a step with a LoRA of rank 4, as the published script has it."""
    table: dict = {
        "output": "nowhere",
        "model": {"path": str(model)},
        "data": {"path": "somebody/data"},
        "method": {"name": "diffusion_dpo"},
        "train": {"steps": 10, "batch_size": 4, "device": "cpu"},
        "optimizer": {"lr": 1e-4},
        "lora": {"rank": 4},
    }
    for name, values in changes.items():
        table[name] = {**table.get(name, {}), **values}
    if table["train"].get("trainable") == "full":
        del table["lora"]
    return table


SLOW_FIFTH = pytest.param("fifth", marks=pytest.mark.slow)


@pytest.mark.parametrize("world", ["tiny", SLOW_FIFTH])
def test_the_work_is_that_of_the_published_script_without_what_a_cache_saves(world, request):
    sizes = SIZES[world]
    table = config(request.getfixturevalue(world), train={"batch_size": sizes.pairs})
    cached = plan(parse(table))
    live = plan(parse({**table, "data": {"path": "somebody/data", "cache": False}}))
    assert live.flop.per_step == sizes.flop
    assert cached.flop.per_step == sizes.flop - sizes.encoder_flop
    assert cached.work.words() == "2 with gradient + 2 without"
    assert live.memory.encoders > 0 == cached.memory.encoders
    if world == "fifth":
        r = cached.rehearsal
        assert live.flop.per_step / 1e9 == pytest.approx(307.5, rel=0.005)
        assert cached.flop.per_step / 1e9 == pytest.approx(225.3, rel=0.005)
        assert 8 * (r.forward + r.backward) / 1e9 == pytest.approx(156.7, rel=0.005)


def real_step(cfg, inputs, policy):
    """Bytes that a real step hands to autograd, and a call that takes another one."""
    accelerator = make_accelerator(cfg)
    net = place_net(policy.net, cfg, accelerator, adapted=True)
    kind = reference_kind(cfg)
    reports = fit(
        policy,
        None if kind == "none" else make_reference(policy, adapted=True, moves=kind == "ema").denoiser,
        cfg.method,
        random_batches(cfg, inputs),
        accelerator.prepare(make_optimizer(cfg, list(trainable(net).values()))),
        steps=3,
        accelerator=accelerator,
    )
    with saved_bytes([*net.parameters(), *net.buffers()]) as handed:
        next(reports)
    return handed(), lambda: next(reports)


def check_memory(cfg, family, policy) -> None:
    """A rehearsal against a real step: what autograd was handed, and the most that was allocated at a time."""
    inputs = encoding(cfg, family, pipeline_index(cfg.model, weights=False))
    shell = family.make_denoiser(bare_net(cfg, family), load_scheduler_config(cfg.model), cfg.timesteps)
    work = evaluations(cfg.method, shell, reference=reference_kind(cfg) != "none")
    r = rehearse(cfg, family, inputs, work, device="cpu")
    handed, step = real_step(cfg, inputs, policy)
    peak = peak_of(step, torch.device("cpu"))
    print(f"handed {r.handed / handed:.3f} of {handed / 1e6:.1f} MB, peak {r.peak / peak:.3f} of {peak / 1e6:.1f} MB")
    assert r.handed == pytest.approx(handed, rel=0.1)
    assert r.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny_sd_diffusion_dpo", []),
        ("tiny_sd3_diffusion_dpo", []),
        ("tiny_sd_mapo", []),
        ("tiny_sd3_ncp_dpo", []),
        ("tiny_sd_diffusion_dpo", ["train.gradient_checkpointing=selective"]),
    ],
)
def test_memory_is_what_a_real_step_holds(name, changes):
    cfg = load(name, ["train.batch_size=4", *changes])
    family = detect_family(cfg.model)
    check_memory(cfg, family, load_policy(cfg.model, family, cfg.timesteps, lora=cfg.lora, seed=cfg.seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"gradient_checkpointing": True}, {"gradient_checkpointing": "selective"}],
    ids=str,
)
def test_memory_of_the_fifth_world_is_what_a_real_step_holds(fifth, changes):
    cfg = parse(config(fifth, train=changes))
    net = build(SIZES["fifth"]).unet
    add_lora(net, cfg.lora, SD.lora_targets, seed=0)
    check_memory(cfg, SD, SD.make_denoiser(net, load_scheduler_config(cfg.model), None))


def rehearsed(folder: Path, world: str, kind: bool | str):
    """One micro-batch of a benchmark world in which nothing but the U-Net is run."""
    sizes = SIZES[world]
    cfg = parse(config(folder, train={"gradient_checkpointing": kind, "batch_size": sizes.pairs}))
    text = (sizes.text.get("max_position_embeddings", 77), sizes.unet["cross_attention_dim"])
    inputs = Encoding(
        latent=(sizes.unet.get("in_channels", 4), sizes.pixels // 8, sizes.pixels // 8),
        cond={"prompt_embeds": (text, torch.float32)},
        image_flop=0,
        prompt_flop=0,
        weights=0,
        largest=0,
        peak=0,
    )
    return rehearse(cfg, SD, inputs, Evaluations(with_gradient=2.0, without_gradient=2.0), device="cpu")


@pytest.mark.parametrize(
    ("world", "share", "most", "work"),
    [("tiny", 0.28, 1e9, 1.1), pytest.param("fifth", 0.28, 210e6, 1.07, marks=pytest.mark.slow)],
)
def test_selective_recompute_keeps_little_and_works_little_more(world, share, most, work, request):
    folder = request.getfixturevalue(world)
    plain, selective, full = (rehearsed(folder, world, kind) for kind in (False, "selective", True))
    step = {kind: 2 * r.forward + r.backward for kind, r in (("plain", plain), ("sel", selective), ("full", full))}
    assert full.handed < selective.handed < min(most, share * plain.handed)
    assert full.peak < selective.peak < plain.peak
    assert selective.forward == plain.forward
    assert step["plain"] < step["sel"] < work * step["plain"] < step["full"]


@pytest.mark.parametrize("name", ON_DATA)
def test_evaluations_are_those_of_the_method_itself(name):
    counts = {
        "cpo": (2, 0), "diffusion_dpo": (2, 2), "diffusion_kto": (1, 1), "dmpo": (2, 2), "linear_dpo": (2, 2),
        "mapo": (2, 0), "ncp_cpo": (2, 0, 2, 2), "ncp_dpo": (2, 2, 2, 4), "ncp_sft": (1, 0, 1, 1), "seppo": (2, 2),
        "sft": (1, 0), "spin": (2, 2),
    }  # fmt: skip
    cfg = load(f"tiny_sd_{name}")
    denoiser = SD.make_denoiser(torch.nn.Identity(), load_scheduler_config(cfg.model), None)
    work = evaluations(cfg.method, denoiser, reference=cfg.method.needs.references[0] != "none")
    found = (work.with_gradient, work.without_gradient, work.features_with_gradient, work.features_without_gradient)
    if name in counts:
        assert found == (*counts[name], 0, 0)[:4]
    else:
        assert found[0] == 2
        assert found[1] > 2 + 2  # what an inversion takes is not the same for every t


def test_an_inversion_takes_half_of_its_levels_on_average():
    cfg = parse(config(Path("x"), method={"name": "inpo", "levels": 10}))
    scheduler = {**_SCHEDULER}
    denoiser = SD.make_denoiser(torch.nn.Identity(), scheduler, None)
    work = evaluations(cfg.method, denoiser, reference=True, samples=1024)
    assert work.of_policy == pytest.approx(2 * 5.5, rel=0.06)
    assert work.without_gradient == pytest.approx(work.of_policy + 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_of_a_local_model_has_a_plan(name):
    found = plan(load(name))
    assert found.fits
    assert found.disk.rows > 0
    assert json.loads(json.dumps(found.table()))["method"] == found.method


@pytest.mark.slow
def test_stable_diffusion_at_true_size_is_counted_without_weights(sd15):
    lora = plan(parse(config(sd15, train={"batch_size": 1, "device": "auto", "precision": "bf16"})), memory=24 * GIB)
    r = lora.rehearsal
    assert r.parameters == 859_520_964
    assert r.trainable == 797_184
    assert r.reference == pytest.approx(SD15_FLOP, rel=0.001)
    assert lora.encoding.image_flop == pytest.approx(1.117e12, rel=0.005)
    assert lora.encoding.latent == (4, 64, 64)
    assert lora.disk.cache_per_row == 2 * 2 * 4 * 64 * 64 * 2 + 77 * 768 * 4
    assert lora.memory.weights == 2 * r.parameters
    assert lora.fits
    assert lora.disk.export == 4 * r.trainable


def room_for(peak: int) -> int:
    """Memory of a GPU that a run of this peak just fits."""
    return int((peak + CONTEXT) / (1 - SPARE)) + 2


@pytest.mark.slow
def test_a_run_that_does_not_fit_names_the_cheapest_change(tiny):
    cfg = parse(config(tiny, train={"device": "auto", "batch_size": 16}, data={"encode_batch_size": 1}))
    there = plan(cfg, memory=24 * GIB)
    assert there.fits
    assert there.change is None
    peaks = []
    for kind, words in (("selective", '"selective"'), (True, "true")):
        less = plan(replace(cfg, train=replace(cfg.train, gradient_checkpointing=kind)), memory=24 * GIB)
        short = plan(cfg, memory=room_for(less.memory.peak))
        assert short.fits is False
        assert short.change.overrides == (f"train.gradient_checkpointing={words}",)
        assert short.change.peak == less.memory.peak
        peaks.append(less.memory.peak)
    assert there.memory.peak > peaks[0] > peaks[1]


@pytest.mark.slow
def test_changes_are_gathered_where_none_is_enough_and_nothing_is_promised_beyond_them(tiny):
    cfg = parse(config(tiny, train={"device": "auto", "trainable": "full", "batch_size": 4}))
    *_, (_, _, last) = leaner(cfg, gathered=True)
    least = plan(last, memory=24 * GIB).memory.peak
    change = plan(cfg, memory=room_for(least * 21 // 20)).change
    assert change.peak <= least * 21 // 20
    assert {"train.gradient_checkpointing=true", 'train.trainable="lora"'} <= set(change.overrides)
    assert plan(cfg, memory=room_for(least // 2)).change is None


def test_changes_come_in_the_order_of_what_they_cost():
    train = {"trainable": "full", "batch_size": 6, "device": "auto"}
    cfg = parse(config(Path("x"), train=train))
    found = [keys for keys, _, _ in leaner(cfg)]
    assert found == [
        ("data.encode_batch_size=1",),
        ("train.offload=true",),
        ('train.gradient_checkpointing="selective"',),
        ("train.gradient_checkpointing=true",),
        ("train.batch_size=3", "train.accumulate=2"),
        ("train.batch_size=2", "train.accumulate=3"),
        ("train.batch_size=1", "train.accumulate=6"),
        ('train.trainable="lora"',),
        ('train.precision="bf16"',),
        ('optimizer.name="adamw8bit"',),
    ]
    *_, (_, _, last) = leaner(cfg, gathered=True)
    assert (last.train.batch_size, last.train.accumulate, last.train.trainable) == (1, 6, "lora")
    assert (last.train.precision, last.train.quantize, last.optimizer.name) == ("bf16", "4bit", "adamw8bit")
    for keys, _, changed in leaner(cfg):
        table = config(Path("x"), train=train)
        for key in keys:
            apply_override(table, key)
        assert parse(table) == changed


def test_a_compiled_run_is_not_offered_selective_recompute():
    cfg = parse(config(Path("x"), train={"compile": True}))
    assert [keys[0] for keys, _, _ in leaner(cfg) if "checkpointing" in keys[0]] == [
        "train.gradient_checkpointing=true"
    ]


def test_a_change_that_the_method_forbids_is_not_offered():
    cfg = parse(config(Path("x"), train={"batch_size": 2}, method={"name": "diffusion_kto"}))
    assert not any("train.batch_size=1" in keys for keys, _, _ in leaner(cfg))
    cfg = parse(config(Path("x"), method={"name": "ncp_dpo"}))
    assert not any("bf16" in keys[0] for keys, _, _ in leaner(cfg))


def test_full_fine_tuning_keeps_a_second_network_and_two_moments(tiny):
    found = plan(parse(config(tiny, train={"trainable": "full"})))
    parameters = found.rehearsal.parameters
    assert found.rehearsal.trainable == parameters
    assert found.memory.second_network == found.memory.weights == 4 * parameters
    assert found.memory.optimizer == pytest.approx(8 * parameters, rel=1e-3)
    assert found.memory.gradients == 4 * parameters
    none = plan(parse(config(tiny, train={"trainable": "full"}, method={"name": "mapo"})))
    assert none.memory.second_network == 0


def test_eight_bit_states_are_as_large_as_the_library_makes_them():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cfg = parse(config(Path("x"), optimizer={"name": "adamw8bit"}))
    shapes = [(100, 100), (8, 8), (300,)]
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        s for p in parameters for n, s in optimizer.state[p].items() if isinstance(s, torch.Tensor) and n[:4] != "qmap"
    ]
    assert optimizer_bytes(cfg, tuple(p.numel() for p in parameters)) == sum(s.nbytes for s in states)


def test_memory_is_counted_from_making_to_letting_go():
    with fake_mode():
        known = torch.empty(100)
        with Memory([known]) as memory:
            a = known.view(10, 10) + 1
            b = a * 2
            assert memory.now == 800
            del a
            assert (memory.now, memory.peak) == (400, 800)
            assert b.t().shape == (10, 10)
            assert memory.now == 400


def test_attention_on_the_cpu_has_its_flops():
    q = torch.randn(1, 2, 16, 8)
    flop = count_flop(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert flop == 2 * 2 * 2 * 16 * 16 * 8


def test_mixed_precision_of_a_gpu_casts_as_cuda_does():
    linear, norm = torch.nn.Linear(4, 4), torch.nn.GroupNorm(2, 4)
    with fake_mode(), autocast("cuda", torch.bfloat16):
        x = torch.empty(2, 4)
        y = linear(x)
        assert y.dtype == torch.bfloat16
        assert norm(y).dtype == torch.float32
        assert torch.softmax(y, -1).dtype == torch.float32
        assert (y + x).dtype == torch.float32
        assert torch.nn.functional.silu(y).dtype == torch.bfloat16


def test_what_is_planned_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = parse(config(Path("x"), train={"device": "auto"}))
    assert planned_device(cfg, None) == "cpu"
    assert planned_device(cfg, GIB) == "cuda"
    assert planned_device(parse(config(Path("x"), train={"device": "auto", "precision": "fp16"})), None) == "cuda"


@pytest.mark.parametrize(("text", "value"), [("24GB", 24 * GIB), ("80 GiB", 80 * GIB), ("512mb", GIB // 2)])
def test_a_size_is_read_as_cards_are_sold(text, value):
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["24", "GB", "-3GB", "0GB", "a lot"])
def test_a_size_that_is_none_is_an_error(text):
    with pytest.raises(InputError, match="--memory must be a size such as 24GB, got"):
        parse_memory(text)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
def test_a_model_that_is_not_here_says_what_to_fetch(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf download nobody/nothing --include"):
        plan(parse(config(Path("nobody/nothing"))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_a_device_that_is_not_here_is_not_measured(tiny):
    with pytest.raises(InputError, match="--measure must have the planned device here"):
        plan(parse(config(tiny, train={"device": "cuda"})), timed=True)


def test_the_command_fits_80_columns_and_writes_json(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    words = [
        "plan",
        "tiny_sd_diffusion_dpo",
        "train.batch_size=2",
        "train.accumulate=3",
        "--measure",
        "--json",
        str(file),
    ]
    monkeypatch.setattr(cli_plan, "out", cli_plan.Console(width=80))
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("fits: needs ")
    assert max(len(line) for line in lines if "plan.json" not in line and "/" not in line) <= 80
    found = json.loads(file.read_text())
    assert found["seconds_a_step"] == pytest.approx(3 * found["measured"]["seconds"])
    assert found["flop"]["per_step"] == 6 * found["flop"]["per_unit"]


def test_no_speed_is_said_where_none_was_measured(tiny):
    found = plan(parse(config(tiny)))
    assert found.seconds_a_step is None
    assert found.hours is None
    rows = {row[0]: row[1] for row in cli_plan._work(found)}
    assert rows["time"] == "not measured"
    assert {f.name for f in dataclasses.fields(Plan)} <= set(found.table())


def test_a_run_that_is_out_of_memory_says_the_cheapest_change(tmp_path, monkeypatch):
    worlds.sd(tmp_path / "sd")
    worlds.parquet(tmp_path / "pairs.parquet", worlds.preference_rows(8))

    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys.modules["diffalign.train"], "take_steps", full)
    with pytest.raises(RunError, match=r"cpu is out of memory .* the cheapest change is train.gradient_checkpointing="):
        run(parse(run_config(tmp_path, tmp_path / "run")))
