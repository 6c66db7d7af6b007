"""FLOPs of a run and bytes that it leaves on disk, from its rehearsal."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from diffalign.bare import Encoding
from diffalign.checks import reference_kind
from diffalign.data.pairs import PairReader
from diffalign.memory import optimizer_bytes
from diffalign.online.settings import KEPT_POLICIES
from diffalign.own_work import RoundWork
from diffalign.rehearsal import Rehearsal
from diffalign.settings import TrainConfig
from diffalign.shipped import DATASETS, resolve
from diffalign.workload import Evaluations


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs; a multiplication and an addition are two."""

    per_unit: int
    """Of one pair or move, or of one image for methods on single images."""
    per_step: int
    """Of an optimizer step on one device."""
    encoding: int
    """Building the cache once, errors of the reference at fixed draws too; without a cache it is in every step."""
    sampling: int
    """Making a round's own images over all processes, from their prompts' encoding to their decoding, and log-probs
    of the policy that sampled again and of the reference; 0 without own images."""
    total: int
    """Of the run on one device, without pictures and validation."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes on disk."""

    cache_per_row: int
    """Moments of a row's images and conditions of its prompt, if no other row has the same; 0 without a cache."""
    rows: int | None
    """None where the data is not local, or streamed; and where it is prompts."""
    checkpoint: int
    kept_checkpoints: int
    export: int
    round: int = 0
    """States, latents and log-probs of a round of own images, which go when the next one begins."""
    images: int = 0
    """At most, of all own images as files, which stay."""
    policies: int = 0
    """Of earlier rounds, as references or slow copies."""

    @property
    def cache(self) -> int | None:
        """At most; images and prompts that repeat are kept once."""
        return None if self.rows is None else self.rows * self.cache_per_row


@dataclass(frozen=True)
class Source:
    """What is known of the data without reading its images, or downloading anything."""

    rows: int | None
    images_a_row: int


def source_of(cfg: TrainConfig) -> Source:
    """The data's rows; prompts are none."""
    prompts = cfg.online is not None
    if prompts or cfg.data.streaming or not Path(resolve(cfg.data.path, DATASETS)).exists():
        return Source(None, 2)
    reader = PairReader(cfg.data)
    return Source(len(reader), 2 if reader.paired else 1)


def flop_of(
    cfg: TrainConfig, r: Rehearsal, inputs: Encoding, work: Evaluations, source: Source, own: RoundWork | None
) -> Work:
    """What a run computes."""
    unit = work.with_gradient * (r.forward + r.backward) + (work.of_policy + work.of_old) * r.forward
    unit += work.of_reference * r.reference
    unit += work.features_with_gradient * (r.features + r.features_backward)
    unit += work.features_without_gradient * r.features
    once = sampling = 0
    if cfg.data.cache is False:
        unit += (2 if cfg.method.needs.data == "pairs" else 1) * inputs.image_flop + inputs.prompt_flop
    elif source.rows is not None:
        images = source.images_a_row * cfg.data.variants
        once = source.rows * (images * inputs.image_flop + inputs.prompt_flop)
        once += source.rows * source.images_a_row * (cfg.train.fixed_draws or 0) * r.forward
    units = cfg.train.batch_size * cfg.train.accumulate
    total = once + cfg.train.steps * units * unit
    if cfg.rounds is not None:
        total += _sampled(cfg, source.rows) * cfg.rounds.steps * (2 if cfg.rounds.guidance > 1 else 1) * r.reference
    if own is not None and cfg.online is not None:
        shared_out = (own.sampling + own.again) * r.forward + own.under_reference * (r.reference or r.forward)
        shared_out += own.images * inputs.image_flop
        prompts = (cfg.online.prompts + 1) * inputs.prompt_flop  # every process encodes all of them
        sampling = shared_out + own.processes * prompts
        total += own.rounds * (shared_out / own.processes + prompts)
    return Work(
        per_unit=round(unit), per_step=round(units * unit), encoding=once, sampling=sampling, total=round(total)
    )


def disk_of(cfg: TrainConfig, r: Rehearsal, inputs: Encoding, source: Source, own: RoundWork | None, kept: int) -> Disk:
    """What a run leaves.

    Args:
        kept: States that a rollout keeps of an image.
    """
    moments = 2 * math.prod(inputs.latent) * getattr(torch, cfg.data.cache_dtype).itemsize
    images = source.images_a_row * cfg.data.variants
    moves = reference_kind(cfg) == "ema"
    one = 4 * r.trainable * (1 + (cfg.train.ema_decay is not None) + moves) + optimizer_bytes(cfg, r.trained)
    full = cfg.train.trainable == "full"
    width = getattr(torch, cfg.export.dtype).itemsize if full else 4
    pools = 0 if own is None else (reference_kind(cfg) == "pool") + cfg.method.needs.old
    return Disk(
        cache_per_row=0 if cfg.data.cache is False or own is not None else images * moments + inputs.prompt_bytes,
        rows=source.rows,
        checkpoint=one,
        kept_checkpoints=one * (cfg.checkpoint.keep_last + (cfg.checkpoint.best is not None)),
        export=r.trainable * width,
        round=0 if own is None else _round_bytes(cfg, inputs, own, kept),
        images=0 if own is None else own.rounds * own.images * inputs.sample_bytes,
        policies=pools * min(KEPT_POLICIES, 1 if own is None else own.rounds) * 4 * r.trainable,
    )


def _round_bytes(cfg: TrainConfig, inputs: Encoding, own: RoundWork, kept: int) -> int:
    """Tensors of a round."""
    assert cfg.online is not None, "a run on its own images has rounds of them"
    latent = math.prod(inputs.latent)
    one = kept * latent * getattr(torch, cfg.online.store_dtype).itemsize + 4 * latent + 4 * own.noisy
    if own.under_reference:
        one += 4 * own.noisy
    if own.again:
        one += 4 * own.noisy * (1 + (latent if cfg.method.needs.mean_old else 0))
    return own.images * one


def _sampled(cfg: TrainConfig, rows: int | None) -> int:
    """Images that all rounds sample: one for every row that a round trains on."""
    assert cfg.rounds is not None
    drawn = cfg.train.steps // cfg.rounds.count * cfg.train.batch_size * cfg.train.accumulate
    return cfg.rounds.count * (drawn if rows is None else min(rows, drawn))
