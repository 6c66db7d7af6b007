"""Rewards: goldens of methods/rewards.md, the model's own logits as oracle, invariances of the batch."""

import hashlib
import itertools
import os
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.aesthetic import AestheticReward, AffineHead, fold
from diffalign.rewards.clip import CLIPEncoder, CLIPParts, CLIPReward
from diffalign.rewards.oracle import OracleReward
from diffalign.tiny import oracle, scenes
from diffalign.types import FunctionReward, RewardBatch
from tests.builders import save_clip, tiny_clip
from tests.loopback import Said, scripted

PROMPTS = ["a red circle", "two blue squares on a table", "a red circle", "fog"]


@pytest.fixture(scope="module")
def parts() -> CLIPParts:
    return tiny_clip()


@pytest.fixture(scope="module")
def waves() -> torch.Tensor:
    """Four smooth pictures of 48x40: sums of sinusoids."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:40] / 48
    pictures = [
        [0.5 + 0.4 * np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 3, (3, 3))] for _ in range(4)
    ]
    return torch.tensor(np.array(pictures), dtype=torch.float32)


def head_state(widths: list[int], places: list[int]) -> dict[str, torch.Tensor]:
    """Random affine layers under the keys of LAION's predictor."""
    rng = torch.Generator().manual_seed(1)
    state = {}
    for place, (i, o) in zip(places, itertools.pairwise(widths), strict=True):
        state[f"layers.{place}.weight"] = torch.randn(o, i, generator=rng) / i**0.5
        state[f"layers.{place}.bias"] = torch.randn(o, generator=rng)
    return state


# --- CLIP


def test_clip_score_is_the_diagonal_of_the_models_own_logits(parts, waves):
    images = waves[:, :, 4:36, 4:36]
    bytes_ = (images * 255).round().byte()
    pixels = parts.processor(list(bytes_.numpy()), return_tensors="pt")["pixel_values"]
    tokens = parts.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    expected = parts.net(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    out = CLIPReward(encoder=CLIPEncoder(parts=parts), scale="logit").score(RewardBatch(images=images, prompts=PROMPTS))
    torch.testing.assert_close(out.scores, expected)
    torch.testing.assert_close(out.raw["cos"], expected / parts.net.logit_scale.exp())


def test_scales_differ_by_their_factor_only(parts, waves):
    batch = RewardBatch(images=waves, prompts=PROMPTS)
    scores = {s: CLIPReward(encoder=CLIPEncoder(parts=parts), scale=s).score(batch).scores for s in ("cos", "x100")}
    torch.testing.assert_close(scores["x100"], 100 * scores["cos"])
    assert scores["cos"].abs().max() <= 1
    with pytest.raises(InputError, match="x1000"):
        CLIPReward(encoder=CLIPEncoder(parts=parts), scale="x1000")


def test_clip_scores_do_not_depend_on_batch_order_or_neighbours(parts, waves):
    def score(order: list[int], batch_size: int) -> torch.Tensor:
        reward = CLIPReward(encoder=CLIPEncoder(parts=parts, batch_size=batch_size))
        return reward.score(RewardBatch(images=waves[order], prompts=[PROMPTS[i] for i in order])).scores

    whole = score([0, 1, 2, 3], 32)
    torch.testing.assert_close(score([0, 1, 2, 3], 1), whole)
    torch.testing.assert_close(score([3, 1, 0, 2], 3), whole[[3, 1, 0, 2]])
    torch.testing.assert_close(score([1, 1, 2], 2), whole[[1, 1, 2]])


def test_equal_prompts_are_encoded_once(parts):
    seen = []
    encoder = CLIPEncoder(parts=parts, batch_size=2)
    original = encoder._text_features
    encoder._text_features = lambda texts: seen.extend(texts) or original(texts)
    encoder.embed_texts(PROMPTS)
    assert sorted(seen) == sorted(set(PROMPTS))


def test_long_prompts_are_cut_with_their_end_token_kept(parts):
    embedded = CLIPEncoder(parts=parts).embed_texts([" ".join("x" * 75), " ".join("x" * 200)])
    torch.testing.assert_close(embedded[0], embedded[1])


def test_differentiable_clip_agrees_with_the_reference_front_end(parts, waves):
    reward = CLIPReward(encoder=CLIPEncoder(parts=parts), scale="cos")
    batch = RewardBatch(images=waves, prompts=PROMPTS)
    torch.testing.assert_close(
        reward.differentiable_score(batch), reward.score(batch).scores, atol=2e-3, rtol=0
    )  # the tolerance of rewards.md 1.2


def test_gradient_reaches_the_pixels_and_not_the_weights(parts, waves):
    images = waves.clone().requires_grad_()
    CLIPReward(encoder=CLIPEncoder(parts=parts)).differentiable_score(
        RewardBatch(images=images, prompts=PROMPTS)
    ).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in parts.net.parameters())


