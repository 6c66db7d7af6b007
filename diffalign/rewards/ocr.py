"""How much of a wanted text can be read in an image: 1 - Levenshtein distance / length, without blanks and case.

The text that is wanted stands in the prompt between double quotes. What reads it is chosen by the user; OCR packages
bring their own versions of everything, so a reader behind `http` is the usual road.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.inputs import images_of
from diffalign.types import Modality, RewardBatch, RewardOutput

_OPEN, _CLOSE = "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"
_QUOTED = re.compile(f'["{_OPEN}]([^"{_CLOSE}]+)["{_CLOSE}]')

Reader = Callable[[Float[Tensor, "b 3 h w"]], Sequence[str | None]]
"""From images to the text in each; None where it could not look."""


class OCRReward:
    """How much of the text that the prompt quotes can be read in the image, in [0, 1].

    `reader` is a function of your own, images to texts. Several quoted texts are asked for together, in their order. A
    prompt that quotes nothing, and an image that the reader could not look at, are NaN. `raw` holds `distance` in
    letters. It says nothing of the picture around the text.

    Paper: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", arXiv 2505.05470, with its code's rule.
    Departs: All quoted texts count, not the first alone; without any, the sample is not judged.
    """

    name = "ocr"
    requires = frozenset({"images", "prompts"})
    modality: Modality = "image"
    differentiable = False
    licence = "of the reader"
    range = (0.0, 1.0)

    def __init__(self, reader: Reader | None = None, *, version: str = "reader of the caller") -> None:
        """Takes a reader, and how its version is called."""
        if reader is None:
            raise InputError(
                "reward ocr must get a reader, a function from images to texts, got none; no OCR model comes with us"
            )
        self.reader, self.version = reader, version

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores on the images' device."""
        images = images_of(batch, self.name, self.requires)
        texts = list(self.reader(images))
        if len(texts) != len(images):
            raise InputError(f"reader must give one text per image, {len(images)}, got {len(texts)}")
        rows: list[tuple[float, float]] = []
        for prompt, text in zip(batch.prompts or [], texts, strict=True):
            target = wanted_text(prompt)
            known = target is not None and text is not None
            rows.append((text_score(target, text), float(distance(target, text))) if known else (torch.nan, torch.nan))  # type: ignore[arg-type]
        scores, letters = torch.tensor(rows, dtype=torch.float32, device=images.device).reshape(-1, 2).unbind(1)
        return RewardOutput(scores=scores, raw={"distance": letters})


def wanted_text(prompt: str) -> str | None:
    """What a prompt quotes, joined; None where it quotes nothing but blanks."""
    found = "".join(_QUOTED.findall(prompt))
    return found if _plain(found) else None


def text_score(target: str, read: str) -> float:
    """1 where the target stands in what was read, else 1 - min(distance, length of the target) / length.

    Raises:
        InputError: A target without a letter.
    """
    wanted, seen = _plain(target), _plain(read)
    if not wanted:
        raise InputError(f"target must hold a letter, got {target!r}")
    return 1.0 if wanted in seen else 1 - min(_levenshtein(wanted, seen), len(wanted)) / len(wanted)


def distance(target: str, read: str) -> int:
    """Letters to insert, delete or replace, without blanks and case; 0 where the target stands in what was read."""
    wanted, seen = _plain(target), _plain(read)
    return 0 if wanted in seen else _levenshtein(wanted, seen)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _levenshtein(a: str, b: str) -> int:
    """Wagner and Fischer's table, a row at a time."""
    row: list[Any] = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (letter != other)))
    return int(row[-1])
