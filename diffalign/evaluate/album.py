"""The pictures of a report: a fixed choice that nobody made, and the largest changes, which are a choice and say so."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.evaluate.comparison import matrix
from diffalign.evaluate.gallery import largest_change, unselected
from diffalign.evaluate.results import Comparison
from diffalign.evaluate.score import Table
from diffalign.evaluate.stats import per_prompt
from diffalign.evaluate.wording import signed

_INLINE_SIDES = {2: 384, 3: 320}
"""Larger images are shrunk to this side for the page, by the number of arms."""
_INLINE_SIDE = 256
"""The same with more arms than that."""
_PIXELATED_SIDE = 128
"""Images up to this side are shown enlarged, pixel by pixel."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image in the page."""

    arm: str
    uri: str
    width: int | None
    """Shown width of a small image, a whole multiple of its own; None lets the page decide."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A prompt with its image from each arm."""

    prompt: str
    k: int
    pictures: tuple[Picture, ...]
    scores: tuple[tuple[str, tuple[float, ...]], ...]
    """(reward, its score of each picture)."""
    label: str | None = None
    """Category of the prompt."""
    note: str | None = None
    """Why it is shown, where it was selected."""


@dataclass(frozen=True, kw_only=True)
class Album:
    """The images of an evaluation with their scores."""

    arms: tuple[str, ...]
    rewards: tuple[str, ...]
    table: Table
    folder: Path
    rows: dict[tuple[str, int, int], int]
    """Row of an image by arm, prompt and seed."""
    prompts: list[str]
    categories: Sequence[str] | None

    def unselected(self) -> list[Card]:
        """The first image of at most 48 prompts, by ascending sha256 of the prompt: 4 of each category."""
        return [self.card(place, self.arms) for place in unselected(self.prompts, self.categories)]

    def largest_changes(self, comparison: Comparison, reward: str) -> dict[str, list[Card]]:
        """The prompts that gained most, lost most and lie in the middle by a reward's mean change over seeds."""
        arms = (comparison.against, comparison.arm)
        gains = matrix(self.table, comparison.arm, reward) - matrix(self.table, comparison.against, reward)
        means, kept = per_prompt(gains)
        differences = np.full(len(gains), np.nan)
        differences[kept] = means
        found = largest_change(differences, self.prompts)
        seeds = f" over {gains.shape[1]} seeds" if gains.shape[1] > 1 else ""

        def shown(places: Sequence[int]) -> list[Card]:
            return [self.card(i, arms, f"{reward} {signed(float(differences[i]))}{seeds}") for i in places]

        return {
            "Largest gains": shown([i for i in found.best if differences[i] > 0]),
            "Largest losses": shown([i for i in found.worst if differences[i] < 0]),
            "In the middle": shown(found.median),
        }

    def card(self, place: int, arms: Sequence[str], note: str | None = None) -> Card:
        """The first image of a prompt from some arms."""
        rows = [self.rows[arm, place, 0] for arm in arms]
        side = _INLINE_SIDES.get(len(self.arms), _INLINE_SIDE)
        names = [self.table["file_name"][row] for row in rows]
        return Card(
            prompt=self.prompts[place],
            k=0,
            pictures=tuple(
                _picture(arm, self.folder / "images" / arm / name, side) for arm, name in zip(arms, names, strict=True)
            ),
            scores=tuple((name, tuple(self.table[name][row] for row in rows)) for name in self.rewards),
            label=None if self.categories is None else self.categories[place],
            note=note,
        )


def album(
    arms: Sequence[str], rewards: Sequence[str], table: Table, folder: Path, categories: Sequence[str] | None = None
) -> Album:
    """The album of an evaluation.

    Args:
        rewards: Whose scores a card shows.
        folder: Images are in `images/<arm>/`.
        categories: Of each prompt.
    """
    places = zip(table["arm"], table["prompt_index"], table["k"], strict=True)
    prompts = dict(zip(table["prompt_index"], table["prompt"], strict=True))
    return Album(
        arms=tuple(arms),
        rewards=tuple(rewards),
        table=table,
        folder=folder,
        rows={place: row for row, place in enumerate(places)},
        prompts=[prompts[i] for i in range(len(prompts))],
        categories=categories,
    )


def _picture(arm: str, file: Path, most: int) -> Picture:
    """An image inline: its own bytes if it is small, else shrunk to a side of `most`, as JPEG."""
    from PIL import Image

    data, kind = file.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        side = max(image.size)
        if side > most:
            image.thumbnail((most, most))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
            data, kind = buffer.getvalue(), "jpeg"
        width = image.width * max(1, _PIXELATED_SIDE // side) if side <= _PIXELATED_SIDE else None
    return Picture(arm=arm, uri=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width=width)
