"""Text encoders in 16 bits: which type each can run in, and their states back in float32."""

from collections.abc import Mapping
from typing import Any

import torch

from diffalign.denoisers import Family
from diffalign.types import Cond


def text_dtypes(family: Family, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Type of each text encoder of a `model_index.json` where `dtype` is asked for: float16 is for CLIP alone.

    Hidden states of T5 and Gemma leave the range of float16 and become infinite; they take bfloat16 in its place.
    """
    wide = torch.bfloat16 if dtype == torch.float16 else dtype
    listed = {name: index.get(name) or (None, "") for name in family.text}
    encoders = {
        name: cls for name, (library, cls) in listed.items() if library == "transformers" and "Token" not in cls
    }
    return {name: dtype if cls.startswith("CLIP") else wide for name, cls in encoders.items()}


def in_float32(cond: Cond) -> Cond:
    """Conditions with their numbers in float32; masks and classes stay what they are."""
    return Cond({name: t.float() if t.is_floating_point() else t for name, t in cond.tensors.items()})
