"""Published prompt sets by name, each checked to be what was published.

A name alone takes the set's file from the folder that the environment variable DIFFALIGN_PROMPTS names, or else from
the Hub; `name:PATH` takes a local file or folder. A set whose bytes are known is refused if one of them has changed,
since numbers on other prompts do not compare.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.data.prompts import PromptSet, read_file
from diffalign.errors import InputError, near_match

FOLDER = "DIFFALIGN_PROMPTS"
"""Environment variable with the folder of local copies."""

PARTIPROMPTS_SHA256 = "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb"
"""Of the file PartiPrompts.tsv in google-research/parti, and of its copy on the Hub."""

AUDIOCAPS, MUSICCAPS = 975, 5521
"""Clips of the test split; captions."""

STYLES = ("anime", "concept-art", "paintings", "photo")
_PICKAPIC = {"v1": "yuvalkirstain/pickapic_v1_no_images", "v2": "yuvalkirstain/pickapic_v2_no_images"}
_PICKAPIC_SPLITS = ("test_unique", "validation_unique", "test", "validation")


@dataclass(frozen=True, kw_only=True)
class Published:
    """How one set is found and read."""

    about: str
    """What it is, in a few words."""
    file: str
    """Name of its file or folder in the folder of local copies."""
    fetch: Callable[[], Path] | None
    """From the Hub; None where no copy there is known."""
    read: Callable[[Path], PromptSet]


def read_set(spec: str) -> PromptSet:
    """A published set: "partiprompts", "partiprompts:/data/PartiPrompts.tsv", "pickapic:v1/validation_unique".

    Raises:
        InputError: No such file, a set that has changed, or one that must be given as a file.
    """
    name, _, rest = spec.partition(":")
    if name == "pickapic":
        return _pickapic(rest or "v2/test_unique")
    known = SETS[name]
    found = known.read(_place(name, known, rest))
    return replace(found, name=name)


def hub_file(repository: str, name: str) -> Path:
    """A file of a data set repository on the Hub, downloaded once."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except OSError as error:
        raise _unreachable(repository, name, error) from error


def hub_column(repository: str, split: str, column: str) -> list[str]:
    """One text column of a split of a data set on the Hub."""
    from datasets import load_dataset

    try:
        return list(load_dataset(repository, split=split)[column])
    except (OSError, ValueError) as error:
        raise _unreachable(repository, split, error) from error


def _unreachable(repository: str, name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"prompts must be within reach, got no {name!r} of {repository!r} from the Hub: {reason}; name a local copy "
        f"after a colon, or its folder in {FOLDER}"
    )


def _place(name: str, known: Published, rest: str) -> Path:
    """Where a set's file or folder lies."""
    local = Path(rest) if rest else Path(os.environ.get(FOLDER, "")) / known.file
    if rest and not local.exists():
        raise InputError(f"prompts must be {known.about}, got {rest!r}, which does not exist")
    if rest or (os.environ.get(FOLDER) and local.exists()):
        return local
    if known.fetch is None:
        raise InputError(
            f"prompts must name a local copy of {known.about}, as {name}:PATH or in the folder {FOLDER} as "
            f"{known.file}; got {name!r} alone"
        )
    return known.fetch()


def _partiprompts(file: Path) -> PromptSet:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != PARTIPROMPTS_SHA256:
        raise InputError(
            f"partiprompts must be the published file with sha256 {PARTIPROMPTS_SHA256}, got sha256 {digest} in "
            f"{str(file)!r}; give a changed file by its path alone, without the name"
        )
    return read_file(file)


def _hpdv2(folder: Path) -> PromptSet:
    """Four styles of 800 prompts, by (style, row): 3,200 rows, of which 3,172 are distinct."""
    prompts: list[str] = []
    metadata: list[dict[str, Any]] = []
    for style in STYLES:
        file = folder / f"{style}.json"
        if not file.is_file():
            raise InputError(
                f"hpdv2 must be a folder with {', '.join(f'{s}.json' for s in STYLES)}, got none {style!r}"
            )
        found = read_file(file).prompts
        if len(found) != 800:
            raise InputError(f"hpdv2 must have 800 prompts of each style, got {len(found)} in {str(file)!r}")
        prompts += found
        metadata += [{"style": style, "row": row} for row in range(len(found))]
    return PromptSet(name="hpdv2", prompts=prompts, metadata=metadata, indexed=True)


def _fetch_hpdv2() -> Path:
    files = [hub_file("zhwang/HPDv2", f"benchmark/{style}.json") for style in STYLES]
    return files[0].parent


