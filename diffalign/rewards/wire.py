"""The JSON in which rewards are asked over HTTP, both ways.

POST /compute {"prompt": [..], "image": [base64 PNG, ..], ..} -> {"rewards": [number or null, ..], "raw": {name: [..]}};
GET /health -> {"name", "version", "range", "requires", ..}. Images are the 8-bit picture, rounded, as PNG, which comes
back exactly; null is a sample that could not be judged, or a bound that is not there. Never a pickle.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffalign.errors import InputError, RunError, near_match
from diffalign.types import Reward, RewardBatch, RewardOutput

FIELDS = {
    "prompt": "prompts",
    "image": "images",
    "condition_images": "references",
    "group_ids": "group_ids",
    "metadata": "metadata",
}
"""Key of a request, and the field of `RewardBatch` that it carries; the rest does not travel."""

MOST_PIXELS = 1 << 26
"""Of one picture, looked at before it is unpacked."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of its reward; where it is silent, what the protocol assumes."""

    name: str = "unnamed"
    version: str = "unknown version"
    range: tuple[float, float] = (-math.inf, math.inf)
    requires: frozenset[str] = frozenset({"images", "prompts"})
    licence: str = "not said"
    batch_limit: int | None = None
    """Samples that a request may hold."""


def eight_bit(images: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """The 8-bit picture that is sent and hashed: rounded, not cut off."""
    return (images.detach().clamp(0, 1) * 255).round().byte().cpu()


def to_png(picture: UInt8[Tensor, "3 h w"]) -> bytes:
    """An 8-bit picture as PNG, without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(data: bytes) -> Float[Tensor, "3 h w"]:
    """A PNG as RGB in [0, 1].

    Raises:
        InputError: Not an RGB picture of 8 bits in PNG, or one of more than `MOST_PIXELS`.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode != "RGB" or image.width * image.height > MOST_PIXELS:
                raise InputError(
                    f"image must be RGB of at most {MOST_PIXELS} pixels, got {image.mode} of {image.width}x"
                    f"{image.height}"
                )
            pixels = np.asarray(image).copy()
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image must be a PNG in base64, got {len(data)} bytes that are not: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def request(batch: RewardBatch, requires: frozenset[str]) -> dict[str, Any]:
    """The body of /compute for a batch: the fields that the reward requires."""
    body: dict[str, Any] = {}
    for key, field in FIELDS.items():
        held = getattr(batch, field)
        if field not in requires or held is None:
            continue
        if field == "images":
            body[key] = [_encode(picture) for picture in eight_bit(held)]
        elif field == "references":
            body[key] = [[_encode(eight_bit(picture)) for picture in pictures] for pictures in held]
        else:
            body[key] = [dict(row) if isinstance(row, Mapping) else row for row in held]
    return body


def read_request(body: Mapping[str, Any], most_samples: int) -> RewardBatch:
    """The batch that a body of /compute holds.

    Raises:
        InputError: An unknown key, a list of the wrong type or length, or an image that is not a PNG.
    """
    held = {key: value for key, value in body.items() if value is not None}
    for key, value in held.items():
        if key not in FIELDS:
            raise InputError(f"request: unknown key {key!r}{near_match(key, FIELDS)}")
        if not isinstance(value, list) or not 1 <= len(value) <= most_samples:
            got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
            raise InputError(f"request.{key} must be a list of 1 to {most_samples} entries, got {got}")
    if len({len(value) for value in held.values()}) > 1:
        lengths = ", ".join(f"{len(value)} in {key}" for key, value in held.items())
        raise InputError(f"request must hold lists of one length, got {lengths}")
    for key, kind in (("prompt", str), ("group_ids", int), ("metadata", dict), ("condition_images", list)):
        for i, entry in enumerate(held.get(key, ())):
            if not isinstance(entry, kind) or isinstance(entry, bool):
                raise InputError(f"request.{key}[{i}] must be {kind.__name__}, got {type(entry).__name__}")
    pictures = [_decode(text, f"request.image[{i}]") for i, text in enumerate(held.get("image", ()))]
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError("request.image must hold images of one size; ask for each size by itself")
    references = [
        [_decode(text, f"request.condition_images[{i}]") for text in row]
        for i, row in enumerate(held.get("condition_images", ()))
    ]
    return RewardBatch(
        images=torch.stack(pictures) if pictures else None,
        prompts=held.get("prompt"),
        references=references or None,
        group_ids=held.get("group_ids"),
        metadata=held.get("metadata"),
    )


def answer(out: RewardOutput) -> dict[str, Any]:
    """The body that answers /compute."""
    assert out.valid is not None, "an output has it from its scores"
    judged = out.valid & out.scores.isfinite()
    return {"rewards": _numbers(out.scores, judged), "raw": {k: _numbers(v, v.isfinite()) for k, v in out.raw.items()}}


def read_answer(body: Mapping[str, Any], count: int, where: str) -> RewardOutput:
    """Scores and components that a server gave for `count` samples; null is NaN.

    Raises:
        RunError: Another number of scores, or something that is not a finite number.
    """
    raw = body.get("raw") or {}
    if not isinstance(raw, dict):
        raise RunError(f"{where} must answer with raw as an object, got {type(raw).__name__}")
    scores = _column(body.get("rewards"), count, f"{where}: rewards")
    return RewardOutput(scores=scores, raw={k: _column(v, count, f"{where}: raw.{k}") for k, v in raw.items()})


def about(reward: Reward, batch_limit: int) -> dict[str, Any]:
    """The body that answers /health."""
    low, high = (float(bound) if math.isfinite(bound) else None for bound in reward.range)
    return {
        "name": reward.name,
        "version": reward.version,
        "range": [low, high],
        "requires": sorted(reward.requires),
        "modality": reward.modality,
        "licence": reward.licence,
        "batch_limit": batch_limit,
    }


def read_about(body: Mapping[str, Any], where: str) -> About:
    """What a server says of its reward.

    Raises:
        RunError: A field of another type, or a reward that needs what does not travel.
    """
    found: dict[str, Any] = {}
    for key in ("name", "version", "licence"):
        if key in body:
            found[key] = _typed(body[key], str, f"{where}: {key}")
    if body.get("batch_limit") is not None:
        found["batch_limit"] = max(1, _typed(body["batch_limit"], int, f"{where}: batch_limit"))
    if "requires" in body:
        found["requires"] = frozenset(
            _typed(f, str, where) for f in _typed(body["requires"], list, f"{where}: requires")
        )
        foreign = sorted(found["requires"] - set(FIELDS.values()))
        if foreign or "images" not in found["requires"]:
            raise RunError(
                f"{where} must serve a reward of images and {', '.join(sorted(FIELDS.values()))}, got one that "
                f"requires {', '.join(sorted(found['requires'])) or 'nothing'}"
            )
    if "range" in body:
        bounds = _typed(body["range"], list, f"{where}: range")
        if len(bounds) != 2 or not all(b is None or _is_number(b) for b in bounds):
            raise RunError(f"{where}: range must be [low, high], got {bounds!r}")
        found["range"] = tuple(
            unbounded if b is None else float(b) for b, unbounded in zip(bounds, (-math.inf, math.inf), strict=True)
        )
    return About(**found)


def _encode(picture: UInt8[Tensor, "3 h w"]) -> str:
    return base64.b64encode(to_png(picture)).decode()


def _decode(text: Any, where: str) -> Float[Tensor, "3 h w"]:
    try:
        return from_png(base64.b64decode(text, validate=True))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (ValueError, TypeError):
        raise InputError(f"{where} must be a PNG in base64, got {type(text).__name__}") from None


def _numbers(values: Float[Tensor, " b"], judged: Tensor) -> list[float | None]:
    return [v if ok else None for v, ok in zip(values.tolist(), judged.tolist(), strict=True)]


def _column(values: Any, count: int, where: str) -> Float[Tensor, " b"]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else repr(values)[:80]
        raise RunError(f"{where} must hold {count} numbers, one per sample, got {got}")
    wrong = next((v for v in values if v is not None and not _is_number(v)), None)
    if wrong is not None:
        raise RunError(f"{where} must hold finite numbers, or null, got {wrong!r}")
    return torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float32)


def _is_number(value: Any) -> bool:
    """A number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 3.4e38


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RunError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
