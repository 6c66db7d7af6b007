"""Sharded full fine-tuning takes the steps of an unsharded one, and its files are the same."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffalign
from diffalign.assemble import make_accelerator
from diffalign.config import parse
from diffalign.data.batches import Collator
from diffalign.data.cache import Share
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.fit import fit
from diffalign.leaner import leaner
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.models.policy import make_reference, share_out
from diffalign.models.save import export_full, trainable
from diffalign.plan import plan, planned_processes
from diffalign.sharding import (
    cut_optimizer,
    gather_optimizer,
    gathered,
    gathered_bytes,
    group_sizes,
    local,
    mesh_of,
    rows_of,
    shard,
)
from diffalign.types import Cond, PairBatch
from diffalign.validation import validate
from tests import worlds
from tests.test_config import BASE
from tests.test_plan import config as plan_config
from tests.test_plan import configs_only
from tests.test_train import config, metrics, weights
from tests.toys import pairs, toy

BOUND = 1e-6
"""Most that a weight may differ after a few steps: sums over processes and micro-batches come in another order."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield mesh_of(torch.device("cpu"), 1)
    torch.distributed.destroy_process_group()


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip


def denoiser(name: str) -> Any:
    """A random denoiser of the family, all of it trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = {"sd": unet, "sd3": transformer}[name]().eval().requires_grad_(True)
    scheduler: dict[str, Any] = {
        "sd": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    }[name]
    return FAMILIES[name].make_denoiser(net, scheduler, None)


def batch(first: int) -> PairBatch:
    rng = torch.Generator().manual_seed(first)
    embeds = torch.randn(2, 5, 16, generator=rng)
    return PairBatch(
        x_w=torch.randn(2, 4, 8, 8, generator=rng),
        x_l=torch.randn(2, 4, 8, 8, generator=rng),
        cond=Cond({"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}),
        samples=(first, first + 1),
    )


def steps_of(policy: Any, reference: Any, optimizer: torch.optim.Optimizer, count: int = 2) -> list[Any]:
    batches = (batch(2 * i) for i in range(2 * count))
    return list(
        fit(policy, reference.denoiser, DiffusionDPO(beta=100.0), batches, optimizer, steps=count, accumulate=2,
            max_grad_norm=0.01)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_sharded_over_one_process_a_step_is_what_it_was(mesh, name):
    plain, policy = denoiser(name), denoiser(name)
    references = [make_reference(one, adapted=False, moves=True, lent=one is policy) for one in (plain, policy)]
    policy.net.enable_gradient_checkpointing()
    references[1] = share_out(policy.net, references[1], mesh, blocks=FAMILIES[name].blocks, dtype=None)
    assert references[1].parameters.keys() == trainable(policy.net).keys()
    makes = [torch.optim.AdamW(p.net.parameters(), lr=1e-2, eps=1e-2, fused=True) for p in (plain, policy)]
    a, b = (steps_of(*both) for both in zip((plain, policy), references, makes, strict=True))
    for x, y in zip(a, b, strict=True):
        assert x.metrics == pytest.approx(y.metrics, rel=1e-5, abs=1e-5)  # a margin is a small difference times beta
        assert x.metrics["grad_norm"] > 0.01
    assert b[0].metrics["rewards/margins"] == 0
    assert b[1].metrics["rewards/margins"] != 0
    found, start = gathered(trainable(policy.net), keep=True), dict(denoiser(name).net.named_parameters())
    for key, p in plain.net.named_parameters():
        torch.testing.assert_close(found[key], p.detach(), atol=BOUND, rtol=0)  # norms are summed in another order
    assert max((found[k] - start[k]).abs().max() for k in start) > 1e-4
    kept = gathered(references[1].parameters, keep=True)
    assert all(torch.equal(kept[k], start[k]) for k in start)


def test_an_update_is_held_back_in_every_piece_of_a_weight(mesh):
    policy = denoiser("sd")
    shard(policy.net, mesh, blocks=FAMILIES["sd"].blocks)
    optimizer = torch.optim.AdamW(policy.net.parameters(), lr=1e-2, fused=True)
    before = gathered(trainable(policy.net), keep=True)
    before = {k: v.clone() for k, v in before.items()}
    poisoned = replace(batch(0), x_w=torch.full((2, 4, 8, 8), torch.nan))
    list(
        fit(policy, None, diffalign.methods.METHODS["sft"](), iter([as_images(poisoned)]), optimizer, steps=1,
            reads=lambda step: False)
    )  # fmt: skip
    after = gathered(trainable(policy.net), keep=True)
    assert all(torch.equal(before[k], after[k]) for k in before)


def as_images(from_pairs: PairBatch) -> Any:
    from diffalign.types import ImageBatch

    return ImageBatch(x_0=from_pairs.x_w, cond=from_pairs.cond, samples=from_pairs.samples)


def test_what_is_gathered_and_cut_again_is_what_it_was(mesh):
    policy = denoiser("sd3")
    state = {k: v.clone() for k, v in policy.net.state_dict().items()}
    shard(policy.net, mesh, blocks=FAMILIES["sd3"].blocks)
    found = gathered(policy.net.state_dict(), keep=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)
    assert not gathered(trainable(policy.net), keep=False)
    parameters = list(policy.net.parameters())
    cut = [rows_of(p.detach().full_tensor() + 1, p) for p in parameters]
    assert all(
        type(c) is type(p.detach()) and c.placements == p.placements for c, p in zip(cut, parameters, strict=True)
    )
    with torch.no_grad():
        for own in local(parameters):
            own.zero_()
    assert all(not p.full_tensor().any() for p in parameters)


def test_states_of_an_optimizer_are_gathered_and_cut_again(mesh):
    linear = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    shard(linear, mesh, blocks=["Linear"])
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = gather_optimizer(optimizer.state_dict(), keep=True)
    assert all(type(v) is torch.Tensor for entry in whole["state"].values() for v in entry.values())
    again = torch.optim.AdamW(linear.parameters(), fused=True)
    again.load_state_dict(cut_optimizer(whole, list(linear.parameters())))
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            found = again.state_dict()["state"][index][name]
            assert type(found) is type(value)
            assert torch.equal(*local([found, value]))


NETS = {
    "sd": "UNet2DConditionModel", "sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel",
    "pixart_sigma": "PixArtTransformer2DModel", "dit": "DiTTransformer2DModel",
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_blocks_hold_most_of_a_family_s_weights(name):
    """Of the class's own sizes, which are those of a published model or near them."""
    cls: Any = FAMILIES[name].net_class()
    assert cls.__name__ == NETS[name]
    with torch.device("meta"):
        net = cls()
    sizes = group_sizes(net, FAMILIES[name].blocks)
    total = sum(p.numel() for p in net.parameters())
    assert sum(sizes) == total
    assert len(sizes) > 10
    assert max(sizes) < total / 8
    assert sizes[-1] < total / 6


