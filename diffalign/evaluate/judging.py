"""Scores of the samples as they lie on disk, each judged once: by reward, version, sample and prompt.

Scores go to journals as they are made. Batches hold neighbours of one arm, the same for any number of processes.
"""

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffalign.data.prompts import PromptSet
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.processes import Processes
from diffalign.evaluate.score import Table, batches, columns_of
from diffalign.evaluate.store import Appender, appending, key, read_journal
from diffalign.progress import bar
from diffalign.rewards import move
from diffalign.types import FunctionReward, Reward

BATCH = 16
"""Samples that a reward is given at a time."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One sample that is to be judged."""

    key: str
    file: Path
    prompt: str
    metadata: Mapping[str, Any]


def score_rows(
    rewards: Sequence[Reward],
    table: Table,
    prompts: PromptSet,
    folder: Path,
    device: torch.device,
    processes: Processes,
    medium: Medium,
    media: Mapping[str, Medium] | None = None,
) -> Table:
    """Columns of scores for a table of samples; only what no journal knows is judged.

    Args:
        table: Columns arm, file (in `folder`), prompt, prompt_index and the medium's hash.
        media: By name, of rewards that get samples in another way than `medium` gives them.
    """
    ways = {reward.name: (media or {}).get(reward.name, medium) for reward in rewards}
    with processes.together():
        _judge(rewards, _distinct(table, prompts, folder, medium), folder, device, processes, ways)
    keys = [_key(table, row, prompts, medium) for row in range(len(table["arm"]))]
    columns: Table = {}
    for reward in rewards:
        known = read_journal(folder, journal_name(reward, ways[reward.name]))
        names = sorted({name for k in keys for name in known[k]["values"]}, key=lambda n: (n != reward.name, n))
        order = list(next(iter(known.values()))["values"]) if known else [reward.name]
        for name in sorted(names, key=lambda n: order.index(n) if n in order else len(order)):
            columns[name] = [known[k]["values"].get(name, float("nan")) for k in keys]
    return columns


def journal_name(reward: Reward, medium: Medium = PICTURES) -> str:
    """Where a reward's scores are kept: another version, text of a plain function, or hearing is another journal."""
    text = _text(reward.function) if isinstance(reward, FunctionReward) else ""
    identity = key(reward.name, reward.version, text, *medium.hearing)
    return f"scores-{re.sub(r'[^A-Za-z0-9_-]', '-', reward.name)}-{identity[:12]}"


def _judge(
    rewards: Sequence[Reward],
    asked: list[list[Asked]],
    folder: Path,
    device: torch.device,
    processes: Processes,
    ways: Mapping[str, Medium],
) -> None:
    journals_of = {reward.name: journal_name(reward, ways[reward.name]) for reward in rewards}
    known = {name: read_journal(folder, journal) for name, journal in journals_of.items()}
    work = []
    for batch in processes.share(asked):
        wanting = [r for r in rewards if any(one.key not in known[r.name] for one in batch)]
        if wanting:
            work.append((batch, wanting))
    needed = [reward for reward in rewards if any(reward in wanting for _, wanting in work)]
    with ExitStack() as journals, bar("scoring", sum(len(b) for b, _ in work), shown=processes.main) as shown:
        opened = {}
        for reward in needed:
            move(reward, device)
            opened[reward.name] = journals.enter_context(appending(folder, journals_of[reward.name], processes.rank))
        for batch, wanting in work:
            samples = [ways[needed[0].name].read(one.file) for one in batch]
            for reward in wanting:
                _score(reward, batch, samples, known[reward.name], opened[reward.name], ways[reward.name])
            shown.advance(len(batch))


def _score(
    reward: Reward,
    batch: list[Asked],
    samples: list[torch.Tensor],
    known: Mapping[str, Any],
    journal: Appender,
    medium: Medium,
) -> None:
    """Judges a whole batch and writes down what was not known of it."""
    position, rows = 0, []
    for stack in batches(samples, BATCH):
        some = batch[position : position + len(stack)]
        position += len(stack)
        given = medium.asked(stack, [a.prompt for a in some], [a.metadata for a in some])
        columns = columns_of(reward, given)
        for i, one in enumerate(some):
            if one.key not in known:
                rows.append({"key": one.key, "values": {name: values[i] for name, values in columns.items()}})
    journal.write(rows)


def _distinct(table: Table, prompts: PromptSet, folder: Path, medium: Medium) -> list[list[Asked]]:
    """Batches of samples that differ in content or prompt, arm by arm."""
    seen: set[str] = set()
    found: list[list[Asked]] = []
    for _, rows in itertools.groupby(range(len(table["arm"])), key=lambda row: table["arm"][row]):
        own = []
        for row in rows:
            identity = _key(table, row, prompts, medium)
            if identity not in seen:
                seen.add(identity)
                about = prompts.metadata[table["prompt_index"][row]]
                file = folder / table["file"][row]
                own.append(Asked(key=identity, file=file, prompt=table["prompt"][row], metadata=about))
        found += [own[start : start + BATCH] for start in range(0, len(own), BATCH)]
    return found


def _key(table: Table, row: int, prompts: PromptSet, medium: Medium) -> str:
    about = json.dumps(prompts.metadata[table["prompt_index"][row]], sort_keys=True, default=str)
    return key(table[medium.digest][row], table["prompt"][row], about)


def _text(function: Any) -> str:
    """What a plain function does, as far as its text says."""
    while isinstance(function, partial):
        function = function.func
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = repr(getattr(function, "__qualname__", type(function).__name__))
    return hashlib.sha256(text.encode()).hexdigest()
