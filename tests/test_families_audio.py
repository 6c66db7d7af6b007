"""Stable Audio 3 on the roads of every family, and on those of sound: length, waveforms, rounds judged by ear."""

import copy
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign import paths
from diffalign.assemble import assemble
from diffalign.config import parse
from diffalign.data.prepare import Encoders, vae_scale
from diffalign.data.sounds import read_wav, wav
from diffalign.denoisers import FAMILIES
from diffalign.denoisers.guided import Guided
from diffalign.errors import InputError
from diffalign.evaluate.generate import generate
from diffalign.fit import fit
from diffalign.methods import METHODS
from diffalign.models.load import ModelSource, detect_family, load_context, load_pipeline, load_scheduler_config
from diffalign.models.lora import LoraSettings
from diffalign.models.policy import load_policy, make_reference
from diffalign.models.save import export_full, export_lora, trainable
from diffalign.online.parts import make_walk
from diffalign.rng import SampleRng
from diffalign.sampling import kernels
from diffalign.sampling.rollout import rollout
from diffalign.sampling.schedule import few_steps, make_schedule
from diffalign.types import Cond, ImageBatch, PairBatch, RewardBatch
from tests import worlds
from tests.audio_builders import tone
from tests.test_train import metrics, same, weights

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
"""Diffusers' AutoencoderSAME is built with it."""

TEXTS = ("a red circle", "small blue square on white")
FAMILY = FAMILIES["stable_audio_3"]
SECONDS = 1.19
SAMPLES = 19040
FRAMES = 75
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    worlds.stable_audio_3(root / "sa3")
    worlds.stable_audio_3(root / "stereo", channels=2, scale=1000)
    worlds.stable_audio_3(root / "distilled", distilled=True)
    (root / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    (root / "reference").mkdir()
    for i in range(6):
        (root / "reference" / f"{i}.wav").write_bytes(wav(tone(200.0 + 90 * i, 16_000 + 800 * i, 16_000), 16_000))
    return root


def source_of(world: Path, name: str = "sa3", **more) -> ModelSource:
    return ModelSource(path=str(world / name), **more)


def context_of(world: Path, name: str = "sa3"):
    return load_context(source_of(world, name), FAMILY, seconds=SECONDS)


def encoders_of(world: Path, name: str = "sa3") -> Encoders:
    return Encoders(source_of(world, name), FAMILY, CPU, context=context_of(world, name))


def policy_of(source: ModelSource, *, trained: str = "lora"):
    lora = LoraSettings(rank=4, alpha=8.0) if trained == "lora" else None
    return load_policy(source, FAMILY, None, lora=lora, seed=0, context=load_context(source, FAMILY, seconds=SECONDS))


def noise(count: int, *seed: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(s) for s in (seed or range(count))]
    return torch.stack([torch.randn(8, FRAMES, 1, generator=g) for g in generators])


def predicted(denoiser, cond: Cond) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(noise(2), torch.tensor([0.3, 0.8]), cond)


# --- the stock pipeline


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1:]], ids=["batch", "single"])
@pytest.mark.parametrize("name", ["sa3", "stereo"])
def test_our_loop_without_noise_ends_at_the_latents_of_the_stock_pipeline(world, name, texts, guidance):
    pipeline, encoders = load_pipeline(source_of(world, name)), encoders_of(world, name)
    x = noise(len(texts))
    asked = {"prompt": list(texts), "duration": SECONDS, "num_inference_steps": 5, "guidance_scale": guidance}
    theirs = pipeline(**asked, latents=x.squeeze(-1), output_type="latent").audios
    cond, uncond = encoders.prompts(texts), encoders.prompts([""] * len(texts))  # rounded as the pipeline's batches are
    policy = replace(policy_of(source_of(world, name), trained="full"), net=pipeline.transformer)
    schedule = make_schedule(
        "ode", load_scheduler_config(source_of(world, name)), 5, table="diffusers", sigmas=FAMILY.levels
    )
    assert torch.equal(schedule.levels, pipeline.scheduler.sigmas)
    walked = rollout(
        Guided(denoiser=policy, uncond=uncond, guidance=guidance),
        kernels.kernel("ode"),
        schedule,
        cond,
        range(len(texts)),
        x_init=x,
    )
    torch.testing.assert_close(walked.x_0.squeeze(-1), theirs, atol=1e-5, rtol=0)
    assert (theirs - x.squeeze(-1)).abs().mean() > 0.1

    heard = pipeline(**asked, latents=x.squeeze(-1)).audios
    ours = encoders.decode(walked.x_0, vae_scale(source_of(world, name)))
    assert heard.shape == ours.shape == (len(texts), 2 if name == "stereo" else 1, SAMPLES)
    torch.testing.assert_close(ours, heard, atol=1e-5, rtol=0)
    assert 0.01 < ours.abs().mean() < 0.9
    family = {"steps": 5, "guidance": guidance, "context": context_of(world, name)}
    torch.testing.assert_close(FAMILY.sample(pipeline, texts, x, **family), heard, atol=1e-5, rtol=0)
    latents = FAMILY.sample(pipeline, texts, x, decoded=False, **family)
    torch.testing.assert_close(latents.squeeze(-1), theirs, atol=1e-5, rtol=0)


