"""DINO's image embeddings, for similarity between images: trained without labels, it tells one dog from another."""

from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.rewards.frontend import IMAGENET_MEAN, IMAGENET_STD, FrontEnd
from diffalign.rewards.inputs import images_of
from diffalign.rewards.networks import pinned, whole_network
from diffalign.types import Embedded, Modality, RewardBatch

DEFAULT_MODEL = "facebook/dino-vits16"


class DINOEncoder:
    """The [CLS] token after the last layer norm of a ViT trained by DINO, not normalised to unit length.

    The shorter side is resized to 8/7 of the network's side (256 for 224), bicubic, then the centre is cut out. Weights
    are read at the first use, from safetensors where there are, else without running code.

    Hub: facebook/dino-vits16 (Apache-2.0).
    Paper: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294.
    """

    modality: Modality = "image"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        net: Any = None,
    ) -> None:
        """Names a folder or a Hub id; or takes a transformers `ViTModel` as `net`."""
        self.model, self.revision = model, revision
        self.batch_size = batch_size
        self.device = torch.device(device)
        if net is not None:
            self.net = net.eval().requires_grad_(False)
            self.to(device)

    @cached_property
    def net(self) -> Any:
        from transformers import ViTModel

        read = partial(ViTModel.from_pretrained, add_pooling_layer=False)
        net = whole_network(read, self.model, self.revision, where="encoder dino: model", kind="a ViT")
        return net.to(self.device)

    @property
    def version(self) -> str:
        return f"{pinned(self.model, self.revision)}, [CLS]"

    @property
    def width(self) -> int:
        return int(self.net.config.hidden_size)

    def to(self, device: torch.device | str) -> "DINOEncoder":
        self.device = torch.device(device)
        if "net" in self.__dict__:
            self.net.to(self.device)
        return self

    @torch.no_grad()
    def embed(self, batch: RewardBatch) -> Embedded:
        """One row an image, by the reference front end."""
        images = images_of(batch, self.version, frozenset())
        rows = [self._features(self._front.reference(chunk)) for chunk in images.split(self.batch_size)]
        return Embedded(rows=torch.cat(rows).to(images.device), counts=(1,) * len(images))

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """One row an image, by the tensor front end."""
        images = images_of(batch, self.version, frozenset())
        rows = self._features(self._front.differentiable(images))
        return Embedded(rows=rows.to(images.device), counts=(1,) * len(images))

    @property
    def _front(self) -> FrontEnd:
        side = int(self.net.config.image_size)
        return FrontEnd(round(side * 8 / 7), crop=side, mean=IMAGENET_MEAN, std=IMAGENET_STD, odd_margin="even")

    def _features(self, pixels: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b d"]:
        return self.net(pixels.to(self.device)).last_hidden_state[:, 0].float()
