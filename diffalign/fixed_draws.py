"""Fixed draws: for every item K draws of all that is random, at which the reference's errors are computed once.

Without them every sample of the stream draws t, noise, latents and prompt dropout afresh, and policy and reference are
both asked. Here draw k of item i is drawn as sample number i K + k would be, in every epoch again: epoch e takes draw
e mod K of every item. The reference's errors there are looked up, so a step has no forward pass of it. On disk, beside
the encodings: reference/<digest>/key.json and part-K-N.safetensors, each whole or not there, in float64.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import load_file
from torch import Tensor

from diffalign.assemble import Parts
from diffalign.checkpoint import enough_room, write_atomic
from diffalign.data.batches import CachedRows, Collator
from diffalign.data.cache import save_shard
from diffalign.data.orders import Turn
from diffalign.errors import RunError
from diffalign.methods.measure import image_errors, pair_errors
from diffalign.models.load import load_scheduler_config
from diffalign.models.lora import POLICY
from diffalign.models.policy import Reference
from diffalign.models.quantized import scales
from diffalign.paths import NoisePath, Prediction
from diffalign.progress import bar
from diffalign.rng import SampleRng
from diffalign.types import Batch, Cond, Denoiser, ErrorKind, ImageBatch, PairBatch

BATCHES_PER_PART = 64
"""Batches in one file: what a kill loses at most."""

Measure = Callable[[Batch], Float[Tensor, "b m"]]
"""The reference's errors on a batch, one column an image of an item, float64."""


