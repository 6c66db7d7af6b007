"""The pool of a run's earlier policies on disk: what is trained, by name, and a digest of every file in pool.json."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.checkpoint import write_atomic
from diffalign.data.cache import save_shard
from diffalign.errors import RunError

_REMEDY = "start the run anew in another folder"


class Pool:
    """The policies at the start of every round so far, trained parameters alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "pool.json"

    def digests(self) -> dict[str, str]:
        """SHA-256 of each policy's file, by its number."""
        if not self.index.is_file():
            return {}
        try:
            return dict(json.loads(self.index.read_text()))
        except json.JSONDecodeError as error:
            raise RunError(f"{self.index} must be as it was written, got no JSON ({error}); {_REMEDY}") from error

    def add(self, number: int, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Writes a policy, unless it is there."""
        known = self.digests()
        if str(number) in known and self._file(number).is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_shard(self._file(number), {k: p.detach().cpu() for k, p in parameters.items()}, {})
        self._write({**known, str(number): _sha256(self._file(number))})

    def policy(self, number: int, like: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """A policy's weights, with the names and shapes of `like`.

        Raises:
            RunError: The pool is empty, or the policy is missing or damaged.
        """
        known, file = self.digests(), self._file(number)
        if not known:
            raise RunError(f"{self.folder} must hold the policies of earlier rounds, got an empty pool; {_REMEDY}")
        if str(number) not in known or not file.is_file():
            raise RunError(
                f"{self.folder} must hold the policies of earlier rounds, got none at {file.name}; {_REMEDY}"
            )
        if _sha256(file) != known[str(number)]:
            raise RunError(f"{file} must be as it was written, got another SHA-256 than pool.json has; {_REMEDY}")
        weights = load_file(file)
        if {k: v.shape for k, v in weights.items()} != {k: p.shape for k, p in like.items()}:
            raise RunError(
                f"{file} must hold the parameters that this run trains, got {len(weights)} others; {_REMEDY}"
            )
        return weights

    def drop_from(self, number: int) -> None:
        """Removes the policies from `number` on: of rounds that a run from an older checkpoint makes anew."""
        self._drop([n for n in self.digests() if int(n) >= number])

    def drop_before(self, number: int) -> None:
        """Removes the policies before `number`."""
        self._drop([n for n in self.digests() if int(n) < number])

    def _drop(self, stale: list[str]) -> None:
        known = self.digests()
        if stale:
            self._write({n: digest for n, digest in known.items() if n not in stale})
        for n in stale:
            self._file(int(n)).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"policy-{number}.safetensors"

    def _write(self, digests: dict[str, str]) -> None:
        write_atomic(self.index, json.dumps(digests, indent=1))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