def test_the_pipeline_walks_from_noise_to_data_along_noise_minus_data(world):
    """A network that knew x_0 would be right by our target, and the stock pipeline with it would end at x_0."""
    pipeline, x_0, eps = load_pipeline(source_of(world)), noise(2, 7, 8), noise(2)
    told = []

    def knows(x, t, **_):
        told.append((x, t))
        return (paths.target(policy.path, policy.prediction, x_0, eps, t).squeeze(-1),)

    policy = policy_of(source_of(world), trained="full")
    pipeline.transformer.forward = knows
    made = FAMILY.sample(pipeline, TEXTS, eps, steps=4, guidance=1.0, decoded=False)
    torch.testing.assert_close(made, x_0, atol=1e-5, rtol=0)
    for x, t in told:
        torch.testing.assert_close(paths.add_noise(policy.path, x_0, eps, t).squeeze(-1), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "scale"), [("sa3", 1), ("stereo", 1000)])
def test_the_network_is_told_t_times_the_schedulers_scale(world, name, scale):
    policy, told = policy_of(source_of(world, name), trained="full"), []
    policy.net.forward = lambda x, timestep, **_: told.append(timestep) or (x,)
    policy(noise(2), torch.tensor([0.25, 1.0]), Cond(dict.fromkeys(KEYS, torch.zeros(2))))
    assert told[0].tolist() == [0.25 * scale, scale]


KEYS = ("prompt_embeds", "prompt_attention_mask", "duration_embeds")


def test_levels_lie_evenly_in_log_snr_from_pure_noise_on():
    found = torch.tensor(FAMILY.levels(10)).double()
    assert found[0] == 1.0
    steps = [b - a for a, b in pairwise(torch.logit(found[1:]).tolist())]
    assert steps == pytest.approx([-0.82] * 8, abs=1e-4)
    assert float(torch.logit(found[1])) == pytest.approx(6.2 - 0.82, abs=1e-4)


def test_conditions_are_the_text_and_the_length_and_do_not_depend_on_the_batch(world):
    encoders = encoders_of(world)
    both = encoders.prompts(TEXTS)
    assert {name: tuple(tensor.shape) for name, tensor in both.tensors.items()} == {
        "prompt_embeds": (2, 25, 16),
        "prompt_attention_mask": (2, 25),
        "duration_embeds": (2, 16),
    }
    alone = encoders.prompts(TEXTS[1:])
    for name in KEYS:
        torch.testing.assert_close(both[name][1:], alone[name], atol=1e-6, rtol=1e-6)
    policy = policy_of(source_of(world), trained="full")
    longer = replace(encoders.context, seconds=1.2)
    other = FAMILY.encode_prompts(encoders._part("text", FAMILY.text), TEXTS, longer)
    start = predicted(policy, both)
    assert (predicted(policy, other) - start).abs().max() > 1e-4  # told 10 ms more
    changed = Cond({**both.tensors, "prompt_embeds": both["prompt_embeds"].flip(0)})
    assert (predicted(policy, changed) - start).abs().max() > 1e-3
    padded = both["prompt_attention_mask"] == 0
    behind = torch.where(padded[..., None], torch.ones(()), both["prompt_embeds"])
    assert torch.equal(predicted(policy, Cond({**both.tensors, "prompt_embeds": behind})), start)


