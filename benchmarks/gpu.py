"""Pairs a second, use of the GPU and peak memory of Diffusion-DPO steps at true sizes: `python -m benchmarks.gpu`.

Networks are those of the published families with random weights; latents and conditions are random too, and a step is
the one that `diffalign train` takes from a cache. Every case runs in a process of its own, after a look at the clocks:
a large matrix product and a large copy. MFU is the FLOPs of two samples with gradient and two of the reference (what
is computed again is not counted) over the time, over the rate of that product. Writes benchmarks/gpu/<device>.json
after each case, and goes on where it stopped. `--tenth` tries it at a tenth of the size, on a CPU too; its times say
nothing.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_worlds import WORLDS, GpuWorld
from diffalign import attention, losses
from diffalign.attention import Attention
from diffalign.checks import PRECISIONS
from diffalign.cli import quiet_libraries
from diffalign.counting import count_flop, fake_mode, make_fake, run_backward
from diffalign.environment import describe
from diffalign.errors import InputError
from diffalign.fit import fit
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.models.load import ModelSource
from diffalign.models.lora import LoraSettings, add_lora
from diffalign.models.policy import cast_frozen, make_reference
from diffalign.models.save import trainable
from diffalign.placing import make_accelerator, make_optimizer, pick_attention, place_net
from diffalign.recompute import Checkpointing
from diffalign.rng import SampleRng
from diffalign.settings import DataSettings, OptimizerSettings, TrainConfig, TrainSettings
from diffalign.timing import batches
from diffalign.types import Cond

OUT = Path(__file__).with_name("gpu")
RANK = 16
KERNELS: tuple[Attention, ...] = ("flash", "cudnn", "mem_efficient", "xformers", "flash3")
"""Beside PyTorch's own choice, "sdpa"."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    world: str
    pairs: int
    """A step."""
    precision: Literal["bf16", "fp16"]
    full: bool = False
    attention: Attention = "sdpa"
    channels_last: bool = False
    compile: bool = False
    recompute: Checkpointing = False
    fixed_draws: bool = False
    """The reference's errors are known; its forward pass is left out."""
    eight_bit: bool = False
    """AdamW's moments."""
    must: float | None = None
    """Pairs a second that are aimed at on an H100."""
    lead: float | None = None
    """Pairs a second that would be a clear lead."""


def _settings(case: Case) -> list[Case]:
    """A U-Net eager, channels-last, compiled, and eager on every kernel of attention."""
    made = [
        replace(case, name=f"{case.name}, eager"),
        replace(case, name=f"{case.name}, channels-last", channels_last=True),
        replace(case, name=f"{case.name}, compiled", compile=True),
        replace(case, name=f"{case.name}, channels-last, compiled", channels_last=True, compile=True),
    ]
    return made + [replace(case, name=f"{case.name}, {kernel}", attention=kernel) for kernel in KERNELS]


def _both(case: Case) -> list[Case]:
    """A case on the fastest kernel of attention, eager and compiled; U-Nets channels-last where they are compiled."""
    unet = WORLDS[case.world].family in ("sd", "sdxl")
    quick = replace(case, attention="auto")
    return [
        replace(quick, name=f"{case.name}, eager"),
        replace(quick, name=f"{case.name}, compiled", compile=True, channels_last=unet),
    ]


_SD15 = Case(name="SD 1.5 LoRA", world="sd15", pairs=16, precision="fp16", must=65, lead=85)
_SDXL = Case(name="SDXL LoRA", world="sdxl", pairs=4, precision="fp16", must=8, lead=10)
_FLUX = Case(name="FLUX.1 LoRA", world="flux", pairs=1, precision="bf16", recompute=True, must=0.55, lead=0.8)
CASES = (
    *_settings(_SD15),
    *_both(replace(_SD15, name="SD 1.5 LoRA, fixed draws", fixed_draws=True, must=95, lead=120)),
    *_both(replace(_SD15, name="SD 1.5 full", full=True, must=45, lead=60)),
    *_settings(_SDXL),
    replace(_SDXL, name="SDXL LoRA, 1 pair, eager", pairs=1, must=None, lead=None),
    replace(_SDXL, name="SDXL LoRA, 1 pair, selective", pairs=1, recompute="selective", must=None, lead=None),
    *_both(replace(_SDXL, name="SDXL full, 8-bit", pairs=1, full=True, eight_bit=True, recompute=True, must=3, lead=5)),
    *_both(Case(name="PixArt-Sigma LoRA", world="pixart", pairs=4, precision="bf16", must=8, lead=10)),
    *_both(Case(name="SD3.5-M 512 LoRA", world="sd35-512", pairs=8, precision="bf16", must=22, lead=28)),
    *_both(Case(name="SD3.5-M 1024 LoRA", world="sd35-1024", pairs=4, precision="bf16", must=4.5, lead=5.5)),
    *_both(_FLUX),
)
"""Targets are those of a study that had no GPU: predictions."""


