"""What all set rewards do alike: embed batches, one process or several, and keep reference sets in files.

A reference file is safetensors. Its metadata say which encoder made it, what kind of summary it holds ("gaussian" or
"rows"), how many rows it was made of, the format, and a digest of the tensors. Anything that does not fit is an
InputError: embeddings of another encoder are numbers of another space.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import InputError, RunError, near_match
from diffalign.rewards import OnDevice, load_encoder
from diffalign.rewards.statistics import Gather, Moments
from diffalign.types import Embedded, MediaEncoder, RewardBatch

FORMAT = "1"
"""Of reference files."""

Way = TypeVar("Way", bound=Callable[..., Tensor])


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The embeddings of a whole set, and which of its samples share a prompt."""

    embedded: Embedded
    groups: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Space:
    """An encoder as the space in which a reward compares sets."""

    reward: str
    """The reward's name, for messages."""
    encoder: MediaEncoder
    gather: Gather

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"images" if self.encoder.modality == "image" else "audio"})

    def to(self, device: torch.device | str) -> None:
        """Moves an encoder that holds a network."""
        if isinstance(self.encoder, OnDevice):
            self.encoder.to(device)

    @torch.no_grad()
    def embed(self, batch: RewardBatch) -> Embedded:
        """A batch's rows, checked.

        Raises:
            RunError: The encoder gave numbers that are not finite.
        """
        return self._checked(self.encoder.embed(batch), batch)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """A batch's rows with gradient to its media, checked."""
        return self._checked(self.encoder.embed_with_graph(batch), batch, least=2)

    def collect(self, batches: Iterable[RewardBatch]) -> Collected:
        """All rows of all processes, at least two; groups where every batch has them.

        Raises:
            InputError: Fewer than two rows, or groups in some batches only.
        """
        rows: list[Tensor] = []
        counts: list[int] = []
        groups: list[int] = []
        for batch in batches:
            embedded = self.embed(batch)
            rows.append(embedded.rows)
            counts += embedded.counts
            groups += batch.group_ids or ()
        width = int(self.gather(torch.tensor([rows[0].shape[1] if rows else 0])).max())
        joined = self.gather(torch.cat(rows) if rows else torch.zeros(0, width))
        found = {
            k: self.gather(torch.tensor(v, dtype=torch.int64)).tolist()
            for k, v in {"counts": counts, "groups": groups}.items()
        }
        self.check_enough(len(joined), len(found["counts"]))
        if found["groups"] and len(found["groups"]) != len(found["counts"]):
            raise InputError(
                f"set reward {self.reward!r} must get group_ids with every batch or with none, got them for "
                f"{len(found['groups'])} of {len(found['counts'])} samples"
            )
        embedded = Embedded(rows=joined, counts=tuple(found["counts"]))
        return Collected(embedded=embedded, groups=tuple(found["groups"]) or None)

    def summarise(self, batches: Iterable[RewardBatch]) -> tuple[Tensor | Moments, int]:
        """(all rows where they are no more than they are wide, else their moments; samples), of all processes.

        Raises:
            InputError: Fewer than two rows.
        """
        held: list[Tensor] = []
        moments: Moments | None = None
        count = samples = 0
        for batch in batches:
            embedded = self.embed(batch)
            samples += len(embedded.counts)
            count += len(embedded.rows)
            if moments is not None:
                moments = moments.add(embedded.rows)
                continue
            held.append(embedded.rows)
            if held and count > embedded.rows.shape[1]:
                moments, held = Moments.of(torch.cat(held)), []
        own = len(moments.mean) if moments else held[0].shape[1] if held else 0
        totals = self.gather(torch.tensor([[count, samples, own]]))
        rows, samples = totals[:, :2].sum(0).tolist()
        width = int(totals[:, 2].max())
        self.check_enough(rows, samples)
        if rows <= width:
            return self.gather(torch.cat(held) if held else torch.zeros(0, width)), samples
        mine = moments or (Moments.of(torch.cat(held)) if held else Moments.empty(width))
        return mine.over_processes(self.gather), samples

    def save(self, file: str | Path, kind: str, tensors: Mapping[str, Tensor], *, rows: int) -> None:
        """Writes a reference in one move."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {
            "diffalign": "set reference",
            "format": FORMAT,
            "kind": kind,
            "encoder": self.encoder.version,
            "rows": str(rows),
            "sha256": _digest(kept),
        }
        place = Path(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.tmp")
        save_file(kept, fresh, metadata=about)
        fresh.replace(place)

    def load(self, file: str | Path, kind: str, dims: Mapping[str, int]) -> tuple[dict[str, Tensor], int]:
        """(tensors, rows that they were made of) of a reference file.

        Raises:
            InputError: No such file, damaged, of another kind or format, or of another encoder.
        """
        where = f"reference {str(file)!r}"
        try:
            with safe_open(file, framework="pt") as held:
                about = held.metadata() or {}
                tensors = {name: held.get_tensor(name) for name in held.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{where} must be a readable safetensors file: {error}") from error
        wanted = {"diffalign": "set reference", "format": FORMAT, "kind": kind, "encoder": self.encoder.version}
        for key, value in wanted.items():
            if about.get(key) != value:
                raise InputError(
                    f"{where} must have {key} {value!r} for set reward {self.reward!r}, got {about.get(key)!r}"
                )
        sound = {name: tensor.dim() for name, tensor in tensors.items()} == dict(dims)
        if not sound or about.get("sha256") != _digest(tensors) or not about.get("rows", "").isdigit():
            raise InputError(f"{where} must hold the {', '.join(dims)} that were written; it is damaged")
        return tensors, int(about["rows"])

    def no_reference(self) -> InputError:
        """The error of scoring before there is a reference."""
        return InputError(
            f"set reward {self.reward!r} must get a reference set first, got none; call fit_reference or load_reference"
        )

    def check_width(self, width: int, reference: int) -> None:
        """Raises InputError for embeddings of another width than the reference's."""
        if width != reference:
            raise InputError(f"set reward {self.reward!r} must get a reference of width {width}, got {reference}")

    def check_enough(self, rows: int, samples: int) -> None:
        """Raises InputError for a set of fewer than two rows."""
        if rows < 2:
            raise InputError(
                f"set reward {self.reward!r} must get a set of at least 2 embeddings, got {rows} of {samples} samples"
            )

    def _checked(self, embedded: Embedded, batch: RewardBatch, least: int = 0) -> Embedded:
        if not bool(embedded.rows.isfinite().all()):
            finite = embedded.rows.isfinite().all(1)
            bad = [i for i, piece in enumerate(pieces(embedded.counts)) if not finite[piece].all()]
            raise RunError(
                f"encoder {self.encoder.version!r} returned NaN or infinity for samples {bad[:8]} of {len(batch)}"
            )
        if len(embedded.rows) < least:
            self.check_enough(len(embedded.rows), len(embedded.counts))
        return embedded


