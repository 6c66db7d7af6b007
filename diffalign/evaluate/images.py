"""The images of all arms, on disk: made where they are lacking, taken over where they are finished.

Batches are the same for any number of processes, and a batch that was cut off is made again whole, so that every image
is the one that a single undisturbed process would have written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.data.prompts import PromptSet
from diffalign.denoisers import Family
from diffalign.errors import InputError, RunError
from diffalign.evaluate.arms import Arm
from diffalign.evaluate.findings import a_noun
from diffalign.evaluate.form import Form
from diffalign.evaluate.generate import make_batch, prompt_seed
from diffalign.evaluate.media import Medium
from diffalign.evaluate.processes import Processes
from diffalign.evaluate.score import Table, places_of, texts_of
from diffalign.evaluate.settings import Sampling
from diffalign.evaluate.store import appending, digest_of, key, read_journal, write_whole
from diffalign.models.load import detect_family, load_pipeline
from diffalign.progress import bar


def columns(medium: Medium) -> tuple[str, ...]:
    """Of a table of samples; `file` is the path in the evaluation's folder."""
    return ("arm", "file_name", "file", "prompt", "prompt_index", "k", "seed", "latent_sha256", medium.digest)


@dataclass(frozen=True)
class Place:
    """One image that is asked for."""

    index: int
    """Of its prompt."""
    k: int
    """Number of the image among its prompt's row."""
    number: int
    """Number of its seed; another one than `k` for a row whose prompt an earlier row has given."""

    def file_name(self, medium: Medium) -> str:
        return f"{self.index:05d}-{self.k}{medium.suffix}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of every arm alike."""

    prompts: PromptSet
    places: tuple[Place, ...]
    """Seed by seed, so that more seeds later leave the batches of the first ones as they were."""

    def batches(self, size: int) -> list[tuple[Place, ...]]:
        """Places that are made together: neighbours of one seed number."""
        n = len(self.prompts)
        starts = (k + i for k in range(0, len(self.places), n) for i in range(0, n, size))
        return [self.places[s : min(s + size, (s // n + 1) * n)] for s in starts]


def plan_of(prompts: PromptSet, seeds: int) -> Plan:
    """All images of all prompts; rows that share a prompt have noise of their own."""
    seen: dict[str, int] = {}
    earlier = []
    for prompt in prompts.prompts:
        earlier.append(seen.get(prompt, 0))
        seen[prompt] = earlier[-1] + 1
    places = tuple(Place(i, k, earlier[i] * seeds + k) for k in range(seeds) for i in range(len(prompts)))
    return Plan(prompts=prompts, places=places)


@dataclass(kw_only=True)
class Studio:
    """Makes one arm's images; its pipeline is loaded when the first one is lacking."""

    arm: Arm
    digest: str
    folder: Path
    device: torch.device
    batch_size: int
    processes: Processes
    form: Form
    pipeline: Any = None

    def make(self, plan: Plan, sampling: Sampling, place: str) -> None:
        """Writes what is lacking of this process's batches under `place` in the evaluation's folder."""
        name, done = f"images-{self.arm.name}", self.done()
        lacking = []
        for batch in self.processes.share(plan.batches(self.batch_size)):
            keys = [self.key(plan, p, sampling) for p in batch]
            if any(k not in done for k in keys):
                lacking.append((batch, keys))
        if not lacking:
            return
        family = self._open(sampling)
        total = sum(len(batch) for batch, _ in lacking)
        with (
            appending(self.folder, name, self.processes.rank) as journal,
            bar(f"{self.arm.name} {self.form.medium.folder}", total, shown=self.processes.main) as shown,
        ):
            for batch, keys in lacking:
                made = make_batch(
                    self.pipeline,
                    family,
                    plan.prompts.prompts,
                    [(p.index, p.number) for p in batch],
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    medium=self.form.medium,
                    shape=self.form.latents,
                    context=self.form.context,
                )
                for p, own, item in zip(batch, keys, made, strict=True):
                    if own not in done:
                        data, file = self.form.medium.encoded(item.image), f"{place}/{p.file_name(self.form.medium)}"
                        write_whole(self.folder / file, data)
                        found = hashlib.sha256(data).hexdigest()
                        journal.write(
                            [{"key": own, "file": file, self._digest: found, "latent_sha256": item.latent_sha256}]
                        )
                    shown.advance()

    def rows(self, plan: Plan, sampling: Sampling) -> Table:
        """One row per image, in the prompts' order, from the journals of all processes."""
        done = self.done()
        table: Table = {name: [] for name in columns(self.form.medium)}
        for p in sorted(plan.places, key=lambda p: (p.index, p.k)):
            row = done[self.key(plan, p, sampling)]
            prompt = plan.prompts.prompts[p.index]
            values = (
                self.arm.name, p.file_name(self.form.medium), row["file"], prompt, p.index, p.k,
                prompt_seed(prompt, p.number), row["latent_sha256"], row[self._digest],
            )  # fmt: skip
            for column, value in zip(table, values, strict=True):
                table[column].append(value)
        return table

    def key(self, plan: Plan, place: Place, sampling: Sampling) -> str:
        """What an image depends on."""
        return key(plan.prompts.prompts[place.index], place.number, self.digest, sampling.table)

    def done(self) -> dict[str, dict[str, Any]]:
        """Images that are whole, by key; a file that is gone or damaged is lacking."""
        found = read_journal(self.folder, f"images-{self.arm.name}")
        return {k: row for k, row in found.items() if _whole(self.folder / row["file"], row[self._digest])}

    @property
    def _digest(self) -> str:
        return self.form.medium.digest

    def _open(self, sampling: Sampling) -> Family:
        assert self.arm.source is not None, "finished images are not made"
        family = detect_family(self.arm.source)
        if self.pipeline is None:
            self.pipeline = load_pipeline(self.arm.source).to(self.device)
            if sampling.dtype != "float32":
                self.pipeline.to(getattr(torch, sampling.dtype))
            family.use_sampler(self.pipeline)
        return family


def take_over(arm: Arm, plan: Plan, folder: Path, medium: Medium) -> Table:
    """Copies an arm's finished images or clips, as our own are kept; returns one row each.

    They belong to their prompts by metadata.jsonl (file_name, prompt, k) or by their names, `<place>-<k>.png`, or, one
    a prompt, by their order.

    Raises:
        InputError: One is lacking or unreadable.
    """
    assert arm.images is not None, "a model's samples are made"
    found = finished(arm.images, plan.prompts, medium)
    table: Table = {name: [] for name in columns(medium)}
    lacking = [p for p in plan.places if (plan.prompts.prompts[p.index], p.number) not in found]
    if lacking:
        first = plan.prompts.prompts[lacking[0].index]
        raise InputError(
            f"{arm.name} must have {a_noun(medium.one)} of every prompt and seed, got {str(arm.images)!r} without "
            f"{len(lacking)} of {len(plan.places)}, the first of {first!r}, seed {lacking[0].k}"
        )
    for p in sorted(plan.places, key=lambda p: (p.index, p.k)):
        prompt = plan.prompts.prompts[p.index]
        file, about = found[prompt, p.number]
        name = p.file_name(medium)
        target = folder / medium.folder / arm.name / name
        data = medium.taken(file)
        digest = hashlib.sha256(data).hexdigest()
        if not _whole(target, digest):
            write_whole(target, data)
        values = (
            arm.name, name, f"{medium.folder}/{arm.name}/{name}", prompt, p.index, p.k, about.get("seed"),
            about.get("latent_sha256"), digest,
        )  # fmt: skip
        for column, value in zip(table, values, strict=True):
            table[column].append(value)
    return table


def finished(folder: Path, prompts: PromptSet, medium: Medium) -> dict[tuple[str, int], tuple[Path, dict[str, Any]]]:
    """(file, what metadata.jsonl says of it) by (prompt, seed number)."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in medium.accepts)
    listed = folder / "metadata.jsonl"
    if not listed.is_file():
        places = places_of(files, prompts, what=medium.folder, suffix=medium.suffix)
        return {(prompts.prompts[i], k): (f, {}) for f, (i, k) in zip(files, places, strict=True)}
    texts = texts_of(folder, files, one=medium.one) or []  # checks that every one is listed
    rows = {row["file_name"]: row for row in map(json.loads, filter(str.strip, listed.read_text("utf-8").splitlines()))}
    found: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}
    for file, text in zip(files, texts, strict=True):
        number = rows[file.name].get("k", sum(text == prompt for prompt, _ in found))
        found[text, number] = (file, rows[file.name])
    return found


def write_metadata(table: Mapping[str, Sequence[Any]], arm: str, folder: Path, medium: Medium) -> None:
    """metadata.jsonl beside an arm's files, as `diffalign sample` writes it."""
    lines = []
    for row, name in enumerate(table["arm"]):
        if name == arm:
            about = {column: table[column][row] for column in columns(medium) if column not in ("arm", "file")}
            lines.append(json.dumps(about, ensure_ascii=False))
    write_whole(folder / medium.folder / arm / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


def check_pairs(table: Table, arms: Sequence[str]) -> str | None:
    """Hash over all latents' hashes, after the check that all arms had the same ones; None if one does not say.

    Raises:
        RunError: Two arms started from other noise.
    """
    hashes = {
        arm: [v for v, name in zip(table["latent_sha256"], table["arm"], strict=True) if name == arm] for arm in arms
    }
    known = {arm: values for arm, values in hashes.items() if None not in values}
    for arm, values in known.items():
        first = next(iter(known))
        if values != known[first]:
            raise RunError(f"arms must start from the same latents, got other ones in {first} and {arm}")
    if len(known) < len(arms):
        return None
    return hashlib.sha256("".join(hashes[arms[0]]).encode()).hexdigest()


def _whole(file: Path, digest: str) -> bool:
    return file.is_file() and digest_of(file) == digest