def config_of(case: Case, device: torch.device) -> TrainConfig:
    """The run that a case is a step of; 16 bits are for GPUs."""
    return TrainConfig(
        output="in memory",
        model=ModelSource(path="in memory"),
        data=DataSettings(path="in memory"),
        method=DiffusionDPO(beta=5000.0),
        train=TrainSettings(
            steps=1,
            batch_size=case.pairs,
            trainable="full" if case.full else "lora",
            precision=case.precision if device.type == "cuda" else "no",
            device="cuda" if device.type == "cuda" else "cpu",
            gradient_checkpointing=case.recompute,
            channels_last=case.channels_last,
            compile=case.compile,
            attention=case.attention,
            fixed_draws=1 if case.fixed_draws else None,
        ),
        optimizer=OptimizerSettings(lr=1e-6, name="adamw8bit" if case.eight_bit else "adamw"),
        lora=LoraSettings(rank=RANK),
    )


def made(world: GpuWorld, cfg: TrainConfig, device: torch.device) -> Any:
    """The network with random weights, made where it will be; adapters change nothing yet."""
    net = _shaped(world, cfg)
    dtype = PRECISIONS[cfg.train.precision]
    if cfg.train.trainable == "lora" and device.type == "cuda" and dtype is not None:
        cast_frozen(net, dtype)  # as when it is placed; here before it takes any memory
    net.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.dim() < 2 or "lora_B" in name:
                tensor.fill_(float(name.endswith("weight") and "lora_B" not in name))
            else:
                tensor.normal_(std=0.02, generator=generator)
    return net


def _shaped(world: GpuWorld, cfg: TrainConfig) -> Any:
    net = world.bare_net()
    if cfg.train.trainable == "full":
        return net.requires_grad_(True)
    with torch.device("meta"):
        add_lora(net, cfg.lora, world.of.lora_targets, seed=cfg.seed)
    return net


def useful_flop(world: GpuWorld, case: Case) -> int:
    """Of one pair: two samples with gradient and, without fixed draws, two of the reference.

    Attention is counted as its products alone, which fused kernels make again in the backward pass.
    """
    cfg = config_of(case, torch.device("cpu"))
    net, inputs = _shaped(world, cfg), world.encoding()
    policy: Any = world.denoiser(net, cfg)
    reference: Any = policy if case.full else make_reference(policy, adapted=True).denoiser
    t = policy.path.sample_t(SampleRng(0, (0, 1)))
    with fake_mode(), sdpa_kernel(SDPBackend.MATH):
        make_fake(net)
        x_t, t = torch.empty(2, *world.latent), torch.empty_like(t)
        cond = Cond({name: torch.empty(2, *shape, dtype=dtype) for name, (shape, dtype) in inputs.cond.items()})
        with torch.no_grad():
            flop = 0 if case.fixed_draws else count_flop(lambda: reference(x_t, t, cond))
        out: list[torch.Tensor] = []
        flop += count_flop(lambda: out.append(policy(x_t, t, cond)))
        loss = losses.squared_error(out[0], torch.empty_like(out[0])).mean()
        return flop + count_flop(lambda: run_backward(loss))


