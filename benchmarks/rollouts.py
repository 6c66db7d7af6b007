"""Rollouts and training steps a second on own images, against a plain loop; writes benchmarks/rollouts.json.

Sampling: two images for each prompt, with everything that log-probs need. Training: one D3PO update on one move of
every pair. All loops run in the same process and in turn, so that a noisy machine disturbs all alike; what is reported
is the median over rounds of the ratio to the plain loop of the same round.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.plain import LR, MAX_GRAD_NORM, RANK
from benchmarks.plain_rollouts import BETA, CLIP, PlainRollouts, sampler_config
from benchmarks.step import PLAIN, Loop, time_in_turn
from benchmarks.worlds import SIZES, World, build
from diffalign.cli import quiet_libraries
from diffalign.denoisers.guided import Guided
from diffalign.denoisers.unet import SD
from diffalign.environment import describe
from diffalign.fit import fit
from diffalign.methods.d3po import D3PO
from diffalign.models.lora import LoraSettings, adapter_reference, add_lora
from diffalign.models.save import trainable
from diffalign.sampling.kernels import kernel
from diffalign.sampling.rollout import initial_noise, rollout
from diffalign.sampling.schedule import make_schedule
from diffalign.sampling.walk import KernelWalk
from diffalign.types import Cond, Denoiser, Trajectory, TransitionPairs

OUT = Path(__file__).with_name("rollouts.json")
STEPS = 10
GUIDANCE = 5.0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of our ways."""

    name: str
    batch: int | None = None
    """Images or pairs at a time; None is all."""
    copied: bool = False
    """The reference is a second network, not the policy's own with its adapter off."""


VARIANTS = (
    Variant(name="ours, one at a time, reference as a second network", batch=1, copied=True),
    Variant(name="ours, one at a time", batch=1),
    Variant(name="ours"),
)


class Ours:
    """What a run does in a round, without judges and disk."""

    def __init__(self, world: World, variant: Variant, device: torch.device, *, steps: int, guidance: float) -> None:
        self.device, self.pairs = device, len(world.ids)
        self.batch = variant.batch
        self.net, self.vae, self.text = (copy.deepcopy(n).to(device) for n in (world.unet, world.vae, world.text))
        add_lora(self.net, LoraSettings(rank=RANK), SD.lora_targets, seed=0)
        policy = SD.make_denoiser(self.net, world.scheduler, None)
        if variant.copied:
            frozen = copy.deepcopy(world.unet).to(device).requires_grad_(False)
            reference: Denoiser = SD.make_denoiser(frozen, world.scheduler, None)
        else:
            reference = adapter_reference(policy, self.net)
        self.ids = world.ids.to(device)
        self.cond = self.encode(self.ids)
        uncond = self.encode(torch.zeros_like(self.ids[:1]))
        self.policy, self.reference = (
            Guided(denoiser=one, uncond=uncond, guidance=guidance) for one in (policy, reference)
        )
        schedule = make_schedule("ddim", sampler_config(world), steps)
        self.walk = KernelWalk(kernel=kernel("ddim", eta=1.0), schedule=schedule)
        size = self.net.config.sample_size
        self.shape = (self.net.config.in_channels, size, size)
        self.walked: list[Trajectory] = []
        self.moves: Sequence[int] = ()
        optimizer = torch.optim.AdamW(trainable(self.net).values(), lr=LR)
        self._reports = fit(
            self.policy,
            self.reference,
            D3PO(beta=BETA, clip=CLIP),
            self._batches(),
            optimizer,
            steps=sys.maxsize,
            accumulate=1 if self.batch is None else self.pairs // self.batch,
            max_grad_norm=MAX_GRAD_NORM,
        )

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Cond:
        """Conditions of prompts."""
        return Cond({"prompt_embeds": self.text(ids)[0]})

    @torch.no_grad()
    def sample(self) -> list[Float[Tensor, "b 3 h w"]]:
        """Two images a prompt, whose text is encoded once; what training needs is kept."""
        self.cond = self.encode(self.ids)
        rows = torch.arange(2 * self.pairs)
        images, self.walked = [], []
        for part in rows.split(self.batch or len(rows)):
            seeds = part.tolist()
            self.walked.append(
                rollout(
                    self.policy,
                    self.walk.kernel,
                    self.walk.schedule,
                    self.cond.rows((part % self.pairs).to(self.device)),
                    seeds,
                    x_init=initial_noise(seeds, self.shape).to(self.device),
                )
            )
            images.append(self.vae.decode(self.walked[-1].x_0 / self.vae.config.scaling_factor).sample)
        return images

    def train(self, moves: Sequence[int]) -> float:
        """One update on one move of every pair."""
        if not self.walked:
            self.sample()
        self.moves = moves
        return next(self._reports).metrics["loss"]

    def _batches(self) -> Iterator[TransitionPairs]:
        """Micro-batches of one update after the other."""
        while True:
            x = torch.cat([walked.x for walked in self.walked])
            for part in torch.arange(self.pairs).split(self.batch or self.pairs):
                step = torch.tensor([self.moves[pair] for pair in part])
                better, worse = x[part], x[part + self.pairs]
                rows = torch.arange(len(part))
                yield TransitionPairs(
                    x_t_w=better[rows, step],
                    x_s_w=better[rows, step + 1],
                    x_t_l=worse[rows, step],
                    x_s_l=worse[rows, step + 1],
                    step=step,
                    cond=self.cond.rows(part.to(self.device)),
                    walk=self.walk,
                    samples=tuple(part.tolist()),
                )


