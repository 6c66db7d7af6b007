"""ImageReward: timm's ViT and transformers' BERT as oracles under the published names; pairs, cuts, damaged files."""

import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.errors import InputError
from diffalign.rewards import imagereward
from diffalign.rewards.blip import BLIPSizes
from diffalign.rewards.imagereward import ImageRewardParts, ImageRewardReward, assemble, expected_shapes
from diffalign.types import DifferentiableReward, RewardBatch

TINY = BLIPSizes(
    image_size=32,
    patch_size=8,
    vision_width=24,
    vision_layers=2,
    vision_heads=2,
    text_width=16,
    text_layers=2,
    text_heads=2,
    vocabulary=64,
    positions=48,
)
PROMPTS = ["a red circle", "two blue squares", "fog", "a red circle"]


def word_pieces() -> Any:
    """A BERT tokenizer whose word pieces are single letters."""
    from transformers import BertTokenizer

    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    return BertTokenizer(
        vocab={piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    )


def random_state(sizes: BLIPSizes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names, those that are not read included."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(sizes).items():
        norm = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "LayerNorm.weight"))
        spread = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        state[name] = norm + spread * torch.randn(shape, generator=rng)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(sizes.positions)[None]
    state["blip.vision_proj.weight"] = torch.zeros(256, sizes.vision_width)
    state["blip.text_proj.bias"] = torch.zeros(256)
    return state


@pytest.fixture(scope="module")
def parts() -> ImageRewardParts:
    return assemble(random_state(TINY), word_pieces(), TINY)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 40, 48, generator=torch.Generator().manual_seed(1)) ** 2


@pytest.fixture(scope="module")
def batch(images) -> RewardBatch:
    return RewardBatch(images=images, prompts=PROMPTS)