def clocks(device: torch.device) -> dict[str, float]:
    """What the device does at best now: TFLOP/s of a matrix product in bf16, and GB/s of a copy, read and written."""
    gpu = device.type == "cuda"
    side, count = (8192, 2**28) if gpu else (256, 2**20)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(count, device=device)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: a @ b, device) for _ in range(10))
    copied = min(_seconds(lambda: target.copy_(source), device) for _ in range(10))
    return {"matmul_tflops": 2 * side**3 / product / 1e12, "copy_gb_s": 2 * source.nbytes / copied / 1e9}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(case: Case, *, tenth: bool = False, steps: int = 20, warmup: int = 3) -> dict[str, Any]:
    """One case on this machine's device; what does not work there is a row with the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = WORLDS[case.world].tenth() if tenth else WORLDS[case.world]
    row = {**asdict(case), "tenth": tenth, "device": device.type}
    try:
        return row | _measured(case, world, device, steps=steps, warmup=warmup)
    except (InputError, RuntimeError) as error:  # of memory, of a kernel that is not there, of the compiler
        return {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _measured(case: Case, world: GpuWorld, device: torch.device, *, steps: int, warmup: int) -> dict[str, Any]:
    cfg, rate = config_of(case, device), clocks(device)
    accelerator = make_accelerator(cfg)
    net = made(world, cfg, device)
    kernel = pick_attention(net, cfg, accelerator)
    place_net(net, cfg, accelerator, adapted=not case.full)
    policy: Any = world.denoiser(net, cfg)
    reference = make_reference(policy, adapted=not case.full).denoiser
    prepared, optimizer = accelerator.prepare(net, make_optimizer(cfg, list(trainable(net).values())))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    flop = useful_flop(world, case)
    reports = fit(
        replace(policy, net=prepared),
        reference,
        cfg.method,
        batches(cfg, world.of, world.encoding()),
        optimizer,
        steps=steps + warmup,
        max_grad_norm=cfg.train.max_grad_norm,
        accelerator=accelerator,
    )
    with attention.used(kernel):
        seconds = [_seconds(lambda: next(reports), device) for _ in range(steps + warmup)][warmup:]
    pairs = case.pairs / statistics.median(seconds)
    return {
        "kernel": kernel,
        "parameters": sum(p.numel() for name, p in net.named_parameters() if ".lora_" not in name),
        "seconds_a_step": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "steps": steps,
        "pairs_a_second": pairs,
        "flop_a_pair": flop,
        "mfu": pairs * flop / 1e12 / rate["matmul_tflops"],
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "clocks": rate,
    }


def file_of(device: torch.device) -> Path:
    """Where a device's rows are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return OUT / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table; rows below what they must reach are marked."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("case", "kernel", "pairs/s", "must", "lead", "MFU", "peak GB")
    for row in rows:
        if "failed" in row:
            shown.add_row(row["name"], row["attention"], row["failed"][:40])
            continue
        short = row["must"] is not None and row["pairs_a_second"] < row["must"]
        shown.add_row(
            row["name"],
            row["kernel"],
            f"{row['pairs_a_second']:.3g}{' (below)' if short else ''}",
            "" if row["must"] is None else f"{row['must']:g}",
            "" if row["lead"] is None else f"{row['lead']:g}",
            f"{100 * row['mfu']:.0f} %",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
        )
    Console().print(shown)


def main() -> None:
    """Measures the cases that the file has not."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", help="parts of their names; all are measured if left out")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--warmup", type=int, default=3)
    options.add_argument("--tenth", action="store_true", help="a tenth of the size, also without a GPU")
    options.add_argument("--again", action="store_true", help="measure what the file has too")
    options.add_argument("--out", type=Path, help="benchmarks/gpu/<device>.json if left out")
    asked = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not asked.tenth:
        options.error("a GPU is needed for true sizes, and none is here; --tenth tries it on a CPU")
    if asked.tenth and asked.out is None:
        options.error("--out must say where rows of a tenth of the size go")
    quiet_libraries()
    out = asked.out or file_of(device)
    before = json.loads(out.read_text())["cases"] if out.is_file() else []
    rows = {row["name"]: row for row in before}
    chosen = [c for c in CASES if asked.cases is None or any(part in c.name for part in asked.cases)]
    if not chosen:
        options.error(f"--cases must name some of: {'; '.join(c.name for c in CASES)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    how = {"tenth": asked.tenth, "steps": asked.steps, "warmup": asked.warmup}
    for case in chosen:
        if case.name in rows and not asked.again:
            continue
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rows[case.name] = pool.apply(measure, (case,), how)
        found = [rows[c.name] for c in CASES if c.name in rows]
        out.write_text(json.dumps({"version": 1, "environment": describe(device), "cases": found}, indent=1) + "\n")
        print(
            case.name, rows[case.name].get("failed") or f"{rows[case.name]['pairs_a_second']:.3g} pairs/s", flush=True
        )
    show([rows[c.name] for c in CASES if c.name in rows])


if __name__ == "__main__":
    main()