def test_old_and_new_return_types_of_transformers_give_one_embedding(parts, waves):
    class Old:
        """transformers 4: the towers return tensors."""

        config = parts.net.config

        def get_image_features(self, pixel_values):
            return parts.net.get_image_features(pixel_values=pixel_values).pooler_output

    old = CLIPEncoder(parts=parts)
    new = CLIPEncoder(parts=parts)
    old.parts = CLIPParts(net=Old(), processor=parts.processor, tokenizer=parts.tokenizer)
    torch.testing.assert_close(old.embed_images(waves), new.embed_images(waves))


def test_clip_reads_no_weights_before_it_scores_and_names_a_missing_model():
    reward = CLIPReward("no/such/folder")
    assert reward.version == "no/such/folder, x100"
    with pytest.raises(InputError, match="no/such/folder"):
        reward.score(RewardBatch(images=torch.zeros(1, 3, 32, 32), prompts=["a"]))


def test_clip_from_a_folder_scores_as_from_memory(parts, waves, tmp_path):
    save_clip(parts, tmp_path)
    batch = RewardBatch(images=waves, prompts=PROMPTS)
    expected = CLIPReward(encoder=CLIPEncoder(parts=parts)).score(batch).scores
    torch.testing.assert_close(CLIPReward(str(tmp_path)).score(batch).scores, expected)


# --- what every reward refuses


@pytest.mark.parametrize("images", [torch.full((2, 3, 32, 32), -0.5), torch.full((2, 3, 32, 32), 128.0)])
def test_images_outside_0_to_1_are_refused_not_guessed(parts, images):
    with pytest.raises(InputError, match=r"RGB in \[0, 1\]"):
        CLIPReward(encoder=CLIPEncoder(parts=parts)).score(RewardBatch(images=images, prompts=["a", "b"]))


def test_nan_images_are_refused(parts):
    with pytest.raises(InputError, match="nan"):
        CLIPReward(encoder=CLIPEncoder(parts=parts)).score(
            RewardBatch(images=torch.full((1, 3, 32, 32), torch.nan), prompts=["a"])
        )


def test_missing_and_too_few_prompts_are_refused(parts, waves):
    reward = CLIPReward(encoder=CLIPEncoder(parts=parts))
    with pytest.raises(InputError, match="must get prompts, got none"):
        reward.score(RewardBatch(images=waves))
    with pytest.raises(InputError, match="one entry per image, 4, got 1"):
        reward.score(RewardBatch(images=waves, prompts=["a"]))


# --- aesthetic


