"""The pipeline for aligned models: an adapter for each branch of guidance, and the best of n images."""

import math
from typing import Any

import pytest
import torch

import diffalign
from diffalign.denoisers import FAMILIES
from diffalign.denoisers.guided import Guided
from diffalign.errors import InputError, RunError
from diffalign.models.load import ModelSource, load_pipeline
from diffalign.rewards.best_of import best, image_reward, score_prompts
from diffalign.sampling.kernels import kernel
from diffalign.sampling.rollout import initial_noise
from diffalign.sampling.schedule import make_schedule
from diffalign.types import Cond
from tests.builders import random_lora
from tests.test_pipelines import PROMPTS, _modules, load, same  # noqa: F401
from tests.toys import SHAPE, toy

STEPS = {"num_inference_steps": 2, "guidance_scale": 3}


@pytest.fixture(scope="module", params=["sd", "sd3"])
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory) -> dict[str, str]:
    """Two LoRA folders."""
    root = tmp_path_factory.mktemp("loras")
    return {name: str(random_lora(model, root / name, seed)) for seed, name in enumerate(("good", "bad"))}


@pytest.fixture(scope="module")
def stocks(model, loras) -> dict[str | None, Any]:
    """The stock pipeline, without noise, as it is and with either LoRA from the start."""
    made = {name: load_pipeline(ModelSource(path=f"tiny-{model}", lora=loras.get(name))) for name in (None, *loras)}
    for pipeline in made.values():
        FAMILIES[model].use_sampler(pipeline)
    return made


@pytest.fixture(scope="module")
def plain(model, _modules) -> Any:  # noqa: F811
    return load("aligned", model)


@pytest.fixture(scope="module")
def adapted(model, loras, _modules) -> Any:  # noqa: F811
    made = load("aligned", model)
    for name, folder in loras.items():
        made.load_lora_weights(folder, adapter_name=name)
    return made


def noise(pipeline: Any, *seeds: int) -> torch.Tensor:
    return initial_noise(
        seeds, FAMILIES[pipeline.family.name].latent_shape(pipeline.components[pipeline.family.net].config)
    )


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


# the branches of guidance


def test_without_adapters_it_is_the_stock_pipeline(model, plain, stocks):
    stock = stocks[None]
    asked = {"latents": noise(plain, 1, 2), **STEPS, "output_type": "pt", "negative_prompt": ["blurry", "noise"]}
    theirs = stock(PROMPTS, **asked, **FAMILIES[model].call_options(stock)).images
    same(plain(PROMPTS, **asked).images, theirs)


def test_an_adapter_on_both_branches_is_the_stock_pipeline_with_it(model, adapted, stocks):
    stock = stocks["good"]
    asked = {"latents": noise(adapted, 1, 2), **STEPS, "output_type": "pt"}
    theirs = stock(PROMPTS, **asked, **FAMILIES[model].call_options(stock)).images
    same(adapted(PROMPTS, **asked, adapter="good").images, theirs)
    same(adapted(PROMPTS, **asked, adapter="good", negative_adapter="good").images, theirs)
    same(adapted(PROMPTS, **asked, adapter={"good": 1.0, "bad": 0.0}, negative_adapter={"good": 1}).images, theirs)


@pytest.mark.parametrize("positive", ["good", None, {}])
def test_a_negative_adapter_is_guidance_away_from_another_model(model, adapted, stocks, positive):
    """Two networks, each with its LoRA from the start, and eps = eps_neg + w (eps_pos - eps_neg) by hand."""
    nets = {"pos": stocks[None if positive == {} else "good"], "neg": stocks["bad"]}
    family, pipeline = FAMILIES[model], nets["pos"]
    denoisers = {b: family.make_denoiser(p.components[family.net], p.scheduler.config, None) for b, p in nets.items()}
    cond, uncond = family.encode_prompts(pipeline, PROMPTS), family.encode_prompts(pipeline, ["blurry"] * 2)
    schedule = make_schedule("ode", pipeline.scheduler.config, 2, table="diffusers")
    x = x_init = noise(adapted, 1, 2)
    with torch.no_grad():
        for i in range(2):
            step = schedule.step(torch.tensor([i, i]))
            eps_pos, eps_neg = denoisers["pos"](x, step.t, cond), denoisers["neg"](x, step.t, uncond)
            x = kernel("ode")(eps_neg + 3.0 * (eps_pos - eps_neg), x, step).mean
    asked = {"latents": x_init, **STEPS, "output_type": "latent", "negative_prompt": "blurry"}
    found = adapted(PROMPTS, **asked, adapter=positive, negative_adapter="bad").images
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)  # guidance multiplies rounding in two networks by 5
    assert (found - adapted(PROMPTS, **asked, adapter="good").images).abs().max() > 1e-2


