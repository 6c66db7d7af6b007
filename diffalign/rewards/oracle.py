"""The tiny world's truth as a reward: what a caption asks for, measured from pixels, without a network."""

import torch

from diffalign.errors import InputError
from diffalign.rewards.inputs import images_of
from diffalign.tiny import oracle
from diffalign.tiny.scenes import SIDE
from diffalign.types import Modality, RewardBatch, RewardOutput


class OracleReward:
    """Mean of the oracle's attributes, in [0, 1]; `raw` holds each of them.

    Takes 64x64 pictures of tiny-world captions only.
    """

    name = "oracle"
    version = "tiny world, 1"
    requires = frozenset({"images", "prompts"})
    modality: Modality = "image"
    differentiable = False
    licence = "-"
    range = (0.0, 1.0)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores on the images' device.

        Raises:
            InputError: A prompt that is not a caption of the tiny world, or images that are not 64x64.
        """
        images = images_of(batch, self.name, self.requires)
        if images.shape[2:] != (SIDE, SIDE):
            raise InputError(f"reward 'oracle' must get {SIDE}x{SIDE} images, got {tuple(images.shape[2:])}")
        pictures = images.permute(0, 2, 3, 1).float().cpu().numpy()
        rows = []
        for row, (picture, prompt) in enumerate(zip(pictures, batch.prompts or [], strict=True)):
            try:
                rows.append(oracle.judge(picture, prompt))
            except ValueError as error:
                raise InputError(f"reward 'oracle', prompt {row}: {error}") from error
        columns = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32, device=images.device)
            for name in (*oracle.ATTRIBUTES, "total")
        }
        return RewardOutput(scores=columns.pop("total"), raw=columns)