def test_a_clip_is_as_long_as_asked_and_a_frame_is_cut(world):
    found = context_of(world)
    assert found.latents == (8, FRAMES, 1)
    assert (found.vae_factor, found.sample_rate_hz, found.seconds) == (256, 16_000, SECONDS)
    assert load_context(source_of(world), FAMILY, seconds=1.2).latents == (8, 75, 1)
    assert load_context(source_of(world), FAMILY, seconds=1.2001).latents == (8, 76, 1)


def test_without_a_length_all_frames_are_heard(world):
    made = FAMILY.sample(load_pipeline(source_of(world)), TEXTS, noise(2), steps=2, guidance=1.0)
    assert made.shape == (2, 1, FRAMES * 256)


def test_the_sampler_of_evaluation_has_no_noise_of_its_own(world):
    pipeline = load_pipeline(source_of(world, "distilled"))
    FAMILY.use_sampler(pipeline)
    made = [FAMILY.sample(pipeline, TEXTS, noise(2), steps=3, guidance=1.0) for _ in range(2)]
    assert torch.equal(*made)


# --- training


def batch_of(method: str, cond: Cond, step: int) -> PairBatch | ImageBatch:
    """A batch of latents in memory."""
    samples = (2 * step, 2 * step + 1)
    x_w, x_l = noise(2, 100 + samples[0], 100 + samples[1]), noise(2, 200 + samples[0], 200 + samples[1])
    if method == "sft":
        return ImageBatch(x_0=x_w, cond=cond, samples=samples)
    return PairBatch(x_w=x_w, x_l=x_l, cond=cond, samples=samples)


def trained(world: Path, method: str, way: str, cond: Cond, *, stopped: bool = False) -> tuple[object, list, int]:
    """(policy after two steps, in one go or with its state carried over after the first, metrics, updated tensors)."""
    chosen = METHODS[method](**({"beta": 100.0} if method == "diffusion_dpo" else {}))
    found, state = [], None
    for start, stop in ((0, 1), (1, 2)) if stopped else ((0, 2),):
        policy = policy_of(source_of(world), trained=way)
        reference = make_reference(policy, adapted=way == "lora").denoiser if method == "diffusion_dpo" else None
        parameters = trainable(policy.net)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        if state is not None:
            for name, parameter in parameters.items():
                parameter.data = state[0][name].clone()
            optimizer.load_state_dict(state[1])
        batches = (batch_of(method, cond, step) for step in range(start, stop))
        reports = fit(policy, reference, chosen, batches, optimizer, steps=stop, start=start, seed=3)
        found += [report.metrics for report in reports]
        state = ({n: p.detach().clone() for n, p in parameters.items()}, copy.deepcopy(optimizer.state_dict()))
    return policy, found, len(state[1]["state"])


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("method", ["diffusion_dpo", "sft"])
def test_the_family_trains_resumes_exports_and_reloads_bit_for_bit(world, tmp_path, method, way):
    cond = encoders_of(world).prompts(TEXTS)
    policy, lines, updated = trained(world, method, way, cond)
    if method == "diffusion_dpo":
        assert lines[0]["rewards/margins"] == 0.0
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert lines[1]["rewards/margins"] != 0.0
    resumed, again, _ = trained(world, method, way, cond, stopped=True)
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    one, two = trainable(policy.net), trainable(resumed.net)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert updated == len(one)  # nothing waits for a gradient in vain

    export = tmp_path / "export"
    if way == "lora":
        export_lora(policy.net, FAMILY, export)
        source = source_of(world, lora=str(export))
    else:
        export_full(policy.net, FAMILY, export, dtype=torch.float32)
        source = source_of(world, denoiser=str(export))
    fresh = policy_of(source_of(world), trained="full")
    loaded = replace(fresh, net=load_pipeline(source).transformer)
    assert torch.equal(predicted(loaded, cond), predicted(policy, cond))
    assert not torch.equal(predicted(loaded, cond), predicted(fresh, cond))


