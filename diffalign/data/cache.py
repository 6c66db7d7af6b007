"""Latents and text embeddings on disk, computed once: safetensors shards under a content key.

A shard holds the rows of one stretch of the source: VAE moments (mean and std, so that a step can sample afresh) of
every distinct image, which two images a row compares, and its prompt. Text shards hold the conditions of the distinct
prompts, "" first. Moments of several buckets lie apart, by size. Shards are written beside and renamed; what is whole
is never computed again, so a killed build goes on.
"""

import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.checkpoint import write_atomic
from diffalign.data.buckets import Size, name_of
from diffalign.data.images import Preprocessing, decode, origin, place, to_size
from diffalign.data.pairs import Counts, Dropped, PairReader, Row
from diffalign.errors import InputError
from diffalign.types import Cond

ROWS_PER_SHARD = 512
PROMPTS_PER_SHARD = 1024

EncodeImages = Callable[[Float[Tensor, "b 3 height width"]], tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]]
"""Pixels in [-1, 1] -> mean and std of the VAE's posterior."""
EncodePrompts = Callable[[Sequence[str]], Cond]


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does: every `of`-th piece, from number `mine`."""

    mine: int = 0
    of: int = 1


def open_folder(folder: Path, key: Mapping[str, Any]) -> None:
    """Marks a folder as the cache of `key`, or checks that it is.

    Raises:
        InputError: The folder holds the cache of something else; the message names what differs.
    """
    file = folder / "key.json"
    if file.is_file():
        found = json.loads(file.read_text())
        wrong = sorted(name for name in {*found, *key} if found.get(name) != key.get(name))
        if wrong:
            differs = "; ".join(f"{name}: {found.get(name)!r} there, {key.get(name)!r} here" for name in wrong)
            raise InputError(
                f"data.cache must be a cache of this model, data and preprocessing, got {str(folder)!r}, which "
                f"differs in {differs}; name another folder or remove this one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(dict(key), indent=1, sort_keys=True))


def write_images(
    folder: Path,
    reader: PairReader,
    prep: Preprocessing,
    encode: EncodeImages,
    *,
    seed: int,
    dtype: torch.dtype,
    batch_size: int,
    share: Share,
) -> Iterator[int]:
    """Encodes the source's images into this process's shards; yields the number of rows of each shard done.

    Raises:
        InputError: More than 1 % of the rows are broken.
    """
    counts = Counts()
    seen = _known_images(folder)
    number = 0
    while (folder / f"rows-{number:05d}.safetensors").is_file():
        _recount(folder / f"rows-{number:05d}.safetensors", counts)
        number += 1
    if number:
        yield counts.rows
    records = reader.records(number * ROWS_PER_SHARD)
    while stretch := list(itertools.islice(records, ROWS_PER_SHARD)):
        file = folder / f"rows-{number:05d}.safetensors"
        if number % share.of == share.mine and not file.is_file():
            shard = _Shard(number, prep, seed, seen)
            for place_in_source, record in stretch:
                counts.add(shard.take(reader.row(place_in_source, record)))
            shard.encode(encode, batch_size)
            shard.save(file, dtype)
            counts.check("data.path", final=False)
        number += 1
        yield len(stretch)


def write_text(
    folder: Path, prompts: Sequence[str], encode: EncodePrompts, *, batch_size: int, share: Share
) -> Iterator[int]:
    """Encodes the distinct prompts into this process's shards; yields the number of prompts of each shard done."""
    for number, start in enumerate(range(0, len(prompts), PROMPTS_PER_SHARD)):
        part = prompts[start : start + PROMPTS_PER_SHARD]
        file = folder / f"text-{number:05d}.safetensors"
        if number % share.of == share.mine and not file.is_file():
            conds = [encode(part[i : i + batch_size]) for i in range(0, len(part), batch_size)]
            names = conds[0].tensors
            save_shard(file, {name: torch.cat([c[name].cpu() for c in conds]) for name in names}, {})
        yield len(part)


@dataclass(frozen=True)
class CacheTable:
    """The row table of all shards: which images and which prompt each row has."""

    chosen: Int[Tensor, "n v 2"]
    """(shard, place in shard) of every variant of the winner."""
    rejected: Int[Tensor, "n v 2"]
    """The same for the loser; -1 for unpaired data."""
    score: Float[Tensor, "n 2"]
    """Scores of winner and loser, NaN where the source has none."""
    good: Bool[Tensor, " n"]
    """Label of a single image; True for pairs."""
    prompt: Int[Tensor, " n"]
    """Place of the row's prompt in `prompts`."""
    number: Int[Tensor, " n"]
    """Place of the row in the source."""
    prompts: list[str]
    """Distinct prompts in order of first use, "" first."""
    counts: Counts
    origin: Int[Tensor, "n v 4"] | None = None
    """Height, width, upper and left edge of the crop of every variant of the winner, where they were asked for."""
    bucket: Int[Tensor, "n 2"] | None = None
    """Buckets of winner and loser as they are alone, where there are buckets; both have the winner's. -1: no loser."""
    sizes: tuple[str, ...] = ()
    """Buckets by name."""

    def __len__(self) -> int:
        return len(self.prompt)