def _pickapic(rest: str) -> PromptSet:
    """Captions of a version and split, each once; papers disagree on the split, so the name says it."""
    version, _, split = rest.partition("/")
    split = split or "test_unique"
    if version not in _PICKAPIC or split not in _PICKAPIC_SPLITS:
        near = near_match(split, _PICKAPIC_SPLITS) if version in _PICKAPIC else ""
        raise InputError(
            f"pickapic must be named with version and split, such as pickapic:v2/test_unique, got {rest!r}{near}"
        )
    prompts = list(dict.fromkeys(hub_column(_PICKAPIC[version], split, "caption")))
    return PromptSet(name=f"pickapic {version} {split}", prompts=prompts, metadata=[{} for _ in prompts])


def _drawbench(file: Path) -> PromptSet:
    """200 distinct prompts; copies that repeat them for several seeds are read as the distinct ones."""
    found = read_file(file)
    rows = list({prompt: row for row, prompt in reversed(list(enumerate(found.prompts)))}.values())
    if len(rows) != 200:
        raise InputError(f"drawbench must have 200 distinct prompts, got {len(rows)} in {str(file)!r}")
    return found.rows(sorted(rows))


def _geneval(file: Path) -> PromptSet:
    """Rows with tag (the task), include and exclude, as GenEval's evaluation_metadata.jsonl has them."""
    found = read_file(file)
    for number, row in enumerate(found.metadata, 1):
        if not isinstance(row.get("tag"), str) or not isinstance(row.get("include"), list):
            raise InputError(
                f"geneval must have tag and include in every row, got row {number} without, in {str(file)!r}"
            )
    return replace(found, indexed=True)


def _audiocaps(file: Path) -> PromptSet:
    """The test split: of each clip the caption of least audiocap_id, in the order of the file's clips."""
    found = _with_columns(file, "audiocaps", ("audiocap_id", "youtube_id", "start_time"))
    first: dict[tuple[str, str], int] = {}
    for row, about in enumerate(found.metadata):
        clip = (about["youtube_id"], about["start_time"])
        if clip not in first or _number(about, file) < _number(found.metadata[first[clip]], file):
            first[clip] = row
    if len(first) != AUDIOCAPS:
        raise InputError(
            f"audiocaps must be the test split with captions of {AUDIOCAPS} clips, got {len(first)} in {str(file)!r}; "
            "give another split by its path alone, without the name"
        )
    return replace(found.rows(list(first.values())), indexed=True)


def _musiccaps(file: Path) -> PromptSet:
    """All captions, with their AudioSet labels and the two subsets in the metadata."""
    found = _with_columns(file, "musiccaps", ("ytid", "start_s", "aspect_list"))
    if len(found) != MUSICCAPS:
        raise InputError(f"musiccaps must have {MUSICCAPS} captions, got {len(found)} in {str(file)!r}")
    return replace(found, indexed=True)


def _song_describer(file: Path) -> PromptSet:
    """The captions of the file: all of them, or those without singing where it is the file of these."""
    return replace(_with_columns(file, "songdescriber", ("caption_id", "track_id", "is_valid_subset")), indexed=True)


def _with_columns(file: Path, name: str, columns: tuple[str, ...]) -> PromptSet:
    """A table of captions that has the published columns."""
    found = read_file(file)
    missing = [column for column in columns if column not in found.metadata[0]]
    if missing:
        raise InputError(f"{name} must have the columns {', '.join(columns)}, got {str(file)!r} without {missing[0]!r}")
    return found


def _number(about: dict[str, Any], file: Path) -> int:
    if not str(about["audiocap_id"]).isdigit():
        raise InputError(f"audiocaps must have numbers as audiocap_id, got {about['audiocap_id']!r} in {str(file)!r}")
    return int(about["audiocap_id"])


SETS: dict[str, Published] = {
    "audiocaps": Published(
        about="AudioCaps' test.csv, one caption of each clip", file="audiocaps.csv", fetch=None, read=_audiocaps
    ),
    "drawbench": Published(about="DrawBench's 200 prompts", file="drawbench.txt", fetch=None, read=_drawbench),
    "geneval": Published(
        about="GenEval's evaluation_metadata.jsonl", file="evaluation_metadata.jsonl", fetch=None, read=_geneval
    ),
    "hpdv2": Published(
        about="the folder of HPDv2's four benchmark files", file="hpdv2", fetch=_fetch_hpdv2, read=_hpdv2
    ),
    "musiccaps": Published(
        about="MusicCaps' musiccaps-public.csv", file="musiccaps-public.csv", fetch=None, read=_musiccaps
    ),
    "partiprompts": Published(
        about="PartiPrompts.tsv",
        file="PartiPrompts.tsv",
        fetch=lambda: hub_file("nateraw/parti-prompts", "PartiPrompts.tsv"),
        read=_partiprompts,
    ),
    "pickapic": Published(
        about="Pick-a-Pic's captions by version and split", file="", fetch=None, read=lambda file: read_file(file)
    ),
    "songdescriber": Published(
        about="Song Describer's song_describer.csv", file="song_describer.csv", fetch=None, read=_song_describer
    ),
}
"""Sets by name; Pick-a-Pic's is read by version and split."""
