"""PickScore: the model's own logits as oracle, its scales, its probability and its evaluation protocol."""

import math

import pytest
import torch

from benchmarks.true_size import filled, vit_h_14
from diffalign.errors import InputError
from diffalign.rewards.clip import CLIPEncoder, CLIPParts
from diffalign.rewards.pickscore import (
    PROCESSOR,
    PickScoreReward,
    preference_probability,
)
from diffalign.types import DifferentiableReward, RewardBatch
from tests.builders import save_clip, tiny_clip, tiny_tokenizer
from tests.pointwise import PROMPTS, batch_of, check_full_size, check_gradient, check_independence, waves


@pytest.fixture(scope="module")
def parts() -> CLIPParts:
    parts = tiny_clip()
    parts.net.logit_scale.data.fill_(math.log(98.3))  # fine-tuned: not exactly 100
    return parts


def test_what_every_pointwise_reward_holds(parts):
    check_independence(lambda size: PickScoreReward(encoder=CLIPEncoder(parts=parts, batch_size=size)))
    check_gradient(PickScoreReward(encoder=CLIPEncoder(parts=parts)), 98.3)
    assert isinstance(PickScoreReward(), DifferentiableReward)


def test_score_is_the_diagonal_of_the_models_own_logits(parts):
    images = waves(32, 32, 4)
    pixels = parts.processor(list((images * 255).round().byte().numpy()), return_tensors="pt")["pixel_values"]
    tokens = parts.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    expected = parts.net(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    out = PickScoreReward(encoder=CLIPEncoder(parts=parts)).score(RewardBatch(images=images, prompts=PROMPTS))
    torch.testing.assert_close(out.scores, expected)
    torch.testing.assert_close(out.raw["cos"], expected / 98.3)


def test_scales_differ_by_their_factor_and_are_named(parts):
    encoder = CLIPEncoder("a/b", parts=parts)
    rewards = {scale: PickScoreReward(encoder=encoder, scale=scale) for scale in ("logit", "cos", "div26")}
    scores = {scale: reward.score(batch_of([0, 1, 2, 3])).scores for scale, reward in rewards.items()}
    torch.testing.assert_close(scores["logit"], 98.3 * scores["cos"])
    torch.testing.assert_close(scores["div26"], scores["logit"] / 26)
    assert [reward.version for reward in rewards.values()] == ["a/b, logit", "a/b, cos", "a/b, div26"]
    assert rewards["cos"].range == (-1.0, 1.0)
    assert rewards["div26"].range == (-math.inf, math.inf)
    with pytest.raises(InputError, match="must be one of logit, cos, div26, got 'x100'"):
        PickScoreReward(encoder=encoder, scale="x100")


def test_the_published_model_takes_laions_processor_and_another_its_own(parts, tmp_path):
    assert PickScoreReward().encoder.processor == PROCESSOR == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert PickScoreReward().version == "yuvalkirstain/PickScore_v1, logit"
    save_clip(parts, tmp_path)
    batch = batch_of([0, 1, 2, 3])
    expected = PickScoreReward(encoder=CLIPEncoder(parts=parts)).score(batch).scores
    torch.testing.assert_close(PickScoreReward(str(tmp_path)).score(batch).scores, expected)


@pytest.mark.parametrize(("gap", "probability"), [(0.405, 0.6), (0.847, 0.7), (2.197, 0.9)])
def test_a_difference_of_scores_is_a_logit(gap, probability):
    a, b = torch.tensor([21.0 + gap]), torch.tensor([21.0])
    assert preference_probability(a, b).item() == pytest.approx(probability, abs=2e-4)  # rewards.md 4
    torch.testing.assert_close(preference_probability(a, b) + preference_probability(b, a), torch.ones(1))
    torch.testing.assert_close(preference_probability(a + 5, b + 5), preference_probability(a, b), atol=1e-5, rtol=0)
    torch.testing.assert_close(preference_probability(a, b), torch.stack([a, b], 1).softmax(1)[:, 0])


def test_the_architecture_is_open_clips_vit_h_14_in_transformers():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        net = CLIPModel(CLIPConfig(**vit_h_14()))
    assert sum(p.numel() for p in net.parameters()) == 986_109_441
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["visual_projection.weight"] == (1024, 1280)
    assert shapes["text_projection.weight"] == (1024, 1024)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (257, 1280)
    assert shapes["text_model.embeddings.token_embedding.weight"] == (49408, 1024)


@pytest.mark.slow
def test_pickscore_at_full_size():
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    net = filled(lambda: CLIPModel(CLIPConfig(**vit_h_14())))
    net.text_model.eos_token_id = 513  # of the tiny tokenizer
    parts = CLIPParts(net=net, processor=CLIPImageProcessorPil(), tokenizer=tiny_tokenizer())
    reward = PickScoreReward(encoder=CLIPEncoder(parts=parts))
    check_full_size(reward, reward.encoder.logit_scale)