@dataclass
class Sampling:
    """A loop that samples at every step."""

    of: PlainRollouts | Ours

    def step(self) -> object:
        return self.of.sample()


@dataclass
class Training:
    """A loop that trains at every step, on moves that go round; the last, which may have no noise, is left out."""

    of: PlainRollouts | Ours
    steps: int
    pairs: int
    taken: int = 0

    def step(self) -> object:
        self.taken += 1
        return self.of.train([(self.taken + pair) % (self.steps - 1) for pair in range(self.pairs)])


def makers(world: World, device: torch.device, *, steps: int, guidance: float) -> dict[str, PlainRollouts | Ours]:
    """The plain loop and our ways, by name."""
    made: dict[str, PlainRollouts | Ours] = {PLAIN: PlainRollouts(world, device, steps=steps, guidance=guidance)}
    return made | {v.name: Ours(world, v, device, steps=steps, guidance=guidance) for v in VARIANTS}


def measure_world(name: str, *, rounds: int, warmup: int, steps: int, guidance: float) -> dict[str, Any]:
    """One world's tables: images a second, updates a second, and how many times the plain loop's both are."""
    sizes = SIZES[name]
    device = torch.device("cuda" if sizes.gpu else "cpu")
    loops = makers(build(sizes), device, steps=steps, guidance=guidance)
    phases: dict[str, tuple[Callable[[Any], Loop], str, int]] = {
        "sampling": (Sampling, "images_a_second", 2 * sizes.pairs),
        "training": (lambda loop: Training(loop, steps, sizes.pairs), "updates_a_second", 1),
    }
    found: dict[str, Any] = {}
    for phase, (wrap, unit, count) in phases.items():
        wrapped = {loop: wrap(own) for loop, own in loops.items()}
        seconds = time_in_turn(wrapped, rounds=rounds, warmup=warmup, device=device)
        found[phase] = [row(loop, times, seconds[PLAIN], unit, count) for loop, times in seconds.items()]
    return {"world": name, "pairs": sizes.pairs, "steps": steps, "guidance": guidance, "rounds": rounds, **found}


def row(loop: str, seconds: Sequence[float], plain: Sequence[float], unit: str, count: int) -> dict[str, Any]:
    """What is said of a loop: its speed, and the median and range over rounds of how many times the plain loop's."""
    ratios = [base / own for base, own in zip(plain, seconds, strict=True)]
    return {
        "loop": loop,
        unit: count / statistics.median(seconds),
        "times_plain": statistics.median(ratios),
        "times_plain_range": [min(ratios), max(ratios)],
    }


def show(table: dict[str, Any]) -> None:
    """Prints one world's tables."""
    for phase in ("sampling", "training"):
        print(f"{table['world']}, {phase}")
        for one in table[phase]:
            unit = next(key for key in one if key.endswith("_a_second"))
            low, high = one["times_plain_range"]
            speed = f"{one[unit]:8.3f} {unit.removesuffix('_a_second')}/s"
            print(f"  {one['loop']:52} {speed}  {one['times_plain']:5.2f} x plain ({low:.2f} to {high:.2f})")


def main() -> None:
    """Measures all worlds that this machine can hold."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--worlds", nargs="+", choices=SIZES, default=list(SIZES))
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--warmup", type=int, default=1)
    options.add_argument("--steps", type=int, default=STEPS, help="moves of the sampler")
    options.add_argument("--guidance", type=float, default=GUIDANCE)
    options.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is the least noisy")
    options.add_argument("--out", type=Path, default=OUT)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    quiet_libraries()
    tables = []
    for name in asked.worlds:
        if SIZES[name].gpu and not torch.cuda.is_available():
            print(f"{name}: left out, it needs a GPU")
            continue
        table = measure_world(
            name, rounds=asked.rounds, warmup=asked.warmup, steps=asked.steps, guidance=asked.guidance
        )
        show(table)
        tables.append(table)
    about = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    content = {"version": 1, "environment": about, "threads": asked.threads, "worlds": tables}
    asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