def test_blocks_that_a_network_lacks_are_an_error(mesh):
    with pytest.raises(ValueError, match="blocks must name classes of the network's modules, got Nobody"):
        shard(nn.Linear(2, 2), mesh, blocks=["Nobody"])


@pytest.mark.parametrize("sharded", [False, True])
def test_an_export_has_the_class_and_the_type_that_were_asked_for(mesh, tmp_path, sharded):
    from diffusers import UNet2DConditionModel

    net = unet()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    if sharded:
        shard(net, mesh, blocks=FAMILIES["sd"].blocks)
    export_full(net, FAMILIES["sd"], tmp_path / "out", dtype=torch.float16, state=state if sharded else None)
    about = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert about["_class_name"] == "UNet2DConditionModel"
    assert {v.dtype for v in load_file(next((tmp_path / "out").rglob("*.safetensors"))).values()} == {torch.float16}
    unet().save_config(tmp_path / "plain")
    assert about == json.loads((tmp_path / "plain" / "config.json").read_text())
    again = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert all(torch.equal(v, state[k].half().float()) for k, v in again.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class Held(Collator):
    """Held-out pairs, one a batch, that remembers which batches were asked for."""

    count: int
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    @property
    def alike(self) -> list[list[int]]:
        return [list(range(self.count))]

    def batch(self, rows: Sequence[int], samples: Sequence[int]) -> PairBatch:
        self.asked.extend(rows)
        return replace(pairs(size=1, seed=rows[0]), samples=tuple(samples))


class Lone:
    """What validation takes of an accelerator."""

    device = torch.device("cpu")

    def autocast(self) -> Any:
        return contextlib.nullcontext()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def test_processes_that_gather_together_validate_as_many_batches_and_count_their_own():
    asked, found = {}, {}
    for mine, together in ((0, True), (1, True), (1, False)):
        rows: Any = range(3)
        held = Held(count=3, rows=rows, kind="pairs", scale=rows, seed=0)
        found[mine, together] = validate(
            toy(),
            toy(seed=1),
            DiffusionDPO(beta=100.0),
            held,
            batch_size=1,
            share=Share(mine, 2),
            accelerator=Lone(),
            together=together,
        )
        asked[mine, together] = held.asked
    assert asked == {(0, True): [0, 2] * 10, (1, True): [1, 0] * 10, (1, False): [1] * 10}
    assert found[1, True] == found[1, False]
    assert found[0, True] != found[1, True]


def changed(**sections: Any) -> dict[str, Any]:
    table = {**BASE, "train": {"steps": 4, "shard": True, "trainable": "full"}}
    return {**table, **{k: {**table.get(k, {}), **v} for k, v in sections.items()}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"trainable": "lora"}},
            r'train\.trainable = "lora", whose gradients and optimizer states are small',
        ),
        ({"method": {"name": "ncp_dpo"}}, "method 'ncp_dpo', which asks more of its networks than one whole forward"),
        ({"method": {"name": "inpo"}}, "method 'inpo', which asks more of its networks"),
        ({"method": {"name": "spin"}, "rounds": {"count": 2}}, "method 'spin', which asks more of its networks"),
        ({"train": {"precision": "fp16"}}, r'train\.precision = "fp16", whose gradient scaling is for whole gradients'),
        ({"optimizer": {"name": "adamw8bit"}}, r'optimizer\.name = "adamw8bit", whose states are of whole tensors'),
        ({"train": {"compile": True}}, r"train\.compile, which is not known to go together"),
        ({"train": {"channels_last": True}}, r"train\.channels_last, whose weights do not lie in rows"),
        ({"train": {"fixed_draws": 2}}, r"train\.fixed_draws, whose errors each process computes by itself"),
        ({"samples": {"every": 1, "prompts": ["a"]}}, r"\[samples\], which the main process makes by itself"),
    ],
    ids=str,
)
def test_what_cannot_be_sharded_is_one_line_with_the_reason(sections, message):
    parse(changed())
    with pytest.raises(InputError, match=r"^config\.train\.shard must be false with " + message) as caught:
        parse(changed(**sections))
    assert "\n" not in str(caught.value)