def read_table(folder: Path) -> CacheTable:
    """Joins the row tables of all shards in order.

    Raises:
        InputError: There are no shards, since the source has no rows.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("chosen", "rejected", "number", "score", "good")}
    optional: dict[str, list[Tensor]] = {"origin": [], "bucket": []}
    prompt = []
    sizes: tuple[str, ...] = ()
    prompts: dict[str, int] = {"": 0}
    counts = Counts()
    for file in sorted(folder.glob("rows-*.safetensors")):
        meta = _recount(file, counts)
        with safe_open(file, framework="pt") as content:
            for name, parts in columns.items():
                parts.append(content.get_tensor(name))
            for name, parts in optional.items():
                if name in content.keys():
                    parts.append(content.get_tensor(name))
        sizes = tuple(meta.get("buckets", ()))
        prompt += [prompts.setdefault(text, len(prompts)) for text in meta["prompts"]]
    if not columns["chosen"]:
        counts.check("data.path", final=True)
    return CacheTable(
        **{name: torch.cat(parts) for name, parts in columns.items()},
        prompt=torch.tensor(prompt, dtype=torch.long),
        prompts=list(prompts),
        counts=counts,
        **{name: torch.cat(parts) for name, parts in optional.items() if parts},
        sizes=sizes,
    )


def scores_of(row: Row) -> tuple[float, float]:
    """Scores of winner and loser, NaN where there is none."""
    return math.nan if row.score_w is None else row.score_w, math.nan if row.score_l is None else row.score_l


class CacheReader:
    """Moments and conditions out of a finished cache, by memory map; needs neither VAE nor text encoder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}

    def moments(
        self, place: Int[Tensor, "b 2"], size: str = ""
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and std of images at (shard, place among its images of this size), float32; "" is without buckets."""
        slices = [self._open(f"rows-{shard:05d}") for shard, _ in place.tolist()]
        rows = [row for _, row in place.tolist()]
        mean, std = (
            torch.stack([f.get_slice(name)[r] for f, r in zip(slices, rows, strict=True)]).float()
            for name in (_tensor("mean", size), _tensor("std", size))
        )
        return mean, std

    def cond(self, prompt: Int[Tensor, " b"]) -> Cond:
        """Conditions of prompts by their place in the table."""
        places = [divmod(p, PROMPTS_PER_SHARD) for p in prompt.tolist()]
        files = [(self._open(f"text-{shard:05d}"), row) for shard, row in places]
        names = files[0][0].keys()
        return Cond({name: torch.stack([f.get_slice(name)[row] for f, row in files]) for name in names})

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / f"{name}.safetensors", framework="pt").__enter__()
        return self._files[name]


class _Shard:
    """Rows on their way to disk: distinct images by digest, and the rows' references to them."""

    def __init__(self, number: int, prep: Preprocessing, seed: int, seen: dict[str, tuple[int, int]]) -> None:
        self.number = number
        self.prep = prep
        self.seed = seed
        self.seen = seen
        self.pixels: dict[str, list[Tensor]] = {} if prep.buckets else {"": []}
        self.digests: list[str] = []
        self.chosen: list[list[tuple[int, int]]] = []
        self.rejected: list[list[tuple[int, int]]] = []
        self.prompts: list[str] = []
        self.numbers: list[int] = []
        self.scores: list[tuple[float, float]] = []
        self.good: list[bool] = []
        self.origin: list[list[tuple[int, int, int, int]]] = []
        self.bucket: list[tuple[int, int]] = []
        self.counts = Counts()
        self.moments: dict[str, Tensor] = {}

    def take(self, row: Row | Dropped) -> Row | Dropped:
        """Adds a row; a row with an unreadable image comes back as dropped."""
        if isinstance(row, Row):
            try:
                own = self._buckets(row)
                size = self.prep.size(own[0][0] if own else None)
                pair = [self._variants(data, row, size) for data in (row.chosen, row.rejected) if data is not None]
            except OSError as error:
                row = Dropped(row.number, "broken", " ".join(str(error).split()))
            else:
                self.chosen.append(pair[0])
                self.rejected.append(pair[1] if len(pair) == 2 else [(-1, -1)] * self.prep.variants)
                self.prompts.append(row.prompt)
                self.numbers.append(row.number)
                self.scores.append(scores_of(row))
                self.good.append(row.good)
                self.bucket += own
                if self.prep.sizes:
                    self.origin.append(self._origins(row, size))
        self.counts.add(row)
        return row

    def encode(self, encode: EncodeImages, batch_size: int) -> None:
        for size, pixels in self.pixels.items():
            parts = [encode(torch.stack(pixels[i : i + batch_size])) for i in range(0, len(pixels), batch_size)]
            for i, name in enumerate(("mean", "std")):
                found = [part[i].cpu() for part in parts]
                self.moments[_tensor(name, size)] = torch.cat(found) if found else torch.empty(0)

    def save(self, file: Path, dtype: torch.dtype) -> None:
        tensors = {
            **{name: moments.to(dtype) for name, moments in self.moments.items()},
            "chosen": torch.tensor(self.chosen, dtype=torch.long).reshape(-1, self.prep.variants, 2),
            "rejected": torch.tensor(self.rejected, dtype=torch.long).reshape(-1, self.prep.variants, 2),
            "number": torch.tensor(self.numbers, dtype=torch.long),
            "score": torch.tensor(self.scores, dtype=torch.float32).reshape(-1, 2),
            "good": torch.tensor(self.good, dtype=torch.bool),
        }
        if self.prep.sizes:
            tensors["origin"] = torch.tensor(self.origin, dtype=torch.long).reshape(-1, self.prep.variants, 4)
        names: dict[str, Any] = {}
        if self.prep.buckets:
            tensors["bucket"] = torch.tensor(self.bucket, dtype=torch.long).reshape(-1, 2)
            names["buckets"] = self.prep.names
        counts = {"rows": self.counts.rows, "dropped": self.counts.dropped, "broken": self.counts.broken}
        save_shard(file, tensors, {"prompts": self.prompts, "digests": self.digests, "counts": counts, **names})

    def _buckets(self, row: Row) -> list[tuple[int, int]]:
        """Buckets of winner and loser as they are alone; nothing without buckets."""
        if not self.prep.buckets:
            return []
        return [(self.prep.bucket_of(row.chosen), -1 if row.rejected is None else self.prep.bucket_of(row.rejected))]

    def _variants(self, data: bytes, row: Row, size: Size) -> list[tuple[int, int]]:
        image = None
        places = []
        name = name_of(size) if self.prep.buckets else ""
        pixels = self.pixels.setdefault(name, [])
        for variant in range(self.prep.variants):
            placement = place(self.prep, self.seed, row.number, variant)
            digest = hashlib.sha256(data + repr(placement).encode()).hexdigest()[:32] + (name and f"@{name}")
            if digest not in self.seen:
                image = image or decode(data)
                self.seen[digest] = (self.number, len(pixels))
                pixels.append(to_size(image, size, placement))
                self.digests.append(digest)
            places.append(self.seen[digest])
        return places

    def _origins(self, row: Row, size: Size) -> list[tuple[int, int, int, int]]:
        variants = range(self.prep.variants)
        return [origin(row.chosen, size, place(self.prep, self.seed, row.number, v)) for v in variants]


def _known_images(folder: Path) -> dict[str, tuple[int, int]]:
    known: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("rows-*.safetensors")):
        number = int(file.stem.split("-")[1])
        places: Counter[str] = Counter()
        for digest in _meta(file)["digests"]:
            size = digest.partition("@")[2]
            known[digest] = (number, places[size])
            places[size] += 1
    return known


def _tensor(name: str, size: str) -> str:
    """What the moments of images of a size are called in a shard."""
    return f"{name}/{size}" if size else name


def _meta(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as content:
        return {name: json.loads(text) for name, text in content.metadata().items()}


def _recount(file: Path, counts: Counts) -> dict[str, Any]:
    meta = _meta(file)
    counts.rows += meta["counts"]["rows"]
    counts.kept += len(meta["prompts"])
    for reason, number in meta["counts"]["dropped"].items():
        counts.dropped[reason] = counts.dropped.get(reason, 0) + number
    counts.broken += meta["counts"]["broken"]
    return meta


def save_shard(file: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes tensors, with JSON values beside them, under another name first: a file is whole or not there."""
    fresh = file.with_name(f".{file.name}.tmp")
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        fresh,
        metadata={k: json.dumps(v) for k, v in meta.items()},
    )
    with fresh.open("rb") as handle:
        os.fsync(handle.fileno())
    fresh.replace(file)
