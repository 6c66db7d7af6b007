"""Labels of people on the images of a round: JSONL, a line for every image and annotator, larger is better.

    {"id": "12-0", "label": 1, "annotator": "ann"}

Which numbers are used is up to the annotators. Or, as D3PO has them, a line for every prompt and annotator with a label
for each of the prompt's images in their order: {"prompt_id": "12", "labels": [1, 0, 0, 1, 0, 0, 0]}. `annotator` may be
left out where there is but one. A label of null is none, so that a file to fill in can be written beforehand.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.checkpoint import write_atomic
from diffalign.errors import InputError, near_match

_KEYS = ("id", "label", "prompt_id", "labels", "annotator")
_LARGEST = 1e30
"""Labels end up as float32."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What people said of the images of a round."""

    mean: dict[str, float]
    """Over annotators, by image, in the order of the round. Equal labels have equal means, in whatever order."""
    unlabelled: int
    """Images that nobody labelled; they are not in `mean`."""
    annotators: int


def read_labels(file: Path, ids: Sequence[str], folder: Path, *, partial: bool = False, suffix: str = ".png") -> Labels:
    """Means of the labels in a file.

    Args:
        ids: Of all images of the round, `<prompt_id>-<number>`, those of a prompt in the order that they were shown in.
        folder: Where the images lie, as `<id><suffix>`.
        partial: Images without a label are left out and counted; False takes them for an error.
        suffix: Of the images, or of the clips.

    Raises:
        InputError: No such file, not one label in it, a line that is not JSON or has other keys, an image that is not
            of the round or not on disk, a label that is not a number, a second one by the same annotator, too many or
            too few labels of a prompt, or images without a label.

    Paper: Yang et al. (D3PO), arXiv 2311.13231; yk7333/d3po, whose script for people prefers the larger mean too.
    Departs: images and prompts are named, where theirs are known by their places in the file.
    """
    given: dict[str, dict[str, _Given]] = {image: {} for image in ids}
    prompts: dict[str, list[str]] = {}
    for image in ids:
        prompts.setdefault(image.rpartition("-")[0], []).append(image)
    for line, row in _rows(file):
        where = f"{file}, line {line}"
        annotator = _annotator(row, where)
        for image, value in _entries(row, prompts, given, where):
            if value is not None:
                _check_new(given[image].get(annotator), image, annotator, where)
                _check_image(image, folder / f"{image}{suffix}", where)
                given[image][annotator] = _Given(line, _number(value, image, where))
    mean = {image: _mean([g.label for g in by.values()]) for image, by in given.items() if by}
    _check_whole(file, ids, mean, partial)
    names = {annotator for by in given.values() for annotator in by}
    return Labels(mean=mean, unlabelled=len(given) - len(mean), annotators=len(names))


def write_template(file: Path, ids: Sequence[str]) -> None:
    """A label file to fill in: every image, with null where its label belongs.

    Raises:
        InputError: There is a file; it may hold labels.
    """
    if file.exists():
        raise InputError(f"{file} must not be there yet, got a file; move it, its labels would be lost")
    write_atomic(file, "".join(json.dumps({"id": image, "label": None}) + "\n" for image in ids))


@dataclass(frozen=True)
class _Given:
    """A label and its line."""

    line: int
    label: float


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines by number, blank ones left out."""
    if not file.is_file():
        raise InputError(f"labels must be a file, got {str(file)!r}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"labels must be UTF-8, got {str(file)!r}: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number} must be valid JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number} must be an object, got {row!r}")
        yield number, row


def _entries(
    row: dict[str, Any], prompts: Mapping[str, list[str]], known: Collection[str], where: str
) -> list[tuple[str, Any]]:
    """(image, label) of a line; a null is a label that was not given."""
    keys = set(row) - {"annotator"}
    if keys == {"id", "label"}:
        return [(_known("id", row["id"], known, "an image", where), row["label"])]
    if keys == {"prompt_id", "labels"}:
        prompt = _known("prompt_id", row["prompt_id"], prompts, "a prompt", where)
        images, labels = prompts[prompt], row["labels"]
        if not isinstance(labels, list) or len(labels) != len(images):
            got = f"{len(labels)}" if isinstance(labels, list) else repr(labels)
            raise InputError(f"{where}: labels must be a list of {len(images)}, one for each image, got {got}")
        return list(zip(images, labels, strict=True))
    odd = next((key for key in row if key not in _KEYS), None)
    hint = "" if odd is None else _near(odd, _KEYS)
    found = ", ".join(row) or "none"
    raise InputError(f"{where} must have the keys id and label, or prompt_id and labels, got {found}{hint}")


def _known(key: str, value: Any, choices: Collection[str], what: str, where: str) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise InputError(f"{where}: {key} must be {what} of this round, got {value!r}{_near(str(value), choices)}")


def _near(name: str, choices: Collection[str]) -> str:
    """A near match only: the list of all images would be long."""
    hint = near_match(name, choices)
    return hint if "did you mean" in hint else ""


def _annotator(row: dict[str, Any], where: str) -> str:
    """A name, or none."""
    name = row.get("annotator")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise InputError(f"{where}: annotator must be a name, got {name!r}; leave it out where there is but one")
    return name or ""


def _number(value: Any, image: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise InputError(f"{where}: label of {image!r} must be a number, got {value!r}")
    return float(value)


def _check_new(earlier: _Given | None, image: str, annotator: str, where: str) -> None:
    if earlier is not None:
        by = f"by {annotator!r}" if annotator else "without an annotator"
        hint = "" if annotator else "; name the annotators where there are several"
        raise InputError(
            f"{where}: {image!r} must have one label of each annotator, got a second {by} after line {earlier.line}"
            f"{hint}"
        )


def _check_image(image: str, file: Path, where: str) -> None:
    if not file.is_file():
        raise InputError(f"{where}: image {image!r} must be on disk, got no file {str(file)!r}")


def _check_whole(file: Path, ids: Sequence[str], mean: dict[str, float], partial: bool) -> None:
    if not mean:
        raise InputError(f"labels must hold at least one label, got none in {str(file)!r}")
    missing = [image for image in ids if image not in mean]
    if missing and not partial:
        some = ", ".join(repr(image) for image in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"labels in {str(file)!r} must be of all {len(ids)} images, got none for {len(missing)} ({some}); label "
            "them, or allow partial labels"
        )


def _mean(labels: Sequence[float]) -> float:
    return math.fsum(labels) / len(labels)
