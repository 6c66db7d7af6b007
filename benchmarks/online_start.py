"""What the base model makes of a run's rounds, from the same captions and initial noise: where its line starts.

Rounds differ in how hard their captions are and in the luck of their noise. A line of what the policy makes minus what
the base model makes of the same starts at zero and says what training did.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import online_measures, online_runs
from benchmarks.method_runs import digest, read
from benchmarks.online_runs import OnlineCell
from benchmarks.scene_pictures import draw_pictures
from diffalign import rewards
from diffalign.assemble import Parts, assemble
from diffalign.checkpoint import write_atomic
from diffalign.online_round import OwnRound
from diffalign.progress import bar
from diffalign.sampling.rollout import initial_noise, rollout
from diffalign.settings import TrainConfig
from diffalign.types import RewardBatch

PER_CAPTION = 2
"""Images of each caption of a round: the first of its group."""
JUDGES = {**online_measures.ROUND_JUDGES, "jpeg": "jpeg"}
NAMES = tuple(f"start_{name}" for name in JUDGES)
"""What `with_start` adds to a round."""

Means = dict[str, float]
"""Of a round, by judge."""


def with_start(cell: OnlineCell, curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of a finished cell, each with what the base model makes of it as `start_<judge>`."""
    found = start(cell, rounds=len(curve))
    return [
        {**one, **{f"start_{name}": value for name, value in means.items()}}
        for one, means in zip(curve, found[: len(curve)], strict=True)
    ]


def start(cell: OnlineCell, rounds: int) -> list[Means]:
    """The base model's means of a run's rounds, the first ones first; made where they are not there yet."""
    file = cell.file.parent / f"start-{digest(sampling(cell))}.json"
    known = read(file)
    found: list[Means] = [] if known is None else known["rounds"]
    if len(found) < rounds:
        draw_pictures(online_runs.PICTURES)
        with tempfile.TemporaryDirectory() as folder:
            cfg = online_runs.placed(cell.settings(), Path(folder) / "run")
            found = found + measure(cfg, range(len(found) + 1, rounds + 1))
        write_atomic(file, json.dumps({"sampling": sampling(cell), "rounds": found}) + "\n")
    return found


def sampling(cell: OnlineCell) -> dict[str, Any]:
    """What the means depend on; rows that sample alike share them, if their rounds have equally many captions."""
    cfg, table = cell.settings(), cell.without_folders()["online"]
    return {
        "model": cell.model,
        "data": cfg.data.path,
        "seed": cell.seed,
        "with_noise": cfg.method.needs.items in ("transitions", "transition_pairs"),
        **{
            key: table.get(key) for key in ("kernel", "steps", "table", "window", "guidance", "prompts", "shared_noise")
        },
        "images": PER_CAPTION,
        "judges": JUDGES,
    }


def measure(cfg: TrainConfig, numbers: Sequence[int]) -> list[Means]:
    """Samples rounds with the model as the run begins, and lets the judges look; round 1 is the first."""
    parts = assemble(cfg)
    judges = {name: rewards.load(spec) for name, spec in JUDGES.items()}
    found = []
    with bar(f"rounds by {cfg.model.path}", len(numbers)) as shown:
        for number in numbers:
            batch = _sampled(parts, number)
            means = {name: float(judge.score(batch).scores.mean()) for name, judge in judges.items()}
            found.append({name: round(value, 5) for name, value in means.items()})
            shown.advance()
    return found


def _sampled(parts: Parts, number: int) -> RewardBatch:
    """The first images of each group of a round."""
    online = parts.online
    assert online is not None, "a run on own images"
    assert online.settings.guidance == 1, "rows sample without guidance"
    entries = OwnRound(parts=parts, online=online, number=number).entries()
    first = [entry for i, entry in enumerate(entries) if i % online.settings.group < PER_CAPTION]
    prompts = [entry.prompt for entry in first]
    with torch.no_grad():
        walked = rollout(
            parts.policy,
            online.walk.kernel,
            online.walk.schedule,
            online.encoders.prompts(prompts),
            [entry.seed for entry in first],
            x_init=initial_noise([entry.noise_seed for entry in first], online.shape),
            window=online.window(parts.cfg.seed, number),
        )
    return RewardBatch(images=online.encoders.decode(walked.x_0, online.scale), prompts=prompts)
