"""The rows of a run on data, to train on and held out, and their batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.checks import buckets_of, context_of, method_name, text_dtype_of
from diffalign.data.batches import Collator, Rows
from diffalign.data.buckets import check_filled
from diffalign.data.cache import Share
from diffalign.data.images import Preprocessing
from diffalign.data.pairs import Counts, PairReader
from diffalign.data.prepare import CacheJob, Encoders, cached, content_key, split_cached, split_live, vae_scale
from diffalign.data.prompts import PromptSet
from diffalign.denoisers import Family
from diffalign.errors import InputError
from diffalign.settings import TrainConfig
from diffalign.types import Needs


def make_collators(
    cfg: TrainConfig, family: Family, folder: Path, share: Share, accelerator: Any
) -> tuple[Collator, Collator | None, Counts]:
    """Batches of rows to train on and of rows held out; of a run on its own images the rows that are mixed in."""
    rows, held, counts = prepare_rows(cfg, family, folder, share, accelerator)
    check_prompts(cfg, rows)
    group = cfg.train.batch_size * cfg.train.accumulate * share.of
    collator = Collator(
        rows=rows,
        kind="images" if cfg.method.needs.real else cfg.method.needs.batches,
        scale=vae_scale(cfg.model),
        seed=cfg.seed,
        prompt_dropout=cfg.data.prompt_dropout,
        latents=cfg.data.latents,
        swap=cfg.data.swap_labels,
        positive_ratio=cfg.data.positive_ratio,
        sizes=cfg.data.sizes == "original",
        group=group,
    )
    if collator.bucket is not None:
        counts.buckets = check_filled(buckets_of(cfg, family), collator.bucket, group)
    return collator, None if held is None else replace(collator, rows=held, prompt_dropout=0.0), counts


def prepare_rows(
    cfg: TrainConfig, family: Family, folder: Path, share: Share, accelerator: Any
) -> tuple[Rows, Rows | None, Counts]:
    """Rows to train on and rows held out, from the cache or encoded as they are asked for."""
    data, needs = cfg.data, cfg.method.needs
    kind = "images" if needs.real else needs.data
    if kind == "prompts":
        raise ValueError("cfg.method must train on images of the data to have rows, got one that makes its own")
    reader = PairReader(data, bad_images=kind == "labelled")
    reader.check_fits(kind, scores=needs.scores, swapped=data.swap_labels)
    prep = Preprocessing(
        resolution=context_of(cfg, family).resolution,
        crop=data.crop,
        flip=data.flip,
        variants=data.variants,
        sizes=data.sizes == "original",
        buckets=buckets_of(cfg, family),
    )
    encoders = Encoders(
        cfg.model,
        family,
        accelerator.device,
        zeros=data.empty_prompt == "zeros",
        offload=cfg.train.offload,
        text_dtype=text_dtype_of(cfg, accelerator.device.type),
    )
    fraction = 0.0 if cfg.validation is None else cfg.validation.fraction
    limit = 0 if cfg.validation is None else cfg.validation.pairs
    if data.cache is False:
        rows, held, counts = split_live(
            reader, prep, encoders, fraction, limit, cfg.seed, data.encode_batch_size, scored=needs.scores
        )
        check_labels(rows, needs)
        return rows, held, counts
    place = folder / "cache" if data.cache is True else Path(data.cache)
    job = CacheJob(
        folder=place,
        key=content_key(encoders, reader, prep, dtype=data.cache_dtype, seed=cfg.seed),
        dtype=getattr(torch, data.cache_dtype),
        batch_size=data.encode_batch_size,
        seed=cfg.seed,
        share=share,
        wait=accelerator.wait_for_everyone,
    )
    table = cached(reader, prep, encoders, job)
    rows, held = split_cached(place, table, fraction, limit, cfg.seed, scored=needs.scores)
    check_labels(rows, needs)
    return rows, held, table.counts


def check_labels(rows: Rows, needs: Needs) -> None:
    """Raises InputError where a method learns from good and bad images and the data has one kind alone."""
    marks = rows.marks
    if needs.data == "labelled" and marks is not None and not marks.both_labels:
        good = int(marks.good.sum())
        raise InputError(
            f"data.path must have good and bad images for this method, got {good} good and {len(rows) - good} bad "
            "to train on"
        )


def check_prompts(cfg: TrainConfig, rows: Rows) -> None:
    """Raises InputError where a method samples an image for each prompt and there is no prompt in the data."""
    if cfg.method.needs.replay is not None and all(not rows.prompt(row).strip() for row in range(len(rows))):
        raise InputError(
            f"data.path must have prompts for method {method_name(cfg.method)!r}, which samples an image for each; got "
            f"{len(rows)} rows, all with blank ones"
        )


def prompts_of(path: str, rows: Rows) -> PromptSet:
    """The prompts of rows, each once, in their order.

    Raises:
        InputError: All are blank.
    """
    found = list(dict.fromkeys(prompt for row in range(len(rows)) if (prompt := rows.prompt(row)).strip()))
    if not found:
        raise InputError(f"data.path must have prompts to make images of, got {len(rows)} rows, all with blank ones")
    return PromptSet(name=path, prompts=found, metadata=[{} for _ in found])
