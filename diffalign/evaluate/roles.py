"""What training saw of the rewards: read from the configs of the runs that an evaluation compares, and data cards."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign import rewards
from diffalign.data.cards import read_card
from diffalign.evaluate.arms import Arm, run_folder
from diffalign.evaluate.comparison import Judge
from diffalign.evaluate.results import Role
from diffalign.methods import METHODS
from diffalign.types import Reward

_PUBLISHED = {
    "yuvalkirstain/pickapic": ("pickscore", "PickScore learned from Pick-a-Pic's labels"),
    "ymhao/HPDv2": ("hpsv2", "HPSv2 learned from HPDv2's labels"),
}
"""By the start of a data set's id on the Hub: the reward that was made of its labels."""

_WORST: tuple[Role, ...] = ("trained_on", "labeller", "held_out")
"""The role that says least for a gain first: it is the one that counts."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one run's training saw of one reward."""

    spec: str
    role: Role
    reason: str


@dataclass(frozen=True, kw_only=True)
class History:
    """What is known of one run's training."""

    run: str
    seen: tuple[Seen, ...]
    complete: bool
    """Whether all its data say by whose judgement they are labelled."""


def assign(
    judges: Sequence[Judge],
    loaded: Sequence[Reward],
    declared: Mapping[str, str],
    arms: Sequence[Arm],
) -> list[Judge]:
    """The judges of a comparison of `arms`, with the role that its runs give them; what is declared wins."""
    histories = [history for arm in arms if arm.run is not None for history in read_runs(arm.run)]
    found = []
    for judge, reward in zip(judges, loaded, strict=True):
        if judge.name in declared:
            found.append(replace(judge, role_reason="declared"))
            continue
        seen = [s for history in histories for s in history.seen if _is(s.spec, judge.spec, reward)]
        if seen:
            chosen = min(seen, key=lambda s: _WORST.index(s.role))
            found.append(replace(judge, role=chosen.role, role_declared=True, role_reason=chosen.reason))
        elif histories and all(history.complete for history in histories):
            runs = ", ".join(dict.fromkeys(history.run for history in histories))
            reason = f"named neither by the config of {runs} nor by the cards of its data"
            found.append(replace(judge, role="held_out", role_declared=True, role_reason=reason))
        else:
            found.append(replace(judge, role="held_out", role_declared=False, role_reason="nobody declared it"))
    return found


def optimised(spec: str, arms: Sequence[Arm]) -> bool:
    """Whether a run of `arms` was trained on a reward of sets, or through its encoder."""
    histories = [history for arm in arms if arm.run is not None for history in read_runs(arm.run)]
    trained = {seen.spec for history in histories for seen in history.seen if seen.role == "trained_on"}
    return bool({spec, encoder_of(spec)} & trained)


def read_runs(run: Path) -> list[History]:
    """Histories of a run and of the runs that it started from."""
    histories: list[History] = []
    todo, known = [run], set()
    while todo:
        folder = todo.pop()
        if folder.resolve() in known:
            continue
        known.add(folder.resolve())
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        histories.append(_history(folder, table))
        starts = [Path(place) for name in ("denoiser", "lora") if (place := table.get("model", {}).get(name))]
        todo += [p for start in starts for p in (start, *start.parents[:2]) if run_folder(str(p)) is not None][:1]
    return histories


def _history(folder: Path, table: Mapping[str, Any]) -> History:
    data = str(table.get("data", {}).get("path", ""))
    method = str(table.get("method", {}).get("name", ""))
    card, seen = read_card(data), []
    if "labels" in card:
        reason = f"its judgement labelled {data}, on which {folder} was trained"
        seen.append(Seen(spec=card["labels"], role="labeller", reason=reason))
    for start, (spec, why) in _PUBLISHED.items():
        if data.startswith(start) or ("labels" not in card and card.get("source", "").startswith(start)):
            seen.append(Seen(spec=spec, role="labeller", reason=f"{why}, on which {folder} was trained"))
    own = table.get("online", {})
    for spec in [*own.get("rewards", ()), *([own["set_reward"]] if "set_reward" in own else [])]:
        seen.append(Seen(spec=spec, role="trained_on", reason=f"{folder} was trained on its scores"))
        if encoder := encoder_of(spec):
            reason = f"{folder} was trained on {spec}, which sees or hears through its encoder"
            seen.append(Seen(spec=encoder, role="trained_on", reason=reason))
    complete = bool(seen)
    if _takes_scores(table):
        if "scores" in card:
            reason = f"method {method} of {folder} learned from its scores in {data}"
            seen.append(Seen(spec=card["scores"], role="trained_on", reason=reason))
        complete = complete and "scores" in card
    return History(run=str(folder), seen=tuple(seen), complete=complete)


def encoder_of(spec: str) -> str | None:
    """The encoder of a reward of sets, also where it judges single samples: "clap" of "fad:clap"; None of others."""
    words = spec.partition("@")[0].split(":")
    rest = words[1:] if words[0] == "per_sample" else words
    return ":".join(rest[1:]) or None if rest[:1] and rest[0] in rewards.names(rewards.SET_GROUP) else None


def _takes_scores(table: Mapping[str, Any]) -> bool:
    """Whether the run's method looked at score columns; one that is not ours may have."""
    options = table.get("method", {})
    method = METHODS.get(options.get("name", ""))
    return method is None or "scores" in options or bool(method().needs.scores)


def _is(seen: str, asked: str, reward: Reward) -> bool:
    """Whether a spec in a card is this reward: by its words, or by what it loads to."""
    if seen == asked or seen == reward.name:
        return True
    if seen.partition(":")[0] != reward.name:
        return False
    other = rewards.load(seen)
    return (other.name, other.version) == (reward.name, reward.version)
