"""What every reward checks at its door: the fields that it needs are there, and media are in their range."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.types import RewardBatch

_SLACK = 1e-3
_FIELDS = ("images", "prompts", "audio", "references", "group_ids", "metadata")


def check_batch(batch: RewardBatch, reward: str, requires: frozenset[str]) -> None:
    """Checks a batch before it is scored.

    Raises:
        InputError: A needed field is absent, fields differ in length, images are not finite in [0, 1] ([-1, 1] and
            0..255 are refused, not guessed), or audio is not finite in [-1, 1] or has no sample rate.
    """
    values = {name: getattr(batch, name) for name in _FIELDS}
    for name in sorted(requires):
        if values.get(name, batch.sample_rate) is None:
            raise InputError(f"reward {reward!r} must get {name}, got none")
    kind = "image" if batch.images is not None else "sample"
    for name, held in values.items():
        if held is not None and len(held) != len(batch):
            raise InputError(f"{name} must have one entry per {kind}, {len(batch)}, got {len(held)}")
    if batch.images is not None and len(batch.images):
        _check_range("images must be RGB", batch.images, 0.0)
    for clip in batch.audio or ():
        if batch.sample_rate is None or batch.sample_rate < 1:
            raise InputError(f"audio must come with its sample_rate, got {batch.sample_rate!r}")
        if clip.numel():
            _check_range("audio must be samples", clip, -1.0)


def images_of(batch: RewardBatch, reward: str, requires: frozenset[str]) -> Float[Tensor, "b 3 h w"]:
    """The images of a batch, checked."""
    check_batch(batch, reward, requires | {"images"})
    assert batch.images is not None, "they are required"
    return batch.images


def audio_of(batch: RewardBatch, reward: str, requires: frozenset[str]) -> tuple[Sequence[Float[Tensor, "c _"]], int]:
    """(clips, samples a second) of a batch, checked."""
    check_batch(batch, reward, requires | {"audio"})
    assert batch.audio is not None, "it is required"
    return batch.audio, batch.sample_rate or 0


def _check_range(what: str, values: Tensor, least: float) -> None:
    low, high = (v.item() for v in torch.aminmax(values.detach()))
    if not (low >= least - _SLACK and high <= 1 + _SLACK):
        raise InputError(f"{what} in [{least:.0f}, 1], got values from {low:.4g} to {high:.4g}")
