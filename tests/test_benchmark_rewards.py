"""The benchmark of rewards: both roads do the same work, at the sizes that it names."""

from pathlib import Path

import pytest
import torch

from benchmarks import rewards, true_size
from diffalign.rewards.clip import CLIPParts

CLIP_PARTS = true_size.clip_parts


def small_clip(sizes: dict) -> CLIPParts:
    """The same with one narrow layer a tower."""
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "patch_size": 32, "image_size": 224}
    return CLIP_PARTS({"text_config": tiny, "vision_config": vision, "projection_dim": 768})


@pytest.mark.parametrize("name", ["pickscore", "aesthetic"])
def test_both_roads_score_an_image_alike(name, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(true_size, "clip_parts", small_clip)
    rival = rewards.RIVALS[name]("float32", tmp_path)
    batch = rewards.batch_of(2)
    pictures = rewards._pictures(batch.images)
    with torch.no_grad():
        singly = [float(rival.singly(image, prompt)) for image, prompt in zip(pictures, batch.prompts, strict=True)]
    scores = rival.ours(batch).scores
    torch.testing.assert_close(scores, torch.tensor(singly), rtol=1e-3, atol=1e-4)


def test_a_table_has_a_row_for_every_reward_and_dtype(monkeypatch):
    monkeypatch.setattr(true_size, "clip_parts", small_clip)
    rows = rewards.measure(["clip"], images=2, rounds=1, threads=1, dtypes=("float32", "bfloat16"))
    assert [(row["reward"], row["dtype"]) for row in rows] == [("clip", "float32"), ("clip", "bfloat16")]
    assert all(row["images_a_second"] > 0 for row in rows)


def test_the_sizes_are_the_published_ones():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in CLIPModel(CLIPConfig(**sizes())).parameters())
            for sizes in (true_size.vit_l_14, true_size.vit_h_14)
        ]
    assert counts == [427_616_513, 986_109_441]
