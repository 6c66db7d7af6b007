"""A round on disk: what was sampled, for whom, and what it was worth; a killed round goes on from it.

manifest.jsonl has a line for every image: id, prompt, seed, how it was sampled, its file. images/ID.png are the images
as judges see them, clips/ID.wav the clips of a model of sound. part-N.safetensors holds a batch of rollouts; its images
are neighbours in the manifest. scores-N.json has their scores by reward, NaN as null. old-N.safetensors has log-probs
of the sampling policy where they were computed again. Everything is written whole or not at all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign.checkpoint import write_atomic
from diffalign.data.cache import save_shard
from diffalign.errors import RunError
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.types import Embedded, Trajectory


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of a round, as the manifest names it."""

    id: str
    """`<place of the prompt in the round>-<number among its images>`."""
    prompt: str
    group: int
    """Place of the prompt in the round."""
    seed: int
    noise_seed: int
    """Of x_init."""
    metadata: Mapping[str, Any]
    """What the prompt's row says beside it."""


class Store:
    """The folder of one round."""

    def __init__(self, folder: Path, entries: Sequence[Entry], batch_size: int, medium: Medium = PICTURES) -> None:
        """`entries` are all images of the round, those of a prompt together; or all clips."""
        self.folder = folder
        self.entries = entries
        self.batch_size = batch_size
        self.medium = medium
        self._open: dict[Path, Any] = {}

    @property
    def parts(self) -> range:
        """Numbers of the batches."""
        return range(-(-len(self.entries) // self.batch_size))

    def rows(self, part: int) -> range:
        """Places of a batch's images in the round."""
        first = part * self.batch_size
        return range(first, min(first + self.batch_size, len(self.entries)))

    @property
    def media(self) -> Path:
        """Folder of the images or clips."""
        return self.folder / self.medium.folder

    def file(self, row: int) -> Path:
        """Of the image or clip at this place."""
        return self.media / f"{self.entries[row].id}{self.medium.suffix}"

    def write_manifest(self, about: Mapping[str, Any]) -> None:
        """A line for every image, with `about`, how all were sampled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {**asdict(entry), **about, self.medium.modality: str(self.file(row).relative_to(self.folder))}
            for row, entry in enumerate(self.entries)
        ]
        write_atomic(self.folder / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def sampled(self, part: int) -> bool:
        """Whether a batch is there: its tensors are written last."""
        return self._part(part).is_file()

    def write_part(
        self,
        part: int,
        walked: Trajectory,
        images: Float[Tensor, " b *rest"],
        log_prob_ref: Float[Tensor, "b n"] | None = None,
    ) -> None:
        """A batch of rollouts and its images in [0, 1], or its clips in [-1, 1].

        Args:
            log_prob_ref: Of its moves under the reference, where the method asks for their log-ratios.
        """
        self.media.mkdir(parents=True, exist_ok=True)
        for row, image in zip(self.rows(part), images, strict=True):
            write_bytes(self.file(row), self.medium.encoded(image))
        tensors = {"x": walked.x, "x_0": walked.x_0, "log_prob": walked.log_prob}
        tensors |= {} if log_prob_ref is None else {"log_prob_ref": log_prob_ref}
        about = {"steps": list(walked.steps), "first": walked.first, "seeds": list(walked.seeds)}
        save_shard(self._part(part), {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, about)

    def judged(self, part: int) -> bool:
        """Whether a batch has its scores."""
        return self._scores(part).is_file()

    def write_scores(self, part: int, scores: Mapping[str, Sequence[float]], embedded: Embedded | None = None) -> None:
        """Scores of a batch by reward, and its images in the space of the set reward."""
        if embedded is not None:
            file = self.folder / f"embedded-{part}.safetensors"
            save_shard(file, {"rows": embedded.rows.float().cpu().contiguous()}, {"counts": list(embedded.counts)})
        table = {name: [v if v == v else None for v in values] for name, values in scores.items()}
        write_atomic(self._scores(part), json.dumps(table))

    def scores(self) -> dict[str, Float[Tensor, " n"]]:
        """Scores of the whole round by reward, float64, NaN where a judge could not tell."""
        found: dict[str, list[float]] = {}
        for part in self.parts:
            for name, values in json.loads(self._scores(part).read_text()).items():
                found.setdefault(name, []).extend(float("nan") if v is None else v for v in values)
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}

    def embedded(self) -> Embedded:
        """The whole round in the space of the set reward."""
        rows, counts = [], []
        for part in self.parts:
            content = self._content(self.folder / f"embedded-{part}.safetensors")
            rows.append(content.get_tensor("rows"))
            counts += json.loads(content.metadata()["counts"])
        return Embedded(rows=torch.cat(rows), counts=tuple(counts))

    def write_old(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        """What the sampling policy says of a batch's moves: `log_prob`, and `mean` where a method needs it."""
        save_shard(self._old(part), {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {})

    def has_old(self, part: int) -> bool:
        """Whether that was computed again."""
        return self._old(part).is_file()

    def walk(self) -> tuple[tuple[int, ...], int]:
        """(numbers of the moves with noise, number of the first kept level), the same for the whole round."""
        about = self._content(self._part(0)).metadata()
        return tuple(json.loads(about["steps"])), int(json.loads(about["first"]))

    def x_0(self, rows: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Clean latents."""
        return torch.stack([self._slice(self._part, row, "x_0") for row in rows]).float()

    def states(
        self, rows: Sequence[int], places: Sequence[int]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """(x_t, x_s) of one move a row; `places` count kept levels."""
        x_t, x_s = (
            torch.stack([self._slice(self._part, r, "x", p + further) for r, p in zip(rows, places, strict=True)])
            for further in (0, 1)
        )
        return x_t.float(), x_s.float()

    def log_prob_old(self, rows: Sequence[int], places: Sequence[int]) -> Float[Tensor, " b"]:
        """Log-probs of moves under the policy that made them; `places` count moves with noise."""
        found = [
            self._slice(self._old if self.has_old(r // self.batch_size) else self._part, r, "log_prob", p)
            for r, p in zip(rows, places, strict=True)
        ]
        return torch.stack(found)

    def log_ratio(self) -> Float[Tensor, " n"]:
        """Of the whole round: summed over an image's moves, log_prob - log_prob_ref as they were sampled, float64."""
        found = [
            (content.get_tensor("log_prob").double() - content.get_tensor("log_prob_ref").double()).sum(1)
            for content in (self._content(self._part(part)) for part in self.parts)
        ]
        return torch.cat(found)

    def mean_old(self, rows: Sequence[int], places: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Means of that policy's moves."""
        return torch.stack([self._slice(self._old, r, "mean", p) for r, p in zip(rows, places, strict=True)])

    def thin(self) -> None:
        """Removes what only training needed; images, manifest, scores and labels stay."""
        self._open.clear()
        for pattern in ("part-*", "old-*", "embedded-*"):
            for file in self.folder.glob(f"{pattern}.safetensors"):
                file.unlink()

    def _part(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"

    def _old(self, part: int) -> Path:
        return self.folder / f"old-{part:05d}.safetensors"

    def _scores(self, part: int) -> Path:
        return self.folder / f"scores-{part:05d}.json"

    def _slice(self, file: Any, row: int, name: str, place: int | None = None) -> Tensor:
        """One row of a tensor, or one place of it."""
        content = self._content(file(row // self.batch_size))
        held = content.get_slice(name)
        return held[row % self.batch_size] if place is None else held[row % self.batch_size, place]

    def _content(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise RunError(
                    f"{file} must be as it was written, got {reason}; remove it, and it is made again"
                ) from error
        return self._open[file]


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file in one move."""
    fresh = file.with_name(f".{file.name}.tmp")
    fresh.write_bytes(data)
    fresh.replace(file)