def test_folded_head_equals_its_layers_one_after_the_other():
    state = {k: v.double() for k, v in head_state([16, 12, 8, 6, 4, 1], [0, 2, 4, 6, 7]).items()}
    x = F.normalize(torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    slow = x
    for place in (0, 2, 4, 6, 7):
        slow = F.linear(slow, state[f"layers.{place}.weight"], state[f"layers.{place}.bias"])
    head = fold(state)
    torch.testing.assert_close(x @ head.weight + head.bias, slow[:, 0], atol=1e-10, rtol=0)


def test_a_head_with_activations_is_refused():
    with pytest.raises(InputError, match="activations are not supported"):
        fold(head_state([16, 12, 8, 1], [0, 3, 6]))


def test_a_head_with_other_keys_is_refused():
    with pytest.raises(InputError, match=r"layers\.N\.weight"):
        fold({"linear.weight": torch.zeros(1, 4)})


def test_aesthetic_is_affine_in_the_unit_embedding(parts, waves, tmp_path):
    save_file(head_state([16, 4, 1], [0, 2]), tmp_path / "head.safetensors")
    reward = AestheticReward(str(tmp_path / "head.safetensors"), encoder=CLIPEncoder(parts=parts))
    embedded = CLIPEncoder(parts=parts).embed_images(waves).double()
    scores = reward.score(RewardBatch(images=waves)).scores
    torch.testing.assert_close(scores.double(), embedded @ reward.head.weight + reward.head.bias, atol=1e-6, rtol=0)
    steepest = F.normalize(reward.head.weight[None].float())
    assert reward.head(torch.cat([-steepest, steepest])).tolist() == pytest.approx(reward.range, abs=1e-6)


def test_a_zero_embedding_scores_the_bias_not_nan(parts, waves):
    class Blind:
        config = parts.net.config

        def get_image_features(self, pixel_values):
            return torch.zeros(len(pixel_values), 16)

    encoder = CLIPEncoder(parts=parts)
    encoder.parts = CLIPParts(net=Blind(), processor=parts.processor, tokenizer=parts.tokenizer)
    head = AffineHead(weight=torch.ones(16, dtype=torch.float64), bias=torch.tensor(2.5, dtype=torch.float64))
    assert head(encoder.embed_images(waves)).tolist() == [2.5] * 4


def test_aesthetic_folder_names_its_own_encoder(parts, waves, tmp_path):
    save_clip(parts, tmp_path / "clip")
    (tmp_path / "head").mkdir()
    save_file(head_state([16, 4, 1], [0, 2]), tmp_path / "head" / "head.safetensors")
    (tmp_path / "head" / "config.json").write_text(f'{{"encoder": "{tmp_path / "clip"}"}}')
    by_folder = AestheticReward(str(tmp_path / "head"))
    by_hand = AestheticReward(str(tmp_path / "head" / "head.safetensors"), encoder=str(tmp_path / "clip"))
    batch = RewardBatch(images=waves)
    torch.testing.assert_close(by_folder.score(batch).scores, by_hand.score(batch).scores)
    assert AestheticReward(str(tmp_path / "head"), encoder="another/model").encoder.model == "another/model"


def test_aesthetic_gradient_matches_its_closed_form(parts, waves, tmp_path):
    save_file(head_state([16, 4, 1], [0, 2]), tmp_path / "h.safetensors")
    head = AestheticReward(str(tmp_path / "h.safetensors"), encoder=CLIPEncoder(parts=parts)).head
    raw = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    head(F.normalize(raw, dim=1)).sum().backward()
    e, norm = F.normalize(raw.detach(), dim=1), raw.detach().norm(dim=1, keepdim=True)
    w = head.weight.float()
    torch.testing.assert_close(raw.grad, (w - (e @ w)[:, None] * e) / norm)  # rewards.md 3.1


def test_a_head_of_another_width_than_its_encoder_is_refused(parts, waves, tmp_path):
    save_file(head_state([768, 4, 1], [0, 2]), tmp_path / "h.safetensors")
    reward = AestheticReward(str(tmp_path / "h.safetensors"), encoder=CLIPEncoder(parts=parts))
    with pytest.raises(InputError, match=r"16 elements, got 768"):
        reward.score(RewardBatch(images=waves))


def test_aesthetic_without_a_head_says_what_to_give():
    with pytest.raises(InputError, match=r"must get a head: .* got none"):
        AestheticReward()
    with pytest.raises(InputError, match="missing"):
        AestheticReward("nowhere.pth")


def test_a_head_that_would_run_code_is_not_read(tmp_path, parts):
    torch.save({"weight": Path("x")}, tmp_path / "bad.pth")
    reward = AestheticReward(str(tmp_path / "bad.pth"), encoder=CLIPEncoder(parts=parts))
    with pytest.raises(InputError, match="head must be readable"):
        reward.head  # noqa: B018


UNIT = {
    "zeros": torch.zeros(768, dtype=torch.float64),
    "basis_0": torch.eye(768, dtype=torch.float64)[0],
    "basis_767": torch.eye(768, dtype=torch.float64)[767],
    "ones": torch.ones(768, dtype=torch.float64),
    "alt": (-1.0) ** torch.arange(768, dtype=torch.float64),
    "cos1": torch.cos(torch.arange(1, 769, dtype=torch.float64)),
    "sin_quad": torch.sin(0.01 * torch.arange(1, 769, dtype=torch.float64) ** 2),
    "ramp": torch.arange(768, dtype=torch.float64) - 383.5,
    "harmonic": 1 / torch.arange(1, 769, dtype=torch.float64),
}
GOLDEN = {  # rewards.md 3.3: (v1, v2)
    "zeros": (3.529371738434, 5.236645844820),
    "basis_0": (5.402092218399, 4.545052400554),
    "basis_767": (5.139168262482, 5.451654016197),
    "ones": (1.513129669799, 4.883284854377),
    "alt": (3.693055376954, 5.310305382519),
    "cos1": (2.526611381940, 4.645512704005),
    "sin_quad": (3.644174766003, 5.205646879993),
    "ramp": (1.918524249952, 4.215948333040),
    "harmonic": (4.235232457429, 4.536588807383),
}


V1, V2 = "sa_0_4_vit_l_14_linear.pth", "sac+logos+ava1-l14-linearMSE.pth"


def published(file: str) -> Path:
    """A published head, where there is one."""
    folder = os.environ.get("DIFFALIGN_TEST_DATA")
    if folder is None:
        pytest.skip("DIFFALIGN_TEST_DATA is unset: it names the folder with aesthetic/*.pth")
    return Path(folder) / "aesthetic" / file


def layers_of(state: dict[str, torch.Tensor], dropout: float) -> torch.nn.Sequential:
    """v2 as its authors run it: a dropout after every layer but the last two."""
    layers: list[torch.nn.Module] = []
    for place in (0, 2, 4, 6, 7):
        weight = state[f"layers.{place}.weight"]
        layer = torch.nn.Linear(*weight.shape[::-1], dtype=weight.dtype)
        layer.load_state_dict({"weight": weight, "bias": state[f"layers.{place}.bias"]})
        layers += [layer, torch.nn.Dropout(dropout)] if place < 6 else [layer]
    return torch.nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize(("version", "file"), [(0, V1), (1, V2)], ids=["v1", "v2"])
def test_published_heads_give_their_golden_values(version, file):
    head = AestheticReward(str(published(file))).head
    for name, vector in UNIT.items():
        unit = vector / (vector.norm() or 1)
        assert float(unit @ head.weight + head.bias) == pytest.approx(GOLDEN[name][version], abs=1e-9)
        assert float(head(unit[None].float())) == pytest.approx(GOLDEN[name][version], abs=2e-6)


@pytest.mark.parametrize(
    ("file", "values", "digest"),
    [
        (V1, 769, "3f61d2e577540bb2386b77f1eed5279599cbc005ec64101d3f6df4d29a07a42a"),
        (V2, 927_969, "fdb85b42a8c89470b0107b27c9efb726a87ea22eb81679c8d8ed17dc79ebd94f"),
    ],
    ids=["v1", "v2"],
)
def test_published_heads_are_the_ones_of_the_golden_values(file, values, digest):
    state = torch.load(published(file), map_location="cpu", weights_only=True)
    content = b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in state.values())
    assert len(content) == 4 * values
    assert hashlib.sha256(content).hexdigest() == digest