@dataclass(frozen=True, kw_only=True)
class FixedDraws:
    """Items at their K draws with the reference's errors there, in the collator's own order; makes batches."""

    collator: Collator
    errors: Float[Tensor, "n k m"]

    @property
    def order(self) -> Turn:
        return self.collator.order

    def batch(self, items: Sequence[int], samples: Sequence[int]) -> Batch:
        """The batch of some items; each sample's epoch says which of the item's draws it takes."""
        count = self.errors.shape[1]
        draws = [sample // len(self.collator) % count for sample in samples]
        made = _drawn(self.collator, items, draws, count)
        assert isinstance(made, PairBatch | ImageBatch), "a collator makes pairs or images"
        return replace(made, err_ref=self.errors[torch.tensor(items), torch.tensor(draws)])


def _drawn(collator: Collator, items: Sequence[int], draws: Sequence[int], count: int) -> Batch:
    return collator.batch(items, [item * count + draw for item, draw in zip(items, draws, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Precise:
    """A denoiser whose predictions go on in float64: errors averaged apart must keep digits for their difference."""

    denoiser: Denoiser

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        return self.denoiser(x_t, t, cond).double()


def measure_with(reference: Denoiser, kind: ErrorKind, seed: int, accelerator: Any) -> Measure:
    """Measures batches under a reference, as a step of the run would."""
    model = Precise(denoiser=reference)

    @torch.no_grad()
    def measure(batch: Batch) -> Float[Tensor, "b m"]:
        batch, rng = batch.to(accelerator.device), SampleRng(seed, batch.samples)
        with accelerator.autocast():
            if isinstance(batch, PairBatch):
                space, shared = kind.error_space, kind.share_noise
                e = pair_errors(model, None, batch, rng, error_space=space, share_noise=shared)
                return torch.stack([e.err_w, e.err_l], 1).cpu()
            assert isinstance(batch, ImageBatch), "a collator makes pairs or images"
            return image_errors(model, None, batch, rng, error_space=kind.error_space).err[:, None].cpu()

    return measure


def errors_of(
    collator: Collator, items: Sequence[int], draw: int, count: int, measure: Measure, *, batch_size: int
) -> Float[Tensor, "n m"]:
    """Errors of some items at one of their draws, in batches that are all as large as a step's.

    Raises:
        RunError: One is not finite.
    """
    found = []
    for start in range(0, len(items), batch_size):
        some = list(items[start : start + batch_size])
        fill = itertools.islice(itertools.cycle(range(len(collator))), batch_size - len(some))
        padded = [*some, *fill]  # another size may take another kernel, and equal weights then give other errors
        found.append(measure(_drawn(collator, padded, [draw] * batch_size, count))[: len(some)])
    errors = torch.cat(found)
    if not errors.isfinite().all():
        wrong = [items[i] for i in (~errors.isfinite().all(1)).nonzero().flatten().tolist()]
        raise RunError(f"errors of the reference must be finite at all fixed draws, got others for items {wrong[:8]}")
    return errors


def known_draws(collator: Collator, count: int, measure: Measure, *, batch_size: int) -> FixedDraws:
    """Draws of all items, computed here and kept in memory."""
    items = range(len(collator))
    errors = [errors_of(collator, items, draw, count, measure, batch_size=batch_size) for draw in range(count)]
    return FixedDraws(collator=collator, errors=torch.stack(errors, 1))


def fixed_draws(parts: Parts, count: int) -> FixedDraws:
    """The run's data at `count` draws an item; what the cache does not hold of them is computed first.

    Raises:
        RunError: An error is not finite, or the disk is full.
    """
    kind, collator, main = parts.cfg.method.needs.errors, parts.collator, parts.accelerator.is_main_process
    assert kind is not None, "checks let no other method in"
    assert parts.reference is not None, "checks let no run without a reference in"
    assert collator is not None, "a run on data has rows"
    rows = collator.rows
    assert isinstance(rows, CachedRows), "checks let no run without a cache in"
    key = content(parts, rows, count)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = rows.reader.folder / "reference" / digest
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "key.json", json.dumps(key, indent=1, sort_keys=True))
    size = parts.cfg.train.batch_size
    pieces = list(_pieces(len(collator), count, size * BATCHES_PER_PART))
    missing = [piece for piece in pieces if not _file(folder, *piece).is_file()]
    parts.accelerator.wait_for_everyone()  # all have looked before anyone writes
    measure = measure_with(parts.reference.denoiser, kind, parts.cfg.seed, parts.accelerator)
    mine = missing[parts.share.mine :: parts.share.of]
    with bar("errors of the reference", sum(len(items) for _, items in mine), shown=main and bool(mine)) as shown:
        for draw, items in mine:
            errors = errors_of(collator, items, draw, count, measure, batch_size=size)
            with enough_room(folder, parts.folder / "checkpoints"):
                save_shard(_file(folder, draw, items), {"errors": errors}, {})
            shown.advance(len(items))
    parts.accelerator.wait_for_everyone()
    found = [torch.cat([load_file(_file(folder, d, i))["errors"] for d, i in pieces if d == k]) for k in range(count)]
    return FixedDraws(collator=collator, errors=torch.stack(found, 1))


def _pieces(items: int, count: int, size: int) -> Iterator[tuple[int, range]]:
    for draw in range(count):
        for start in range(0, items, size):
            yield draw, range(start, min(start + size, items))


def _file(folder: Path, draw: int, items: range) -> Path:
    return folder / f"part-{draw}-{items.start:08d}.safetensors"


def content(parts: Parts, rows: CachedRows, count: int) -> Mapping[str, Any]:
    """Everything that the reference's errors depend on, by name."""
    cfg, collator, kind = parts.cfg, parts.collator, parts.cfg.method.needs.errors
    assert parts.reference is not None
    assert collator is not None
    assert kind is not None
    return {
        "version": 1,
        "reference": digest_of(parts.reference),
        "scheduler": dict(load_scheduler_config(cfg.model)),
        "data": json.loads((rows.reader.folder / "key.json").read_text()),
        "rows": hashlib.sha256(rows.rows.numpy().tobytes()).hexdigest()[:32],
        "batches": [collator.kind, collator.prompt_dropout, collator.latents, collator.swap, collator.sizes],
        "draws": count,
        "seed": cfg.seed,
        "timesteps": None if cfg.timesteps is None else asdict(cfg.timesteps),
        "guidance": cfg.train.guidance,
        "errors": asdict(kind),
        "precision": cfg.train.precision,
        "batch_size": cfg.train.batch_size,
        **({} if cfg.train.quantize == "none" else {"quantize": cfg.train.quantize}),
        "kernels": [parts.accelerator.device.type, parts.attention, cfg.train.channels_last, cfg.train.compile],
    }


def digest_of(reference: Reference) -> str:
    """Of the reference's own weights: those of a network that it shares with the policy but for the trained adapter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(reference.net.named_parameters()):
        if f".{POLICY}." not in name:
            digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)};".encode())
            digest.update(_raw(parameter))
    for scale in scales(reference.net):
        digest.update(_raw(scale))
    return digest.hexdigest()[:32]


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
