"""Similarity to references and the DINO encoder: timm's ViT as oracle, identities of cosines, published names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.clip import CLIPEncoder
from diffalign.rewards.dino import DINOEncoder
from diffalign.rewards.frontend import IMAGENET_MEAN, IMAGENET_STD
from diffalign.rewards.image_similarity import ImageSimilarityReward
from diffalign.types import Embedded, MediaEncoder, RewardBatch
from tests.builders import tiny_clip

TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
TRUE = {"image_size": 224, "patch_size": 16, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}


def build(sizes: dict[str, int], heads: int) -> Any:
    """A ViT with random weights and without a pooler."""
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ViTModel(ViTConfig(**sizes, num_attention_heads=heads), add_pooling_layer=False).eval()
        if sizes == TINY:
            for parameter in net.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
    return net


def published(net: Any) -> dict[str, torch.Tensor]:
    """The state dict under the names of facebook/dino-vits16's file."""
    names = (
        ("layers.", "encoder.layer."),
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    )
    state = {}
    for name, value in net.state_dict().items():
        for new, old in names:
            name = name.replace(new, old)
        state[name] = value
    return state


def save(net: Any, folder: Path, drop: str | None = None) -> None:
    state = {name: value.contiguous() for name, value in published(net).items() if name != drop}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.config.to_dict(), default=str))


@pytest.fixture(scope="module")
def dino() -> DINOEncoder:
    return DINOEncoder(net=build(TINY, 2))


@pytest.fixture(scope="module")
def clip() -> CLIPEncoder:
    return CLIPEncoder(parts=tiny_clip())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(4, 3, 48, 40, generator=torch.Generator().manual_seed(0)) ** 2


class Counting:
    """An encoder that notes how many images it has seen."""

    modality = "image"
    version = "counting"
    width = 16

    def __init__(self, encoder: MediaEncoder) -> None:
        self.encoder, self.seen = encoder, 0

    def embed(self, batch: RewardBatch) -> Embedded:
        self.seen += len(batch)
        return self.encoder.embed(batch)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        self.seen += len(batch)
        return self.encoder.embed_with_graph(batch)


# --- the encoder


def test_dino_is_an_encoder(dino, images):
    assert isinstance(dino, MediaEncoder)
    out = dino.embed(RewardBatch(images=images))
    assert out.rows.shape == (4, dino.width)
    assert out.counts == (1,) * 4


