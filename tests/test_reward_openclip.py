"""open_clip: the package's own model, transforms and tables as oracles; QuickGELU where the tag has it."""

import sys

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU

from benchmarks.true_size import filled
from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards import openclip
from diffalign.rewards.frontend import CLIP_MEAN, HALF, FrontEnd
from diffalign.rewards.openclip import OpenCLIPEncoder, OpenCLIPParts, OpenCLIPReward, front_of, wants_quick_gelu
from diffalign.types import DifferentiableReward, RewardBatch
from tests.pointwise import PROMPTS, batch_of, check_full_size, check_gradient, check_independence, waves
from tests.tiny_openclip import register, tiny_net, tiny_openclip


@pytest.fixture(scope="module")
def parts() -> OpenCLIPParts:
    return tiny_openclip()


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The file of a model that open_clip's tables know as "tiny"."""
    return register(monkeypatch, tmp_path)


def activations(net: torch.nn.Module) -> set[type]:
    """Classes of activations in both towers."""
    towers = (net.visual.transformer, net.transformer)
    return {type(m) for tower in towers for m in tower.modules() if isinstance(m, torch.nn.GELU | QuickGELU)}


def test_what_every_pointwise_reward_holds(parts):
    check_independence(lambda size: OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts, batch_size=size)))
    check_gradient(OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts)), 100)
    assert isinstance(OpenCLIPReward(), DifferentiableReward)


def test_score_is_the_diagonal_of_the_models_own_logits(parts):
    images = waves(32, 32, 4)
    pixels = parts.front.reference(images)
    expected = parts.net.get_logits(pixels, parts.tokenizer(PROMPTS))[0].diagonal()
    batch = RewardBatch(images=images, prompts=PROMPTS)
    out = OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts), scale="logit").score(batch)
    torch.testing.assert_close(out.scores, expected)
    torch.testing.assert_close(out.raw["cos"], expected * 0.07)
    torch.testing.assert_close(
        OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts)).score(batch).scores, 100 * out.raw["cos"]
    )


def test_the_encoder_gives_one_unit_row_an_image(parts):
    encoder = OpenCLIPEncoder(parts=parts)
    embedded = encoder.embed(batch_of([0, 1, 2]))
    assert embedded.rows.shape == (3, encoder.width) == (3, 16)
    assert embedded.counts == (1, 1, 1)
    torch.testing.assert_close(embedded.rows.norm(dim=1), torch.ones(3))
    images = waves(48, 48).requires_grad_()
    encoder.embed_with_graph(RewardBatch(images=images)).rows[0, 0].backward()
    assert (images.grad != 0).any()


# --- QuickGELU


def test_an_openai_tag_is_loaded_with_quick_gelu(tables):
    encoder = OpenCLIPEncoder("tiny/openai")
    assert activations(encoder.parts.net) == {QuickGELU}
    quick, plain = tiny_net(quick_gelu=True), tiny_net()
    pixels = encoder.parts.front.reference(waves(32, 32, 2))
    expected = torch.nn.functional.normalize(quick.encode_image(pixels))
    torch.testing.assert_close(encoder.embed_images(waves(32, 32, 2)), expected)
    wrong = torch.nn.functional.normalize(plain.encode_image(pixels))
    assert (wrong - expected).abs().max() > 0.003  # what the mismatch that open_clip only warns about would give


def test_a_tag_of_plain_gelu_stays_plain(tables):
    assert activations(OpenCLIPEncoder("tiny/laion").parts.net) == {torch.nn.GELU}


def test_every_openai_tag_of_the_package_wants_quick_gelu():
    tags = open_clip.list_pretrained()
    openai = [(name, tag) for name, tag in tags if tag == "openai"]
    assert len(openai) >= 9
    assert all(wants_quick_gelu(name, tag) for name, tag in openai)
    assert not wants_quick_gelu("ViT-H-14", "laion2b_s32b_b79k")
    assert wants_quick_gelu("ViT-H-14", "dfn5b")


# --- the front end


