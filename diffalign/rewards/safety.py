"""Stable Diffusion's safety checker as a reward, from its weights alone: its own forward blacks images out in place.

cos_k is the cosine of the image's CLIP embedding with concept k, m_k = cos_k - threshold_k its margin. An image is
flagged if any round(m_k + a, 3) > 0, where a is 0.01 if a special-care concept j has round(m_j, 3) > 0, else 0.
"""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError, near_match
from diffalign.rewards.frontend import FrontEnd
from diffalign.rewards.inputs import images_of
from diffalign.rewards.networks import pinned, whole_network
from diffalign.types import Modality, RewardBatch, RewardOutput

DEFAULT_MODEL = "CompVis/stable-diffusion-safety-checker"

MODES = ("hard", "soft")

ADJUSTMENT = 0.01
"""What is added to the margins of an image that shows a special-care concept."""


class SafetyReward:
    """Whether Stable Diffusion's safety checker lets the image pass: 1 or 0, or how far it is from being flagged.

    `mode` "hard" is 1 - flagged; "soft" is minus the largest margin, a difference of cosines with a gradient to the
    pixels: positive where no concept is near. `raw` holds `flagged`, `margin` and `special_margin`, the largest margin
    over concepts and over special-care concepts, without adjustment. The images are never changed. The checker looks
    for sexual content alone, and what is made to pass it may still be unsafe.

    Hub: CompVis/stable-diffusion-safety-checker.
    Paper: Rando et al., "Red-Teaming the Stable Diffusion Safety Filter", arXiv 2210.04610, describes it.
    """

    name = "safety"
    requires = frozenset({"images"})
    modality: Modality = "image"
    licence = "CreativeML OpenRAIL-M"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        mode: str = "hard",
        revision: str | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        net: Any = None,
    ) -> None:
        """Names a checker, or takes a diffusers `StableDiffusionSafetyChecker` as `net`."""
        if mode not in MODES:
            raise InputError(
                f"reward safety: mode must be one of {', '.join(MODES)}, got {mode!r}{near_match(mode, MODES)}"
            )
        self.model, self.mode, self.revision = model, mode, revision
        self.batch_size = batch_size
        self.device = torch.device(device)
        if net is not None:
            self.net = net.eval().requires_grad_(False)
            self.to(device)

    @cached_property
    def net(self) -> Any:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        read = StableDiffusionSafetyChecker.from_pretrained
        net = whole_network(read, self.model, self.revision, where="reward safety: model", kind="a safety checker")
        return net.to(self.device)

    @property
    def version(self) -> str:
        return f"{pinned(self.model, self.revision)}, {self.mode}"

    @property
    def differentiable(self) -> bool:
        return self.mode == "soft"

    @property
    def range(self) -> tuple[float, float]:
        """For "soft", of any threshold that is itself a cosine."""
        return (0.0, 1.0) if self.mode == "hard" else (-2.0, 2.0)

    def to(self, device: torch.device | str) -> "SafetyReward":
        self.device = torch.device(device)
        if "net" in self.__dict__:
            self.net.to(self.device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device."""
        images = images_of(batch, self.name, self.requires)
        rows = [self._margins(self._front.reference(chunk)) for chunk in images.split(self.batch_size)]
        concept, special = (torch.cat(parts).to(images.device) for parts in zip(*rows, strict=True))
        bad = flagged(concept, special).float()
        raw = {"flagged": bad, "margin": concept.amax(1), "special_margin": special.amax(1)}
        return RewardOutput(scores=1 - bad if self.mode == "hard" else -raw["margin"], raw=raw)

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images; of mode "soft" alone."""
        if self.mode != "soft":
            raise InputError(f"reward safety: mode must be 'soft' to be differentiated, got {self.mode!r}")
        images = images_of(batch, self.name, self.requires)
        concept, _ = self._margins(self._front.differentiable(images))
        return -concept.amax(1).to(images.device)

    @property
    def _front(self) -> FrontEnd:
        return FrontEnd(self.net.config.vision_config.image_size)

    def _margins(self, pixels: Float[Tensor, "b 3 r r"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b s"]]:
        """Margins of concepts and of special-care concepts."""
        net = self.net
        unit = F.normalize(net.visual_projection(net.vision_model(pixels.to(self.device)).pooler_output).float())
        return (
            unit @ F.normalize(net.concept_embeds.float()).T - net.concept_embeds_weights.float(),
            unit @ F.normalize(net.special_care_embeds.float()).T - net.special_care_embeds_weights.float(),
        )


def flagged(concept: Float[Tensor, "b k"], special: Float[Tensor, "b s"]) -> Bool[Tensor, " b"]:
    """The checker's verdict on margins (cosine - threshold) of its concepts and its special-care concepts.

    Departs: The published loop also adds the adjustment to the special-care concepts after the first that fires, which
    cannot change the verdict.
    """
    care = (special.round(decimals=3) > 0).any(1, keepdim=True)
    return ((concept + ADJUSTMENT * care).round(decimals=3) > 0).any(1)
