"""Every raw score of every image in one table; what is compared is computed from it later.

A table is a dict of equally long columns. A reward's scores are in the column of its name, its components in
`reward.component`; NaN marks an image that the reward could not judge, or judged by a number that is not finite.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.data.prompts import PromptSet
from diffalign.errors import InputError, RunError
from diffalign.progress import bar
from diffalign.types import Reward, RewardBatch

Table = dict[str, list[Any]]

MOST_INVALID = 0.01
"""Share of images that a reward may leave unjudged before the work stops."""

_NUMBERED = re.compile(r"(\d+)-(\d+)")
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SOUNDS = {".wav"}


def score_images(
    images: Iterable[Float[Tensor, "3 _ _"]],
    prompts: Sequence[str] | None,
    rewards: Sequence[Reward],
    *,
    batch_size: int = 16,
    metadata: Sequence[dict[str, Any]] | None = None,
) -> Table:
    """Scores of images by each reward; images may differ in size, a batch never does.

    Args:
        images: RGB in [0, 1], one per prompt; read lazily.
    """
    table: Table = {}
    position = 0
    for batch in batches(images, batch_size):
        rows = slice(position, position + len(batch))
        position += len(batch)
        asked = RewardBatch(
            images=batch,
            prompts=None if prompts is None else list(prompts[rows]),
            metadata=None if metadata is None else list(metadata[rows]),
        )
        for reward in rewards:
            for name, values in columns_of(reward, asked).items():
                table.setdefault(name, []).extend(values)
    return table


def columns_of(reward: Reward, asked: RewardBatch) -> Table:
    """A reward's scores of a batch and their components, NaN where it could not judge."""
    out = reward.score(asked)
    columns = {reward.name: out.scores, **{f"{reward.name}.{name}": v for name, v in out.raw.items()}}
    table: Table = {}
    for name, values in columns.items():
        judged = values.isfinite() if out.valid is None else values.isfinite() & out.valid.to(values.device)
        table[name] = torch.where(judged, values, torch.nan).tolist()
    return table


def score_folder(
    folder: str | Path, rewards: Sequence[Reward], prompts: PromptSet | None = None, *, batch_size: int = 16
) -> Table:
    """Scores of the images of a folder, with the columns prompt, file, prompt_index and k in front.

    Args:
        prompts: Images are then named `<prompt's place>-<k>.png`, or are as many as the prompts, in the order of their
            names. Without it, prompts come from the folder's metadata.jsonl (file_name, prompt) or from a .txt beside
            every image; if there are neither, only rewards that need no prompt can score.

    Raises:
        InputError: No images, an unreadable image, or images that do not fit the prompts.
        RunError: A reward left more than 1 % of the images unjudged.
    """
    place = Path(folder)
    files = image_files(place)
    places = places_of(files, prompts)
    texts = texts_of(place, files) if prompts is None else [prompts.prompts[i] for i, _ in places]
    metadata = None if prompts is None else [prompts.metadata[i] for i, _ in places]
    table: Table = {
        "prompt": texts if texts is not None else [""] * len(files),
        "file": [f.name for f in files],
        "prompt_index": [i for i, _ in places],
        "k": [k for _, k in places],
    }
    with bar("scoring", len(files)) as shown:
        scores = score_images(counted(files, shown), texts, rewards, batch_size=batch_size, metadata=metadata)
    table |= scores
    for reward in rewards:
        check_valid(reward.name, table[reward.name], table["file"])
    return table


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name.

    Raises:
        InputError: There are none.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES) if folder.is_dir() else []
    if not files:
        raise InputError(f"images must be a folder with {', '.join(sorted(IMAGES))} files, got none in {str(folder)!r}")
    return files


def counted(files: Iterable[Path], shown: Any) -> Iterator[Float[Tensor, "3 _ _"]]:
    """The images of files, one by one, advancing a bar."""
    for file in files:
        yield read_image(file)
        shown.advance()


