"""CLIP beyond tests/test_rewards.py: text and its padding, pooling of both configs, precision, the full size."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.true_size import filled, vit_l_14
from diffalign.errors import InputError
from diffalign.rewards.clip import CLIPEncoder, CLIPParts, CLIPReward
from diffalign.types import DifferentiableReward, RewardBatch
from tests.builders import save_clip, tiny_clip, tiny_tokenizer
from tests.pointwise import PROMPTS, batch_of, check_full_size, check_gradient, check_independence, waves


@pytest.fixture(scope="module")
def parts() -> CLIPParts:
    return tiny_clip()


def test_what_every_pointwise_reward_holds(parts):
    check_independence(lambda size: CLIPReward(encoder=CLIPEncoder(parts=parts, batch_size=size)))
    check_gradient(CLIPReward(encoder=CLIPEncoder(parts=parts)), 100)
    assert isinstance(CLIPReward(), DifferentiableReward)  # by its face alone: nothing is read


def test_padding_does_not_change_a_prompts_embedding(parts):
    encoder = CLIPEncoder(parts=parts)
    alone = encoder.embed_texts(["fog"])
    beside = encoder.embed_texts(["fog", "a prompt that is a good deal longer than the other"])[:1]
    torch.testing.assert_close(beside, alone)
    tokens = parts.tokenizer(["fog"], padding="max_length", max_length=77, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.shape == (1, 77)
    for filler in (513, 0):  # the end token, as transformers pads, and 0, as open_clip does
        padded = parts.net.get_text_features(input_ids=torch.where(mask.bool(), ids, filler), attention_mask=mask)
        row = padded.pooler_output
        torch.testing.assert_close(row / row.norm(dim=1, keepdim=True), alone)


def test_legacy_and_new_configs_pool_at_the_same_token(parts):
    legacy = copy.deepcopy(parts.net)
    legacy.text_model.eos_token_id = 2  # what configs said before transformers 4.31: pool at the greatest id
    assert parts.net.text_model.eos_token_id == 513
    old = CLIPEncoder(parts=CLIPParts(net=legacy, processor=parts.processor, tokenizer=parts.tokenizer))
    texts = [*PROMPTS, " ".join("x" * 200)]
    torch.testing.assert_close(old.embed_texts(texts), CLIPEncoder(parts=parts).embed_texts(texts))
    shifted = copy.deepcopy(parts.net)
    shifted.text_model.eos_token_id = 512  # the start token: the check above would see another position
    other = CLIPEncoder(parts=CLIPParts(net=shifted, processor=parts.processor, tokenizer=parts.tokenizer))
    assert (other.embed_texts(texts) - old.embed_texts(texts)).abs().max() > 0.1


def test_a_longer_embedding_has_the_same_score(parts):
    scaled = copy.deepcopy(parts.net)
    scaled.visual_projection.weight.data *= 7
    scaled.text_projection.weight.data *= 0.3
    other = CLIPEncoder(parts=CLIPParts(net=scaled, processor=parts.processor, tokenizer=parts.tokenizer))
    batch = batch_of([0, 1, 2, 3])
    expected = CLIPReward(encoder=CLIPEncoder(parts=parts)).score(batch).scores
    torch.testing.assert_close(CLIPReward(encoder=other).score(batch).scores, expected)


def test_a_half_network_gives_float32_scores_and_keeps_its_temperature(parts):
    own = CLIPParts(net=copy.deepcopy(parts.net), processor=parts.processor, tokenizer=parts.tokenizer)
    own.net.logit_scale.data.fill_(4.6052)
    half = CLIPEncoder(parts=own, dtype="bfloat16")
    assert own.net.visual_projection.weight.dtype == torch.bfloat16
    assert half.logit_scale == pytest.approx(100.003, abs=1e-3)  # 98.8 if the exponent were bfloat16
    reward = CLIPReward(encoder=half, scale="cos")
    batch = batch_of([0, 1, 2, 3])
    scores = reward.score(batch).scores
    assert scores.dtype == torch.float32
    full = CLIPReward(encoder=CLIPEncoder(parts=parts), scale="cos").score(batch).scores
    torch.testing.assert_close(scores, full, atol=0.03, rtol=0)  # a handful of bfloat16 roundings of 1/256
    assert reward.version == "openai/clip-vit-large-patch14 in bfloat16, cos"
    images = batch.images.clone().requires_grad_()
    reward.differentiable_score(RewardBatch(images=images, prompts=batch.prompts)).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()


def test_versions_name_revision_and_precision():
    assert CLIPEncoder("a/b", revision="main", dtype="float16").version == "a/b@main in float16"
    assert CLIPEncoder("a/b").version == "a/b"
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        CLIPEncoder("a/b", dtype="bfloat")


def test_no_images_have_no_scores(parts):
    out = CLIPReward(encoder=CLIPEncoder(parts=parts)).score(RewardBatch(images=torch.zeros(0, 3, 32, 32), prompts=[]))
    assert out.scores.shape == (0,)


def test_images_that_were_divided_by_255_twice_are_refused_by_both_roads(parts):
    reward = CLIPReward(encoder=CLIPEncoder(parts=parts))
    batch = RewardBatch(images=waves(64, 64) / 255, prompts=["a"])
    for score in (reward.score, reward.differentiable_score):
        with pytest.raises(InputError, match="divided by 255 twice"):
            score(batch)


def test_processor_and_tokenizer_may_lie_elsewhere(parts, tmp_path):
    save_clip(parts, tmp_path / "both")
    parts.net.save_pretrained(tmp_path / "net")
    batch = batch_of([0, 1, 2, 3])
    expected = CLIPReward(str(tmp_path / "both")).score(batch).scores
    split = CLIPEncoder(str(tmp_path / "net"), processor=str(tmp_path / "both"))
    torch.testing.assert_close(CLIPReward(encoder=split).score(batch).scores, expected)
    with pytest.raises(InputError, match="must be a CLIP model"):
        CLIPReward(str(tmp_path / "net")).score(batch)


def test_a_file_without_a_weight_is_refused(parts, tmp_path):
    save_clip(parts, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "visual_projection.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"must hold all weights, got .* without visual_projection\.weight"):
        CLIPReward(str(tmp_path)).score(batch_of([0]))


@pytest.mark.slow
def test_clip_at_full_size():
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    net = filled(lambda: CLIPModel(CLIPConfig(**vit_l_14())))
    assert sum(p.numel() for p in net.parameters()) == 427_616_513
    assert net.text_model.eos_token_id == 49407
    net.text_model.eos_token_id = 513  # of the tiny tokenizer
    parts = CLIPParts(net=net, processor=CLIPImageProcessorPil(), tokenizer=tiny_tokenizer())
    reward = CLIPReward(encoder=CLIPEncoder(parts=parts))
    assert reward.encoder.width == 768
    assert parts.front.side == 224
    check_full_size(reward, 100)