def test_weights_mix_adapters_and_leave_nothing_behind(adapted, model):
    net = adapted.components[FAMILIES[model].net]
    layers = [m for m in net.modules() if hasattr(m, "scaling")]
    before = [(dict(m.scaling), m.active_adapter, m.disable_adapters) for m in layers]
    asked = {"latents": noise(adapted, 1), **STEPS, "output_type": "latent"}
    images = {
        str(mix): adapted(PROMPTS[0], **asked, adapter=mix).images
        for mix in ("good", {"good": 0.5}, {"good": 0.5, "bad": 0.5}, {"good": 0.0}, {})
    }
    same(images[str({"good": 0.0})], images["{}"])
    others = [images[key] for key in images if key != "{}" and "0.0" not in key]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(others) for b in others[:i])
    assert [(dict(m.scaling), m.active_adapter, m.disable_adapters) for m in layers] == before


def test_two_models_in_guidance_are_two_calls_of_a_batch_each():
    policy, other = toy("epsilon"), toy("epsilon", seed=1)
    x, t = torch.randn(2, *SHAPE), torch.tensor([500, 20])
    cond, uncond = Cond({"c": torch.randn(2, 3)}), Cond({"c": torch.zeros(1, 3)})
    same(
        Guided(denoiser=policy, uncond=uncond, guidance=3.0, negative=policy)(x, t, cond),
        Guided(denoiser=policy, uncond=uncond, guidance=3.0)(x, t, cond),
    )
    eps, eps_neg = policy(x, t, cond), other(x, t, Cond({"c": torch.zeros(2, 3)}))
    same(Guided(denoiser=policy, uncond=uncond, guidance=3.0, negative=other)(x, t, cond), 3.0 * eps - 2.0 * eps_neg)


# best of n


@pytest.mark.parametrize("reward", [redness, "clip:tiny-clip"], ids=["function", "spec"])
def test_the_best_of_n_is_the_image_with_the_highest_score(plain, reward):
    asked = {"num_inference_steps": 1, "output_type": "pt", "seeds": list(range(6))}
    every = plain(PROMPTS, **asked, num_images_per_prompt=3).images.reshape(2, 3, 3, 64, 64)
    judge = redness if callable(reward) else diffalign.load_reward(reward)
    scores = torch.stack([judge(images, [prompt] * 3) for images, prompt in zip(every, PROMPTS, strict=True)])
    made = plain(PROMPTS, **asked, best_of=3, reward=reward)
    same(made.candidate_scores, scores)
    same(made.scores, scores.max(1).values)
    for row in range(2):
        same(made.images[row], every[row, scores[row].argmax()])
    two = plain(PROMPTS, **asked, best_of=3, reward=reward, num_images_per_prompt=2, batch_size=4)
    same(two.scores, scores.topk(2).values.flatten())  # the best first, and batches change nothing
    same(two.images[2], made.images[1])
    assert torch.equal(two.chosen[:, 0], scores.argmax(1))


def test_images_and_latents_come_as_asked(plain):
    asked = {**STEPS, "seeds": [1, 2], "best_of": 2, "reward": "jpeg"}
    images, scores = plain(PROMPTS[0], **asked, return_dict=False)
    assert (len(images), images[0].size, scores.shape) == (1, (64, 64), (1,))
    chosen = plain(PROMPTS[0], **asked, output_type="latent")
    both = plain(PROMPTS[0], **STEPS, seeds=[1, 2], num_images_per_prompt=2, output_type="latent").images
    same(chosen.images[0], both[chosen.chosen[0, 0]])
    assert plain(PROMPTS[0], **STEPS).scores is None