def read_image(file: Path) -> Float[Tensor, "3 h w"]:
    """RGB in [0, 1].

    Raises:
        InputError: It is not a readable image; the message names the file.
    """
    from diffalign.data.images import decode

    try:
        image = decode(file.read_bytes())
    except OSError as error:
        raise InputError(f"{str(file)!r} must be a readable image: {error}") from error
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def write_image(image: Float[Tensor, "3 h w"], file: Path) -> None:
    """An image in [0, 1] as PNG, which keeps all 8 bits."""
    file.write_bytes(png(image))


def png(image: Float[Tensor, "3 h w"]) -> bytes:
    """An image in [0, 1] as the bytes of a PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(out, "PNG")
    return out.getvalue()


def check_valid(reward: str, scores: Sequence[float], names: Sequence[str]) -> int:
    """Number of images that a reward could not judge.

    Raises:
        RunError: They are more than 1 %.
    """
    invalid = [name for name, score in zip(names, scores, strict=True) if np.isnan(score)]
    if len(invalid) > MOST_INVALID * len(scores):
        raise RunError(
            f"reward {reward!r} could not judge {len(invalid)} of {len(scores)} images, more than {MOST_INVALID:.0%}; "
            f"first: {', '.join(invalid[:3])}"
        )
    return len(invalid)


def check_table_file(file: str | Path) -> None:
    """Raises InputError for a file that `write_table` would not write."""
    if Path(file).suffix not in (".parquet", ".csv"):
        raise InputError(f"scores must be written to a .parquet or .csv file, got {str(file)!r}")


def write_table(table: Table, file: str | Path) -> None:
    """Writes a table as .parquet or .csv; NaN stays NaN in parquet and is an empty cell in csv.

    Raises:
        InputError: Another suffix.
    """
    check_table_file(file)
    place = Path(file)
    if place.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(table), place)
        return
    with place.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow(["" if isinstance(v, float) and np.isnan(v) else v for v in row])


def batches(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stacks of at most `size` neighbours of equal height and width."""
    for _, run in itertools.groupby(images, key=lambda image: image.shape):
        while chunk := list(itertools.islice(run, size)):
            yield torch.stack(chunk)


def places_of(
    files: list[Path], prompts: PromptSet | None, *, what: str = "images", suffix: str = ".png"
) -> list[tuple[int, int]]:
    """(place of the prompt, k) of each file; `what` they are called in a message."""
    numbered = [_NUMBERED.fullmatch(f.stem) for f in files]
    places = [(int(m[1]), int(m[2])) for m in numbered if m]
    if len(places) < len(files):
        places = [(i, 0) for i in range(len(files))]
        if prompts is not None and len(files) != len(prompts):
            raise InputError(
                f"{what} must be named <prompt's place>-<k>{suffix} or be as many as the {len(prompts)} prompts, "
                f"got {len(files)}"
            )
    if prompts is not None and max(i for i, _ in places) >= len(prompts):
        raise InputError(f"{what} must belong to one of {len(prompts)} prompts, got {files[-1].name}")
    return places


def texts_of(folder: Path, files: list[Path], *, one: str = "image") -> list[str] | None:
    """A prompt per file, from metadata.jsonl or from .txt files; None where there are neither."""
    listed = folder / "metadata.jsonl"
    if listed.is_file():
        try:
            rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
            known = {row["file_name"]: row["prompt"] for row in rows}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{listed} must hold objects with file_name and prompt, got {error}") from error
        missing = [f.name for f in files if f.name not in known]
        if missing:
            raise InputError(f"{listed} must name every {one}, got no row for {missing[0]!r}")
        return [known[f.name] for f in files]
    texts = [f.with_suffix(".txt") for f in files]
    if not any(t.is_file() for t in texts):
        return None
    lacking = [t.name for t in texts if not t.is_file()]
    if lacking:
        raise InputError(
            f"every {one} in {str(folder)!r} must have a .txt with its prompt, got none named {lacking[0]!r}"
        )
    return [t.read_text(encoding="utf-8").strip() for t in texts]