def test_dino_sees_the_middle_of_a_256_pixel_image_in_imagenets_colours():
    with torch.device("meta"):
        front = DINOEncoder(net=build(TRUE, 6), device="meta")._front
    assert (front.size, front.resize, front.side, front.filter) == (256, "shortest", 224, "bicubic")
    assert (front.mean, front.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_published_weights_give_the_embedding_that_timm_gives(dino, images, tmp_path):
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    state = published(dino.net)
    theirs = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    parts = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for kind in ("weight", "bias"):
        theirs[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(2):
            for new, old in parts.items():
                theirs[f"blocks.{i}.{new}.{kind}"] = state[f"encoder.layer.{i}.{old}.{kind}"]
            three = [state[f"encoder.layer.{i}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            theirs[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(three)
    vit.load_state_dict(theirs, strict=True)
    save(dino.net, tmp_path)
    read = DINOEncoder(str(tmp_path))
    with torch.no_grad():
        expected = vit.eval().forward_features(read._front.reference(images))[:, 0]
    torch.testing.assert_close(read.embed(RewardBatch(images=images)).rows, expected, atol=2e-5, rtol=1e-5)


def test_dinos_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        held = {name: tuple(value.shape) for name, value in published(build(TRUE, 6)).items()}
    expected = {
        "embeddings.cls_token": (1, 1, 384),
        "embeddings.position_embeddings": (1, 197, 384),
        "embeddings.patch_embeddings.projection.weight": (384, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (384,),
        "layernorm.weight": (384,),
        "layernorm.bias": (384,),
    }
    shapes = {
        "attention.attention.query": (384, 384),
        "attention.attention.key": (384, 384),
        "attention.attention.value": (384, 384),
        "attention.output.dense": (384, 384),
        "intermediate.dense": (1536, 384),
        "output.dense": (384, 1536),
        "layernorm_before": (384,),
        "layernorm_after": (384,),
    }
    for i in range(12):
        for part, shape in shapes.items():
            expected |= {
                f"encoder.layer.{i}.{part}.weight": shape,
                f"encoder.layer.{i}.{part}.bias": shape[:1],
            }
    assert held == expected


def test_a_file_without_a_weight_is_refused(dino, images, tmp_path):
    save(dino.net, tmp_path, drop="encoder.layer.1.attention.attention.key.weight")
    with pytest.raises(InputError, match="must hold all weights"):
        DINOEncoder(str(tmp_path)).embed(RewardBatch(images=images))
    with pytest.raises(InputError, match="no/such/folder"):
        DINOEncoder("no/such/folder").embed(RewardBatch(images=images))


def test_dinos_rows_do_not_depend_on_the_batch(dino, images):
    whole = dino.embed(RewardBatch(images=images)).rows
    small = DINOEncoder(net=dino.net, batch_size=1).embed(RewardBatch(images=images[[3, 0, 0]])).rows
    torch.testing.assert_close(small, whole[[3, 0, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dino_at_its_true_size_with_random_weights():
    encoder = DINOEncoder(net=build(TRUE, 6))
    images = torch.rand(3, 3, 300, 256, generator=torch.Generator().manual_seed(0))
    reward = ImageSimilarityReward(encoder=encoder)
    references = [[image] for image in images]
    out = reward.score(RewardBatch(images=images, references=references))
    torch.testing.assert_close(out.scores, torch.ones(3))
    x = images.clone().requires_grad_()
    reward.differentiable_score(RewardBatch(images=x, references=references[::-1])).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


# --- the reward


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_an_image_is_like_itself_and_less_like_others(kind, images, request):
    reward = ImageSimilarityReward(encoder=request.getfixturevalue(kind))
    same = reward.score(RewardBatch(images=images, references=[[image] for image in images])).scores
    other = reward.score(RewardBatch(images=images, references=[[image] for image in images.roll(1, 0)])).scores
    torch.testing.assert_close(same, torch.ones(4))
    assert (other < 0.9999).all()
    assert (other > -1).all()


def test_similarity_is_symmetric(dino, images):
    reward = ImageSimilarityReward(encoder=dino)
    there = reward.score(RewardBatch(images=images[:1], references=[[images[1]]])).scores
    back = reward.score(RewardBatch(images=images[1:2], references=[[images[0]]])).scores
    torch.testing.assert_close(there, back)


def test_several_references_count_by_their_mean_not_by_the_nearest(dino, images):
    reward = ImageSimilarityReward(encoder=dino)
    single = [reward.score(RewardBatch(images=images[:1], references=[[r]])).scores.item() for r in images]
    whole = reward.score(RewardBatch(images=images[:2], references=[list(images), [images[3]]])).scores
    assert whole[0].item() == pytest.approx(sum(single) / 4, abs=1e-6)
    assert whole[0] < max(single) - 1e-3
    alone = reward.score(RewardBatch(images=images[1:2], references=[[images[3]]])).scores
    torch.testing.assert_close(whole[1:], alone)


def test_references_may_differ_in_size_and_order(dino, images):
    small = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(5))
    mixed = [images[0], small, images[1]]
    reward = ImageSimilarityReward(encoder=dino)
    first = reward.score(RewardBatch(images=images[:2], references=[mixed, [small]])).scores
    fresh = ImageSimilarityReward(encoder=dino)
    second = fresh.score(RewardBatch(images=images[:2].flip(0), references=[[small], mixed[::-1]])).scores
    torch.testing.assert_close(first, second.flip(0))


def test_each_distinct_reference_is_embedded_once(dino, images):
    counting = Counting(dino)
    reward = ImageSimilarityReward(encoder=counting)
    references = [[images[0], images[1]], [images[1].clone()], [images[0]], [images[0], images[0]]]
    batch = RewardBatch(images=images, references=references)
    first = reward.score(batch).scores
    assert counting.seen == 4 + 2
    torch.testing.assert_close(reward.score(batch).scores, first, rtol=0, atol=0)
    reward.differentiable_score(batch)
    assert counting.seen == 4 + 2 + 4 + 4


def test_old_references_are_forgotten_in_time(dino, images, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.image_similarity._KEPT", 2)
    reward = ImageSimilarityReward(encoder=dino)
    batch = RewardBatch(images=images, references=[[image] for image in images])
    first = reward.score(batch).scores
    assert len(reward._known) == 2
    torch.testing.assert_close(reward.score(batch).scores, first, rtol=0, atol=0)


def test_gradient_reaches_the_images_and_not_the_references(dino, images):
    x = images.clone().requires_grad_()
    held = images.roll(1, 0).clone().requires_grad_()
    reward = ImageSimilarityReward(encoder=dino)
    reward.differentiable_score(RewardBatch(images=x, references=[[r] for r in held])).sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert held.grad is None


def test_both_front_ends_agree_on_smooth_pictures(dino):
    y, x = torch.meshgrid(*[torch.arange(64) / 64] * 2, indexing="ij")
    smooth = torch.stack([torch.stack([0.5 + 0.4 * torch.sin(6 * (a * x + k * y)) for k in range(3)]) for a in (1, 2)])
    reward = ImageSimilarityReward(encoder=dino)
    batch = RewardBatch(images=smooth, references=[[smooth[1]], [smooth[0]]])
    torch.testing.assert_close(reward.differentiable_score(batch), reward.score(batch).scores, atol=2e-3, rtol=0)


def test_the_encoder_is_named_by_a_spec():
    by_model = rewards.load("diffalign.rewards.image_similarity:ImageSimilarityReward", model="clip:some/model")
    by_encoder = ImageSimilarityReward(encoder="clip:some/model", batch_size=3)
    assert by_model.version == by_encoder.version == "some/model"
    assert by_encoder.encoder.batch_size == 3
    assert ImageSimilarityReward().version == "facebook/dino-vits16, [CLS]"


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "must get references, got none"),
        ([[torch.zeros(3, 8, 8)]], "references must have one entry per image, 4, got 1"),
        ([[torch.zeros(3, 8, 8)], [], [torch.zeros(3, 8, 8)], []], r"at least one image a sample, .* \[1, 3\]"),
        ([[torch.full((3, 8, 8), -1.0)]] * 4, r"references: images must be RGB in \[0, 1\]"),
    ],
)
def test_wrong_references_are_refused(dino, images, references, message):
    with pytest.raises(InputError, match=message):
        ImageSimilarityReward(encoder=dino).score(RewardBatch(images=images, references=references))


def test_an_encoder_of_audio_is_refused():
    class Ear(Counting):
        modality = "audio"

    with pytest.raises(InputError, match="must be of images, got one of audio"):
        ImageSimilarityReward(encoder=Ear(None))
