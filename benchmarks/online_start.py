"""What the base model makes of the captions of a run's rounds, sampled as the run samples: where its line starts.

Rounds have different captions, some harder than others. A line of what the policy makes minus what the base model makes
of the same captions starts at zero and says what training did.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import online_measures, online_runs
from benchmarks.method_runs import digest, read
from benchmarks.online_runs import OnlineCell
from diffalign import rewards
from diffalign.assemble import Parts, assemble
from diffalign.checkpoint import write_atomic
from diffalign.data.orders import Order
from diffalign.progress import bar
from diffalign.sampling.rollout import initial_noise, rollout
from diffalign.settings import TrainConfig
from diffalign.types import RewardBatch

PER_CAPTION = 4
"""Images of each training caption."""
BATCH = 64
JUDGES = {**online_measures.ROUND_JUDGES, "jpeg": "jpeg"}

NAMES = tuple(f"start_{name}" for name in JUDGES)
"""What `with_start` adds to a round."""

Scores = dict[str, list[float]]
"""By judge, the mean score of each training caption's images, captions in their order."""


def sampling(cell: OnlineCell) -> dict[str, Any]:
    """What the scores depend on; rows that sample alike share them."""
    cfg = cell.settings()
    assert cfg.online is not None, "a run on own images"
    assert cfg.online.guidance == 1, "rows sample without guidance"
    on_moves = cfg.method.needs.items in ("transitions", "transition_pairs")
    asked = {key: cell.without_folders()["online"].get(key) for key in ("kernel", "steps", "table", "window")}
    return {
        "model": cell.model,
        "data": cfg.data.path,
        "with_noise": on_moves,
        **asked,
        "images": PER_CAPTION,
        "judges": JUDGES,
    }


def file_of(cell: OnlineCell) -> Path:
    """Where the scores are kept, beside the model's cells."""
    return cell.file.parent / f"start-{digest(sampling(cell))}.json"


def start(cell: OnlineCell) -> Scores:
    """The base model's scores of training captions, made where they are not there yet."""
    file = file_of(cell)
    known = read(file)
    if known is None:
        with tempfile.TemporaryDirectory() as folder:
            scores = measure(online_runs.placed(cell.settings(), Path(folder) / "run"))
        known = {"sampling": sampling(cell), "scores": scores}
        write_atomic(file, json.dumps(known) + "\n")
    return known["scores"]


def measure(cfg: TrainConfig, per_caption: int = PER_CAPTION) -> Scores:
    """Samples every caption with the model as a run begins, and lets the judges look."""
    parts = assemble(replace(cfg, online=replace(cfg.online, rewards=("jpeg",), set_reward=None, set_reference=None)))
    assert parts.online is not None, "a run on own images"
    captions = parts.online.prompts.prompts
    cond = parts.online.encoders.prompts(captions)
    rows = torch.arange(len(captions)).repeat_interleave(per_caption)
    judges = {name: rewards.load(spec) for name, spec in JUDGES.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in judges}
    with bar(f"training captions by {cfg.model.path}", len(rows)) as shown:
        for number, part in enumerate(rows.split(BATCH)):
            images = _images(parts, cond.rows(part), seeds=(BATCH * number + torch.arange(len(part))).tolist())
            batch = RewardBatch(images=images, prompts=[captions[row] for row in part.tolist()])
            for name, judge in judges.items():
                found[name].append(judge.score(batch).scores)
            shown.advance(len(part))
    means = {name: torch.cat(scores).view(-1, per_caption).mean(1) for name, scores in found.items()}
    return {name: [round(value, 5) for value in scores.tolist()] for name, scores in means.items()}


def _images(parts: Parts, cond: Any, *, seeds: list[int]) -> torch.Tensor:
    """One batch on its way, with noise on a window that is drawn anew where the run has windows."""
    online = parts.online
    assert online is not None, "a run on own images"
    with torch.no_grad():
        walked = rollout(
            parts.policy,
            online.walk.kernel,
            online.walk.schedule,
            cond,
            seeds,
            x_init=initial_noise(seeds, online.shape),
            window=online.window(parts.cfg.seed, seeds[0]),
        )
    return online.encoders.decode(walked.x_0, online.scale)


def with_start(cell: OnlineCell, curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of a finished cell, each with the base model's means of its captions as `start_<judge>`."""
    cfg, scores = cell.settings(), start(cell)
    assert cfg.online is not None, "a run on own images"
    return [
        {**one, **_named(of_round(scores, number=one["round"], prompts=cfg.online.prompts, seed=cfg.seed))}
        for one in curve
    ]


def _named(means: Mapping[str, float]) -> dict[str, float]:
    return {f"start_{name}": value for name, value in means.items()}


def of_round(scores: Mapping[str, list[float]], *, number: int, prompts: int, seed: int) -> dict[str, float]:
    """By judge, the base model's mean over the captions of a round.

    Args:
        number: Of the round, 1 first.
        prompts: Captions of a round.
        seed: Of the run.
    """
    order = Order(len(next(iter(scores.values()))), seed)
    places = [order.item((number - 1) * prompts + place) for place in range(prompts)]
    return {name: sum(values[row] for row in places) / prompts for name, values in scores.items()}
