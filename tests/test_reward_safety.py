"""The safety reward: diffusers' own checker as oracle, on copies of the images, which it blacks out."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffalign.errors import InputError
from diffalign.rewards.safety import SafetyReward, flagged
from diffalign.types import RewardBatch

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TRUE_VISION = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def build(vision: dict[str, int], width: int, seed: int = 0) -> Any:
    """A checker with random weights and random concepts."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=width)).eval()
        if vision == VISION:
            for parameter in net.vision_model.parameters():
                if parameter.dim() > 1:  # the usual start is so small that all embeddings look alike
                    torch.nn.init.normal_(parameter, std=0.3)
        for name in ("concept_embeds", "special_care_embeds"):
            torch.nn.init.normal_(getattr(net, name))
    return net


@pytest.fixture(scope="module")
def checker() -> Any:
    return build(VISION, 16)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(24, 3, 40, 48, generator=torch.Generator().manual_seed(1)) ** 3


def with_thresholds(net: Any, images: torch.Tensor, concept: float, special: float) -> Any:
    """A copy whose largest margins are 0 at the given quantiles of the images."""
    net = copy.deepcopy(net)
    for parameter in (net.concept_embeds_weights, net.special_care_embeds_weights):
        parameter.zero_()
    raw = SafetyReward(net=net).score(RewardBatch(images=images)).raw
    net.concept_embeds_weights.fill_(raw["margin"].quantile(concept).item())
    net.special_care_embeds_weights.fill_(raw["special_margin"].quantile(special).item())
    return net


def verdict(net: Any, images: torch.Tensor) -> torch.Tensor:
    """What diffusers' forward says; it gets a copy to black out."""
    pixels = SafetyReward(net=net)._front.reference(images)
    _, bad = net(pixels, images.clone())
    return torch.tensor(bad).float()


@pytest.mark.parametrize("concept", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("special", [0.0, 0.3, 0.7, 1.0])
def test_flags_are_those_of_diffusers_own_checker(checker, images, concept, special):
    net = with_thresholds(checker, images, concept, special)
    out = SafetyReward(net=net).score(RewardBatch(images=images))
    torch.testing.assert_close(out.raw["flagged"], verdict(net, images), rtol=0, atol=0)
    torch.testing.assert_close(out.scores, 1 - out.raw["flagged"])


def test_special_care_flags_what_would_have_passed_by_a_hair(checker, images):
    net = with_thresholds(checker, images, 1.0, 0.5)
    net.concept_embeds_weights.add_(0.005)  # nothing is flagged by itself; the nearest image lies 0.005 below
    raw = SafetyReward(net=net).score(RewardBatch(images=images)).raw
    near = (raw["margin"] > -0.009) & (raw["margin"] < 0)
    assert near.any()
    for special, expected in ((2.0, 0.0), (-2.0, 1.0)):
        net.special_care_embeds_weights.fill_(special)
        bad = SafetyReward(net=net).score(RewardBatch(images=images)).raw["flagged"]
        torch.testing.assert_close(bad, verdict(net, images), rtol=0, atol=0)
        assert bad[near].tolist() == [expected] * int(near.sum())


def test_margins_are_rounded_to_three_places_before_the_verdict():
    concept = torch.tensor([[-1.0, 0.0004], [-1.0, 0.0006], [-1.0, -0.0096], [-1.0, -0.0094]])
    none, one = torch.full((4, 3), 0.0004), torch.tensor([[-1.0, -1.0, 0.0006]] * 4)
    assert flagged(concept, none).tolist() == [False, True, False, False]
    assert flagged(concept, one).tolist() == [True, True, False, True]


def test_soft_is_positive_exactly_where_hard_is_1_away_from_the_rounding(checker, images):
    net = with_thresholds(checker, images, 0.5, 1.0)
    net.special_care_embeds_weights.fill_(2.0)
    batch = RewardBatch(images=images)
    soft, hard = (SafetyReward(net=net, mode=mode).score(batch) for mode in ("soft", "hard"))
    clear = soft.scores.abs() > 5e-4
    assert clear.sum() > 20
    assert torch.equal(soft.scores[clear] > 0, hard.scores[clear] == 1)
    assert 0 < hard.scores.sum() < len(images)
    torch.testing.assert_close(soft.scores, -soft.raw["margin"])


def test_an_image_at_a_concept_has_margin_1_minus_its_threshold(checker, images):
    net = copy.deepcopy(checker)
    pixels = SafetyReward(net=net)._front.reference(images[:1])
    with torch.no_grad():
        net.concept_embeds[5] = 3 * net.visual_projection(net.vision_model(pixels).pooler_output)[0]
        net.concept_embeds_weights.fill_(0.25)
        net.concept_embeds_weights[5] = 0.2
    out = SafetyReward(net=net, mode="soft").score(RewardBatch(images=images[:1]))
    assert out.scores.item() == pytest.approx(-0.8, abs=1e-6)


def test_images_are_left_as_they_are(checker, images):
    net = with_thresholds(checker, images, 0.2, 0.5)
    before = images.clone()
    SafetyReward(net=net).score(RewardBatch(images=images))
    torch.testing.assert_close(images, before, rtol=0, atol=0)


def test_scores_do_not_depend_on_batch_order_or_neighbours(checker, images):
    def score(order: list[int], batch_size: int) -> torch.Tensor:
        reward = SafetyReward(net=checker, mode="soft", batch_size=batch_size)
        return reward.score(RewardBatch(images=images[order])).scores

    whole = score([0, 1, 2, 3], 32)
    torch.testing.assert_close(score([0, 1, 2, 3], 1), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score([3, 1, 1, 2], 3), whole[[3, 1, 1, 2]], rtol=1e-4, atol=1e-6)


def test_soft_has_a_gradient_to_the_pixels_and_hard_has_none(checker, images):
    reward = SafetyReward(net=checker, mode="soft")
    assert reward.differentiable
    x = images[:3].clone().requires_grad_()
    reward.differentiable_score(RewardBatch(images=x)).sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in checker.parameters())
    hard = SafetyReward(net=checker)
    assert not hard.differentiable
    with pytest.raises(InputError, match="mode must be 'soft'"):
        hard.differentiable_score(RewardBatch(images=images[:1]))