def test_a_reward_may_be_anything_that_scores_images():
    images = torch.rand(4, 3, 8, 8)
    for given in (redness, diffalign.load_reward("jpeg"), diffalign.load_reward("jpeg").reward):
        assert score_prompts(image_reward(given), images, PROMPTS).shape == (2, 2)


def test_an_image_that_the_safety_checker_blackened_comes_last(model, plain):
    if model != "sd":
        pytest.skip("SD3 has no safety checker")
    from transformers import CLIPImageProcessorPil

    class Prude(torch.nn.Module):
        """Flags every image but the second."""

        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images, clip_input):
            images[[0, 2]] = 0
            return images, [True, False, True]

    def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return -images.mean((1, 2, 3))

    try:
        plain.safety_checker, plain.feature_extractor = Prude(), CLIPImageProcessorPil()
        asked = {"num_inference_steps": 1, "best_of": 3, "reward": darkness, "output_type": "pt"}
        made = plain(PROMPTS[0], **asked, num_images_per_prompt=2)
    finally:
        plain.safety_checker = plain.feature_extractor = None
    assert made.chosen.tolist() == [[1, 0]]
    assert made.nsfw_content_detected == [False, True]
    assert made.images[1].max() == 0


def test_a_lora_without_a_name_gets_the_stock_pipeline_s(model, loras):
    pipeline = load("aligned", model)
    pipeline.load_lora_weights(loras["good"], weight_name="pytorch_lora_weights.safetensors")
    made = pipeline(PROMPTS[0], num_inference_steps=1, adapter="default_0", seeds=1, output_type="latent").images
    plain = pipeline(PROMPTS[0], num_inference_steps=1, adapter={}, seeds=1, output_type="latent").images
    assert (made - plain).abs().max() > 1e-3


def test_what_could_not_be_judged_is_never_best():
    scores = torch.tensor([[0.0, math.nan, 1.0, 1.0], [-5.0, -4.0, math.nan, -6.0]])
    assert best(scores, 3).tolist() == [[2, 3, 0], [1, 0, 3]]
    with pytest.raises(RunError, match="at least 4 of the 4 images of each prompt, got 3 for prompt 0"):
        best(scores, 4)


# bad input


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"best_of": 4}, "reward must be given to take the best of 4"),
        (
            {"best_of": 1, "num_images_per_prompt": 2, "reward": "jpeg"},
            "best_of must be at least num_images_per_prompt",
        ),
        ({"reward": "jpg"}, "reward must be a known name .* got 'jpg'; did you mean 'jpeg'"),
        ({"reward": 3.0}, "reward must be a spec, a reward or a function"),
        ({"reward": "clap"}, "reward must judge images, got 'clap', which judges audio"),
        ({"adapter": "goood"}, "adapter must be a loaded adapter, got 'goood'; did you mean 'good'"),
        ({"negative_adapter": "worse"}, "negative_adapter must be a loaded adapter, got 'worse'"),
        ({"negative_adapter": {"good": 1.0, "bad": 1.0}}, "adapter must be named beside negative_adapter"),
        ({"adapter": {"good": math.nan}}, r"adapter\['good'\] must be a finite number"),
        ({"negative_adapter": "bad", "guidance_scale": 1.0}, "guidance_scale must be above 1"),
        ({"latents": torch.zeros(2, 4, 3, 3)}, "latents must have shape"),
        ({"prompt": []}, "prompt must hold one prompt"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt must be one, or one for each of 2 prompts, got 3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"output_type": "pill"}, "output_type must be a known one"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_clear_error(adapted, asked, said):
    with pytest.raises(InputError, match=said):
        adapted(**{"prompt": PROMPTS, **STEPS, **asked})


def test_an_adapter_where_none_is_loaded_says_how(plain):
    with pytest.raises(InputError, match="got 'good'; none is: call load_lora_weights"):
        plain(PROMPTS, **STEPS, negative_adapter="good")


def test_a_model_of_another_family_is_refused(plain, model):
    with pytest.raises(InputError, match="families sd or sd3"):
        type(plain)(**{**plain.components, "unet": None, "transformer": None})
