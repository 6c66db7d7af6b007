"""Training in rounds: before each, an earlier policy becomes the reference and samples the round's losers.

A run is a list of phases, one where there are no rounds. Before round k the policy k - 1 goes into the pool, theta_j
is drawn from it, and an image is sampled for every row that the round will see: decoded, rounded to 8 bit and encoded
again, so that it has gone through the VAE as the winners have. On disk, under rounds/:

policies/policy-N.safetensors and pool.json, their digests; round-K/part-N.safetensors, moments of images by row.

Everything is written whole or not at all and made from (config, seed) alone, so a killed run makes what is missing.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import rng
from diffalign.assemble import Parts
from diffalign.checkpoint import enough_room, restore_
from diffalign.data.batches import Collator, Source
from diffalign.data.cache import save_shard
from diffalign.data.selfsampled import Images, RoundSettings, SelfSampled, Split
from diffalign.errors import RunError
from diffalign.fixed_draws import fixed_draws
from diffalign.logbook import Logbook
from diffalign.models.load import load_pipeline
from diffalign.models.offload import placed
from diffalign.models.policy import Reference
from diffalign.pool import Pool
from diffalign.progress import bar
from diffalign.types import Denoiser, Replay

BATCHES_PER_PART = 16
"""Sampled batches in one file: what a kill loses at most."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that have one reference and one source of batches."""

    policy: Denoiser
    reference: Denoiser | None
    old: Denoiser | None = None
    """The policy that made the images, where the method asks for it."""
    collator: Source
    held: Collator | None
    start: int
    """Steps taken before it."""
    stop: int
    """Steps taken at its end."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a run, 1 first."""

    parts: Parts
    settings: RoundSettings
    reference: Reference
    number: int
    length: int
    """Optimizer steps."""

    @property
    def first(self) -> int:
        """Steps taken before the round."""
        return (self.number - 1) * self.length

    @property
    def start(self) -> int:
        """Steps taken before what is left of it."""
        return max(self.first, self.parts.start)

    @property
    def folder(self) -> Path:
        """Where its images are."""
        return self.parts.folder / "rounds" / f"round-{self.number}"

    def wanted(self) -> dict[Split, list[int]]:
        """Rows that an image is sampled for."""
        stop = self.first + self.length
        found: dict[Split, list[int]] = {"train": rows_between(self.parts, self.first, stop)}
        if self.parts.held is not None:
            found["held"] = list(range(len(self.parts.held.rows)))
        return found


