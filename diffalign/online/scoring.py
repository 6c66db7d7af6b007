"""Judges of a round: batches are scored in a thread of their own while the next ones are sampled."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import rewards
from diffalign.errors import InputError, RunError
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.media import check_takes as check_takes
from diffalign.evaluate.score import check_valid, columns_of
from diffalign.online.settings import OnlineSettings
from diffalign.online.store import Entry, Store
from diffalign.types import Embedded, Reward, SetReward

PEOPLE = "people"
"""Under which name the means of people's labels stand among the scores."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Everything that says what an image is worth, where it is not people."""

    pointwise: tuple[Reward, ...]
    weights: Mapping[str, float]
    """By reward."""
    of_sets: SetReward | None = None
    medium: Medium = PICTURES

    def to(self, device: torch.device | str) -> None:
        """Moves what holds a network."""
        for reward in self.pointwise:
            rewards.move(reward, device)
        if isinstance(self.of_sets, rewards.OnDevice):
            self.of_sets.to(device)

    def judge(
        self, images: Float[Tensor, " b *rest"], entries: Sequence[Entry]
    ) -> tuple[dict[str, list[float]], Embedded | None]:
        """(scores by reward, the images or clips in the space of the set reward)."""
        asked = self.medium.asked(
            self.medium.stored(images), [e.prompt for e in entries], [dict(e.metadata) for e in entries]
        )
        scores = {}
        for reward in self.pointwise:
            found = columns_of(reward, asked)[reward.name]
            if len(found) != len(entries):
                raise RunError(f"reward {reward.name!r} must give {len(entries)} scores, got {len(found)}")
            scores[reward.name] = found
        return scores, None if self.of_sets is None else self.of_sets.embed(asked)


def load_judges(settings: OnlineSettings, medium: Medium = PICTURES) -> Judges:
    """The rewards of a config, which judge what the model makes.

    Raises:
        InputError: An unknown reward, two of one name, one of other media, or a set reward without the reference that
            it needs.
    """
    pointwise = tuple(rewards.load(spec) for spec in settings.rewards)
    names = [reward.name for reward in pointwise]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"online.rewards must have names of their own, got {twice[0]!r} twice")
    for reward in pointwise:
        check_takes(reward, "online.rewards", medium)
    weights = dict(zip(names, settings.weights or (1.0,) * len(names), strict=True))
    return Judges(pointwise=pointwise, weights=weights, of_sets=_set_reward(settings, medium), medium=medium)


def _set_reward(settings: OnlineSettings, medium: Medium) -> SetReward | None:
    if settings.set_reward is None:
        return None
    found = rewards.load_set(settings.set_reward)
    check_takes(found, "online.set_reward", medium)
    if settings.set_reference is None:
        if found.needs_reference:
            raise InputError(
                f"online.set_reference must be there with set reward {found.name!r}, which compares with a reference; "
                f"name a folder of {medium.folder}, or statistics that `diffalign reference` wrote"
            )
        return found
    place = Path(settings.set_reference)
    if place.suffix == ".safetensors":
        found.load_reference(place)
    elif place.is_dir():
        found.fit_reference(medium.exemplars(place))
    else:
        raise InputError(
            f"online.set_reference must be a folder of {medium.folder} or a .safetensors file, got "
            f"{settings.set_reference!r}"
        )
    return found


class Scoring:
    """A context in which batches are scored one after the other beside the caller's own work."""

    def __init__(self, judges: Judges | None, store: Store, done: Callable[[int], None]) -> None:
        """`done` is called with the number of images of each batch that has its scores; no judges, no scores."""
        self.judges = judges
        self.store = store
        self.done = done
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
        self.waiting: list[Future[None]] = []

    def submit(self, part: int, images: Float[Tensor, " b *rest"]) -> None:
        """Scores a batch when those before it are scored; raises what one of them raised."""
        if self.judges is None:
            self.done(len(images))
            return
        while self.waiting and (self.waiting[0].done() or len(self.waiting) > 2):
            self.waiting.pop(0).result()
        self.waiting.append(self.pool.submit(self._score, self.judges, part, images))

    def _score(self, judges: Judges, part: int, images: Float[Tensor, " b *rest"]) -> None:
        entries = [self.store.entries[row] for row in self.store.rows(part)]
        scores, embedded = judges.judge(images, entries)
        self.store.write_scores(part, scores, embedded)
        self.done(len(entries))

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for one in self.waiting:
                    one.result()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)


def images_of(store: Store, part: int) -> Float[Tensor, " b *rest"]:
    """A batch's images or clips as they lie on disk."""
    return torch.stack([store.medium.read(store.file(row)) for row in store.rows(part)])


def check_scores(scores: Mapping[str, Float[Tensor, " n"]], store: Store, number: int) -> None:
    """Raises RunError where a reward left more than 1 % of a round unjudged, or gave every image the same score."""
    names = [entry.id for entry in store.entries]
    for reward, values in scores.items():
        check_valid(reward, values.tolist(), names)
        judged = values[values.isfinite()]
        if len(judged) > 1 and bool((judged == judged[0]).all()):
            raise RunError(
                f"reward {reward!r} must tell {store.medium.folder} apart, got {float(judged[0]):g} for all "
                f"{len(judged)} of round {number}; look at them in {store.media}"
            )