def test_peft_reads_an_exported_lora(world, tmp_path):
    from peft import PeftModel

    cond = encoders_of(world).prompts(TEXTS)
    policy, _, _ = trained(world, "sft", "lora", cond)
    export_lora(policy.net, FAMILY, tmp_path / "export")
    fresh = policy_of(source_of(world), trained="full")
    theirs = replace(fresh, net=PeftModel.from_pretrained(fresh.net, tmp_path / "export"))
    assert torch.equal(predicted(theirs, cond), predicted(policy, cond))


def test_maps_of_the_encoder_are_frames_that_carry_gradient(world):
    policy, cond = policy_of(source_of(world), trained="full"), encoders_of(world).prompts(TEXTS)
    x = noise(2).requires_grad_()
    found = policy.features(x, torch.tensor([0.3, 0.8]), cond, blocks=2)
    assert [tuple(level.shape) for level in found] == [(2, 32, FRAMES, 1)] * 3
    found[-1].square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_t_is_uniform_where_nothing_else_is_named(world):
    t = policy_of(source_of(world)).path.sample_t(SampleRng(0, tuple(range(4000))))
    assert t.mean() == pytest.approx(0.5, abs=0.02)
    assert t.std() == pytest.approx(12**-0.5, abs=0.01)


# --- rounds


def table(world: Path, output: Path, *, method: str = "dragon", name: str = "sa3", **sections) -> dict:
    """Two rounds of an update each, by the Fréchet distance of three bands."""
    found = {
        "output": str(output),
        "model": {"path": str(world / name)},
        "data": {"path": str(world / "prompts.txt"), "seconds": SECONDS},
        "method": {"name": method},
        "online": {
            "set_reward": "fad:tests.audio_rewards:Bands",
            "set_reference": str(world / "reference"),
            "prompts": 2,
            "group": 2,
            "steps": 3,
            "batch_size": 2,
            "guidance": 2.0,
            "table": "diffusers",
        },
        "train": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "lora": {"rank": 2},
        "checkpoint": {"every": 1},
    }
    if method != "dragon":
        found["online"] = {**found["online"], "rewards": ["tests.audio_rewards:Loudness"]}
        del found["online"]["set_reward"], found["online"]["set_reference"]
    for key, section in sections.items():
        found[key] = {**found.get(key, {}), **section}
    return found


def test_dragon_lowers_a_distance_of_sets_of_clips_and_survives_a_stop(world, tmp_path):
    whole = diffalign.train(table(world, tmp_path / "whole"))
    lines = metrics(whole.folder)
    rounds = [line for line in lines if "round" in line]
    assert [line["round"] for line in rounds] == [1, 2]
    assert all(line["set_plus"] > line["set_minus"] for line in rounds)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]

    folder = whole.folder / "rounds" / "round-2"
    manifest = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["audio"] for line in manifest] == [f"clips/0000{i}-{k}.wav" for i in (0, 1) for k in (0, 1)]
    for line in manifest:
        clip, rate_hz = read_wav(folder / line["audio"])
        assert (tuple(clip.shape), rate_hz) == ((1, SAMPLES), 16_000)
    assert "pipeline_tag: text-to-audio" in (whole.export / "README.md").read_text()

    parts = table(world, tmp_path / "parts", train={"steps": 1})
    diffalign.train(parts)
    resumed = diffalign.train(table(world, tmp_path / "parts") | {"resume": "latest"})
    assert same(weights(whole.folder, 2), weights(resumed.folder, 2))


def test_in_bf16_with_recomputation_the_first_margin_is_exactly_0(world, tmp_path):
    run = table(world, tmp_path / "run", train={"precision": "bf16", "gradient_checkpointing": True})
    steps = [line for line in metrics(diffalign.train(run).folder) if "loss" in line]
    assert steps[0]["rewards/margins"] == 0.0
    assert steps[1]["rewards/margins"] != 0.0


