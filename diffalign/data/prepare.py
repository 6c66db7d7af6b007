"""From a `[data]` section to rows to train on and rows held out, through the cache, built where it is not."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffalign.checkpoint import write_atomic
from diffalign.data import cache
from diffalign.data.batches import CachedRows, LatentScale, LiveRows, Marks, Rows, held_out
from diffalign.data.cache import CacheReader, Share
from diffalign.data.images import Preprocessing
from diffalign.data.pairs import Counts, Dropped, PairReader, Row
from diffalign.denoisers import Context, Family
from diffalign.denoisers.family import PLAIN
from diffalign.errors import InputError
from diffalign.models.load import ModelSource, home, load_net_config, load_pipeline, load_vae_config
from diffalign.models.offload import Turns
from diffalign.models.text import in_float32
from diffalign.paths import broadcast
from diffalign.progress import bar
from diffalign.shipped import MODELS, resolve
from diffalign.types import Cond


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows to train on, rows held out, and the scale of their latents."""

    rows: Rows
    held: Rows | None
    scale: LatentScale
    counts: Counts


class Encoders:
    """VAE and text encoders of a pipeline, loaded when first used, so that a finished cache loads neither."""

    def __init__(
        self,
        source: ModelSource,
        family: Family,
        device: torch.device,
        *,
        zeros: bool = False,
        offload: bool = False,
        context: Context = PLAIN,
        text_dtype: torch.dtype = torch.float32,
    ) -> None:
        """The VAE is float32, as SDXL's must be.

        Args:
            zeros: The conditions of an empty prompt are zeros.
            offload: One network at a time is on the device, and none after `rest`.
            context: How large what is made is, for families that tell it with the prompt.
            text_dtype: Of text encoders, as `models.text.text_dtypes` has it; what they say comes back as float32.
        """
        self.source = source
        self.family = family
        self.device = device
        self.zeros = zeros
        self.context = context
        self.text_dtype = text_dtype
        self._parts: dict[str, Any] = {}
        self._turns = Turns(device) if offload else None

    @torch.no_grad()
    def images(
        self, pixels: Float[Tensor, "b 3 height width"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and std of the VAE's posterior for pixels in [-1, 1]."""
        vae = self._part("vae", ("vae",)).vae
        posterior = vae.encode(pixels.to(self.device)).latent_dist
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "b c h w"], scale: LatentScale) -> Float[Tensor, " b *rest"]:
        """Images in [0, 1], or waveforms in [-1, 1], of clean latents as the denoiser has them."""
        vae = self._part("vae", ("vae",)).vae
        return self.family.decode(vae, x_0.to(self.device) / scale.scale + scale.shift, self.context)

    def prompts(self, texts: Sequence[str]) -> Cond:
        """Conditions of prompts, on the CPU and in float32."""
        cond = in_float32(self.family.encode_prompts(self._part("text", self.family.text), texts, self.context))
        cond = cond.to("cpu")
        if not self.zeros:
            return cond
        kept = torch.tensor([text != "" for text in texts])
        return Cond({name: tensor * broadcast(kept, tensor) for name, tensor in cond.tensors.items()})

    def rest(self) -> None:
        """Clears the device of networks that take turns there."""
        if self._turns is not None:
            self._turns.park()

    def free(self) -> None:
        """Lets go of the networks."""
        self._parts.clear()
        if self._turns is not None:
            self._turns.end()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _part(self, name: str, components: Sequence[str]) -> Any:
        if name not in self._parts:
            pipeline = load_pipeline(self.source, only=components, text_dtype=self.text_dtype)
            if self._turns is None:
                pipeline.to(self.device)
            else:
                self._turns.add(p for p in pipeline.components.values() if isinstance(p, nn.Module))
            self._parts[name] = pipeline
        return self._parts[name]


def vae_scale(source: ModelSource) -> LatentScale:
    """Scaling constants of the VAE's config; a class without them gives latents as the denoiser has them."""
    config = load_vae_config(source)
    if config.get("latents_mean") is not None:
        raise InputError(
            "vae.config.latents_mean must be absent, got a mean and a deviation per channel, as no known family has; "
            "name another model.vae"
        )
    return LatentScale(scale=float(config.get("scaling_factor", 1.0)), shift=float(config.get("shift_factor") or 0.0))