def test_one_process_has_nobody_to_share_with(tmp_path):
    table = changed() | {"output": str(tmp_path / "run")}
    with pytest.raises(
        InputError, match=r"must be false on 1 process, .* got true; start several with accelerate launch"
    ):
        diffalign.train(table)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_shards_by_itself_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"accelerate launch must be told no plugin, got {name}; train.shard = true"):
        make_accelerator(parse(BASE))


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
import diffalign
for table in json.loads(open(sys.argv[1]).read()):
    try:
        diffalign.train(table)
    except diffalign.errors.RunError as error:
        print("ENDED", error, flush=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    worlds.sd(root / "sd")
    worlds.sd3(root / "sd3")
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(40, ties=4))
    return root


def run_all(tables: list[dict], processes: int, root: Path, *, script: str = SCRIPT) -> str:
    """Trains one config after the other in as many processes; returns what they printed."""
    (root / "run.py").write_text(script)
    (root / "tables.json").write_text(json.dumps(tables))
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(root / "run.py"), str(root / "tables.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def full(world: Path, name: str, model: str, steps: int = 2, **train: Any) -> dict:
    """A run on 2 x 2 pairs a step with nearly plain momentum, whose steps magnify no last digit."""
    settings = {"steps": steps, "batch_size": 1, "accumulate": 2, "ema_decay": 0.9, "max_grad_norm": 0.01}
    table = config(
        world,
        world / name,
        model=model,
        trainable="full",
        train=settings | train,
        checkpoint={"every": 1, "keep_last": 9},
        optimizer={"lr": 5e-2, "eps": 1e-2},
    )
    return {**table, "resume": "latest"}


def measured(table: dict) -> dict:
    """With held-out pairs: three, so that two processes have different numbers of batches."""
    return {**table, "validation": {"every": 2, "fraction": 0.3, "pairs": 3}}


@pytest.fixture(scope="module")
def runs(world: Path) -> tuple[Path, str]:
    """The folder of all runs of two processes, and what they printed."""
    tables = [measured(full(world, "plain-sd", "sd")), measured(full(world, "shard-sd", "sd", shard=True))]
    tables += [full(world, "plain-sd3", "sd3"), full(world, "shard-sd3", "sd3", shard=True)]
    tables += [full(world, "parts-sd3", "sd3", n, shard=True) for n in (1, 2)]
    tables += [full(world, "into-sd3", "sd3", 1), full(world, "into-sd3", "sd3", 2, shard=True)]
    tables += [full(world, "out-of-sd3", "sd3", 1, shard=True)]
    for m in ("sd", "sd3"):
        tables += [full(world, f"bf16-{m}", m, 1, shard=True, precision="bf16", gradient_checkpointing=True)]
    for name, sharded in (("ema-plain", False), ("ema-shard", True)):
        table = full(world, name, "sd3", shard=sharded, reference_decay=0.5)
        tables.append({**table, "method": {"name": "linear_dpo", "beta": 100.0}})
    table = full(world, "broken", "sd3", shard=True)
    tables.append({**table, "optimizer": {"lr": 1e30, "eps": 1e-2}})
    return world, run_all(tables, 2, world)


def files(folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / f"{name}.safetensors")


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_sharded_over_two_processes_a_run_is_the_unsharded_one(runs, model):
    plain, sharded = runs[0] / f"plain-{model}", runs[0] / f"shard-{model}"
    for step in (1, 2):
        for name in ("weights", "ema", "optimizer"):
            found = worst(files(plain, step, name), files(sharded, step, name))
            print(f"{model} step {step} {name}: {found:.2g}")
            assert found < BOUND
    assert worst(weights(sharded, 1), weights(sharded, 2)) > 100 * BOUND
    for x, y in zip(metrics(plain), metrics(sharded), strict=True):
        assert x.keys() == y.keys()
        if "grad_norm" in x:
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-5)
            assert x["grad_norm"] > 0.01
        one, two = x.get("validation", x), y.get("validation", y)
        assert one["err_w"] == pytest.approx(two["err_w"], rel=1e-5)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)  # a margin is a small difference times beta
    assert len(metrics(sharded)) == (4 if model == "sd" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_equal_weights_give_a_margin_of_exactly_0(runs, model):
    for name in ("shard", "bf16"):
        first = next(line for line in metrics(runs[0] / f"{name}-{model}") if "grad_norm" in line)
        assert first["rewards/margins"] == 0
        assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert first["grad_norm"] > 0


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit(runs):
    whole, parts = runs[0] / "shard-sd3", runs[0] / "parts-sd3"
    for name in ("weights", "ema", "optimizer"):
        assert worst(files(whole, 2, name), files(parts, 2, name)) == 0
    assert metrics(whole) == metrics(parts)
    assert worst(*(load_file(next((f / "export").rglob("*.safetensors"))) for f in (whole, parts))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_the_export_is_the_average_of_the_gathered_weights(runs, model):
    folder = runs[0] / f"shard-{model}"
    exported = load_file(next((folder / "export").rglob("*.safetensors")))
    assert all(torch.equal(exported[name], value) for name, value in files(folder, 2, "ema").items())
    plain = next((runs[0] / f"plain-{model}" / "export").rglob("config.json"))
    assert json.loads(plain.read_text()) == json.loads(next((folder / "export").rglob("config.json")).read_text())


@pytest.mark.slow
def test_a_checkpoint_of_either_kind_goes_on_as_the_other(runs):
    folder = runs[0]
    whole = weights(folder / "plain-sd3", 2)
    assert worst(weights(folder / "into-sd3", 2), whole) < BOUND
    file = folder / "out-of-sd3" / "config.toml"  # one process takes what two took
    file.write_text(file.read_text().replace("\nbatch_size = 1\n", "\nbatch_size = 2\n", 1))
    run_all([full(folder, "out-of-sd3", "sd3", 2, batch_size=2)], 1, folder)
    assert worst(weights(folder / "out-of-sd3", 2), whole) < BOUND


@pytest.mark.slow
def test_a_reference_that_follows_is_sharded_too(runs):
    plain, sharded = (runs[0] / name for name in ("ema-plain", "ema-shard"))
    for name in ("weights", "reference"):
        assert worst(files(plain, 2, name), files(sharded, 2, name)) < BOUND
    assert worst(files(sharded, 2, "reference"), weights(sharded, 2)) > 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes_without_an_update(runs):
    folder, printed = runs
    ended = [line for line in printed.splitlines() if "ENDED" in line]
    assert len(ended) == 2
    assert all("is not finite at step 2" in line and "no update was made" in line for line in ended)
    assert [p.name for p in (folder / "broken" / "checkpoints").iterdir()] == ["step-1"]


def planned(folder: Path, *, processes: int | None = 4, **train: Any) -> Any:
    found = parse(plan_config(folder, train={"trainable": "full", **train}))
    return plan(found, processes=processes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configs_only(tmp_path_factory.mktemp("tiny"), sizes="tiny")


def test_a_plan_divides_what_is_shared_out(tiny):
    plain, shared = planned(tiny), planned(tiny, shard=True, accumulate=2, ema_decay=0.9)
    parameters = plain.rehearsal.parameters
    assert (plain.shared_by, shared.shared_by) == (1, 4)
    assert shared.memory.weights == shared.memory.second_network == shared.memory.ema == parameters
    assert shared.memory.gradients == parameters
    assert shared.memory.optimizer == pytest.approx(2 * parameters, rel=1e-3)
    assert shared.rehearsal.saved == plain.rehearsal.saved
    assert (shared.rehearsal.forward, shared.rehearsal.backward) == (plain.rehearsal.forward, plain.rehearsal.backward)
    r = shared.rehearsal
    assert r.peak + 4 * parameters >= plain.rehearsal.peak > r.peak
    assert shared.memory.step == r.peak + r.gathered + parameters
    assert 0 < r.gathered < 4 * parameters
    halved = planned(tiny, shard=True, precision="bf16").rehearsal
    assert halved.gathered < 0.7 * r.gathered
    assert halved.weights == r.weights


def test_what_is_gathered_at_a_time_is_counted_by_hand():
    assert gathered_bytes([10, 20, 5], torch.float32) == 4 * 5 + 20 * (2 * 4 + 4 + 4 + 4)
    assert gathered_bytes([10, 20, 5], torch.bfloat16) == 2 * 5 + 20 * (2 * 2 + 2 + 2 + 4)
    assert gathered_bytes([1, 1, 100], torch.float32) == 4 * 100 + 100 * (4 + 4)


def test_sharding_is_offered_to_a_full_run_of_several_processes():
    full_run = parse(plan_config(Path("x"), train={"trainable": "full", "batch_size": 2, "device": "auto"}))
    offered = [keys for keys, _, _ in leaner(full_run, processes=8)]
    assert offered.index(("train.shard=true",)) == offered.index(("train.gradient_checkpointing=true",)) + 1
    assert ("train.shard=true",) not in [keys for keys, _, _ in leaner(full_run)]
    adapted = parse(plan_config(Path("x"), train={"device": "auto"}))
    assert ("train.shard=true",) not in [keys for keys, _, _ in leaner(adapted, processes=8)]
    *_, (_, _, last) = leaner(full_run, gathered=True, processes=8)
    assert (last.train.trainable, last.train.shard) == ("lora", False)


def test_a_plan_of_a_sharded_run_must_know_over_how_many_processes(tiny, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"^--processes must be at least 2 with train.shard, got 1; say how many"):
        planned(tiny, processes=None, shard=True)
    with pytest.raises(InputError, match=r"^--measure must be left out with train.shard"):
        plan(parse(plan_config(tiny, train={"trainable": "full", "shard": True})), timed=True, processes=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert planned_processes(None) == 4
    assert planned_processes(2) == 2


MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
import diffalign
from benchmarks.step import peak_of
from diffalign.assemble import make_accelerator, make_optimizer
from diffalign.config import parse
from diffalign.denoisers.unet import SD
from diffalign.fit import fit
from diffalign.models.load import load_net_config, load_scheduler_config, pipeline_index
from diffalign.models.policy import make_reference, share_out
from diffalign.models.save import trainable
from diffalign.rehearsal import encoding, random_batches
from diffalign.sharding import local, mesh_of

cfg = parse(json.loads(open(sys.argv[1]).read())[0])
accelerator = make_accelerator(cfg)
net = SD.net_class().from_config(load_net_config(cfg.model, SD)).eval()
if cfg.train.gradient_checkpointing:
    net.enable_gradient_checkpointing()
policy = SD.make_denoiser(net, load_scheduler_config(cfg.model), None)
reference = make_reference(policy, adapted=False, lent=True)
dtype = torch.bfloat16 if cfg.train.precision == "bf16" else None
reference = share_out(net, reference, mesh_of(accelerator.device, 2), blocks=SD.blocks, dtype=dtype)
optimizer = accelerator.prepare(make_optimizer(cfg, list(trainable(net).values())))
inputs = encoding(cfg, SD, pipeline_index(cfg.model, weights=False))
steps = fit(policy, reference.denoiser, cfg.method, random_batches(cfg, inputs), optimizer, steps=9, max_grad_norm=1.0,
            accelerator=accelerator)
for _ in range(2):
    next(steps)
own = sum(4 * x.numel() for x in local(net.parameters()))
print("FOUND", json.dumps([own, peak_of(lambda: next(steps), torch.device("cpu"))]), flush=True)
"""


@pytest.mark.slow
def test_a_sharded_step_holds_less_than_the_plan_says_and_more_than_half(tiny, tmp_path):
    table = plan_config(tiny, train={"trainable": "full", "batch_size": 1, "shard": True})
    lines = run_all([table], 2, tmp_path, script=MEASURE).splitlines()
    found = [json.loads(line.removeprefix("FOUND ")) for line in lines if line.startswith("FOUND ")]
    use = plan(parse(table), processes=2).memory
    for own, peak in found:
        print(f"own {use.weights / own:.3f} of {own / 1e6:.2f} MB, step {use.step / peak:.3f} of {peak / 1e6:.2f} MB")
        assert own == pytest.approx(use.weights, rel=0.01)
        assert use.step / 2 < peak < use.step
