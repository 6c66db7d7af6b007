"""Rewards of whole sets in an evaluation: one number per arm, over all of its images.

No interval stands beside them: prompts that a resample draws twice make a set look less diverse and nearer to itself,
so the bootstrap that serves means would be wrong here.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from diffalign.errors import InputError
from diffalign.evaluate.results import SetResult
from diffalign.evaluate.score import Table, batches, read_image
from diffalign.evaluate.store import appending, key, read_journal
from diffalign.progress import bar
from diffalign.rewards import OnDevice
from diffalign.types import RewardBatch, SetReward

BATCH = 32


def prepare(sets: Mapping[str, SetReward], reference: str | None, device: torch.device) -> None:
    """Gives rewards their reference set and device.

    Raises:
        InputError: One needs a reference and there is none, or none needs the one that is there.
    """
    needing = [spec for spec, reward in sets.items() if reward.needs_reference]
    if needing and reference is None:
        raise InputError(f"reward {needing[0]!r} must have a reference set; name its file as reference")
    if reference is not None and not needing:
        raise InputError(f"reference must belong to a reward of sets that needs one, got {reference!r} and none")
    for spec in needing:
        assert reference is not None, "checked above"
        sets[spec].load_reference(reference)
    for reward in sets.values():
        if isinstance(reward, OnDevice):
            reward.to(device)


def score_sets(
    sets: Mapping[str, SetReward], table: Table, folder: Path, reference: str | None
) -> tuple[SetResult, ...]:
    """The numbers of all arms; those that a journal knows are not computed again."""
    known = read_journal(folder, "sets")
    arms = list(dict.fromkeys(table["arm"]))
    content = None if reference is None else hashlib.sha256(Path(reference).read_bytes()).hexdigest()
    found = []
    with appending(folder, "sets", 0) as journal, bar("sets", len(sets) * len(arms)) as shown:
        for spec, reward in sets.items():
            for arm in arms:
                rows = [r for r, name in enumerate(table["arm"]) if name == arm]
                pictures = [table["image_sha256"][r] for r in rows]
                own = key(reward.name, reward.version, content if reward.needs_reference else None, pictures)
                if own not in known:
                    files = [folder / table["file"][r] for r in rows]
                    places = [table["prompt_index"][r] for r in rows]
                    groups = places if len(set(places)) < len(places) else None  # one image a prompt makes no group
                    out = reward.score_set(image_batches(files, [table["prompt"][r] for r in rows], groups))
                    known[own] = {"key": own, "score": out.score, "raw": out.raw, "samples": out.samples}
                    journal.write([known[own]])
                value = known[own]
                found.append(
                    SetResult(
                        reward=reward.name,
                        spec=spec,
                        version=reward.version,
                        arm=arm,
                        score=value["score"],
                        raw=value["raw"],
                        samples=value["samples"],
                    )
                )
                shown.advance()
    return tuple(found)


def image_batches(
    files: Sequence[Path], prompts: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> Iterator[RewardBatch]:
    """Images of files, read when they are asked for, with their prompts and the numbers of their groups."""
    position = 0
    for stack in batches((read_image(file) for file in files), BATCH):
        rows = slice(position, position + len(stack))
        yield RewardBatch(
            images=stack,
            prompts=None if prompts is None else prompts[rows],
            group_ids=None if groups is None else groups[rows],
        )
        position += len(stack)
