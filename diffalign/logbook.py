"""What a run writes beside its weights: metrics.jsonl, cut back on resume, and the trackers that the config names."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.fit import StepReport
from diffalign.validation import Validation

TIME_FIELDS = ("seconds", "samples_per_second", "sampling_seconds")
"""Fields that differ between two runs of the same config."""


class Logbook:
    """metrics.jsonl, one JSON object a line: a training step, a validation, the start of a round, a look."""

    def __init__(self, file: Path, accelerator: Any, start: int) -> None:
        """Opens the file, cut back to its first `start` bytes; only the main process writes."""
        self.accelerator = accelerator
        self.file = file
        self.handle = None
        self.first: Validation | None = None
        if accelerator.is_main_process:
            with file.open("ab") as end:
                end.truncate(start)
            self.handle = file.open("a", encoding="utf-8")

    @property
    def offset(self) -> int:
        """Bytes that are safe on disk now."""
        if self.handle is None:
            return 0
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return self.handle.tell()

    def step(self, report: StepReport, lr: float) -> None:
        """Writes one training step."""
        speed = report.samples / report.seconds
        self._write(
            {
                "step": report.step,
                **report.metrics,
                "lr": lr,
                "samples": report.samples,
                "seconds": round(report.seconds, 4),
                "samples_per_second": round(speed, 3),
                "deciles": report.deciles,
            }
        )
        self.accelerator.log({**report.metrics, "lr": lr, "samples_per_second": speed}, step=report.step)

    def validation(self, step: int, result: Validation) -> None:
        """Writes one validation."""
        self._write({"step": step, "validation": result.metrics, "deciles": result.deciles})
        self.accelerator.log({f"validation/{k}": v for k, v in result.metrics.items()}, step=step)

    def first_validation(self) -> Validation | None:
        """The run's first validation, which a resumed run reads back."""
        if self.first is None and self.handle is not None:
            self.handle.flush()
            for line in self.file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if "validation" in entry:
                    self.first = Validation(metrics=entry["validation"], deciles=entry["deciles"])
                    break
        return self.first

    def round(self, step: int, entry: Mapping[str, int | float]) -> None:
        """Writes what a round began with, after `step` steps."""
        self._write({"step": step, **entry})
        self.accelerator.log({f"rounds/{k}": v for k, v in entry.items()}, step=step)

    def guard(self, step: int, entry: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        """Writes what the guard found at a look, and its `numbers` to trackers."""
        self._write({"step": step, "guard": entry})
        self.accelerator.log({f"guard/{k}": v for k, v in numbers.items()}, step=step)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the file and the trackers, whatever happened."""
        if self.handle is not None:
            self.handle.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _write(self, entry: dict[str, Any]) -> None:
        if self.handle is not None:
            self.handle.write(json.dumps(entry) + "\n")
            self.handle.flush()