def test_the_constants_of_the_pretrained_config_are_honoured(tables):
    assert OpenCLIPEncoder("tiny/laion").parts.front == FrontEnd(32, mean=HALF, std=HALF, odd_margin="even")
    assert OpenCLIPEncoder("tiny/openai").parts.front.mean == CLIP_MEAN
    published = open_clip.get_pretrained_cfg("ViT-L-14", "laion2b_s32b_b82k")
    assert front_of({**published, "size": 224}).mean == HALF
    assert front_of({**open_clip.get_pretrained_cfg("ViT-H-14", "laion2b_s32b_b79k"), "size": 224}).mean == CLIP_MEAN


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("width", [101, 103])  # 43.09 and 43.95 columns where 150 rows become 64
def test_the_reference_road_is_open_clips_own_transform(resize_mode, interpolation, width):
    from PIL import Image

    config = {"size": (64, 64), "mean": HALF, "std": HALF, "interpolation": interpolation, "resize_mode": resize_mode}
    images = (waves(150, width) * 255).round() / 255
    picture = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(picture)[None]
    torch.testing.assert_close(front_of(config).reference(images), expected, atol=1e-6, rtol=0)


def test_images_that_are_not_square_or_padded_in_colour_are_refused():
    usual = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "shortest"}
    for config in ({"size": (224, 256)}, {"size": 224, "fill_color": 127}):
        with pytest.raises(InputError, match="square images with black padding"):
            front_of({**usual, **config})


# --- loading


def test_a_spec_names_architecture_and_tag_or_file(tables):
    by_tag = rewards.load("openclip:tiny/laion")
    assert by_tag.version == "tiny/laion, x100"
    by_file = OpenCLIPReward(f"tiny/{tables}")
    plain = OpenCLIPReward(encoder=OpenCLIPEncoder(parts=tiny_openclip()))
    batch = batch_of([0, 1, 2, 3])
    torch.testing.assert_close(by_file.score(batch).scores, plain.score(batch).scores)
    half = tiny_openclip(FrontEnd(32, mean=HALF, std=HALF, odd_margin="even"))
    expected = OpenCLIPReward(encoder=OpenCLIPEncoder(parts=half)).score(batch).scores
    torch.testing.assert_close(by_tag.score(batch).scores, expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-H14/laion2b_s32b_b79k", "did you mean 'ViT-H-14'"),
        ("ViT-H-14/laion2b_s32b_b97k", "did you mean 'laion2b_s32b_b79k'"),
        ("ViT-H-14", "known tag or a file"),
        ("tiny/{folder}/bad.pt", "weights that can be read"),
        ("tiny/{folder}/other.pt", "weights that can be read"),
    ],
)
def test_a_wrong_model_ends_in_one_line_at_the_first_use(tables, tmp_path, model, message):
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "other.pt")
    reward = OpenCLIPReward(model.format(folder=tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        reward.score(batch_of([0]))
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=r"pip install 'diffalign\[openclip\]'"):
        OpenCLIPReward().score(batch_of([0]))


def test_a_half_network_gives_float32_scores_and_keeps_its_temperature(parts):
    own = tiny_openclip()
    own.net.logit_scale.data.fill_(4.6052)
    encoder = OpenCLIPEncoder("a/b", parts=own, dtype="bfloat16")
    reward = OpenCLIPReward(encoder=encoder, scale="cos")
    scores = reward.score(batch_of([0, 1, 2, 3])).scores
    assert scores.dtype == torch.float32
    assert encoder.logit_scale == pytest.approx(100.003, abs=1e-3)
    full = OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts), scale="cos").score(batch_of([0, 1, 2, 3])).scores
    torch.testing.assert_close(scores, full, atol=0.03, rtol=0)
    assert reward.version == "a/b in bfloat16, cos"


def test_nothing_is_read_before_the_first_score(monkeypatch):
    monkeypatch.setattr(openclip, "load_parts", lambda model: pytest.fail("read"))
    reward = OpenCLIPReward()
    assert reward.version == "ViT-H-14/laion2b_s32b_b79k, x100"
    reward.to("cpu")


@pytest.mark.slow
def test_openclip_at_full_size():
    net = filled(lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))
    assert sum(p.numel() for p in net.parameters()) == 986_109_441
    assert activations(net) == {torch.nn.GELU}
    parts = OpenCLIPParts(
        net=net, tokenizer=open_clip.get_tokenizer("ViT-H-14"), front=FrontEnd(224, odd_margin="even")
    )
    reward = OpenCLIPReward(encoder=OpenCLIPEncoder(parts=parts))
    assert reward.encoder.width == 1024
    check_full_size(reward, 100)