def test_both_front_ends_agree_on_smooth_pictures(checker):
    y, x = torch.meshgrid(*[torch.arange(48) / 48] * 2, indexing="ij")
    smooth = torch.stack([torch.stack([0.5 + 0.4 * torch.sin(6 * (a * x + k * y)) for k in range(3)]) for a in (1, 2)])
    reward, batch = SafetyReward(net=checker, mode="soft"), RewardBatch(images=smooth)
    torch.testing.assert_close(reward.differentiable_score(batch), reward.score(batch).scores, atol=2e-3, rtol=0)


def published(net: Any) -> dict[str, torch.Tensor]:
    """The state dict under the names of the published file, whose vision tower lies one level deeper."""
    state = {}
    for name, value in net.state_dict().items():
        old = name.startswith("vision_model.") and not name.startswith("vision_model.vision_model.")
        state[name.replace("vision_model.", "vision_model.vision_model.", 1) if old else name] = value.contiguous()
    return state


def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        held = {name: tuple(value.shape) for name, value in published(build(TRUE_VISION, 768)).items()}
    tower, layer = "vision_model.vision_model.", "vision_model.vision_model.encoder.layers."
    expected = {
        "concept_embeds": (17, 768),
        "concept_embeds_weights": (17,),
        "special_care_embeds": (3, 768),
        "special_care_embeds_weights": (3,),
        "visual_projection.weight": (768, 1024),
        f"{tower}embeddings.class_embedding": (1024,),
        f"{tower}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{tower}embeddings.position_embedding.weight": (257, 1024),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        expected |= {f"{tower}{norm}.{kind}": (1024,) for kind in ("weight", "bias")}
    for i in range(24):
        for part, shape in {
            **{f"self_attn.{p}_proj": (1024, 1024) for p in ("q", "k", "v", "out")},
            "mlp.fc1": (4096, 1024),
            "mlp.fc2": (1024, 4096),
        }.items():
            expected |= {f"{layer}{i}.{part}.weight": shape, f"{layer}{i}.{part}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            expected |= {f"{layer}{i}.{norm}.{kind}": (1024,) for kind in ("weight", "bias")}
    assert held == expected


def save(net: Any, folder: Path, drop: str | None = None) -> None:
    state = published(net)
    if drop is not None:
        del state[drop]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.config.to_dict(), default=str))


def test_a_file_with_the_published_names_scores_as_from_memory(checker, images, tmp_path):
    save(checker, tmp_path)
    batch = RewardBatch(images=images[:3])
    out = SafetyReward(str(tmp_path), mode="soft").score(batch)
    torch.testing.assert_close(out.scores, SafetyReward(net=checker, mode="soft").score(batch).scores)


@pytest.mark.parametrize("drop", ["concept_embeds", "vision_model.vision_model.post_layernorm.weight"])
def test_a_file_without_a_weight_is_refused(checker, images, tmp_path, drop):
    save(checker, tmp_path, drop)
    with pytest.raises(InputError, match="must hold all weights"):
        SafetyReward(str(tmp_path)).score(RewardBatch(images=images[:1]))


def test_wrong_options_and_images_are_refused(checker):
    with pytest.raises(InputError, match="mode must be one of hard, soft, got 'sof'; did you mean 'soft'"):
        SafetyReward(mode="sof")
    with pytest.raises(InputError, match=r"RGB in \[0, 1\]"):
        SafetyReward(net=checker).score(RewardBatch(images=torch.full((1, 3, 32, 32), -1.0)))
    reward = SafetyReward("no/such/folder")
    assert reward.version == "no/such/folder, hard"
    with pytest.raises(InputError, match="no/such/folder"):
        reward.score(RewardBatch(images=torch.zeros(1, 3, 32, 32)))


@pytest.mark.slow
def test_at_its_true_size_with_random_weights():
    net = build(TRUE_VISION, 768)
    images = torch.rand(4, 3, 256, 320, generator=torch.Generator().manual_seed(0))
    net = with_thresholds(net, images, 0.5, 0.5)
    whole = SafetyReward(net=net, mode="soft").score(RewardBatch(images=images))
    torch.testing.assert_close(whole.raw["flagged"], verdict(net, images), rtol=0, atol=0)
    single = SafetyReward(net=net, mode="soft", batch_size=1).score(RewardBatch(images=images))
    torch.testing.assert_close(single.raw["margin"], whole.raw["margin"], rtol=1e-4, atol=1e-6)
    x = images[:1].clone().requires_grad_()
    SafetyReward(net=net, mode="soft").differentiable_score(RewardBatch(images=x)).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
