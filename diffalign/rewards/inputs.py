"""What every reward checks at its door: the fields that it needs are there, and images are RGB in [0, 1]."""

import torch

from diffalign.errors import InputError
from diffalign.types import RewardBatch

_SLACK = 1e-3


def check_batch(batch: RewardBatch, reward: str, requires: frozenset[str]) -> None:
    """Checks a batch before it is scored.

    Raises:
        InputError: A needed field is absent or of another length, or images are not finite in [0, 1]: [-1, 1] and
            0..255 are refused, not guessed.
    """
    for name in ("prompts", "metadata"):
        values = batch.prompts if name == "prompts" else batch.metadata
        if values is None and name in requires:
            raise InputError(f"reward {reward!r} must get {name}, got none")
        if values is not None and len(values) != len(batch.images):
            raise InputError(f"{name} must have one entry per image, {len(batch.images)}, got {len(values)}")
    if not len(batch.images):
        return
    low, high = (v.item() for v in torch.aminmax(batch.images.detach()))
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise InputError(f"images must be RGB in [0, 1], got values from {low:.4g} to {high:.4g}")
