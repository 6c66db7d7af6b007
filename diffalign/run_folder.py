"""The folder of a run: which checkpoint it goes on from, and whether it may."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign import checkpoint as disk
from diffalign.config import dump
from diffalign.errors import InputError
from diffalign.settings import TrainConfig
from diffalign.strict import changed_keys

_FREE_TO_CHANGE = ("resume", "train.steps", "train.shard", "rounds.count")
"""Keys that a resumed run may have changed."""


def find_checkpoint(folder: Path, cfg: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a run from the start; changes nothing on disk.

    Raises:
        InputError: The folder holds another run, or the config has changed since the run that is resumed.
    """
    if (folder / "config.toml").is_file():
        _check_resumable(folder, cfg, dump(cfg))
    elif folder.exists() and any(p.name != "cache" for p in folder.iterdir()):
        raise InputError(
            f"config.output must be a new folder or one of a run, got {cfg.output!r} with other files in it"
        )
    elif cfg.resume not in ("never", "latest"):
        raise InputError(
            f"config.resume must name a checkpoint of config.output, got {cfg.resume!r} and no run is there"
        )
    found = disk.checkpoints(folder / "checkpoints")
    if cfg.resume == "never" or not found:
        return None
    if cfg.resume == "latest":
        return found[max(found)]
    names = {path.name: path for path in found.values()}
    if cfg.resume not in names:
        raise InputError(f"config.resume must be never, latest or one of {', '.join(names)}, got {cfg.resume!r}")
    return names[cfg.resume]


def _check_resumable(folder: Path, cfg: TrainConfig, table: Mapping[str, Any]) -> None:
    written = tomllib.loads((folder / "config.toml").read_text())
    steps = max(disk.checkpoints(folder / "checkpoints"), default=0)
    if cfg.resume == "never":
        raise InputError(
            f"config.output must be a new folder, got {cfg.output!r} with a run at step {steps}; "
            'set resume = "latest" to go on with it, or name another folder'
        )
    rolls_back = cfg.guard is not None and cfg.guard.action == "roll_back"  # needs checkpoints of all that was whole
    free = _FREE_TO_CHANGE if rolls_back else (*_FREE_TO_CHANGE, "guard.action")
    changed = [c for c in changed_keys(written, table) if not c.startswith(free)]
    changed += _changed_rounds(written, cfg)
    if changed:
        raise InputError(
            f"config must be that of the run in {cfg.output!r} to resume it, but changed: {', '.join(changed)}"
        )


def _changed_rounds(written: Mapping[str, Any], cfg: TrainConfig) -> list[str]:
    """Steps and rounds may both grow, but a round must stay as long as it was."""
    if cfg.rounds is None or "rounds" not in written:
        return []
    then, now = written["train"]["steps"] // written["rounds"]["count"], cfg.train.steps // cfg.rounds.count
    return [] if then == now else [f"train.steps / rounds.count ({then} then, {now} now)"]