def test_a_reward_of_one_channel_says_so_of_a_stereo_model(world, tmp_path):
    run = table(world, tmp_path / "run", name="stereo")
    with pytest.raises(
        InputError, match=r"audio\[0\] must be mono, shape \(1, samples\), for 'bands', got \(2, 19040\)"
    ):
        diffalign.train(run)


def test_clips_on_disk_are_what_the_judges_heard(world, tmp_path):
    from tests.audio_rewards import RATE, Loudness

    run = table(world, tmp_path / "run", method="ddpo", train={"steps": 1, "accumulate": 4})
    result = diffalign.train(run)
    folder = result.folder / "rounds" / "round-1"
    files = sorted((folder / "clips").iterdir())
    heard = RewardBatch(audio=[read_wav(file)[0] for file in files], sample_rate=RATE)
    told = [v for part in sorted(folder.glob("scores-*.json")) for v in json.loads(part.read_text())["loudness"]]
    assert Loudness().score(heard).scores.tolist() == told
    step = next(line for line in metrics(result.folder) if "loss" in line)
    assert (step["ratio"], step["approx_kl"]) == (1.0, 0.0)


def test_rewards_hear_another_rate_and_one_channel_where_asked(world, tmp_path):
    online = {"rewards": ["tests.audio_rewards:Fast"], "heard_hz": 8_000, "mono": True}
    run = table(world, tmp_path / "run", method="ddpo", name="stereo", online=online)
    run["train"] |= {"steps": 1, "accumulate": 4}
    result = diffalign.train(run)
    clip, rate_hz = read_wav(next((result.folder / "rounds" / "round-1" / "clips").iterdir()))
    assert (clip.shape[0], rate_hz) == (2, 16_000)  # on disk as the model made them


# --- true size


@pytest.mark.parametrize(
    ("sizes", "weights", "targets"),
    [
        ({}, 1.4, 120),
        ({"embed_dim": 1024, "depth": 20, "num_heads": 16, "use_differential_attention": False}, 0.43, 100),
    ],
    ids=["medium", "small"],
)
def test_the_published_networks_fit(sizes, weights, targets):
    """stable-audio-3-medium-base, and small-music-base or small-sfx-base."""
    from diffusers import AutoencoderSAME, StableAudio3DiTModel
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    with torch.device("meta"):
        net = StableAudio3DiTModel(**sizes)
        vae = AutoencoderSAME(encoder_transformer_depths=(6,) if sizes else (12,))
        told = StableAudio3DurationEmbedder().config.output_dim
    cond = Cond(
        {
            "prompt_embeds": torch.empty(2, 257, 768, device="meta"),
            "prompt_attention_mask": torch.empty(2, 257, dtype=torch.long, device="meta"),
            "duration_embeds": torch.empty(2, told, device="meta"),
        }
    )
    policy = FAMILY.make_denoiser(net, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, None)
    x = torch.empty(2, 256, 108, 1, device="meta")
    assert policy(x, torch.empty(2, device="meta"), cond).shape == x.shape
    assert FAMILY.decode(vae, x, context_true()).shape == (2, 2, 441_000)
    assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(weights, rel=0.1)
    names = [n for n, m in net.named_modules() if n.endswith(tuple(f".{t}" for t in FAMILY.lora_targets))]
    assert len(names) == targets
    assert all(isinstance(net.get_submodule(name), torch.nn.Linear) for name in names)


CONFIGS = {
    "vae": {"sampling_rate": 44_100, "patch_size": 256, "encoder_strides": [16]},
    "duration_embedder": {"max_val": 384.0},
    "transformer": {"io_channels": 256},
}


def context_true(seconds: float = 10.0):
    return FAMILY.size(FAMILY, CONFIGS.__getitem__, resolution=None, seconds=seconds)


def test_ten_seconds_of_the_published_models_are_108_frames():
    assert context_true().latents == (256, 108, 1)
    assert context_true(380.0).latents == (256, 4092, 1)