def check_conditions(family: Family, *, empty_prompt: str, sizes: str) -> None:
    """Raises InputError for conditions that the family does not have."""
    if empty_prompt == "zeros" and not family.zero_empty:
        raise InputError(
            f"config.data.empty_prompt must be 'encode' with the family {family.name!r}, whose pipelines encode an "
            "empty prompt; got 'zeros'"
        )
    if sizes == "original" and not family.told_sizes:
        raise InputError(
            f"config.data.sizes must be 'target' with the family {family.name!r}, whose network is told no sizes; "
            "got 'original'"
        )


def content_key(
    encoders: Encoders, reader: PairReader, prep: Preprocessing, *, dtype: str, seed: int
) -> dict[str, Any]:
    """Everything that the content of a cache depends on, by name."""
    source, family = encoders.source, encoders.family
    random = prep.flip or prep.crop == "random"
    where, place = home(source)
    return {
        "version": 2,
        "vae": fingerprint(source.vae or source.path, source.revision, ("vae",)),
        "text": fingerprint(source.path, source.revision, family.text),
        "data": reader.fingerprint(),
        "limit": reader.source.limit,
        "bad_images": reader.bad_images and not reader.paired,
        "resolution": prep.resolution,
        "crop": prep.crop,
        "flip": prep.flip,
        "variants": prep.variants,
        "seed": seed if random else None,
        **({"config": fingerprint(place, source.revision, ("vae", *family.text))} if where == "model.config" else {}),
        **{name: load_net_config(source, family)[name] for name in family.text_depends_on},
        **({"empty_prompt": "zeros"} if encoders.zeros else {}),
        **({} if encoders.text_dtype == torch.float32 else {"text_encoder_dtype": str(encoders.text_dtype)[6:]}),
        **({"sizes": "original"} if prep.sizes else {}),
        **({"buckets": prep.names} if prep.buckets else {}),
        "dtype": dtype,
    }


def fingerprint(path: str, revision: str | None, components: Sequence[str]) -> str:
    """Which weights these are: names, sizes and ends of local files, or the hub id with its revision."""
    folder = Path(resolve(path, MODELS))
    if not folder.exists():
        return f"{path}@{revision or 'main'}"
    parts = [folder / c for c in components if (folder / c).is_dir()] or [folder]
    digest = hashlib.sha256()
    for part in parts:
        for file in [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file()):
            digest.update(f"{part.name}/{file.relative_to(part)}:{file.stat().st_size};".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(1 << 20))
                handle.seek(max(0, file.stat().st_size - (1 << 20)))
                digest.update(handle.read())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """How a cache is built: by whom, with which settings."""

    folder: Path
    key: Mapping[str, Any]
    dtype: torch.dtype
    batch_size: int
    seed: int
    share: Share
    wait: Callable[[], None]
    """Returns when every process has called it."""


def cached(reader: PairReader, prep: Preprocessing, encoders: Encoders, job: CacheJob) -> cache.CacheTable:
    """The table of a whole cache in the job's folder, built first where it is not.

    Raises:
        InputError: The folder is the cache of something else, too many rows are broken, or none is left; a folder that
            was made by this call is removed again.
    """
    folder, main = job.folder, job.share.mine == 0
    with _undone_on_error(folder, main=main):
        if main:
            cache.open_folder(folder, job.key)
        job.wait()
        if not main:
            cache.open_folder(folder, job.key)
        if not (folder / "complete.json").is_file():
            _build(reader, prep, encoders, job)
        table = cache.read_table(folder)
        table.counts.check("data.path", final=True)
        if main and not (folder / "complete.json").is_file():
            write_atomic(folder / "complete.json", json.dumps({"rows": len(table), "prompts": len(table.prompts)}))
        job.wait()
        return table


def _build(reader: PairReader, prep: Preprocessing, encoders: Encoders, job: CacheJob) -> None:
    """Writes this process's share of the shards, images first."""
    main = job.share.mine == 0
    total = None if reader.source.streaming else len(reader)
    images = cache.write_images(
        job.folder,
        reader,
        prep,
        encoders.images,
        seed=job.seed,
        dtype=job.dtype,
        batch_size=job.batch_size,
        share=job.share,
    )
    with bar("encoding images", total, shown=main) as shown:
        for rows in images:
            shown.advance(rows)
    job.wait()
    table = cache.read_table(job.folder)
    table.counts.check("data.path", final=True)
    texts = cache.write_text(job.folder, table.prompts, encoders.prompts, batch_size=job.batch_size, share=job.share)
    with bar("encoding prompts", len(table.prompts), shown=main) as shown:
        for prompts in texts:
            shown.advance(prompts)
    job.wait()
    encoders.free()


