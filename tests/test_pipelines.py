"""The pipelines for Diffusers: against the stock ones, seeds, injected noise, log-probs, bad input."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import shipped
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.models.load import ModelSource, load_pipeline
from diffalign.sampling.kernels import kernel
from diffalign.sampling.rollout import Keep, initial_noise, log_probs
from tests.builders import random_lora

ROOT = Path(__file__).parent.parent
PROMPTS = ["a large red circle on a white background", "two small blue squares"]
NAMES = {"sd": "sd_rollout", "sd3": "sd3_rollout"}
KERNELS = {"sd": "ddim", "sd3": "flow_sde"}


@pytest.fixture(autouse=True, scope="module")
def _modules(tmp_path_factory):
    """Diffusers copies a pipeline's file into a cache that all its users share; tests have their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))  # what Diffusers puts on the path goes with the patch
        yield


def load(pipeline: str, model: str) -> Any:
    from diffusers import DiffusionPipeline

    made = DiffusionPipeline.from_pretrained(
        ROOT / "assets" / "tiny" / model, custom_pipeline=str(ROOT / "pipelines" / pipeline), trust_remote_code=True
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=["sd", "sd3"])
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(model, _modules) -> Any:
    return load(NAMES[model], model)


@pytest.fixture(scope="module")
def stock(model, ours) -> Any:
    """The stock pipeline with the sampler that has no noise."""
    made = load_pipeline(ModelSource(path=f"tiny-{model}"))
    FAMILIES[model].use_sampler(made)
    return made


@pytest.fixture(scope="module")
def shape(model, ours) -> tuple[int, int, int]:
    return FAMILIES[model].latent_shape(ours.components[FAMILIES[model].net].config)


def same(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# the stock pipeline


@pytest.mark.parametrize("guidance", [0, 4.5])
@pytest.mark.parametrize("way", [{"kernel": "ode"}, {"eta": 0}], ids=["ode", "eta 0"])
def test_without_noise_images_are_those_of_the_stock_pipeline(model, ours, stock, shape, guidance, way):
    asked = {
        "latents": initial_noise([3, 4], shape),
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "negative_prompt": ["blurry", "noise"],
        "output_type": "pt",
    }
    theirs = stock(PROMPTS, **asked, **FAMILIES[model].call_options(stock)).images
    made = ours(PROMPTS, **asked, **way)
    same(made.images, theirs)
    assert made.log_probs.shape == (2, 0)
    assert made.trajectory.x.shape == (2, 4, *shape)


def test_a_generator_starts_the_same_images_as_in_the_stock_pipeline(model, ours, stock):
    asked = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    theirs = stock(PROMPTS[0], **asked, **FAMILIES[model].call_options(stock), generator=torch.manual_seed(5)).images
    same(ours(PROMPTS[0], **asked, kernel="ode", generator=torch.manual_seed(5)).images, theirs)


def test_ddim_walks_without_noise_end_where_the_scheduler_ends(ours, stock, shape, model):
    if model != "sd":
        pytest.skip("a flow ends at 0")
    before = ours.scheduler, stock.scheduler
    try:
        for pipeline in (ours, stock):
            pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=True)
        asked = {"latents": initial_noise([3], shape), "num_inference_steps": 2, "output_type": "latent"}
        same(ours(PROMPTS[0], **asked, eta=0.0).images, stock(PROMPTS[0], **asked).images)
    finally:
        ours.scheduler, stock.scheduler = before


