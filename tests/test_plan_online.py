"""A plan of a run on its own images says what the engine does: its calls one by one, its bytes as they are held."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.step import peak_of
from diffalign import cli, cli_plan, online_round, online_rounds, shipped
from diffalign.assemble import assemble, claim_folder
from diffalign.bare import bare_net, encoding
from diffalign.checks import context_of, reference_kind
from diffalign.config import load, parse
from diffalign.counting import saved_bytes
from diffalign.errors import InputError
from diffalign.fit import fit
from diffalign.leaner import leaner
from diffalign.logbook import Logbook
from diffalign.memory import sampling_peak
from diffalign.models.load import detect_family, load_scheduler_config, pipeline_index
from diffalign.models.policy import load_policy, make_old, make_reference
from diffalign.models.save import trainable
from diffalign.online import sampling
from diffalign.online.store import Store
from diffalign.online_round import OwnRound
from diffalign.own_work import kept_levels, own_evaluations, own_walk
from diffalign.placing import make_accelerator, make_optimizer, place_net
from diffalign.plan import GIB, Plan, plan
from diffalign.rehearsal import rehearse
from diffalign.timing import batches, guided
from tests import worlds
from tests.test_online import PROMPTS, table

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
FILES = sorted(f.stem for f in shipped.configs().glob("*.toml") if "[online]" in f.read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


@dataclass
class Seen:
    """Samples through a network, by what it was run for."""

    phase: str = "training"
    plain: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("training", "sampling", "again", "reference"), 0)
    )
    graded: int = 0

    def during(self, phase, work):
        def inside(*args, **named):
            before, self.phase = self.phase, phase
            try:
                return work(*args, **named)
            finally:
                self.phase = before

        return inside

    def count(self, net, args, named) -> None:
        samples = len(args[0] if args else named["hidden_states"])
        if torch.is_grad_enabled():
            assert self.phase == "training"
            self.graded += samples
        else:
            self.plain[self.phase] += samples


def counted(cfg, monkeypatch) -> Seen:
    """What the engine itself asks of the network, over all rounds of a run."""
    seen = Seen()
    monkeypatch.setattr(sampling, "rollout", seen.during("sampling", sampling.rollout))
    reference = online_round.reference_log_probs
    monkeypatch.setattr(online_round, "reference_log_probs", seen.during("reference", reference))
    monkeypatch.setattr(online_rounds, "remember_old", seen.during("again", online_rounds.remember_old))
    parts = assemble(cfg)
    claim_folder(parts)
    parts.net.register_forward_pre_hook(seen.count, with_kwargs=True)
    with Logbook(parts.folder / "metrics.jsonl", parts.accelerator, 0) as book:
        sys.modules["diffalign.train"].train(parts, book)
    return seen


RUNS = {
    "d3po": ("sd", "d3po", {"guidance": 2.0}, {}),
    "ddpo computed again": ("sd", "ddpo", {"guidance": 2.0, "batch_size": 3}, {"accumulate": 4}),
    "ddpo as sampled": ("sd", "ddpo", {"batch_size": 2}, {"accumulate": 4}),
    "a window with means": (
        "sd3",
        {"name": "flow_grpo", "trust": "guard"},
        {"steps": 6, "window": {"size": 2}, "guidance": 2.0, "batch_size": 4},
        {"accumulate": 2},
    ),
    "a KL in the reward": (
        "sd3",
        {"name": "flow_grpo", "kl": 0.0, "kl_reward": 0.1},
        {"steps": 4, "guidance": 2.0, "updates": 1, "batch_size": 3},
        {"steps": 2, "accumulate": 6},
    ),
    "a slow copy": ("sd3", "diffusion_nft", {"steps": 8, "batch_size": 4}, {"accumulate": 7}),
    "groups": ("sd", "dgpo", {"steps": 8}, {"accumulate": 4}),
    "no reference": ("sd3", "curated", {"steps": 8, "guidance": 2.0, "batch_size": 4}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_calls_are_those_of_the_engine_itself(world, tmp_path, monkeypatch, name):
    model, method, online, train = RUNS[name]
    run = table(world, tmp_path / "run", model=model, method=method, online=online, train=train)
    cfg = parse(run)
    found = plan(cfg).own
    seen = counted(cfg, monkeypatch)
    assert found.rounds == 2
    assert seen.plain["sampling"] == 2 * found.sampling
    assert seen.plain["again"] == 2 * found.again
    assert seen.plain["reference"] == 2 * found.under_reference
    assert seen.graded == 2 * found.with_gradient
    assert seen.plain["training"] == 2 * found.without_gradient
    assert (found.again > 0) == (name in ("ddpo computed again", "a window with means", "a KL in the reward"))
    assert (found.under_reference > 0) == (name == "a KL in the reward")
    assert (found.of_old > 0) == (name in ("a slow copy", "groups"))


def small(name: str, *changes: str):
    """A shipped run with rounds of four images and ten guided moves, whatever its own settings are."""
    sizes = ["online.prompts=2", "online.group=2", "online.updates=1", "online.batch_size=4", "train.batch_size=4"]
    return load(name, [*sizes, "online.steps=10", "online.guidance=2.0", "lora.rank=16", *changes])


def test_a_micro_batch_is_planned_as_it_is_called(world):
    found = plan(small("tiny_sd_d3po", "train.accumulate=5", "train.steps=2"))
    assert (found.unit, found.batch_size, found.own.images, found.own.items) == ("pair of moves", 4, 4, 20)
    assert found.work.words() == "4 with gradient + 4 without"  # two images, guided
    r, own = found.rehearsal, found.own
    assert found.flop.per_step == 20 * 4 * (r.forward + r.backward + r.reference)
    latents = own.sampling * r.forward + own.images * found.encoding.image_flop
    assert found.flop.sampling == latents + 3 * found.encoding.prompt_flop
    assert found.flop.total == 2 * (found.flop.sampling + found.flop.per_step)


def test_processes_share_out_what_is_sampled_and_each_reads_all_prompts():
    changes = ("train.accumulate=5", "train.steps=2")
    one = plan(small("tiny_sd_ddpo", *changes, "train.batch_size=8"), processes=1)
    two = plan(small("tiny_sd_ddpo", *changes, "train.batch_size=4"), processes=2)
    assert one.own.items == two.own.items
    assert one.own.sampling == two.own.sampling
    assert two.flop.per_step * 2 == one.flop.per_step
    prompts = 3 * two.encoding.prompt_flop
    shared_out = one.flop.total - 2 * prompts
    again = 2 * (two.own.again - one.own.again) * two.rehearsal.forward
    assert two.flop.total == pytest.approx((shared_out + again) / 2 + 2 * prompts)


def rehearsed(cfg, family, inputs):
    walk = own_walk(cfg, family)
    shell = family.make_denoiser(bare_net(cfg, family), load_scheduler_config(cfg.model), cfg.timesteps)
    work = own_evaluations(cfg, shell, walk, reference=reference_kind(cfg) != "none")
    return rehearse(cfg, family, inputs, work, device="cpu"), walk


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny_sd_d3po", []),
        ("tiny_sd_ddpo", []),
        ("tiny_sd3_flow_grpo", []),
        ("tiny_sd3_diffusion_nft", []),
        ("tiny_sd_curated", ["train.gradient_checkpointing=true"]),
    ],
)
def test_memory_of_training_is_what_a_real_step_holds(name, changes):
    cfg = small(name, "train.accumulate=1", *changes)  # one micro-batch: no gradients are held before it
    family = detect_family(cfg.model)
    inputs = encoding(cfg, family, pipeline_index(cfg.model, weights=False))
    r, _ = rehearsed(cfg, family, inputs)
    policy = load_policy(
        cfg.model, family, cfg.timesteps, lora=cfg.lora, seed=cfg.seed, context=context_of(cfg, family)
    )
    accelerator = make_accelerator(cfg)
    net = place_net(policy.net, cfg, accelerator, adapted=True)
    compared = reference_kind(cfg) != "none"
    reference = make_reference(policy, adapted=True).denoiser if compared else None
    old = make_old(policy, adapted=True).denoiser if cfg.method.needs.old else None
    device = torch.device("cpu")
    reports = fit(
        guided(cfg, policy, inputs, device),
        None if reference is None else guided(cfg, reference, inputs, device),
        cfg.method,
        batches(cfg, family, inputs),
        accelerator.prepare(make_optimizer(cfg, list(trainable(net).values()))),
        steps=3,
        accelerator=accelerator,
        old=old,
    )
    with saved_bytes([*net.parameters(), *net.buffers()]) as handed:
        next(reports)
    peak = peak_of(lambda: next(reports), device)
    print(
        f"handed {r.handed / handed():.3f} of {handed() / 1e6:.1f} MB, peak {r.peak / peak:.3f} of {peak / 1e6:.1f} MB"
    )
    assert r.handed == pytest.approx(handed(), rel=0.1)
    assert r.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny_sd_ddpo", ["train.accumulate=10"]),
        ("tiny_sd_d3po", ["online.store_dtype=float16"]),
        ("tiny_sd3_flow_grpo", ["train.accumulate=16", "online.batch_size=32", "online.prompts=16"]),
        ("tiny_sd3_diffusion_nft", ["train.accumulate=4"]),
    ],
)
def test_memory_of_sampling_is_what_a_real_batch_holds(tmp_path, name, changes):
    cfg = small(name, f"output={tmp_path / 'run'}", *changes)
    family = detect_family(cfg.model)
    inputs = encoding(cfg, family, pipeline_index(cfg.model, weights=False))
    r, walk = rehearsed(cfg, family, inputs)
    own = cfg.online
    rows, dtype = own.batch_size, getattr(torch, own.store_dtype)
    planned = sampling_peak(r, inputs, rows=rows, kept=kept_levels(cfg, walk), dtype=dtype)
    parts = assemble(cfg)
    this = OwnRound(parts=parts, online=parts.online, number=1)
    store = Store(this.folder, this.entries(), rows, parts.online.medium)
    cond, uncond = online_rounds._conditions(this, store)

    def make():
        return sampling.sample_part(
            parts.online, this.sampler, store, 0, cond, uncond, window=None, device=torch.device("cpu"),
            autocast=parts.accelerator.autocast,
        )  # fmt: skip

    make()  # loads the VAE
    peak = peak_of(make, torch.device("cpu"))
    print(f"{name}: peak {planned / peak:.3f} of {peak / 1e6:.1f} MB")
    assert planned == pytest.approx(peak, rel=0.1)


def test_a_round_takes_what_its_files_take(world, tmp_path, monkeypatch):
    online = {"guidance": 2.0, "batch_size": 3}
    cfg = parse(table(world, tmp_path / "run", method="ddpo", online=online, train={"accumulate": 4, "steps": 2}))
    found = plan(cfg).disk
    counted(cfg, monkeypatch)
    folder = tmp_path / "run" / "rounds" / "round-1"
    tensors = sum(f.stat().st_size for pattern in ("part-*", "old-*") for f in folder.glob(pattern))
    heads = 1024 * len([*folder.glob("part-*"), *folder.glob("old-*")])
    assert found.round <= tensors <= found.round + heads
    assert 0 < sum(f.stat().st_size for f in folder.glob("images/*")) <= found.images + 4 * 128
    assert found.policies == 0


@pytest.mark.parametrize("method", ["diffusion_nft", "online_dpo"])
def test_copies_of_the_policy_are_counted_in_memory_and_on_disk(world, tmp_path, method):
    full = table(
        world, tmp_path / "run", model="sd3", method=method, online={"steps": 8, "batch_size": 4},
        train={"trainable": "full", "accumulate": 7, **({"reference": "pool"} if method == "online_dpo" else {})},
    )  # fmt: skip
    del full["lora"]
    found = plan(parse(full))
    copies = 2 if method == "diffusion_nft" else 1
    assert found.memory.second_network == copies * found.memory.weights
    assert found.disk.policies == 2 * 4 * found.rehearsal.trainable
    assert found.memory.sampling >= found.memory.stays


def test_a_run_that_does_not_fit_samples_fewer_at_a_time_first():
    sizes = ("train.steps=1", "train.accumulate=16", "online.batch_size=64", "online.prompts=32")
    cfg = small("tiny_sd_curated", "train.device=auto", *sizes)
    changes = [keys[0] for keys, _, _ in leaner(cfg)]
    assert changes[:2] == ["online.batch_size=32", "online.batch_size=16"]
    assert "data.encode_batch_size=1" not in changes
    there = plan(cfg, memory=24 * GIB)
    assert there.memory.sampling > there.memory.stays + there.memory.step
    assert there.memory.peak == there.memory.sampling
    short = plan(cfg, memory=int((there.memory.peak + GIB // 2) / 0.95) - 1024)
    assert short.change.overrides == ("online.batch_size=32",)


def test_a_round_that_does_not_come_out_even_is_one_line():
    with pytest.raises(InputError, match="the updates of a round must see all of its 4 images at 10 moves equally"):
        plan(small("tiny_sd_ddpo_jpeg", "train.accumulate=3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f for f in FILES if f.startswith("tiny_")])
def test_every_shipped_run_of_a_local_model_has_a_plan(name):
    found = plan(load(name))
    assert found.fits
    assert found.own.items
    assert json.loads(json.dumps(found.table()))["own"]["images"] == found.own.images


def test_the_command_has_a_section_of_rounds_and_measures_a_few_moves(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    sizes = ["online.prompts=2", "online.group=2", "online.updates=1", "online.batch_size=2", "train.batch_size=2"]
    changes = [*sizes, "online.steps=10"]
    words = ["plan", "tiny_sd_d3po", *changes, "train.accumulate=3", "--measure", "--json", str(file)]
    monkeypatch.setattr(cli_plan, "out", cli_plan.Console(width=80))
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(len(line) for line in lines if "plan.json" not in line and "/" not in line) <= 80
    assert any("sampling a round" in line for line in lines)
    found = json.loads(file.read_text())
    seen, own = found["measured"]["sampled"], found["own"]
    assert found["seconds_a_round"] == pytest.approx(2 * (10 * seen["move"] + seen["decoding"]))
    whole = own["rounds"] * found["seconds_a_round"] + found["steps"] * found["seconds_a_step"]
    assert found["hours"] == pytest.approx(whole / 3600)


@pytest.mark.slow
def test_clips_of_sound_have_a_plan(tmp_path):
    worlds.stable_audio_3(tmp_path / "sound")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run = table(tmp_path, tmp_path / "run", model="sound", method="dragon", data={"seconds": 1.0})
    run["online"] = {**run["online"], "rewards": [], "set_reward": "vendi:clip:tiny-clip", "steps": 4}
    found = plan(parse(run))
    assert isinstance(found, Plan)
    assert found.disk.images == 2 * 4 * 2 * 16_000
    assert found.memory.sampling > 0
