"""The samples of a report: a fixed choice that nobody made, and the largest changes, which are a choice and say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.evaluate.comparison import matrix
from diffalign.evaluate.gallery import largest_change, unselected
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.results import Comparison, SetResult
from diffalign.evaluate.score import Table
from diffalign.evaluate.set_results import Outlier
from diffalign.evaluate.stats import per_prompt
from diffalign.evaluate.wording import signed


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One sample in the page."""

    arm: str
    uri: str
    width: int | None
    """Shown width of a small image, a whole multiple of its own; None lets the page decide."""
    sound: str | None = None
    """What a player plays."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A prompt with its sample from each arm."""

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
    """The samples of an evaluation with their scores."""

    arms: tuple[str, ...]
    rewards: tuple[str, ...]
    table: Table
    folder: Path
    rows: dict[tuple[str, int, int], int]
    """Row of an image by arm, prompt and seed."""
    prompts: list[str]
    categories: Sequence[str] | None
    medium: Medium = PICTURES

    def unselected(self) -> list[Card]:
        """The first sample of as many prompts as the medium shows, by ascending sha256: 4 of each category."""
        places = unselected(self.prompts, self.categories, most=self.medium.prompts_shown)
        return [self.card(place, self.arms) for place in places]

    def largest_changes(self, comparison: Comparison, reward: str) -> dict[str, list[Card]]:
        """The prompts that gained most, lost most and lie in the middle by a reward's mean change over seeds."""
        arms = (comparison.against, comparison.arm)
        gains = matrix(self.table, comparison.arm, reward) - matrix(self.table, comparison.against, reward)
        means, kept = per_prompt(gains)
        differences = np.full(len(gains), np.nan)
        differences[kept] = means
        found = largest_change(differences, self.prompts, count=self.medium.changes_shown)
        seeds = f" over {gains.shape[1]} seeds" if gains.shape[1] > 1 else ""

        def shown(places: Sequence[int]) -> list[Card]:
            return [self.card(i, arms, f"{reward} {signed(float(differences[i]))}{seeds}") for i in places]

        return {
            "Largest gains": shown([i for i in found.best if differences[i] > 0]),
            "Largest losses": shown([i for i in found.worst if differences[i] < 0]),
            "In the middle": shown(found.median),
        }

    def outliers(self, found: SetResult) -> dict[str, list[Card]]:
        """The samples of an arm that help and that hurt its number by a reward of whole sets."""

        def shown(chosen: Sequence[Outlier]) -> list[Card]:
            return [self.card(o.prompt_index, [found.arm], f"credit {signed(o.credit)}", k=o.k) for o in chosen]

        return {"Help most": shown(found.best), "Hurt most": shown(found.worst)}

    def card(self, place: int, arms: Sequence[str], note: str | None = None, *, k: int = 0) -> Card:
        """A prompt's sample of one seed number from some arms."""
        rows = [self.rows[arm, place, k] for arm in arms]
        names = [self.table["file_name"][row] for row in rows]
        return Card(
            prompt=self.prompts[place],
            k=k,
            pictures=tuple(self._picture(arm, name) for arm, name in zip(arms, names, strict=True)),
            scores=tuple((name, tuple(self.table[name][row] for row in rows)) for name in self.rewards),
            label=None if self.categories is None else self.categories[place],
            note=note,
        )

    def _picture(self, arm: str, name: str) -> Picture:
        found = self.medium.shown(self.folder / self.medium.folder / arm / name, len(self.arms))
        return Picture(arm=arm, uri=found.uri, width=found.width, sound=found.sound)


def album(
    arms: Sequence[str],
    rewards: Sequence[str],
    table: Table,
    folder: Path,
    categories: Sequence[str] | None = None,
    medium: Medium = PICTURES,
) -> Album:
    """The album of an evaluation.

    Args:
        rewards: Whose scores a card shows.
        folder: Samples are in `<medium's folder>/<arm>/`.
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
        medium=medium,
    )