def test_published_heads_fold_to_their_known_vectors():
    v1, v2 = (AestheticReward(str(published(file))).head for file in (V1, V2))
    assert float(v2.bias) == pytest.approx(5.236645844820, abs=1e-11)
    assert float(v2.weight.norm()) == pytest.approx(17.995624776434, abs=1e-11)
    assert float(v2.weight.sum()) == pytest.approx(-9.792627021749, abs=1e-11)
    assert (int(v2.weight.argmax()), int(v2.weight.argmin())) == (288, 669)
    assert float(v2.weight.abs().max()) == pytest.approx(2.3934364709, abs=1e-9)
    first = [-0.6915934442661988, -0.5569938671797479, -0.3211685218551614, -0.6314835540301613, -0.18479302174080234]
    assert v2.weight[:5].tolist() == pytest.approx(first, abs=1e-14)
    assert float(v1.weight.norm()) == pytest.approx(28.444395846303, abs=1e-11)
    assert float(v1.weight.sum()) == pytest.approx(-55.875739251744, abs=1e-11)
    assert float(F.cosine_similarity(v1.weight, v2.weight, dim=0)) == pytest.approx(0.369479304594, abs=1e-11)
    bounds = [AestheticReward(str(published(file))).range for file in (V1, V2)]
    assert bounds == [pytest.approx((-24.915, 31.974), abs=1e-3), pytest.approx((-12.759, 23.232), abs=1e-3)]