# --- the published file


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def test_names_and_shapes_are_those_of_the_published_file():
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    expected: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, 1024),
        f"{vision}.pos_embed": (1, 197, 1024),
        f"{vision}.patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{vision}.patch_embed.proj.bias": (1024,),
        **norm(f"{vision}.norm", 1024),
        f"{text}.embeddings.word_embeddings.weight": (30524, 768),
        f"{text}.embeddings.position_embeddings.weight": (512, 768),
        **norm(f"{text}.embeddings.LayerNorm", 768),
    }
    for i in range(24):
        block = f"{vision}.blocks.{i}"
        expected |= norm(f"{block}.norm1", 1024) | norm(f"{block}.norm2", 1024)
        expected |= linear(f"{block}.attn.qkv", 3072, 1024) | linear(f"{block}.attn.proj", 1024, 1024)
        expected |= linear(f"{block}.mlp.fc1", 4096, 1024) | linear(f"{block}.mlp.fc2", 1024, 4096)
    for i in range(12):
        layer = f"{text}.encoder.layer.{i}"
        for kind, width in (("attention", 768), ("crossattention", 1024)):
            expected |= linear(f"{layer}.{kind}.self.query", 768, 768)
            expected |= linear(f"{layer}.{kind}.self.key", 768, width) | linear(
                f"{layer}.{kind}.self.value", 768, width
            )
            expected |= linear(f"{layer}.{kind}.output.dense", 768, 768) | norm(f"{layer}.{kind}.output.LayerNorm", 768)
        expected |= linear(f"{layer}.intermediate.dense", 3072, 768) | linear(f"{layer}.output.dense", 768, 3072)
        expected |= norm(f"{layer}.output.LayerNorm", 768)
    for place, out, into in ((0, 1024, 768), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        expected |= linear(f"mlp.layers.{place}", out, into)
    assert expected_shapes(BLIPSizes()) == expected
    assert (BLIPSizes().vision_heads, BLIPSizes().text_heads) == (16, 12)  # in no shape
    projections = (1024 + 1) * 256 + (768 + 1) * 256
    weights = sum(math.prod(shape) for shape in expected.values()) + projections
    assert round(4 * weights / 1e9, 2) == 1.79  # gigabytes of the published file


@pytest.mark.parametrize(
    "name",
    [
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "mlp.layers.7.weight",
    ],
)
def test_a_missing_misshapen_or_foreign_weight_is_an_error_that_names_it(name):
    state = random_state(TINY)
    with pytest.raises(InputError, match=f"without {name}"):
        assemble({key: value for key, value in state.items() if key != name}, None, TINY)
    with pytest.raises(InputError, match=rf"must have {name} of shape .*, got \(2, 3\)"):
        assemble({**state, name: torch.zeros(2, 3)}, None, TINY)
    beyond = name.replace("layers.7", "layers.9").replace("blocks.1", "blocks.2").replace("layer.0", "layer.2")
    with pytest.raises(InputError, match=f"no weights of another network, got {beyond}"):
        assemble({**state, beyond: torch.zeros(1)}, None, TINY)


@pytest.mark.parametrize("file", ["ImageReward.pt", "ImageReward.safetensors", "model.safetensors"])
def test_a_file_or_folder_scores_as_from_memory(parts, batch, tmp_path, monkeypatch, file):
    monkeypatch.setattr(imagereward, "BLIPSizes", lambda: TINY)
    state = random_state(TINY)
    if file.endswith(".pt"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    parts.tokenizer.save_pretrained(tmp_path)
    expected = ImageRewardReward(parts=parts).score(batch).scores
    for place in (tmp_path, tmp_path / file):
        torch.testing.assert_close(ImageRewardReward(str(place)).score(batch).scores, expected)


def test_files_that_cannot_be_read_are_refused(tmp_path, batch):
    def refused(place: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            ImageRewardReward(place).score(batch)

    refused(str(tmp_path), "folder must hold one of ImageReward.safetensors, model.safetensors, ImageReward.pt")
    refused("no/such/folder", r"a Hub id with ImageReward.pt, got 'no/such/folder'")
    torch.save({"mlp": Path("x")}, tmp_path / "ImageReward.pt")
    refused(str(tmp_path), "weights must be readable")
    torch.save([torch.zeros(1)], tmp_path / "ImageReward.pt")
    refused(str(tmp_path), "weights must be a state dict, got list")
    (tmp_path / "ImageReward.pt").write_bytes(b"<html>404</html>")
    refused(str(tmp_path), "weights must be readable")
    (tmp_path / "model.safetensors").write_bytes(b"<html>404</html>")
    refused(str(tmp_path), "weights must be readable")


def test_nothing_is_read_before_the_first_score():
    reward = ImageRewardReward(revision="abc")
    assert isinstance(reward, DifferentiableReward)
    assert reward.version == "THUDM/ImageReward@abc"


# --- the network


def test_the_visual_encoder_is_timms_vit_with_the_published_names(parts, images):
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )
    prefix = "blip.visual_encoder."
    state = {name.removeprefix(prefix): v for name, v in random_state(TINY).items() if name.startswith(prefix)}
    vit.load_state_dict(state, strict=True)
    pixels = ImageRewardReward(parts=parts)._front.reference(images)
    with torch.no_grad():
        expected = vit.eval().forward_features(pixels)
        seen = parts.net.visual_encoder(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(seen, expected, atol=2e-5, rtol=1e-5)


def test_the_feature_is_what_a_two_way_bert_with_cross_attention_makes_of_its_first_token(images):
    from transformers import BertConfig, BertModel

    sizes = BLIPSizes(**{**vars(TINY), "vision_width": 16})  # transformers' BERT takes images of its own width only
    state = random_state(sizes)
    ours = assemble(state, word_pieces(), sizes)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        is_decoder=True,
        add_cross_attention=True,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    prefix = "blip.text_encoder."
    theirs = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    del theirs["embeddings.position_ids"]
    kinds = "embeddings.token_type_embeddings.weight"  # BLIP has none
    bert.load_state_dict({**theirs, kinds: torch.zeros(2, 16)}, strict=True)
    reward = ImageRewardReward(parts=ours)
    tokens, mask = reward._tokens(PROMPTS)
    assert tokens.shape == (4, 35)
    with torch.no_grad():
        pixels = reward._front.reference(images)
        seen = ours.net.visual_encoder(pixel_values=pixels).last_hidden_state
        two_way = torch.where(mask[:, None, None] == 1, 0.0, -1e30).expand(4, 1, 35, 35)
        read = bert(input_ids=tokens, attention_mask=two_way, encoder_hidden_states=seen, use_cache=False)
        torch.testing.assert_close(ours.net(pixels, tokens, mask), read.last_hidden_state[:, 0], atol=2e-5, rtol=1e-5)


def test_the_head_is_the_layers_one_after_the_other_and_dropouts_do_nothing(parts):
    layers = nn.Sequential(
        nn.Linear(16, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).double()
    state = {k.removeprefix("mlp.layers."): v for k, v in random_state(TINY).items() if k.startswith("mlp.")}
    layers.load_state_dict(state, strict=True)
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = layers.eval()(features.double())[:, 0].float()
    torch.testing.assert_close(parts.head(features), expected)


def test_training_mode_changes_nothing(parts, batch):
    reward = ImageRewardReward(parts=parts)
    expected = reward.score(batch).scores
    parts.net.train()
    torch.testing.assert_close(reward.score(batch).scores, expected, rtol=0, atol=0)
    parts.net.eval()


@pytest.mark.parametrize(
    ("output", "score"), [(0.16717362830052426, 0.0), (1.2005131249076314, 1.0), (-0.8661658683060829, -1.0)]
)
def test_scores_are_standardised_by_the_published_constants(batch, output, score):
    state = random_state(TINY)
    state["mlp.layers.7.weight"].zero_()
    state["mlp.layers.7.bias"].fill_(output)
    out = ImageRewardReward(parts=assemble(state, word_pieces(), TINY)).score(batch)
    torch.testing.assert_close(out.scores, torch.full((4,), score), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.raw["mlp"], torch.full((4,), output))


# --- pairs


def test_an_image_is_paired_with_its_own_prompt(parts, images, batch):
    whole = ImageRewardReward(parts=parts).score(batch).scores
    for i in range(4):
        alone = RewardBatch(images=images[i : i + 1], prompts=PROMPTS[i : i + 1])
        torch.testing.assert_close(ImageRewardReward(parts=parts).score(alone).scores, whole[i : i + 1])
    other = ImageRewardReward(parts=parts).score(RewardBatch(images=images, prompts=["fog"] * 4)).scores
    assert ((other - whole).abs() > 1e-3).tolist() == [True, True, False, True]
    same_image = RewardBatch(images=images[:1].expand(4, -1, -1, -1), prompts=PROMPTS)
    by_prompt = ImageRewardReward(parts=parts).score(same_image).scores
    torch.testing.assert_close(by_prompt[0], by_prompt[3])
    assert (by_prompt[1:3] - by_prompt[0]).abs().min() > 1e-3


def test_scores_do_not_depend_on_batch_order_or_neighbours(parts, images, batch):
    def score(order: list[int], batch_size: int) -> Tensor:
        reward = ImageRewardReward(parts=parts, batch_size=batch_size)
        return reward.score(RewardBatch(images=images[order], prompts=[PROMPTS[i] for i in order])).scores

    whole = score([0, 1, 2, 3], 32)
    torch.testing.assert_close(score([0, 1, 2, 3], 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score([3, 1, 1, 2], 3), whole[[3, 1, 1, 2]], rtol=1e-4, atol=1e-5)


def test_padding_is_not_read(images, batch, parts):
    state = random_state(TINY)
    state["blip.text_encoder.embeddings.word_embeddings.weight"][0] = 100.0
    changed = ImageRewardReward(parts=assemble(state, word_pieces(), TINY)).score(batch).scores
    torch.testing.assert_close(changed, ImageRewardReward(parts=parts).score(batch).scores)


def test_prompts_beyond_35_word_pieces_are_cut_and_counted(parts, images):
    fits, cut, cut_elsewhere = "a" * 33, "a" * 33 + "b", "a" * 33 + "cd e"
    prompts = [fits, cut, cut_elsewhere, "fog"]
    out = ImageRewardReward(parts=parts).score(RewardBatch(images=images[:1].expand(4, -1, -1, -1), prompts=prompts))
    assert out.raw["cut"].tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(out.scores[:3], out.scores[:1].expand(3))
    assert ImageRewardReward(parts=parts).cut(prompts) == [False, True, True, False]


# --- gradient and doors


def test_gradient_reaches_the_pixels_of_its_own_pair_only(parts, images):
    x = images.clone().requires_grad_()
    scores = ImageRewardReward(parts=parts).differentiable_score(RewardBatch(images=x, prompts=PROMPTS))
    [grad] = torch.autograd.grad(scores[1], x)
    assert (grad.abs().amax((1, 2, 3)) > 0).tolist() == [False, True, False, False]
    assert grad.isfinite().all()
    assert all(not p.requires_grad for p in parts.net.parameters())


def test_the_gradient_is_the_slope_of_the_score(parts, images):
    reward = ImageRewardReward(parts=parts)
    x = (0.1 + 0.8 * images[:1]).requires_grad_()
    held = {"prompts": PROMPTS[:1]}
    [grad] = torch.autograd.grad(reward.differentiable_score(RewardBatch(images=x, **held)).sum(), x)
    step = 1e-3 * grad / grad.norm()
    up, down = (reward.differentiable_score(RewardBatch(images=(x + s * step).detach(), **held)) for s in (5, -5))
    torch.testing.assert_close((up - down) / 1e-2, grad.norm()[None], rtol=0.02, atol=0)


def test_both_front_ends_agree_on_smooth_pictures(parts):
    y, x = torch.meshgrid(*[torch.arange(64) / 64] * 2, indexing="ij")
    smooth = torch.stack([torch.stack([0.5 + 0.4 * torch.sin(6 * (a * x + k * y)) for k in range(3)]) for a in (1, 2)])
    reward, batch = ImageRewardReward(parts=parts), RewardBatch(images=smooth, prompts=PROMPTS[:2])
    torch.testing.assert_close(reward.differentiable_score(batch), reward.score(batch).scores, atol=5e-3, rtol=0)


def test_wrong_images_and_prompts_are_refused(parts, images):
    reward = ImageRewardReward(parts=parts)
    with pytest.raises(InputError, match="must get prompts, got none"):
        reward.score(RewardBatch(images=images))
    with pytest.raises(InputError, match="one entry per image, 4, got 1"):
        reward.score(RewardBatch(images=images, prompts=["a"]))
    with pytest.raises(InputError, match=r"RGB in \[0, 1\]"):
        reward.differentiable_score(RewardBatch(images=images * 255, prompts=PROMPTS))


@pytest.mark.slow
def test_at_its_true_size_with_random_weights_from_a_file(tmp_path):
    torch.save(random_state(BLIPSizes()), tmp_path / "ImageReward.pt")
    word_pieces().save_pretrained(tmp_path)
    reward = ImageRewardReward(str(tmp_path))
    images = torch.rand(3, 3, 256, 320, generator=torch.Generator().manual_seed(0))
    whole = reward.score(RewardBatch(images=images, prompts=PROMPTS[:3])).scores
    assert whole.isfinite().all()
    reward.batch_size = 1
    single = reward.score(RewardBatch(images=images.flip(0), prompts=PROMPTS[:3][::-1])).scores
    torch.testing.assert_close(single.flip(0), whole, rtol=1e-4, atol=1e-4)
    x = images[:1].clone().requires_grad_()
    reward.differentiable_score(RewardBatch(images=x, prompts=PROMPTS[:1])).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