# --- bad input


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (
            None,
            r"data\.seconds must be there with the family 'stable_audio_3', whose clips may have any length up to",
        ),
        (0.0159, r"data\.seconds must be at least a frame of the model, 0\.016 s, got 0\.0159"),
        (4.1, r"data\.seconds must be in \(0, 4\] with this model, got 4\.1"),
        (0.0, r"data\.seconds must be in \(0, 4\]"),
        (-1.0, r"data\.seconds must be in \(0, 4\]"),
        (math.nan, r"data\.seconds must be in \(0, 4\]"),
        (math.inf, r"data\.seconds must be in \(0, 4\]"),
    ],
)
def test_a_length_that_a_clip_cannot_have_is_named(world, seconds, message):
    with pytest.raises(InputError, match=message):
        load_context(source_of(world), FAMILY, seconds=seconds)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"resolution": 64}}, "data.resolution must be left out with the family 'stable_audio_3', which"),
        ({"model": {"vae": "other"}}, "model.vae must be left out with the family 'stable_audio_3', whose VAE is"),
        ({"samples": {"every": 1, "prompts": ["a"]}}, "config.samples must be left out with the family 'stable_au"),
        ({"data": {"empty_prompt": "zeros"}}, "empty_prompt must be 'encode' with the family 'stable_audio_3'"),
        ({"online": {"set_reward": "vendi:clip:tiny-clip"}}, "set_reward must judge clips and prompts alone"),
        ({"online": {"rewards": ["clip:tiny-clip"]}}, "online.rewards must judge clips and prompts alone, got 'clip'"),
        ({"online": {"rewards": ["tests.audio_rewards:Fast"]}}, "audio must have 8000 samples a second for 'fast'"),
        ({"online": {"heard_hz": 0}}, "online.heard_hz must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_a_family_of_sound_does_not_have_is_named(world, tmp_path, sections, message):
    with pytest.raises(InputError, match=message):
        diffalign.train(table(world, tmp_path / "run", **sections))


def test_pairs_on_disk_are_images(world, tmp_path):
    run = table(world, tmp_path / "run")
    del run["online"]
    run["method"] = {"name": "diffusion_dpo"}
    with pytest.raises(
        InputError, match="method must be one on prompts with the family 'stable_audio_3', since data are read"
    ):
        assemble(parse(run))


def test_a_distilled_model_is_not_trained_at_noise_of_its_own(world):
    config = load_scheduler_config(source_of(world, "distilled"))
    assert few_steps(config)
    assert not few_steps(load_scheduler_config(source_of(world)))
    cfg = parse(table(world, world / "none"))
    with pytest.raises(InputError, match="must be a model of many steps"):
        make_walk(cfg.online, cfg.method.needs, source_of(world, "distilled"))


def test_pictures_are_not_asked_of_a_model_of_sound(world):
    with pytest.raises(InputError, match="must make images here, got one of the family 'stable_audio_3'"):
        list(generate(load_pipeline(source_of(world)), FAMILY, TEXTS, steps=1))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "scheduler.invert_sigmas must be false"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting must be false"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "must have a flow-matching scheduler"),
        ("model_index.json", {"duration_embedder": [None, None]}, "must have the component 'duration_embedder'"),
        ("vae/config.json", {"_class_name": "AutoencoderOther"}, "must have a VAE of Diffusers' own classes, got"),
    ],
)
def test_a_folder_that_is_not_of_its_family_gives_one_clear_line(world, tmp_path, file, changes, message):
    shutil.copytree(world / "sa3", tmp_path / "model")
    place = tmp_path / "model" / file
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
    with pytest.raises(InputError, match=message) as error:
        diffalign.train(table(tmp_path, tmp_path / "run", name="model", data={"path": str(world / "prompts.txt")}))
    assert "\n" not in str(error.value)


def test_a_folder_is_recognised_and_a_fresh_adapter_changes_nothing(world):
    assert detect_family(source_of(world)) is FAMILY
    policy, cond = policy_of(source_of(world)), encoders_of(world).prompts(TEXTS)
    reference = make_reference(policy, adapted=True).denoiser
    assert torch.equal(predicted(policy, cond), predicted(reference, cond))
    assert len([name for name in trainable(policy.net) if "lora_A" in name]) == 10