def open_space(
    reward: str,
    encoder: str | MediaEncoder,
    options: Mapping[str, Any] | None,
    device: torch.device | str,
    gather: Gather,
) -> Space:
    """The space of an encoder given by spec and options, or as it is."""
    if isinstance(encoder, str):
        made = load_encoder(encoder, **(options or {}))
    elif options:
        raise InputError(f"set reward {reward!r} must get an encoder by name to take encoder_options, got {options!r}")
    else:
        made = encoder
    space = Space(reward=reward, encoder=made, gather=gather)
    if isinstance(encoder, str):
        space.to(device)
    return space


def pieces(counts: Iterable[int]) -> Iterator[slice]:
    """The rows of each sample."""
    ends = list(accumulate(counts, initial=0))
    return (slice(a, b) for a, b in pairwise(ends))


def exchanged(members: tuple[int, ...], out: int, into: int) -> tuple[int, ...]:
    """Members of a set with another sample in the place of one of them."""
    if out not in members or into in members:
        raise ValueError(f"out must be in the set and into must not, got {out} and {into} for {members[:8]}")
    return tuple(into if i == out else i for i in members)


def check_left(x: Embedded, least: int) -> None:
    """Raises InputError where leaving a sample out would leave fewer than `least` rows."""
    short = [i for i, count in enumerate(x.counts) if len(x.rows) - count < least]
    if short or not x.counts:
        raise InputError(
            f"a set must keep at least {least} embeddings without any one sample, got {len(x.rows)} of "
            f"{len(x.counts)} samples; give more samples"
        )


def credit_of(mode: str, ways: Mapping[str, Way]) -> Way:
    """The way of sharing credit of that name."""
    if mode not in ways:
        raise InputError(f"credit must be one of {', '.join(ways)}, got {mode!r}{near_match(mode, ways)}")
    return ways[mode]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, types and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()
