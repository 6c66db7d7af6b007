"""Training in rounds: before each, an earlier policy becomes the reference and samples the round's losers.

A run is a list of phases, one where there are no rounds. Before round k the policy k - 1 goes into the pool, theta_j
is drawn from it, and an image is sampled for every row that the round will see: decoded, rounded to 8 bit and encoded
again, so that it has gone through the VAE as the winners have. On disk, under rounds/:

policies/policy-N.safetensors and pool.json, their digests; round-K/part-N.safetensors, moments of images by row.

Everything is written whole or not at all and made from (config, seed) alone, so a killed run makes what is missing.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from diffalign import rng
from diffalign.assemble import Parts
from diffalign.checkpoint import restore_, write_atomic
from diffalign.data.batches import Collator, LatentScale
from diffalign.data.cache import save_shard
from diffalign.data.selfsampled import Images, SelfSampled, Split
from diffalign.errors import RunError
from diffalign.logbook import Logbook
from diffalign.models.load import load_pipeline
from diffalign.progress import bar
from diffalign.types import Denoiser, Replay

BATCHES_PER_PART = 16
"""Sampled batches in one file: what a kill loses at most."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that have one reference and one source of batches."""

    reference: Denoiser | None
    collator: Collator
    held: Collator | None
    start: int
    """Steps taken before it."""
    stop: int
    """Steps taken at its end."""


