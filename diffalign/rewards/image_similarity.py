"""Similarity to given images: the mean cosine between the embeddings of an image and of its references."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.inputs import images_of
from diffalign.types import Embedded, MediaEncoder, Modality, RewardBatch, RewardOutput

_KEPT = 10_000
"""Embeddings of references that are kept; beyond that the one not used for longest is dropped."""


class ImageSimilarityReward:
    """Mean cosine of the image's embedding with those of its reference images: CLIP-I or DINO, by the encoder.

    "dino" (facebook/dino-vits16) asks for the same individual; "clip:openai/clip-vit-base-patch32" is content with the
    same kind of thing. The mean runs over all references of a sample, not over the nearest; `raw` holds `cos`. A copy
    of the reference scores 1: similarity says nothing of whether a prompt is followed.

    Paper: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", arXiv
    2208.12242, section 4.1.
    """

    name = "image_similarity"
    requires = frozenset({"images", "references"})
    modality: Modality = "image"
    differentiable = True
    licence = "of the encoder: Apache-2.0 (DINO), MIT (CLIP)"
    range = (-1.0, 1.0)

    def __init__(
        self,
        model: str = "dino",
        *,
        encoder: str | MediaEncoder | None = None,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Takes an `encoder` as it is, or the spec of one, for which `model` is another name."""
        chosen = model if encoder is None else encoder
        options: dict[str, Any] = {"batch_size": batch_size, "device": device}
        given = {key: value for key, value in options.items() if value is not None}
        self.encoder = rewards.load_encoder(chosen, **given) if isinstance(chosen, str) else chosen
        if self.encoder.modality != "image":
            raise InputError(f"reward image_similarity: encoder must be of images, got one of {self.encoder.modality}")
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def version(self) -> str:
        return self.encoder.version

    def to(self, device: torch.device | str) -> "ImageSimilarityReward":
        if isinstance(self.encoder, rewards.OnDevice):
            self.encoder.to(device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores by the reference front end, on the images' device."""
        cos = self._cos(self.encoder.embed(self._checked(batch)), batch)
        return RewardOutput(scores=cos, raw={"cos": cos})

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Scores by the tensor front end, with gradient to the images; the references stay as `score` sees them."""
        return self._cos(self.encoder.embed_with_graph(self._checked(batch)), batch)

    def _checked(self, batch: RewardBatch) -> RewardBatch:
        """The images alone."""
        images = images_of(batch, self.name, self.requires)
        empty = [row for row, held in enumerate(batch.references or []) if not held]
        if empty:
            raise InputError(f"references must hold at least one image a sample, got none for samples {empty[:8]}")
        return RewardBatch(images=images)

    def _cos(self, embedded: Embedded, batch: RewardBatch) -> Float[Tensor, " b"]:
        """Mean of the cosines: the product of the unit row with the mean of its references' unit rows."""
        references = batch.references or []
        known = self._embedded([image for held in references for image in held])
        means = torch.stack([rows.mean(0) for rows in known.split([len(held) for held in references])])
        return (F.normalize(embedded.rows, dim=1) * means.to(embedded.rows.device)).sum(1)

    def _embedded(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> Float[Tensor, "n d"]:
        """Unit rows of references; each distinct image is embedded once, those of one size together."""
        keys = [_key(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._known}
        for shape in dict.fromkeys(image.shape for image in new.values()):
            same = {key: image for key, image in new.items() if image.shape == shape}
            try:
                rows = self.encoder.embed(RewardBatch(images=torch.stack([i.float() for i in same.values()]))).rows
            except InputError as error:
                raise InputError(f"references: {error}") from error
            self._known.update(zip(same, F.normalize(rows, dim=1).cpu(), strict=True))
        rows = torch.stack([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return rows


def _key(image: Float[Tensor, "3 _ _"]) -> str:
    """What two references share if and only if they are the same image."""
    pixels = image.detach().float().cpu().contiguous()
    return f"{tuple(image.shape)} {hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}"