def test_injected_noise_makes_the_noisy_images_of_the_stock_pipeline(model, ours, stock, shape):
    """DDIM with eta 1 and a generator; Diffusers' stochastic flow sampler, which draws from the global stream."""
    x_init, steps = initial_noise([3, 4], shape), 3
    asked = {"latents": x_init, "num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "latent"}
    noise = torch.stack([torch.randn(x_init.shape, generator=rng) for rng in [torch.manual_seed(0)] * steps], dim=1)
    if model == "sd":
        theirs = stock(PROMPTS, **asked, eta=1.0, generator=torch.manual_seed(0)).images
        made = ours(PROMPTS, **asked, variance_noise=noise)
    else:
        before = stock.scheduler
        stock.scheduler = type(before).from_config(before.config, stochastic_sampling=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = stock(PROMPTS, **asked, **FAMILIES[model].call_options(stock)).images
        stock.scheduler = before
        made = ours(PROMPTS, **asked, kernel="cps", eta=1.0, variance_noise=noise)
    same(made.images, theirs)
    assert not torch.equal(made.images, ours(PROMPTS, **asked, kernel="ode").images)


# what comes with the images


def test_log_probs_are_those_that_training_computes(model, ours):
    made = ours(PROMPTS, num_inference_steps=3, guidance_scale=3.0, seeds=[1, 2], output_type="latent")
    moves = 3 if model == "sd" else 2  # the last move of a flow has no noise
    assert made.trajectory.steps == tuple(range(moves))
    assert made.log_probs.shape == (2, moves)
    again = log_probs(made.denoiser, made.kernel, made.schedule, made.trajectory)
    assert torch.equal(again, made.log_probs)
    for column, i in enumerate(made.trajectory.steps):
        x_t, x_s = made.trajectory.states(i)
        step = made.schedule.step(torch.full((2,), i))
        move = made.kernel(made.denoiser(x_t, step.t, made.trajectory.cond), x_t, step)
        density = torch.distributions.Normal(move.mean, move.std.reshape(2, 1, 1, 1).expand_as(x_s))
        same(made.log_probs[:, column], density.log_prob(x_s).mean((1, 2, 3)))


def test_the_trajectory_starts_at_the_latents_and_ends_at_the_images(ours, shape):
    x_init = initial_noise([7], shape)
    made = ours(PROMPTS[0], num_inference_steps=2, latents=x_init, seeds=3, output_type="latent")
    assert torch.equal(made.trajectory.x[:, 0], x_init)
    assert torch.equal(made.trajectory.x[:, -1], made.images)
    other = ours(PROMPTS[0], num_inference_steps=2, latents=x_init, seeds=4, output_type="latent")
    assert not torch.equal(other.images, made.images)


@pytest.mark.parametrize("by", ["seeds", "generators"])
def test_an_image_does_not_depend_on_the_batch_that_it_is_made_in(ours, by):
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}

    def noise(*numbers: int) -> dict[str, Any]:
        if by == "seeds":
            return {"seeds": list(numbers)}
        return {"generator": [torch.Generator().manual_seed(number) for number in numbers]}

    both = ours([*PROMPTS, PROMPTS[0]], **asked, **noise(5, 6, 7))
    alone = ours(PROMPTS[1], **asked, **noise(6))
    same(alone.images[0], both.images[1])
    same(alone.log_probs[0], both.log_probs[1])
    assert not torch.equal(both.images[0], both.images[2])


def test_a_window_and_what_is_kept(model, ours):
    asked = {"num_inference_steps": 4, "seeds": [1], "output_type": "latent"}
    made = ours(PROMPTS[0], **asked, window=range(1, 3), keep=Keep(dtype="float16"))
    assert (made.trajectory.steps, made.trajectory.first) == ((1, 2), 1)
    assert (made.trajectory.x.dtype, made.log_probs.shape) == (torch.float16, (1, 2))
    pair = ours(PROMPTS[0], **asked, window=(1, 3), keep=Keep(dtype="float16"))
    assert torch.equal(pair.images, made.images)
    chosen = kernel(KERNELS[model], eta=0.5)
    assert torch.equal(
        ours(PROMPTS[0], **asked, kernel=chosen).images, ours(PROMPTS[0], **asked, kernel=chosen.name, eta=0.5).images
    )


def test_embedded_prompts_are_prompts(model, ours):
    asked = {"num_inference_steps": 2, "seeds": [1, 2], "output_type": "latent"}
    family = FAMILIES[model]
    cond, uncond = (family.encode_prompts(ours, texts).tensors for texts in (PROMPTS, ["", ""]))
    embeds = {**cond, **{f"negative_{name}": value for name, value in uncond.items()}}
    same(ours(**embeds, **asked).images, ours(PROMPTS, **asked).images)


def test_images_come_as_asked(ours, shape):
    asked = {"num_inference_steps": 1, "seeds": [1], "kernel": "ode"}
    images, trajectory, densities = ours(PROMPTS[0], **asked, return_dict=False)
    side = shape[-1] * ours.vae_scale_factor
    assert images[0].size == (side, side)
    assert len(trajectory) == len(densities) == 1
    assert ours(PROMPTS[0], **asked, output_type="np").images.shape == (1, side, side, 3)
    wide = ours(PROMPTS[0], **asked, output_type="pt", height=side // 2, width=side).images
    assert wide.shape == (1, 3, side // 2, side)


def test_a_flagged_image_is_black(model, ours):
    if model != "sd":
        pytest.skip("SD3 has no safety checker")
    from transformers import CLIPImageProcessorPil

    class Prude(torch.nn.Module):
        """Flags the second image, as Stable Diffusion's checker does: it takes the pixels away and says so."""

        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images, clip_input):
            assert clip_input.shape[-1] == 224
            images[1:] = 0
            return images, [False, True]

    try:
        ours.safety_checker, ours.feature_extractor = Prude(), CLIPImageProcessorPil()
        made = ours(PROMPTS, num_inference_steps=1, output_type="pt")
    finally:
        ours.safety_checker = ours.feature_extractor = None
    assert made.nsfw_content_detected == [False, True]
    assert made.images[0].max() > 0
    assert made.images[1].max() == 0


def test_in_bfloat16_the_network_sees_its_own_type_and_the_walk_is_float32(model):
    pipeline = load(NAMES[model], model).to(torch.bfloat16)
    made = pipeline(PROMPTS[0], num_inference_steps=2, seeds=[1], output_type="pt")
    assert made.trajectory.x.dtype == made.log_probs.dtype == torch.float32
    assert made.images.isfinite().all()


# bad input


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kernel": "{other}"}, r"kernel must fit a \w+ model, got"),
        ({"kernel": "dddim"}, r"kernel must be a known kernel, got 'dddim'; did you mean 'ddim'"),
        ({"eta": -1.0}, r"kernel.eta must be"),
        ({"kernel": "ode", "eta": 0.5}, r"kernel 'ode' does not take option 'eta'"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, r"latents must have shape \(2, .*\) for 2 images .* got \(1, 4, 3, 3\)"),
        ({"variance_noise": torch.zeros(2, 1, 4, 3, 3)}, r"variance_noise must have shape \(2, 2, .*got \(2, 1, 4, 3"),
        ({"seeds": [1, 2, 3]}, r"seeds must be one integer for each of 2 images, got \[1, 2, 3\]"),
        ({"seeds": [1, 2], "generator": torch.manual_seed(0)}, r"seeds must be left out beside a generator"),
        ({"generator": [torch.manual_seed(0)] * 3}, r"generator must be one, or a list of one for each of 2 images"),
        ({"window": range(0, 9)}, r"window must be consecutive moves within \[0, 2\)"),
        ({"prompt": []}, r"prompt must hold one prompt or more"),
        ({"prompt": None}, r"prompt must be given, or prompt_embeds"),
        ({"num_images_per_prompt": 0}, r"num_images_per_prompt must be at least 1, got 0"),
        ({"height": 65}, r"height must be a multiple of \d+, got 65"),
        ({"output_type": "pill"}, r"output_type must be a known one, got 'pill'; did you mean 'pil'"),
        ({"num_inference_steps": 0}, r"steps must be in \[1, 1000\], got 0"),
        ({"kernel": kernel("ode"), "eta": 0.5}, r"eta must be left out beside a made kernel"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_clear_error(model, ours, asked, said):
    if asked.get("kernel") == "{other}":
        asked = {"kernel": {"sd": "flow_sde", "sd3": "ddim"}[model]}
    with pytest.raises(InputError, match=said):
        ours(**{"prompt": PROMPTS, "num_inference_steps": 2, **asked})


# loading


def test_all_pipelines_live_in_one_process(model, ours, shape):
    """Diffusers runs every local pipeline.py in one module: a second one must neither fail nor change the first."""
    asked = {"num_inference_steps": 1, "latents": initial_noise([1], shape), "kernel": "ode", "output_type": "latent"}
    before = ours(PROMPTS[0], **asked).images
    loaded = [load(name, other) for other in NAMES for name in (NAMES[other], "aligned")]
    assert len({type(pipeline) for pipeline in loaded}) == 4
    assert torch.equal(ours(PROMPTS[0], **asked).images, before)


def test_a_pipeline_is_found_by_bare_name():
    assert Path(shipped.pipeline("sd_rollout")) == ROOT / "pipelines" / "sd_rollout"
    with pytest.raises(InputError, match="did you mean 'sd3_rollout'"):
        shipped.pipeline("sd3_rollouts")


def test_pipelines_are_thin_and_may_be_copied():
    """Diffusers copies the one file: it imports the package by its name, and has the class name of the others."""
    for file in (ROOT / "pipelines").glob("*/*.py"):
        tree = ast.parse(file.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 0 for node in imports)
        pipelines = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and "Pipeline" in node.name]
        assert pipelines == ["DiffalignPipeline"]
        assert not any(
            isinstance(node, ast.For | ast.While) and "scheduler" in ast.unparse(node) for node in ast.walk(tree)
        )
    for file in (ROOT / "diffalign").rglob("*.py"):
        assert "import pipelines" not in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES.values(), "aligned"])
def test_the_examples_of_the_docs_run(name, tmp_path, monkeypatch, capsys):
    sections = (ROOT / "docs" / "pipelines.md").read_text().split("\n## ")
    [section] = [text for text in sections if text.startswith(f"{name}\n")]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    if "load_lora_weights" in section:
        for seed, run in enumerate(("good", "bad")):
            random_lora("sd", tmp_path / "runs" / run / "export", seed)
    exec(compile("\n".join(blocks), f"docs/pipelines.md, {name}", "exec"), {})
    said = capsys.readouterr().out
    wanted = {"sd_rollout": "torch.Size([2, 11, 8, 8, 8])", "sd3_rollout": "(0, 1, 2, 3)\ntorch.Size([2, 4])"}
    assert wanted.get(name, "tensor(") in said