def phases(parts: Parts, book: Logbook) -> Iterator[Phase]:
    """What is left of a run: one stretch of steps, or round after round, each sampled when it is asked for.

    Raises:
        RunError: The pool of policies is empty or damaged, or an image is not finite.
    """
    cfg = parts.cfg
    if cfg.rounds is None:
        reference = None if parts.reference is None else parts.reference.denoiser
        yield Phase(
            reference=reference, collator=parts.collator, held=parts.held, start=parts.start, stop=cfg.train.steps
        )
        return
    length = cfg.train.steps // cfg.rounds.count
    for number in range(parts.start // length + 1, cfg.rounds.count + 1):
        yield _round(parts, book, number, length)


def _round(parts: Parts, book: Logbook, number: int, length: int) -> Phase:
    """Makes a round ready: its policy in the pool, its reference, its images."""
    assert parts.reference is not None, "a method with rounds has a reference"
    assert parts.cfg.method.needs.replay is not None, "only such a method has rounds"
    began, first = time.monotonic(), (number - 1) * length
    start = max(first, parts.start)
    pool = Pool(parts.folder / "rounds" / "policies")
    chosen = replayed(parts.cfg.method.needs.replay, number, parts.cfg.seed)
    if parts.accelerator.is_main_process:
        _clear(parts.folder / "rounds", pool, number)
        if start == first:
            pool.add(number - 1, parts.parameters)
    parts.accelerator.wait_for_everyone()
    restore_(parts.reference.parameters, pool.policy(chosen, parts.reference.parameters))
    wanted: dict[Split, list[int]] = {"train": rows_between(parts, first, first + length)}
    if parts.held is not None:
        wanted["held"] = list(range(len(parts.held.rows)))
    folder = parts.folder / "rounds" / f"round-{number}"
    sample(parts, folder, number, wanted)
    if start == first:
        settings = parts.cfg.rounds
        assert settings is not None, "a round has settings"
        book.round(
            start,
            {
                "round": number,
                "reference": chosen,
                "images": sum(map(len, wanted.values())),
                "forwards_per_image": settings.steps * (2 if settings.guidance > 1 else 1),
                "seconds": round(time.monotonic() - began, 4),
            },
        )
    return Phase(
        reference=parts.reference.denoiser,
        collator=_joined(parts.collator, Images(folder, "train")),
        held=None if parts.held is None else _joined(parts.held, Images(folder, "held")),
        start=start,
        stop=first + length,
    )


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
    order = parts.collator.order
    return sorted({order.item(s) for s in range(start * global_batch_size, stop * global_batch_size)})


_REMEDY = "start the run anew in another folder"


class Pool:
    """The policies at the start of every round so far, trained parameters alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "pool.json"

    def digests(self) -> dict[str, str]:
        """SHA-256 of each policy's file, by its number."""
        if not self.index.is_file():
            return {}
        try:
            return dict(json.loads(self.index.read_text()))
        except json.JSONDecodeError as error:
            raise RunError(f"{self.index} must be as it was written, got no JSON ({error}); {_REMEDY}") from error

    def add(self, number: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Writes a policy, unless it is there."""
        known = self.digests()
        if str(number) in known and self._file(number).is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_shard(self._file(number), {k: p.detach().cpu() for k, p in parameters.items()}, {})
        self._write({**known, str(number): _sha256(self._file(number))})

    def policy(self, number: int, like: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """A policy's weights, with the names and shapes of `like`.

        Raises:
            RunError: The pool is empty, or the policy is missing or damaged.
        """
        known, file = self.digests(), self._file(number)
        if not known:
            raise RunError(f"{self.folder} must hold the policies of earlier rounds, got an empty pool; {_REMEDY}")
        if str(number) not in known or not file.is_file():
            raise RunError(
                f"{self.folder} must hold the policies of earlier rounds, got none at {file.name}; {_REMEDY}"
            )
        if _sha256(file) != known[str(number)]:
            raise RunError(f"{file} must be as it was written, got another SHA-256 than pool.json has; {_REMEDY}")
        weights = load_file(file)
        if {k: v.shape for k, v in weights.items()} != {k: p.shape for k, p in like.items()}:
            raise RunError(
                f"{file} must hold the parameters that this run trains, got {len(weights)} others; {_REMEDY}"
            )
        return weights

    def drop_from(self, number: int) -> None:
        """Removes the policies from `number` on: of rounds that a run from an older checkpoint makes anew."""
        known = self.digests()
        stale = [n for n in known if int(n) >= number]
        if stale:
            self._write({n: digest for n, digest in known.items() if n not in stale})
        for n in stale:
            self._file(int(n)).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"policy-{number}.safetensors"

    def _write(self, digests: dict[str, str]) -> None:
        write_atomic(self.index, json.dumps(digests, indent=1))


def _clear(folder: Path, pool: Pool, number: int) -> None:
    """Removes what round `number` must not see: images of other rounds, policies of later ones."""
    for place in folder.glob("round-*"):
        if place.name != f"round-{number}":
            shutil.rmtree(place)
    pool.drop_from(number)


def sample(parts: Parts, folder: Path, number: int, wanted: dict[Split, list[int]]) -> None:
    """Samples the round's images that are not there yet, this process its share of the parts."""
    settings = parts.cfg.rounds
    assert settings is not None, "a round has settings"
    size = settings.batch_size * BATCHES_PER_PART
    pieces: list[tuple[Split, list[int]]] = []
    for split, rows in wanted.items():
        there = Images(folder, split).places
        missing = [row for row in rows if row not in there]
        pieces += [(split, missing[i : i + size]) for i in range(0, len(missing), size)]
    parts.accelerator.wait_for_everyone()  # all have looked before anyone writes
    mine = pieces[parts.share.mine :: parts.share.of]
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        sampler = Sampler(parts, number)
        total = sum(len(rows) for _, rows in mine)
        with bar(f"sampling round {number}", total, shown=parts.accelerator.is_main_process) as shown:
            for split, rows in mine:
                moments = []
                for i in range(0, len(rows), settings.batch_size):
                    moments.append(sampler.moments(split, rows[i : i + settings.batch_size]))
                    shown.advance(len(moments[-1][0]))
                mean, std = (torch.cat(side).to(sampler.dtype) for side in zip(*moments, strict=True))
                file = folder / f"{split}-{rows[0]:08d}.safetensors"
                save_shard(file, {"mean": mean, "std": std}, {"rows": rows})
    parts.accelerator.wait_for_everyone()


class Sampler:
    """The round's reference in its stock pipeline, and the way of its images to moments."""

    def __init__(self, parts: Parts, number: int) -> None:
        assert parts.reference is not None, "a method with rounds has a reference"
        self.parts = parts
        self.number = number
        self.reference = parts.reference
        self.scale: LatentScale = parts.collator.scale
        data = parts.cfg.data
        self.dtype = torch.float32 if data.cache is False else getattr(torch, data.cache_dtype)
        self.shape = parts.collator.rows.latents([0], [0], "w")[0].shape[1:]
        components = ("vae", *parts.family.text)
        device = parts.accelerator.device
        self.pipeline = load_pipeline(parts.cfg.model, only=components, net=self.reference.net).to(device)
        parts.family.use_sampler(self.pipeline)

    @torch.no_grad()
    def moments(self, split: Split, rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and std of the VAE's posterior of an image sampled for each row's prompt, from noise of its own."""
        vae = self.pipeline.vae
        z = self._latents(split, rows) / self.scale.scale + self.scale.shift
        pixels = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        if not pixels.isfinite().all():
            raise RunError(f"images of round {self.number} must be finite, got others for rows {list(rows)}")
        posterior = vae.encode((pixels * 255).round() / 255 * 2 - 1).latent_dist
        return posterior.mean.float().cpu(), posterior.std.float().cpu()

    def _latents(self, split: Split, rows: Sequence[int]) -> Float[Tensor, "b c h w"]:
        settings, source = self.parts.cfg.rounds, self.parts.collator if split == "train" else self.parts.held
        assert settings is not None, "a round has settings"
        assert source is not None, "held-out rows are there where they are sampled for"
        height, width = (side * self.pipeline.vae_scale_factor for side in self.shape[1:])
        path = (self.parts.cfg.seed, "rollout", split, self.number)
        noise = torch.stack([torch.randn(self.shape, generator=rng.generator(*path, row)) for row in rows])
        with self.reference.network(), self.parts.accelerator.autocast():
            latents = self.pipeline(
                prompt=[source.rows.prompt(row) for row in rows],
                latents=noise.to(self.parts.accelerator.device),
                height=height,
                width=width,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                output_type="latent",
                **self.parts.family.call_options(self.pipeline),
            ).images
        return latents.float()


def _joined(collator: Collator, images: Images) -> Collator:
    return replace(collator, rows=SelfSampled(rows=collator.rows, images=images))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
