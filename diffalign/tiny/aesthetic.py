"""tiny-aesthetic: how tidy a picture looks, whatever it shows; a head on tiny-clip in the LAION predictor's format.

Tidy pictures are sharp, clean and vivid. A picture that is blurred, noisy or washed out is rated lower, from 10 down
to 1.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFilter
from torch import Tensor, nn

from diffalign.tiny import pretrain

WORST_BLUR, WORST_NOISE = 1.5, 0.15


def spoil(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """(the picture blurred, noisy and washed out by random amounts, its rating from 1 to 10)."""
    blur, noise, grey = (rng.uniform(0, 1, 3) * (rng.uniform(0, 1, 3) < 0.6)).tolist()
    image = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(WORST_BLUR * blur))
    pixels = np.asarray(image, dtype=np.float64)
    pixels = pixels + grey * (pixels.mean(2, keepdims=True) - pixels)
    pixels = pixels + 255 * WORST_NOISE * noise * rng.standard_normal(pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8), 10.0 - 3.0 * (blur + noise + grey)


class Head(nn.Module):
    """Affine layers with dropout between them and no activation, under LAION's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 64),
            nn.Dropout(0.2),
            nn.Linear(64, 32),
            nn.Dropout(0.2),
            nn.Linear(32, 16),
            nn.Dropout(0.1),
            nn.Linear(16, 8),
            nn.Linear(8, 1),
        )

    def forward(self, embedding: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        return self.layers(embedding)[:, 0]


@torch.no_grad()
def rated_embeddings(clip: Any, count: int, *, seed: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """(unit image embeddings of spoilt pictures, their ratings)."""
    pictures = pretrain.draw(count, seed=seed, split="train", care=pretrain.CATALOGUE)
    rng = np.random.default_rng(seed)
    spoilt = [spoil(picture, rng) for picture in pictures.pixels]
    pictures = pretrain.Pictures(np.stack([s for s, _ in spoilt]), pictures.captions)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pretrain.CLIP_MEAN, pretrain.CLIP_STD))
    parts = []
    for rows in torch.arange(count).split(256):
        out = clip.get_image_features(pixel_values=((pictures.batch(rows) + 1) / 2 - mean) / std)
        parts.append(nn.functional.normalize(out.pooler_output, dim=1))
    return torch.cat(parts), torch.tensor([r for _, r in spoilt])


def train_head(clip: Any, *, steps: int = 3000, seed: int = 5) -> Head:
    """The head that predicts ratings from tiny-clip's embeddings."""
    embeddings, ratings = rated_embeddings(clip, 8000, seed=41)
    torch.manual_seed(seed)
    head = Head(embeddings.shape[1])

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(ratings), (256,), generator=rng)
        return (head(embeddings[rows]) - ratings[rows].float()).square().mean()

    return pretrain.descend([head], loss, steps=steps, lr=3e-3, seed=seed, name="tiny-aesthetic")[0]
