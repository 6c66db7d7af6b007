"""A guard's images on disk: `<prompt's place>-<seed number>.png` and scores.json, by reward in the order of the places.

Batches are written beside, by whichever process made them, and the folder is put in place when all are there.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.evaluate.findings import Paired, by_prompt
from diffalign.evaluate.generate import Generated
from diffalign.evaluate.lazy import PairedImages, paired_files
from diffalign.evaluate.score import check_valid, write_image

SCORES = "scores.json"

Place = tuple[int, int]
"""(prompt's place, number of its seed)."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of one look."""

    folder: Path
    places: Sequence[Place]
    batch_size: int

    @property
    def parts(self) -> range:
        """Numbers of the batches, which are the same whatever the number of processes."""
        return range(-(-len(self.places) // self.batch_size))

    @property
    def whole(self) -> bool:
        """Whether all are there, with their scores."""
        return (self.folder / SCORES).is_file()

    def of(self, part: int) -> Sequence[Place]:
        """The places of a batch."""
        return self.places[part * self.batch_size : (part + 1) * self.batch_size]

    def begin(self) -> None:
        """Makes room beside, and removes what a killed look left there."""
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(parents=True)

    def write(self, part: int, made: Sequence[Generated], scores: Mapping[str, Sequence[float]]) -> None:
        """A batch with its scores, NaN for what a reward could not judge."""
        for one in made:
            write_image(one.image, self._fresh / _name((one.prompt_index, one.k)))
        table = {name: [None if math.isnan(v) else v for v in values] for name, values in scores.items()}
        (self._fresh / f"part-{part:05d}.json").write_text(json.dumps(table))

    def finish(self) -> None:
        """Joins the scores and puts the folder in its place.

        Raises:
            RunError: A reward left more than 1 % of the images unjudged.
        """
        joined: dict[str, list[float | None]] = {}
        for part in self.parts:
            file = self._fresh / f"part-{part:05d}.json"
            for name, values in json.loads(file.read_text()).items():
                joined.setdefault(name, []).extend(values)
            file.unlink()
        for name, values in joined.items():
            check_valid(name, [math.nan if v is None else v for v in values], [_name(place) for place in self.places])
        (self._fresh / SCORES).write_text(json.dumps(joined))
        shutil.rmtree(self.folder, ignore_errors=True)
        self._fresh.rename(self.folder)

    def scores(self) -> dict[str, list[float]]:
        """Scores by reward, in the order of the places."""
        table = json.loads((self.folder / SCORES).read_text())
        return {name: [math.nan if v is None else v for v in values] for name, values in table.items()}

    def files(self) -> dict[Place, Path]:
        return {place: self.folder / _name(place) for place in self.places}

    @property
    def _fresh(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.tmp")


def paired_images(now: Images, start: Images) -> PairedImages:
    """The images of a look beside those of the start."""
    return paired_files(now.files(), start.files())


def paired_scores(now: Images, start: Images) -> dict[str, Paired]:
    """The scores of both by reward, by prompt and seed."""
    prompts, seeds = zip(*now.places, strict=True)
    before = start.scores()
    return {
        name: by_prompt(np.array(values), np.array(before[name]), prompts, seeds)
        for name, values in now.scores().items()
    }


def drop_others(root: Path, keep: Sequence[Path]) -> None:
    """Removes the folders of looks that are none of `keep`."""
    for place in root.glob("step-*"):
        if place not in keep:
            shutil.rmtree(place)


def _name(place: Place) -> str:
    return f"{place[0]:05d}-{place[1]}.png"
