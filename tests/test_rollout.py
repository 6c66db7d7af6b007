"""The sampling loop: against the stock pipelines, ratios of exactly 1, noise that belongs to an image, windows."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.denoisers import FAMILIES
from diffalign.denoisers.guided import Guided
from diffalign.errors import InputError, RunError
from diffalign.models.load import ModelSource, load_context, load_pipeline
from diffalign.online.parts import make_walk
from diffalign.online.settings import OnlineSettings
from diffalign.progress import bar
from diffalign.sampling.kernels import KERNELS, kernel
from diffalign.sampling.rollout import Keep, draw_window, initial_noise, log_probs, noisy_steps, rollout
from diffalign.sampling.schedule import Schedule, make_schedule, schedule_of
from diffalign.types import Cond, Denoiser, Needs, Trajectory
from tests import worlds
from tests.toys import SHAPE, Toy, toy

PROMPTS = ["a large red circle on a white background", "two small blue squares"]
SD_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SD3_CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
VP = ("ddim", "ddpm", "euler_ancestral")
NOISY = [name for name in KERNELS if name != "ode"]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
"""Of the Euler schedulers, which give numpy a tensor."""


@dataclass(frozen=True)
class World:
    """A shipped tiny model, ready to sample."""

    pipeline: Any
    denoiser: Denoiser
    cond: Cond
    uncond: Cond
    shape: tuple[int, int, int]

    def guided(self, guidance: float) -> Guided:
        return Guided(denoiser=self.denoiser, uncond=self.uncond, guidance=guidance)


@pytest.fixture(scope="module", params=["sd", "sd3"])
def world(request) -> World:
    family = FAMILIES[request.param]
    pipeline = load_pipeline(ModelSource(path=f"tiny-{request.param}"))
    family.use_sampler(pipeline)
    net = pipeline.components[family.net]
    side = net.config["sample_size"]
    return World(
        pipeline=pipeline,
        denoiser=family.make_denoiser(net, pipeline.scheduler.config, None),
        cond=family.encode_prompts(pipeline, PROMPTS),
        uncond=family.encode_prompts(pipeline, [""] * len(PROMPTS)),  # rounded as the pipeline's own batch is
        shape=(net.config["in_channels"], side, side),
    )


def walk(name: str, steps: int = 5) -> Schedule:
    return make_schedule(name, SD_CONFIG if name in VP else SD3_CONFIG, steps)


def model(name: str) -> Toy:
    return toy("epsilon" if name in VP else "velocity")


def conds(size: int) -> Cond:
    return Cond({"c": torch.arange(size * 3).reshape(size, 3) / 10})


def toy_rollout(name: str = "flow_sde", seeds=(0, 1, 2), steps: int = 5, **options) -> Trajectory:
    chosen = options.pop("kernel", kernel(name))
    x_init = options.pop("x_init", initial_noise(seeds, SHAPE))
    return rollout(model(name), chosen, walk(name, steps), conds(len(seeds)), seeds, x_init=x_init, **options)


# the stock pipelines


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_without_noise_the_loop_is_the_stock_pipeline(world, guidance):
    x_init = initial_noise([3, 4], world.shape)
    options = FAMILIES["sd3" if "transformer" in world.pipeline.components else "sd"].call_options(world.pipeline)
    theirs = world.pipeline(
        prompt=PROMPTS,
        latents=x_init,
        num_inference_steps=5,
        guidance_scale=guidance,
        output_type="latent",
        **options,
    ).images
    schedule = schedule_of(world.pipeline.scheduler, last="scheduler")
    denoiser = world.guided(guidance)
    names = [("ode", {}), ("ddim", {"eta": 0.0}) if schedule.moves.kind == "vp" else ("flow_sde", {"eta": 0.0})]
    for name, settings in names:
        found = rollout(denoiser, kernel(name, **settings), schedule, world.cond, (3, 4), x_init=x_init)
        torch.testing.assert_close(found.x_0, theirs, atol=1e-5, rtol=1e-5)
        assert found.log_prob.shape == (2, 0)


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_without_noise_the_loop_is_flux_s_own_at_the_shift_of_its_image(tmp_path, guided):
    """Dev's shift grows with the image; at 16 tokens it is far from that of the model's own size."""
    family, source = FAMILIES["flux"], ModelSource(path=str(worlds.flux(tmp_path / "flux", guided=guided)))
    pipeline, context = load_pipeline(source), load_context(source, family, resolution=16)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = family.make_denoiser(pipeline.transformer, pipeline.scheduler.config, None, context)
    x_init = initial_noise([3, 4], context.latents)
    theirs = family.sample(pipeline, PROMPTS, x_init, steps=5, guidance=3.5, decoded=False)
    walks = [
        make_walk(OnlineSettings(steps=5, table=table), Needs(data="prompts", items="images"), source, family=family,
                  context=context)
        for table in ("analytic", "diffusers")
    ]  # fmt: skip
    for made in walks:
        torch.testing.assert_close(made.schedule.levels, pipeline.scheduler.sigmas)
        cond = family.encode_prompts(pipeline, PROMPTS)
        found = rollout(denoiser, made.kernel, made.schedule, cond, (3, 4), x_init=x_init)
        torch.testing.assert_close(found.x_0, theirs, atol=1e-5, rtol=1e-5)
    if guided:
        large = load_context(source, family, resolution=64)
        other = make_walk(OnlineSettings(steps=5), Needs(data="prompts", items="images"), source, family=family,
                          context=large)  # fmt: skip
        assert (other.schedule.levels[1:-1] > walks[0].schedule.levels[1:-1]).all()


def test_without_noise_a_walk_on_the_ve_path_is_the_stock_pipeline_with_its_euler_scheduler(world):
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    if not isinstance(world.pipeline, StableDiffusionPipeline):
        pytest.skip("a flow model has no VE walk")
    pipeline = StableDiffusionPipeline(
        **{
            **world.pipeline.components,
            "scheduler": EulerDiscreteScheduler.from_config(world.pipeline.scheduler.config),
        },
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    x_init = initial_noise([3, 4], world.shape)
    theirs = pipeline(PROMPTS, latents=x_init, num_inference_steps=5, guidance_scale=4.5, output_type="latent").images
    schedule = schedule_of(pipeline.scheduler)
    found = rollout(world.guided(4.5), kernel("ode"), schedule, world.cond, (3, 4), x_init=x_init)
    torch.testing.assert_close(found.x_0, theirs, atol=1e-5, rtol=1e-5)


# ratios


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_ratio_on_an_unchanged_policy_is_exactly_1_with_gradient_and_guidance(world, dtype):
    name = "ddim" if "unet" in world.pipeline.components else "flow_sde"
    schedule, chosen = make_schedule(name, world.pipeline.scheduler.config, 4), kernel(name)
    x_init, keep = initial_noise([7, 7], world.shape), Keep(dtype=dtype)
    denoiser = world.guided(3.0)
    made = rollout(denoiser, chosen, schedule, world.cond, (7, 8), x_init=x_init, keep=keep)
    assert made.x.dtype == getattr(torch, dtype)
    net: Any = world.denoiser.net
    net.requires_grad_(True)
    again = log_probs(denoiser, chosen, schedule, made)
    ratio = (again - made.log_prob).exp()
    assert torch.equal(ratio, torch.ones(2, len(made.steps)))
    ratio.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    net.requires_grad_(False)
    net.zero_grad()


@pytest.mark.parametrize("name", NOISY)
def test_the_ratio_is_exactly_1_with_every_kernel(name):
    made = toy_rollout(name, kernel=kernel(name, form="normal"))
    again = log_probs(model(name), kernel(name, form="normal"), walk(name), made)
    assert made.log_prob.shape == (3, 5 if name == "ddim" else 4)
    assert made.log_prob.abs().min() > 0
    assert torch.equal(again, made.log_prob)


def test_a_stored_state_that_is_rounded_after_the_density_would_break_the_ratio():
    made, chosen = toy_rollout(), kernel("flow_sde")
    rounded = Trajectory(**{**vars(made), "x": made.x.half()})
    assert (log_probs(model("flow_sde"), chosen, walk("flow_sde"), rounded) - made.log_prob).abs().max() > 1e-6


def test_in_bfloat16_a_different_batch_shape_moves_the_log_prob_by_less_than_the_stated_bound(world):
    name = "ddim" if "unet" in world.pipeline.components else "flow_sde"
    schedule, chosen = make_schedule(name, world.pipeline.scheduler.config, 4), kernel(name)
    with torch.autocast("cpu", torch.bfloat16):
        made = rollout(world.denoiser, chosen, schedule, world.cond, (7, 8), x_init=initial_noise([7, 8], world.shape))
        with torch.no_grad():
            again = log_probs(world.denoiser, chosen, schedule, made)
            alone = log_probs(world.denoiser, chosen, schedule, made.rows(slice(0, 1)))
    assert made.log_prob.dtype == torch.float32
    torch.testing.assert_close(again, made.log_prob, atol=0, rtol=0)
    torch.testing.assert_close(alone, made.log_prob[:1], atol=2e-3, rtol=0)  # the bound that rollout.py states


# noise


def test_an_image_does_not_depend_on_the_batch_that_it_is_made_in():
    together = toy_rollout(seeds=(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        noise = initial_noise([seed], SHAPE)
        assert torch.equal(noise[0], initial_noise([5, 6, 7], SHAPE)[i])
        one = conds(3).rows(slice(i, i + 1))
        alone = rollout(model("flow_sde"), kernel("flow_sde"), walk("flow_sde"), one, (seed,), x_init=noise)
        torch.testing.assert_close(alone.x[0], together.x[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[i], atol=1e-5, rtol=1e-5)


def test_no_noise_is_shared_between_images_or_steps_and_none_is_taken_from_the_global_stream():
    noises: list[Tensor] = []
    before = torch.get_rng_state()
    chosen, schedule = kernel("flow_sde"), walk("flow_sde")
    made = toy_rollout()
    assert torch.equal(torch.get_rng_state(), before)
    for i in made.steps:
        x_t, x_s = made.states(i)
        step = schedule.step(torch.full((3,), i))
        move = chosen(model("flow_sde")(x_t, step.t, made.cond).detach(), x_t, step)
        noises.extend((x_s - move.mean) / move.std.reshape(-1, 1, 1, 1))
    table = torch.stack([noise.flatten() for noise in [*noises, *initial_noise((0, 1, 2), SHAPE)]])
    torch.testing.assert_close(table.std(1), torch.ones(len(table)), atol=0.3, rtol=0)
    assert (table.corrcoef() - torch.eye(len(table))).abs().max() < 0.6  # of 64 numbers each


def test_a_group_may_share_its_start_and_differs_from_the_first_noise_on():
    start = initial_noise([9], SHAPE).expand(2, *SHAPE)
    cond = Cond({"c": torch.zeros(2, 3)})
    options = {"x_init": start, "window": range(2, 4), "keep": Keep(levels="all")}
    made = rollout(model("flow_sde"), kernel("flow_sde"), walk("flow_sde"), cond, (1, 2), **options)
    same = [torch.equal(made.x[0, j], made.x[1, j]) for j in range(6)]
    assert same == [True, True, True, False, False, False]


# what is kept


def test_in_a_window_there_is_noise_and_outside_it_the_walk_is_the_noise_free_one():
    free = toy_rollout(kernel=kernel("ode"), keep=Keep(levels="all"))
    made = toy_rollout(window=range(1, 3))
    assert (made.steps, made.first, made.x.shape, made.log_prob.shape) == ((1, 2), 1, (3, 3, *SHAPE), (3, 2))
    torch.testing.assert_close(made.x[:, 0], free.x[:, 1], atol=0, rtol=0)
    assert torch.equal(made.t, walk("flow_sde").levels[1:4])
    rest = rollout(
        model("flow_sde"),
        kernel("ode"),
        Schedule(moves=walk("flow_sde").moves.rows(torch.tensor([3, 4]))),
        made.cond,
        made.seeds,
        x_init=made.x[:, -1],
    )
    torch.testing.assert_close(rest.x_0, made.x_0, atol=0, rtol=0)


def test_states_and_log_probs_of_a_window_are_those_of_the_same_walk_kept_whole():
    part, whole = (toy_rollout(window=range(1, 3), keep=Keep(levels=levels)) for levels in ("noisy", "all"))
    assert whole.x.shape == (3, 6, *SHAPE)
    assert (whole.first, whole.steps) == (0, (1, 2))
    assert torch.equal(whole.log_prob, part.log_prob)
    for i in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(whole.states(i), part.states(i), strict=True))
    assert torch.equal(whole.x[:, -1], whole.x_0)
    with pytest.raises(ValueError, match=r"step must be kept, in \[1, 3\), got 3"):
        part.states(3)


def test_intermediate_predictions_of_the_clean_latents_come_on_demand():
    made = toy_rollout(keep=Keep(x_0_hat=True))
    assert made.x_0_hat.shape == (3, 5, *SHAPE)
    torch.testing.assert_close(made.x_0_hat[:, -1], made.x_0, atol=1e-6, rtol=1e-5)  # where the clean last move goes
    assert toy_rollout().x_0_hat is None


def test_rows_of_a_trajectory_are_those_of_its_samples():
    made = toy_rollout(keep=Keep(x_0_hat=True))
    part = made.rows(slice(1, 3)).to("cpu")
    assert len(part) == 2
    assert part.seeds == (1, 2)
    for name in ("x", "x_0", "log_prob", "x_0_hat"):
        assert torch.equal(vars(part)[name], vars(made)[name][1:3])
    assert torch.equal(part.cond["c"], made.cond["c"][1:3])


def test_the_bar_advances_by_every_move(capsys):
    with bar("rollout", 5) as shown:
        toy_rollout(shown=shown)
    assert shown.done == 5
    assert "rollout 5/5" in capsys.readouterr().err


def test_half_precision_halves_the_memory_and_ends_near_the_same_image():
    made, full = toy_rollout(keep=Keep(dtype="float16")), toy_rollout()
    assert made.x.nbytes * 2 == full.x.nbytes
    assert made.x_0.dtype == torch.float32
    torch.testing.assert_close(made.x_0, full.x_0, atol=2e-2, rtol=0)  # a unit in the last of 11 bits a move


def test_a_window_is_drawn_by_place_and_covers_its_range():
    drawn = [draw_window(2, 1, 6, seed=0, place=("round", r)) for r in range(200)]
    assert {w.start for w in drawn} == {1, 2, 3, 4}
    assert all(len(w) == 2 for w in drawn)
    assert drawn[3] == draw_window(2, 1, 6, seed=0, place=("round", 3))


def test_the_moves_with_noise_are_known_before_the_walk():
    assert noisy_steps(kernel("flow_sde"), walk("flow_sde")) == (0, 1, 2, 3)
    assert noisy_steps(kernel("flow_sde", last="noise"), walk("flow_sde")) == (0, 1, 2, 3, 4)
    assert noisy_steps(kernel("ddim"), walk("ddim")) == (0, 1, 2, 3, 4)
    assert noisy_steps(kernel("dance"), walk("dance"), range(1, 3)) == (1, 2)
    assert noisy_steps(kernel("ddim", eta=0.0), walk("ddim")) == ()


# guidance


@dataclass(frozen=True)
class Counted:
    """A denoiser that keeps the batch sizes it was called with."""

    inner: Toy
    sizes: list[int] = field(default_factory=list)

    @property
    def path(self):
        return self.inner.path

    @property
    def prediction(self):
        return self.inner.prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.sizes.append(len(x_t))
        return self.inner(x_t, t, cond)


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_goes_from_the_unconditional_prediction_through_the_conditional_one_in_one_call(rows):
    plain, cond, uncond = toy("velocity"), conds(3), Cond({"c": torch.ones(1, 3).expand(rows, 3)})
    counted = Counted(plain)
    x, t = initial_noise((0, 1, 2), SHAPE), torch.tensor([0.2, 0.5, 0.9])
    a, b = plain(x, t, Cond({"c": torch.ones(3, 3)})), plain(x, t, cond)
    found = Guided(denoiser=counted, uncond=uncond, guidance=3.0)(x, t, cond)
    torch.testing.assert_close(found, 3 * b - 2 * a, atol=1e-5, rtol=1e-5)
    assert torch.equal(Guided(denoiser=counted, uncond=uncond, guidance=1.0)(x, t, cond), b)
    assert counted.sizes == [6, 3]


def test_gradient_flows_through_both_branches_unless_the_unconditional_one_is_detached():
    x, t, cond, uncond = initial_noise((0,), SHAPE), torch.tensor([0.5]), conds(1), Cond({"c": torch.ones(1, 3)})

    def slope(denoiser) -> Tensor:
        inner = toy("velocity")
        out = denoiser(inner)(x, t, cond).square().sum()
        return torch.autograd.grad(out, inner.net.last.weight)[0]

    both = slope(lambda inner: Guided(denoiser=inner, uncond=uncond, guidance=3.0))
    one = slope(lambda inner: Guided(denoiser=inner, uncond=uncond, guidance=3.0, detach_uncond=True))

    def by_hand(inner, share):
        a, b = inner(x, t, uncond), inner(x, t, cond)
        return (share * a + (1 - share) * a.detach()) * -2 + 3 * b

    torch.testing.assert_close(both, slope(lambda i: lambda *_: by_hand(i, 1.0)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one, slope(lambda i: lambda *_: by_hand(i, 0.0)), atol=1e-4, rtol=1e-4)
    assert (both - one).abs().max() > 1e-2


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": range(3, 5)}, r"where 'flow_sde' has none at \[4\]; raise eta, or leave the last move out"),
        ({"window": range(1, 3), "kernel": kernel("flow_sde", eta=0.0)}, r"has none at \[1, 2\]; raise eta"),
        ({"window": range(4, 7)}, r"window must be consecutive moves within \[0, 5\), got range\(4, 7\)"),
        ({"window": range(0, 4, 2)}, "window must be consecutive moves"),
        ({"window": range(2, 2)}, "window must be consecutive moves"),
    ],
)
def test_a_window_that_cannot_be_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        toy_rollout(**options)


def test_a_window_that_does_not_fit_its_range_is_one_clear_error():
    with pytest.raises(InputError, match=r"window must have a size in \[1, 5\] within \[1, 6\), got 6"):
        draw_window(6, 1, 6, seed=0, place=())


def test_an_image_that_is_not_finite_is_one_clear_error_that_names_its_seed():
    start = initial_noise((4, 5, 6), SHAPE)
    start[1, 0] = float("nan")
    with pytest.raises(RunError, match=r"latents of a rollout must be finite, got others for seeds \[5\]"):
        toy_rollout(seeds=(4, 5, 6), x_init=start)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="seeds, x_init and cond must be of one length, got 3 and 2"):
        toy_rollout(x_init=initial_noise((0, 1), SHAPE))


@pytest.mark.parametrize(
    ("uncond", "guidance", "message"),
    [
        (Cond({"c": torch.ones(1, 3)}), 0.5, "guidance must be at least 1, which is off, got 0.5"),
        (Cond({"c": torch.ones(1, 3)}), float("nan"), "guidance must be at least 1"),
        (Cond({"d": torch.ones(1, 3)}), 2.0, r"uncond must hold \['c'\] like cond, got \['d'\]"),
        (Cond({"c": torch.ones(2, 3)}), 2.0, r"uncond\['c'\] must have shape \(1, 3\) or \(3, 3\), got \(2, 3\)"),
        (Cond({"c": torch.ones(1, 4)}), 2.0, r"uncond\['c'\] must have shape \(1, 3\) or \(3, 3\), got \(1, 4\)"),
    ],
)
def test_guidance_that_cannot_be_is_one_clear_error(uncond, guidance, message):
    def call() -> Tensor:
        guided = Guided(denoiser=toy("velocity"), uncond=uncond, guidance=guidance)
        return guided(initial_noise((0, 1, 2), SHAPE), torch.full((3,), 0.5), conds(3))

    with pytest.raises(InputError, match=message):
        call()