@contextmanager
def _undone_on_error(folder: Path, *, main: bool) -> Iterator[None]:
    """Removes what was made inside if the input turns out to be wrong; an interrupted build stays, to go on."""
    fresh = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except InputError:
        if main and fresh:
            shutil.rmtree(fresh[-1], ignore_errors=True)
        raise


def split_cached(
    folder: Path, table: cache.CacheTable, fraction: float, limit: int, seed: int, *, scored: bool = False
) -> tuple[Rows, Rows | None]:
    """Training rows and at most `limit` held-out rows of a cache; no prompt is in both.

    Args:
        scored: Leave out rows that miss a score, and count them in the table's counts.
    """
    held = torch.tensor([fraction > 0 and held_out(text, fraction) for text in table.prompts])[table.prompt]
    fit = table.score.isfinite().all(1) if scored else torch.ones(len(table), dtype=torch.bool)
    table.counts.drop_kept("unscored", int((~fit).sum()))
    table.counts.check("data.path", final=True)
    if table.bucket is not None:
        table.counts.cropped = _cropped(table.bucket[fit])
    reader = CacheReader(folder)
    train = CachedRows(reader, table, (fit & ~held).nonzero().flatten(), seed)
    if fraction == 0:
        return train, None
    rest = CachedRows(reader, table, (fit & held).nonzero().flatten()[:limit], seed)
    return _checked(train, rest, fraction)


def split_live(
    reader: PairReader,
    prep: Preprocessing,
    encoders: Encoders,
    fraction: float,
    limit: int,
    seed: int,
    batch_size: int,
    *,
    scored: bool = False,
) -> tuple[Rows, Rows | None, Counts]:
    """The same without a cache: rows are encoded when asked for."""
    counts = Counts()
    numbers: list[int] = []
    held: list[bool] = []
    scores: list[tuple[float, float]] = []
    good: list[bool] = []
    buckets: list[tuple[int, int]] = []
    for row in reader.rows():
        if isinstance(row, Row) and scored and not row.scored:
            row = Dropped(row.number, "unscored")
        if isinstance(row, Row) and prep.buckets:
            row = _bucketed(row, prep, buckets)
        counts.add(row)
        if isinstance(row, Row):
            numbers.append(row.number)
            held.append(fraction > 0 and held_out(row.prompt, fraction))
            scores.append(cache.scores_of(row))
            good.append(row.good)
    counts.check("data.path", final=True)
    bucket = torch.tensor(buckets, dtype=torch.long).reshape(-1, 2)
    counts.cropped = _cropped(bucket)
    marks = Marks(
        score=torch.tensor(scores, dtype=torch.float32),
        good=torch.tensor(good),
        paired=reader.paired,
        bucket=bucket[:, 0] if prep.buckets else None,
    )

    def rows(places: Tensor) -> LiveRows:
        chosen = [numbers[i] for i in places.tolist()]
        parts = (encoders.images, encoders.prompts)
        return LiveRows(reader, chosen, prep, *parts, seed, batch_size, marks.rows(places))

    apart = torch.tensor(held)
    train = rows((~apart).nonzero().flatten())
    if fraction == 0:
        return train, None, counts
    return *_checked(train, rows(apart.nonzero().flatten()[:limit]), fraction), counts


def _bucketed(row: Row, prep: Preprocessing, buckets: list[tuple[int, int]]) -> Row | Dropped:
    """Adds the buckets of winner and loser; a row whose images have no size comes back as dropped."""
    try:
        loser = -1 if row.rejected is None else prep.bucket_of(row.rejected)
        buckets.append((prep.bucket_of(row.chosen), loser))
    except OSError as error:
        return Dropped(row.number, "broken", " ".join(str(error).split()))
    return row


def _cropped(bucket: Int[Tensor, "n 2"]) -> int:
    """Losers whose own bucket is not their winner's."""
    return int(((bucket[:, 1] >= 0) & (bucket[:, 1] != bucket[:, 0])).sum())


def _checked(train: Rows, held: Rows, fraction: float) -> tuple[Rows, Rows]:
    if not len(train) or not len(held):
        raise InputError(
            f"validation.fraction must leave prompts on both sides, got {fraction} with {len(train)} rows to train "
            f"on and {len(held)} held out"
        )
    return train, held