def test_the_published_v2_folded_is_its_layers_and_has_no_training_mode():
    state = torch.load(published(V2), map_location="cpu", weights_only=True)
    head, layers = fold(state), layers_of({k: v.double() for k, v in state.items()}, 0.2)
    x = F.normalize(torch.randn(8, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = layers.eval()(x)[:, 0]
    torch.testing.assert_close(x @ head.weight + head.bias, expected, atol=1e-10, rtol=0)
    assert (layers.train()(x)[:, 0] - expected).abs().max() > 1e-3  # noise: what a parent's train() would do


def test_training_mode_of_a_parent_does_not_change_aesthetic_scores(parts, waves, tmp_path):
    save_file(head_state([16, 12, 8, 6, 4, 1], [0, 2, 4, 6, 7]), tmp_path / "head.safetensors")
    reward = AestheticReward(str(tmp_path / "head.safetensors"), encoder=CLIPEncoder(parts=parts))
    before = reward.score(RewardBatch(images=waves)).scores
    torch.nn.ModuleList([parts.net]).train()
    after = reward.score(RewardBatch(images=waves)).scores
    parts.net.eval()
    assert torch.equal(before, after)


# --- oracle


def test_oracle_reward_is_the_judge_of_the_tiny_world_row_by_row():
    rng = np.random.default_rng(0)
    drawn = [scenes.draw_scene(rng, "train") for _ in range(3)]
    prompts = [scenes.caption(scene, rng) for scene in drawn]
    pictures = np.stack([np.asarray(scenes.render(scene)) for scene in drawn])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    out = OracleReward().score(RewardBatch(images=images, prompts=prompts))
    for row, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        judged = oracle.judge(picture / 255, prompt)
        assert out.scores[row].item() == pytest.approx(judged["total"], abs=1e-6)
        assert {k: pytest.approx(v[row].item(), abs=1e-6) for k, v in out.raw.items()} == {
            k: v for k, v in judged.items() if k != "total"
        }
    assert out.scores.min() > 0.9


def test_oracle_names_the_prompt_that_is_not_of_its_world():
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(InputError, match=r"prompt 1: .*a photo of a cat"):
        OracleReward().score(
            RewardBatch(images=images, prompts=["large red circle top, black background", "a photo of a cat"])
        )


def test_oracle_refuses_other_sizes():
    with pytest.raises(InputError, match="64x64"):
        OracleReward().score(RewardBatch(images=torch.zeros(1, 3, 32, 32), prompts=["x"]))


# --- loading


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """An installed package that declares rewards, as a folder on the path."""
    (tmp_path / "painted.py").write_text(
        textwrap.dedent(
            """
            import torch
            from diffalign.types import FunctionReward

            class Redness:
                '''Mean of the red channel.

                More.
                '''

                name = "redness"
                version = "1"
                requires = frozenset({"images"})
                range = (0.0, 1.0)
                modality, differentiable, licence = "image", False, "-"

                def __init__(self, model="plain", weight=1.0):
                    self.model, self.weight = model, weight

                def score(self, batch):
                    from diffalign.types import RewardOutput
                    return RewardOutput(scores=self.weight * batch.images[:, 0].mean((1, 2)))

            class Terse:
                name, version, requires, range, differentiable = "terse", "1", frozenset(), (0, 1), False

                def score(self, batch):
                    return None

            def length(images, prompts):
                return [float(len(p)) for p in prompts]

            ready = Redness(weight=2.0)
            number = 3
            """
        )
    )
    info = tmp_path / "painted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: painted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffalign.rewards]\nredness = painted:Redness\nbroken = painted:Gone\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("painted", None)


def test_a_reward_is_found_by_its_entry_point(plugins):
    assert "redness" in rewards.names()
    assert rewards.load("redness").model == "plain"
    assert rewards.load("redness:org/model", weight=3.0).model == "org/model"


def test_a_reward_is_summed_up_by_its_first_line_even_where_another_is_broken(plugins):
    assert rewards.summary("redness") == "Mean of the red channel."
    assert rewards.summary("broken").startswith("cannot be imported")


def test_classes_instances_and_functions_are_loaded_by_module_and_name(plugins):
    batch = RewardBatch(images=torch.full((2, 3, 4, 4), 0.25), prompts=["a", "bcd"])
    assert rewards.load("painted:Redness", weight=4.0).score(batch).scores.tolist() == [1.0, 1.0]
    assert rewards.load("painted:ready").score(batch).scores.tolist() == [0.5, 0.5]
    function = rewards.load("painted:length")
    assert isinstance(function, FunctionReward)
    assert function.name == "length"
    assert function.score(batch).scores.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("rednes", {}, "did you mean 'redness'"),
        ("rednes:tiny", {}, "did you mean 'redness'"),
        ("nothing.like:it", {}, "must be importable"),
        ("painted:nothing", {}, "must be in its module"),
        ("painted:number", {}, "must be a class, a reward or a function"),
        ("redness", {"colour": 1}, "must get options that its class takes"),
        ("redness:m", {"model": "n"}, "must name its model once"),
        ("painted:length", {"x": 1}, "must be a class to take options"),
    ],
)
def test_a_wrong_reward_ends_in_one_line(plugins, spec, options, message):
    with pytest.raises(InputError, match=message) as caught:
        rewards.load(spec, **options)
    assert "\n" not in str(caught.value)


def test_the_declared_rewards_exist(tmp_path):
    save_file(head_state([16, 4, 1], [0, 2]), tmp_path / "head.safetensors")
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    with scripted(lambda asked: Said({})) as server:
        models = {"aesthetic": str(tmp_path / "head.safetensors"), "http": server.url, "per_sample": "vendi"}
        for name, place in declared["project"]["entry-points"]["diffalign.rewards"].items():
            options = {"model": models[name]} if name in models else {}
            assert rewards.load(place, **options).name == name


def test_moving_a_reward_moves_its_network_and_leaves_others_alone(parts):
    clip = CLIPReward(encoder=CLIPEncoder(parts=parts))
    rewards.move(clip, "cpu")
    rewards.move(OracleReward(), "cpu")
    assert clip.encoder.device == torch.device("cpu")


def test_a_reward_that_does_not_say_what_it_is_is_refused(plugins):
    with pytest.raises(InputError, match=r"must declare differentiable, licence, .* got one without licence, modality"):
        rewards.load("painted:Terse")
