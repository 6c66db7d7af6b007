"""PickScore: a CLIP ViT-H/14 fine-tuned on people's choices between two images of one prompt.

Its score is a Bradley-Terry logit of temperature 1, so labels that are made of it should keep the probability:
a difference of 0.405 is a preference of 60 %, 0.847 of 70 %, 2.197 of 90 %.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.rewards.clip import CLIPEncoder
from diffalign.rewards.cosine import CosineReward, Scale

DEFAULT_MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose image processor and tokenizer the published model uses."""

SCALES = {"logit": Scale(learned=True), "cos": Scale(), "div26": Scale(factor=1 / 26, learned=True)}
"""The paper's; DiffusionDPO's and its descendants'; flow_grpo's and DiffusionNFT's, which lies near 0.75 to 0.9."""


class PickScoreReward(CosineReward):
    """How likely people are to pick this image for this prompt: exp(logit_scale) · cos, mostly 17 to 25.

    A logit: `preference_probability` of two scores of one prompt. `scale` is "logit" (the paper's), "cos", or "div26"
    (the logit over 26, "to 0-1" in several training codes). `raw` holds `cos`. It was trained on Pick-a-Pic v1, whose
    users liked vivid, detailed, centred pictures.

    Weights: yuvalkirstain/PickScore_v1 on the Hub, processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
    Paper: Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
        arXiv 2305.01569.
    """

    name = "pickscore"
    licence = "MIT (code); the weights' card names none"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        scale: str = "logit",
        encoder: CLIPEncoder | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names a model, or takes an `encoder` as it is.

        The published model's processor is LAION's; another model's lies in its own folder.
        """
        options: dict[str, Any] = {"revision": revision, "dtype": dtype, "batch_size": batch_size, "device": device}
        processor = PROCESSOR if model == DEFAULT_MODEL else None
        self._open(encoder or CLIPEncoder(model, processor=processor, **options), scale, SCALES)


def preference_probability(score_a: Float[Tensor, "*b"], score_b: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Probability that people pick image a over image b of one prompt, from scores on the "logit" scale."""
    return torch.sigmoid(score_a - score_b)
