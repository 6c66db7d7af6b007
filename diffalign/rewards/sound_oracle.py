"""The truth of the tiny world's sounds as a reward: what a caption asks for, measured without a network."""

import torch

from diffalign.errors import InputError
from diffalign.rewards.audio import mono_clips, silent
from diffalign.tiny import hearing
from diffalign.tiny.sounds import RATE_HZ
from diffalign.types import Modality, RewardBatch, RewardOutput


class SoundOracleReward:
    """Mean of the ear's attributes, in [0, 1]; `raw` holds each of them, and `silent`.

    Takes mono clips at 16 kHz of at least a quarter of a second, with captions of the tiny world's sounds. Silence has
    nothing of what was asked, and scores 0.
    """

    name = "sound_oracle"
    version = "tiny world's sounds, 1"
    requires = frozenset({"audio", "prompts", "sample_rate"})
    modality: Modality = "audio"
    differentiable = False
    licence = "-"
    range = (0.0, 1.0)

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores on the clips' device.

        Raises:
            InputError: A prompt that is not a caption of the world's sounds; clips that are not mono, too short, at
                another rate, or not finite.
        """
        clips = mono_clips(batch, self.name, rate_hz=RATE_HZ, shortest=hearing.SHORTEST, requires=self.requires)
        rows = []
        for row, (clip, prompt) in enumerate(zip(clips, batch.prompts or [], strict=True)):
            try:
                rows.append(hearing.judge(clip.double().cpu().numpy(), prompt))
            except ValueError as error:
                raise InputError(f"reward 'sound_oracle', prompt {row}: {error}") from error
        device = clips[0].device if clips else None
        columns = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32, device=device)
            for name in (*hearing.ATTRIBUTES, "total")
        }
        scores = columns.pop("total")
        return RewardOutput(scores=scores, raw=columns | {"silent": silent(batch.audio or ()).to(scores)})
