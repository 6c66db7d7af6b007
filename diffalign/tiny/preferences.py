"""Pairs made by a base model and labelled by the simulated person, in Pick-a-Pic's own columns.

For a training caption the model makes several images; the one that the oracle likes best and the one it likes least
are a pair. The person chooses by a Bradley-Terry draw, P(first wins) = sigmoid((score_0 - score_1) / temperature), so
some labels are wrong, as in life; images that look about equally good to it are a tie.
"""

import io
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from diffalign.tiny import oracle, scenes


@dataclass(frozen=True, kw_only=True)
class Person:
    """How the simulated person labels."""

    temperature: float = 0.15
    """Score difference, in points of the oracle, at which the better image wins 73 % of draws."""
    tie_below: float = 0.1
    """Score differences smaller than this are a tie."""

    def label(self, score_0: float, score_1: float, rng: np.random.Generator) -> float:
        """1 where the first image wins, 0 where the second, 0.5 for a tie."""
        if abs(score_0 - score_1) < self.tie_below:
            return 0.5
        return float(rng.random() < 1 / (1 + math.exp(-(score_0 - score_1) / self.temperature)))


def training_captions(count: int, *, seed: int) -> list[str]:
    """Distinct captions of training combinations."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[scenes.caption(scenes.draw_scene(rng, "train"), rng)] = None
    return list(found)


def choose_pair(scores: Float[np.ndarray, " k"], rng: np.random.Generator) -> tuple[int, int]:
    """Places of the best and the worst of some images, in random order."""
    pair = [int(scores.argmax()), int(scores.argmin())]
    if pair[0] == pair[1]:
        pair[1] = (pair[0] + 1) % len(scores)
    first = int(rng.integers(2))
    return pair[first], pair[1 - first]


def make_rows(
    captions: list[str], images: Float[np.ndarray, "n k h w 3"], *, model: str, person: Person, seed: int
) -> list[dict[str, Any]]:
    """One labelled pair a caption, from its k images in [0, 1]."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, (caption, some) in enumerate(zip(captions, images, strict=True)):
        scores = np.array([oracle.judge(image, caption)["total"] for image in some])
        a, b = choose_pair(scores, rng)
        label = person.label(scores[a], scores[b], rng)
        rows.append(_row(number, caption, (some[a], some[b]), label, model))
    return rows


def agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of decided pairs whose label agrees with the oracle, share of ties, mean gap between the two scores."""
    right, gaps, decided = 0, [], 0
    for row in rows:
        scores = [oracle.judge(_decode(row[name]), row["caption"])["total"] for name in ("jpg_0", "jpg_1")]
        gaps.append(abs(scores[0] - scores[1]))
        if row["label_0"] != 0.5:
            decided += 1
            right += (scores[0] > scores[1]) == (row["label_0"] == 1)
    return {"agreement": right / decided, "ties": 1 - decided / len(rows), "mean_gap": float(np.mean(gaps))}


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Writes parquet."""
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="zstd", row_group_size=256)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads parquet back."""
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


def _row(number: int, caption: str, pair: tuple[np.ndarray, np.ndarray], label: float, model: str) -> dict[str, Any]:
    uids = [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{model}/{number}/{i}")) for i in (0, 1)]
    best = "tie" if label == 0.5 else uids[0 if label == 1 else 1]
    return {
        "are_different": True,
        "best_image_uid": best,
        "caption": caption,
        "created_at": "2026-11-21T00:00:00",
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": "",
        "image_1_uid": uids[1],
        "image_1_url": "",
        "jpg_0": _jpeg(pair[0]),
        "jpg_1": _jpeg(pair[1]),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": model,
        "model_1": model,
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": 1,
    }


def _jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(out, format="JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) / 255