def phases(parts: Parts, book: Logbook) -> Iterator[Phase]:
    """What is left of a run: one stretch of steps, or round after round, each sampled when it is asked for.

    Raises:
        RunError: The pool of policies is empty or damaged, or an image or an error of the reference is not finite.
    """
    settings, reference, steps = parts.cfg.rounds, parts.reference, parts.cfg.train.steps
    draws = parts.cfg.train.fixed_draws
    if settings is None or reference is None:
        fixed = None if reference is None else reference.denoiser
        yield Phase(
            policy=parts.policy,
            reference=fixed,
            collator=collator_of(parts) if draws is None else fixed_draws(parts, draws),
            held=parts.held,
            start=parts.start,
            stop=steps,
        )
        return
    length = steps // settings.count
    for number in range(parts.start // length + 1, settings.count + 1):
        yield _begin(Round(parts=parts, settings=settings, reference=reference, number=number, length=length), book)


def _begin(this: Round, book: Logbook) -> Phase:
    """Makes a round ready: its policy in the pool, its reference, its images."""
    parts, began = this.parts, time.monotonic()
    chosen = replayed(parts.cfg.method.needs.replay or "last", this.number, parts.cfg.seed)
    pool = Pool(parts.folder / "rounds" / "policies")
    if parts.accelerator.is_main_process:
        _clear(this, pool)
        if this.start == this.first:
            with enough_room(pool.folder, parts.folder / "checkpoints"):
                pool.add(this.number - 1, parts.parameters)
    parts.accelerator.wait_for_everyone()
    restore_(this.reference.parameters, pool.policy(chosen, this.reference.parameters))
    wanted = this.wanted()
    sample(this, wanted)
    if this.start == this.first:
        cost = {
            "images": sum(map(len, wanted.values())),
            "forwards_per_image": this.settings.steps * (2 if this.settings.guidance > 1 else 1),
            "seconds": round(time.monotonic() - began, 4),
        }
        book.round(this.start, {"round": this.number, "reference": chosen, **cost})
    return Phase(
        policy=parts.policy,
        reference=this.reference.denoiser,
        collator=_joined(collator_of(parts), Images(this.folder, "train")),
        held=None if parts.held is None else _joined(parts.held, Images(this.folder, "held")),
        start=this.start,
        stop=this.first + this.length,
    )


def collator_of(parts: Parts) -> Collator:
    """Batches of the run's data."""
    assert parts.collator is not None, "a run on data has rows"
    return parts.collator


def replayed(replay: Replay, number: int, seed: int) -> int:
    """Which policy is the reference of round `number`: 0 is the start, `number` - 1 the one that the round begins with.

    Paper: Zhang et al., arXiv 2410.05255: j is uniform over 0..k-1.
    """
    last = number - 1
    drawn = int(torch.randint(number, (), generator=rng.generator(seed, "replay", number)))
    return {"uniform": drawn, "last": last, "first": 0}[replay]


def rows_between(parts: Parts, start: int, stop: int) -> list[int]:
    """The distinct rows that steps `start` to `stop` will see over all processes, ascending."""
    t = parts.cfg.train
    global_batch_size = t.batch_size * t.accumulate * parts.share.of
    order = collator_of(parts).order
    return sorted({order.item(s) for s in range(start * global_batch_size, stop * global_batch_size)})


def _clear(this: Round, pool: Pool) -> None:
    """Removes what the round must not see: images of other rounds, policies of later ones."""
    for place in this.folder.parent.glob("round-*"):
        if place != this.folder:
            shutil.rmtree(place)
    pool.drop_from(this.number)


def sample(this: Round, wanted: dict[Split, list[int]]) -> None:
    """Samples the round's images that are not there yet, this process its share of the parts."""
    parts, batch_size = this.parts, this.settings.batch_size
    pieces: list[tuple[Split, list[int]]] = []
    for split, rows in wanted.items():
        there = Images(this.folder, split).places
        missing = [row for row in rows if row not in there]
        pieces += [(split, some) for some in _split(missing, batch_size * BATCHES_PER_PART)]
    parts.accelerator.wait_for_everyone()  # all have looked before anyone writes
    mine = pieces[parts.share.mine :: parts.share.of]
    if mine:
        this.folder.mkdir(parents=True, exist_ok=True)
        sampler, offload = Sampler(this), parts.cfg.train.offload
        total, main = sum(len(rows) for _, rows in mine), parts.accelerator.is_main_process
        with (
            placed(sampler.pipeline, this.reference.net, offload=offload),
            bar(f"sampling round {this.number}", total, shown=main) as shown,
        ):
            for split, rows in mine:
                made = [sampler.moments(split, some) for some in _split(rows, batch_size)]
                sampler.save(split, rows, made)
                shown.advance(len(rows))
    parts.accelerator.wait_for_everyone()


def _split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Sampler:
    """The round's reference in its stock pipeline, and the way of its images to moments on disk."""

    def __init__(self, this: Round) -> None:
        self.round = this
        self.parts = this.parts
        data = self.parts.cfg.data
        self.dtype = torch.float32 if data.cache is False else getattr(torch, data.cache_dtype)
        self.shape = collator_of(self.parts).rows.latents([0], [0], "w")[0].shape[1:]
        components = ("vae", *self.parts.family.text)
        self.pipeline = load_pipeline(self.parts.cfg.model, only=components, net=this.reference.net)
        self.parts.family.use_sampler(self.pipeline)

    @torch.no_grad()
    def moments(self, split: Split, rows: list[int]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and std of the VAE's posterior of an image sampled for each row's prompt, from noise of its own."""
        vae, scale = self.pipeline.vae, collator_of(self.parts).scale
        pixels = vae.decode(self._latents(split, rows) / scale.scale + scale.shift).sample
        if not pixels.isfinite().all():
            raise RunError(f"images of round {self.round.number} must be finite, got others among rows {rows}")
        seen = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round() / 255
        posterior = vae.encode(seen * 2 - 1).latent_dist
        return posterior.mean.float().cpu(), posterior.std.float().cpu()

    def save(self, split: Split, rows: list[int], made: list[tuple[Tensor, Tensor]]) -> None:
        """Writes a part: the moments of rows, batch by batch."""
        mean, std = (torch.cat(side).to(self.dtype) for side in zip(*made, strict=True))
        file = self.round.folder / f"{split}-{rows[0]:08d}.safetensors"
        with enough_room(file, self.parts.folder / "checkpoints"):
            save_shard(file, {"mean": mean, "std": std}, {"rows": rows})

    def _latents(self, split: Split, rows: list[int]) -> Float[Tensor, "b c h w"]:
        source, device = collator_of(self.parts) if split == "train" else self.parts.held, self.parts.accelerator.device
        assert source is not None, "held-out rows are there where they are sampled for"
        path = (self.parts.cfg.seed, "rollout", split, self.round.number)
        noise = torch.stack([torch.randn(self.shape, generator=rng.generator(*path, row)) for row in rows])
        with self.round.reference.network(), self.parts.accelerator.autocast():
            latents = self.parts.family.sample(
                self.pipeline,
                [source.rows.prompt(row) for row in rows],
                noise.to(device),
                steps=self.round.settings.steps,
                guidance=self.round.settings.guidance,
                decoded=False,
            )
        return latents.float()


def _joined(collator: Collator, images: Images) -> Collator:
    return replace(collator, rows=SelfSampled(rows=collator.rows, images=images))
