"""What the images of a round were worth: by rewards, or by people; and what earlier rounds were."""

import json

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.checkpoint import write_atomic
from diffalign.errors import RunError
from diffalign.online.labels import read_labels, write_template
from diffalign.online.scoring import PEOPLE, check_scores
from diffalign.online.store import Store
from diffalign.online_round import OwnRound
from diffalign.types import Scored


def scored_images(this: OwnRound, store: Store) -> tuple[Scored, Int[Tensor, " n"]]:
    """(what judges say of the images that they could score, the places of those in the round)."""
    online = this.online
    if online.judges is None:
        scores, weights = {PEOPLE: _labels(this, store)}, {PEOPLE: 1.0}
    else:
        scores, weights = store.scores(), dict(online.judges.weights)
    check_scores(scores, store, this.number)
    group = torch.tensor([entry.group for entry in store.entries])
    known = torch.stack([values.isfinite() for values in scores.values()]).all(0) if scores else group >= 0
    if this.parts.cfg.method.needs.whole_groups:
        known = known.reshape(-1, online.settings.group).all(1).repeat_interleave(online.settings.group)
    images = known.nonzero().flatten()
    of_sets = None if online.judges is None else online.judges.of_sets
    found = Scored(
        scores={name: values[images].float() for name, values in scores.items()},
        weights=weights,
        group=group[images],
        prompts=[entry.prompt for entry in store.entries[:: online.settings.group]],
        past=_past(this),
        embedded=None if of_sets is None else store.embedded(),
        set_reward=of_sets,
        log_ratio=store.log_ratio()[images].float() if this.parts.cfg.method.needs.log_ratio else None,
    )
    _remember_scores(this, found)
    return found, images


def _labels(this: OwnRound, store: Store) -> Float[Tensor, " n"]:
    """Means of people's labels; without them the run ends here, to go on when they are there."""
    file, names = store.folder / "labels.jsonl", [entry.id for entry in store.entries]
    if not file.is_file():
        template = store.folder / "labels-template.jsonl"
        if this.parts.accelerator.is_main_process and not template.is_file():
            write_template(template, names)
        raise RunError(
            f"round {this.number} waits for people: label the {len(names)} {store.medium.folder} of {store.media} in "
            f"{file} (start from {template.name}), and run the same command with resume=latest"
        )
    found = read_labels(file, names, store.media, suffix=store.medium.suffix).mean
    return torch.tensor([found.get(name, float("nan")) for name in names], dtype=torch.float64)


def _remember_scores(this: OwnRound, scored: Scored) -> None:
    """Scores by reward and prompt, for advantages that look back."""
    if not this.parts.accelerator.is_main_process:
        return
    table: dict[str, dict[str, list[float]]] = {}
    for name, values in scored.scores.items():
        of_prompts = table.setdefault(name, {})
        for value, group in zip(values.tolist(), scored.group.tolist(), strict=True):
            of_prompts.setdefault(scored.prompts[group], []).append(value)
    folder = this.root / "history"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"round-{this.number:06d}.json", json.dumps(table))


def _past(this: OwnRound) -> dict[str, dict[str, list[float]]]:
    """Scores of earlier rounds by reward and prompt."""
    found: dict[str, dict[str, list[float]]] = {}
    for file in sorted((this.root / "history").glob("round-*.json")):
        if int(file.stem.removeprefix("round-")) < this.number:
            for name, of_prompts in json.loads(file.read_text()).items():
                for prompt, values in of_prompts.items():
                    found.setdefault(name, {}).setdefault(prompt, []).extend(values)
    return found


def statistics(scored: Scored) -> dict[str, float]:
    """Of each reward mean and spread over the round, and the mean over prompts of their best image; the mean log-ratio,
    an estimate of the walk's KL."""
    found, prompts = {}, [scored.group == group for group in scored.group.unique()]
    for name, values in scored.scores.items():
        found[f"score/{name}"] = round(float(values.double().mean()), 6)
        found[f"score/{name}/std"] = round(float(values.double().std(correction=0)), 6)
        best = [float(values[of].double().max()) for of in prompts]
        found[f"score/{name}/best"] = round(sum(best) / len(best), 6)
    if scored.log_ratio is not None:
        found["log_ratio"] = round(float(scored.log_ratio.double().mean()), 6)
    return found
