"""Every family on the same roads, on random pipelines of the true classes: train, resume, export, reload, sample."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign.data.prepare import vae_scale
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.evaluate.generate import generate
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.models.lora import LoraSettings
from diffalign.models.policy import load_policy, make_reference
from diffalign.paths import TimestepSampling
from diffalign.rng import SampleRng
from diffalign.sampling.inversion import Level, step
from diffalign.types import Cond
from tests import worlds

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
"""Diffusers' Euler schedulers hand a tensor to numpy."""

TEXTS = ["a red circle", "small blue square on white"]


@dataclass(frozen=True)
class Model:
    """A row of the round trips."""

    build: object
    family: str
    cfg: bool = True
    """Guidance is a second pass without the prompt, in the pipeline."""
    samples: bool = True
    """The pipeline makes images from noise."""
    texts: tuple[str, ...] = tuple(TEXTS)


MODELS = {
    "sdxl": Model(worlds.sdxl, "sdxl"),
    "sdxl_refiner": Model(worlds.sdxl_refiner, "sdxl_refiner", samples=False),
    "pixart_sigma": Model(worlds.pixart, "pixart_sigma"),
    "pixart_alpha": Model(worlds.pixart_alpha, "pixart_alpha"),
    "sd3_t5": Model(worlds.sd3_t5, "sd3"),
    "flux": Model(worlds.flux, "flux", cfg=False),
    "dit": Model(worlds.dit, "dit", texts=("green", "7")),
    "flux_schnell": Model(worlds.flux_schnell, "flux", cfg=False),
}
SAMPLED = [name for name, model in MODELS.items() if model.samples]
OLDER = {
    "sd": Model(worlds.sd, "sd"),
    "sd_v": Model(partial(worlds.sd, prediction="v_prediction"), "sd"),
    "sd3": Model(worlds.sd3, "sd3"),
}
"""Those that train, resume and reload in test_train and test_lora."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name, model in {**MODELS, **OLDER}.items():
        model.build(root / name)
    rows = worlds.preference_rows(16, ties=2)
    worlds.parquet(root / "pairs.parquet", rows)
    for i, row in enumerate(rows):
        row["caption"] = worlds.WORDS[i % 4]
    worlds.parquet(root / "classes.parquet", rows)
    return root


def config(world: Path, output: Path, model: str, *, trainable: str = "lora", method: str = "diffusion_dpo") -> dict:
    return {
        "output": str(output),
        "model": {"path": str(world / model)},
        "data": {
            "path": str(world / ("classes.parquet" if model == "dit" else "pairs.parquet")),
            "resolution": worlds.SIDE,
            "cache": str(world / f"cache-{model}"),
            "prompt_dropout": 0.2,
        },
        "method": {"name": method, **({"beta": 100.0} if method == "diffusion_dpo" else {})},
        "train": {"steps": 2, "batch_size": 2, "trainable": trainable, "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 1},
        **({"lora": {"rank": 4, "alpha": 8.0}} if trainable == "lora" else {}),
    }


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def predicted(denoiser, x_t, t, cond) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(x_t, t, cond)


def parts(world: Path, name: str, export: Path | None = None):
    """Denoiser of a folder with or without an export, one latent batch and conditions for it."""
    lora = export is not None and any(export.glob("*.safetensors"))
    source = ModelSource(
        path=str(world / name),
        lora=str(export) if lora else None,
        denoiser=str(export) if export is not None and not lora else None,
    )
    family = detect_family(source)
    pipeline = load_pipeline(source)
    shape = (family.latent_shape(load_pipeline(source, only=(family.net,)).components[family.net].config)[0], 8, 8)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    plain = load_policy(ModelSource(path=str(world / name)), family, None, lora=None, seed=0)
    return (
        replace(plain, net=pipeline.components[family.net]),
        x,
        family.encode_prompts(pipeline, MODELS.get(name, MODELS["sdxl"]).texts),
        pipeline,
    )


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("method", ["diffusion_dpo", "sft"])
@pytest.mark.parametrize("name", MODELS)
def test_a_family_trains_resumes_exports_and_reloads_bit_for_bit(world, tmp_path, name, method, trainable):
    whole = config(world, tmp_path / "whole", name, trainable=trainable, method=method)
    result = diffalign.train(whole)
    lines = metrics(result.folder)
    if method == "diffusion_dpo":
        assert lines[0]["rewards/margins"] == 0.0
        assert lines[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert lines[1]["rewards/margins"] != 0
    first = {**whole, "output": str(tmp_path / "parts"), "train": {**whole["train"], "steps": 1}}
    diffalign.train(first)
    second = diffalign.train({**first, "train": whole["train"], "resume": "latest"})
    trained, resumed = (
        load_file(r.folder / "checkpoints" / "step-2" / "weights.safetensors") for r in (result, second)
    )
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[k], resumed[k]) for k in trained)

    denoiser, x, cond, _ = parts(world, name, result.export)
    base, _, _, _ = parts(world, name)
    t = base.path.sample_t(SampleRng(0, (0, 1)))
    source = ModelSource(path=str(world / name))
    lora = LoraSettings(rank=4, alpha=8.0) if trainable == "lora" else None
    memory = load_policy(source, FAMILIES[MODELS[name].family], None, lora=lora, seed=0)
    for key, parameter in memory.net.named_parameters():
        if key in trained:
            parameter.data = trained[key]
    assert torch.equal(predicted(denoiser, x, t, cond), predicted(memory, x, t, cond))
    assert not torch.equal(predicted(denoiser, x, t, cond), predicted(base, x, t, cond))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_recognised_and_a_fresh_adapter_has_margin_exactly_0(world, name):
    source = ModelSource(path=str(world / name))
    family = detect_family(source)
    assert family.name == MODELS[name].family
    policy = load_policy(source, family, None, lora=LoraSettings(rank=4), seed=0)
    reference = make_reference(policy, adapted=True).denoiser
    _, x, cond, _ = parts(world, name)
    t = policy.path.sample_t(SampleRng(0, (0, 1)))
    assert torch.equal(predicted(policy, x, t, cond), predicted(reference, x, t, cond))
    for parameter in policy.net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1
    assert not torch.equal(predicted(policy, x, t, cond), predicted(reference, x, t, cond))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_with_recomputation_the_first_margin_is_exactly_0_too(world, tmp_path, name):
    table = config(world, tmp_path / "run", name)
    table["train"] |= {"precision": "bf16", "gradient_checkpointing": True}
    lines = metrics(diffalign.train(table).folder)
    assert lines[0]["rewards/margins"] == 0.0
    assert lines[1]["rewards/margins"] != 0.0


@pytest.mark.parametrize("name", MODELS)
def test_a_run_can_start_from_the_lora_of_another(world, tmp_path, name):
    first = diffalign.train(config(world, tmp_path / "first", name))
    table = config(world, tmp_path / "second", name)
    table["model"]["lora"] = str(first.export)
    second = diffalign.train(table)
    lines = metrics(second.folder)
    assert lines[0]["rewards/margins"] == 0.0
    assert lines[0]["err_ref_w"] != pytest.approx(metrics(first.folder)[0]["err_ref_w"], abs=1e-5)


@pytest.mark.parametrize("name", SAMPLED)
def test_images_come_from_the_stock_pipeline_at_given_noise(world, name):
    _, _, _, pipeline = parts(world, name)
    family = FAMILIES[MODELS[name].family]
    made = [
        list(generate(pipeline, family, MODELS[name].texts, steps=2, guidance=2.0, batch_size=size)) for size in (2, 1)
    ]
    for together, alone in zip(*made, strict=True):
        assert together.latent_sha256 == alone.latent_sha256
        # one 8-bit level: sums differ in the last float32 bit with the batch size
        torch.testing.assert_close(together.image, alone.image, atol=1.01 / 255, rtol=0)
    assert (made[0][0].image - made[0][1].image).abs().max() > 0.02


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", [*SAMPLED, *OLDER])
def test_our_denoiser_walked_down_its_path_gives_the_latents_of_the_stock_pipeline(world, name, guidance):
    """eta = 0 and ODE: what the pipeline conditions, scales, packs and tells of t is what training does."""
    walk_beside_the_pipeline(world, name, guidance)


@pytest.mark.parametrize("name", [name for name in [*SAMPLED, *OLDER] if name != "dit"])
def test_it_does_so_for_images_twice_as_wide_as_high(world, name):
    walk_beside_the_pipeline(world, name, 1.0, wide=True)


def walk_beside_the_pipeline(world: Path, name: str, guidance: float, *, wide: bool = False) -> None:
    denoiser, x, cond, pipeline = parts(world, name)
    x = torch.cat([x, x.flip(0)], dim=3) if wide else x
    model = MODELS[name] if name in MODELS else OLDER[name]
    family, texts = FAMILIES[model.family], model.texts
    flow = denoiser.prediction == "velocity"
    if not flow:
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading"
        )
    if not model.cfg and denoiser.guidance is not None:
        denoiser = replace(denoiser, guidance=guidance)
    if family.own_loop is not None:
        theirs = plain_dit(pipeline, list(texts), guidance)
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    else:
        theirs = pipeline(
            prompt=list(texts),
            latents=family.pack(x),
            height=16,
            width=32 if wide else 16,
            num_inference_steps=4,
            guidance_scale=guidance,
            output_type="latent",
            **family.call_options(pipeline),
        ).images
        theirs = family.unpack(theirs, *x.shape[-2:])
    ours = family.sample(pipeline, texts, x, steps=4, guidance=guidance, decoded=False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    empty = family.encode_prompts(pipeline, [""] * 2)
    if family.zero_empty:
        empty = Cond({k: torch.zeros_like(v) for k, v in empty.tensors.items()})
    levels = schedule(pipeline, denoiser, flow)
    with torch.no_grad():
        for high, low in pairwise(levels):
            if model.cfg and guidance > 1:
                both = Cond({k: torch.cat([empty[k], cond[k]]) for k in cond.tensors})
                uncond, pred = denoiser(x.repeat(2, 1, 1, 1), high.t.repeat(2), both).chunk(2)
                pred = uncond + guidance * (pred - uncond)
            else:
                pred = denoiser(x, high.t, cond)
            x = step(denoiser, pred, x, high, low)
    torch.testing.assert_close(x, theirs, atol=1e-5, rtol=1e-5)


def plain_dit(pipeline, names: list[str], guidance: float) -> torch.Tensor:
    """Latents that the stock DiT pipeline hands to its VAE."""
    kept = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents: kept.append(latents) or decode(latents)
    ids = [pipeline.labels[n] if n in pipeline.labels else int(n) for n in names]
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    pipeline(ids, guidance_scale=guidance, generator=generators, num_inference_steps=4, output_type="pt")
    pipeline.vae.decode = decode
    return kept[0] * pipeline.vae.config.scaling_factor


def schedule(pipeline, denoiser, flow: bool) -> list[Level]:
    """The levels that the pipeline walked through, noisy first."""
    if flow:
        found = [s.repeat(2) for s in pipeline.scheduler.sigmas.float()]
        return [Level(t, 1 - t, t) for t in found]
    levels = [t.repeat(2) for t in pipeline.scheduler.timesteps]
    low = [*levels[1:], torch.zeros_like(levels[0])]
    low[-1] = torch.zeros(2, dtype=torch.long)
    return [Level(t, *denoiser.path.coefficients(t)) for t in [levels[0], *low]]


# --- SDXL


def sdxl(world: Path, name: str = "sdxl", timesteps: TimestepSampling | None = None):
    source = ModelSource(path=str(world / name))
    return load_policy(source, detect_family(source), timesteps, lora=None, seed=0)


def test_sdxl_is_told_the_side_trained_on_or_the_sizes_in_the_conditions(world):
    denoiser = sdxl(world)
    _, x, cond, _ = parts(world, "sdxl")
    told = denoiser._added(x, cond)["time_ids"]
    assert told.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    sized = Cond({**cond.tensors, "origin": torch.tensor([[48, 32, 4, 0], [16, 20, 0, 2]])})
    assert denoiser._added(x, sized)["time_ids"].tolist() == [[48, 32, 4, 0, 16, 16], [16, 20, 0, 2, 16, 16]]


def test_the_refiner_is_told_an_aesthetic_score_of_6(world):
    denoiser = sdxl(world, "sdxl_refiner")
    _, x, cond, _ = parts(world, "sdxl_refiner")
    assert denoiser._added(x, cond)["time_ids"].tolist() == [[16, 16, 0, 0, 6]] * 2


def test_the_refiner_trains_the_least_noisy_fifth_and_turbo_at_its_four_steps(world, tmp_path):
    draws = SampleRng(0, tuple(range(500)))
    refined = sdxl(world, "sdxl_refiner").path.sample_t(draws)
    assert refined.max() < 200
    assert len(refined.unique()) > 150
    worlds.sdxl(tmp_path / "turbo", turbo=True)
    path = sdxl(tmp_path, "turbo").path
    t = path.sample_t(draws)
    assert t.unique().tolist() == [249, 499, 749, 999]
    assert (t.bincount()[[249, 499, 749, 999]] > 90).all()
    assert path.alpha_bar[-1] == pytest.approx(0, abs=1e-6)  # no signal left at the end
    chosen = sdxl(tmp_path, "turbo", TimestepSampling()).path.sample_t(draws)
    assert len(chosen.unique()) > 300


def test_sdxl_learns_from_the_winners_own_size_and_crop_where_asked(world, tmp_path):
    from diffalign.assemble import assemble
    from diffalign.config import parse

    rows = worlds.preference_rows(4)
    for i, row in enumerate(rows):
        winner = "jpg_0" if row["label_0"] == 1 else "jpg_1"
        row[winner] = worlds.png(i, side=40)
    file = worlds.parquet(tmp_path / "p.parquet", rows)
    for cache in (str(tmp_path / "cache"), False):
        table = config(world, tmp_path / "run", "sdxl")
        table["data"] |= {"path": str(file), "cache": cache, "sizes": "original"}
        collator = assemble(parse(table)).collator
        batch = collator.batch([0, 1], [0, 1])
        assert batch.cond["origin"].tolist() == [[40, 40, 0, 0]] * 2
        assert batch.cond.repeat(2)["origin"].shape == (4, 4)


def test_crops_are_counted_after_resizing_and_in_the_mirrored_image():
    from diffalign.data.images import Placement, origin

    wide = worlds.picture(64, 32)
    assert origin(wide, (16, 16), Placement(0.25, 0.5)) == (32, 64, 0, 4)
    assert origin(wide, (16, 16), Placement(0.25, 0.5, True)) == (32, 64, 0, 12)


def test_an_empty_prompt_is_encoded_or_zeros(world, tmp_path):
    from diffalign.data.prepare import Encoders

    source = ModelSource(path=str(world / "sdxl"))
    family = detect_family(source)
    encoded = Encoders(source, family, torch.device("cpu")).prompts(["", "a red circle"])
    zeros = Encoders(source, family, torch.device("cpu"), zeros=True).prompts(["", "a red circle"])
    for name, tensor in zeros.tensors.items():
        assert (tensor[0] == 0).all(), name
        assert (encoded[name][0] != 0).any(), name
        assert torch.equal(tensor[1], encoded[name][1]), name
    table = config(world, tmp_path / "run", "sdxl")
    table["data"]["empty_prompt"] = "zeros"
    diffalign.train(config(world, tmp_path / "first", "sdxl"))
    with pytest.raises(InputError, match="differs in empty_prompt"):
        diffalign.train(table)


def test_the_vae_encodes_in_float32_where_fp16_would_overflow(world):
    from diffalign.data.prepare import Encoders

    source = ModelSource(path=str(world / "sdxl"))
    encoders = Encoders(source, detect_family(source), torch.device("cpu"))
    mean, _ = encoders.images(torch.zeros(1, 3, 16, 16))
    assert mean.dtype == torch.float32
    assert vae_scale(source).scale == pytest.approx(0.13025)


def test_the_refiner_is_not_sampled_from_noise(world):
    _, _, _, pipeline = parts(world, "sdxl_refiner")
    with pytest.raises(InputError, match="must make images from noise to be sampled, got the SDXL refiner"):
        list(generate(pipeline, FAMILIES["sdxl_refiner"], TEXTS, steps=2))


def test_a_vae_whose_config_says_no_scale_has_that_of_its_class(world, tmp_path):
    """As in stable-diffusion-v1-5, whose config was written before there was the entry."""
    worlds.sd(tmp_path / "old")
    file = tmp_path / "old" / "vae" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "scaling_factor"}))
    assert vae_scale(ModelSource(path=str(tmp_path / "old"))).scale == 0.18215


# --- PixArt


def test_a_pixart_lora_is_read_by_peft_and_fused_into_an_export(world, tmp_path):
    from peft import PeftModel

    from diffalign.evaluate.sample import export_pipeline

    result = diffalign.train(config(world, tmp_path / "run", "pixart_sigma"))
    ours, x, cond, _ = parts(world, "pixart_sigma", result.export)
    base, _, _, _ = parts(world, "pixart_sigma")
    t = base.path.sample_t(SampleRng(0, (0, 1)))
    expected = predicted(ours, x, t, cond)
    theirs = replace(base, net=PeftModel.from_pretrained(base.net, result.export))
    assert torch.equal(predicted(theirs, x, t, cond), expected)
    assert "PeftModel.from_pretrained" in (result.export / "README.md").read_text()
    source = ModelSource(path=str(world / "pixart_sigma"), lora=str(result.export))
    export_pipeline(source, tmp_path / "whole")
    fused, _, _, _ = parts(tmp_path, "whole")
    torch.testing.assert_close(predicted(fused, x, t, cond), expected, atol=1e-4, rtol=1e-4)  # W + BA, rounded once


def test_a_lora_of_another_network_is_refused_with_its_key(world, tmp_path):
    from safetensors.torch import save_file

    result = diffalign.train(config(world, tmp_path / "run", "pixart_sigma"))
    shutil.copytree(result.export, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "adapter_model.safetensors")
    wrong = {name.replace("transformer_blocks.0.", "transformer_blocks.7."): w for name, w in weights.items()}
    save_file(wrong, tmp_path / "other" / "adapter_model.safetensors")
    source = ModelSource(path=str(world / "pixart_sigma"), lora=str(tmp_path / "other"))
    with pytest.raises(
        InputError, match=r"must be a loadable model, .* do not fit the network: 'transformer_blocks\.7"
    ):
        load_pipeline(source)


def test_pixart_predicts_noise_alone_and_does_not_see_tokens_behind_the_mask(world):
    denoiser, x, cond, pipeline = parts(world, "pixart_sigma")
    t = torch.tensor([400, 400])
    out = predicted(denoiser, x, t, cond)
    assert pipeline.transformer.config.out_channels == 8
    assert out.shape == x.shape
    mask = cond["prompt_attention_mask"]
    assert cond["prompt_embeds"].shape[1] == 300
    behind = torch.where(mask[..., None] == 1, cond["prompt_embeds"], torch.ones(()))
    changed = Cond({**cond.tensors, "prompt_embeds": behind})
    torch.testing.assert_close(predicted(denoiser, x, t, changed), out)
    seen = Cond({**changed.tensors, "prompt_attention_mask": torch.ones_like(mask)})
    assert (predicted(denoiser, x, t, seen) - out).abs().max() > 1e-3


def test_pixart_alpha_at_1024_pixels_is_told_sizes_and_sigma_is_not(world):
    alpha, x, cond, _ = parts(world, "pixart_alpha")
    told = alpha._told(x, cond)["added_cond_kwargs"]
    assert told["resolution"].tolist() == [[16, 16]] * 2
    assert told["aspect_ratio"].tolist() == [[1], [1]]
    assert cond["prompt_embeds"].shape[1] == 120
    sigma, _, _, _ = parts(world, "pixart_sigma")
    assert set(sigma._told(x, cond)["added_cond_kwargs"].values()) == {None}


# --- FLUX.1


def test_latents_are_packed_as_the_pipeline_packs_them():
    from diffusers import FluxPipeline

    from diffalign.denoisers.flux import image_ids, pack, unpack

    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 6, 8), x)
    theirs = FluxPipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(x), theirs)


@pytest.mark.parametrize(("resolution", "mu"), [(256, 0.5), (1024, 1.15), (512, 0.63)])
def test_the_shift_of_flux_is_the_schedulers_at_the_side_trained_on(resolution, mu):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffalign.denoisers.flux import shift_of
    from diffalign.paths import FlowPath

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    path = FlowPath(shift=shift_of(scheduler.config, (resolution // 16) ** 2))
    u = torch.linspace(1.0, 0.125, 8, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=u.numpy(), mu=mu)
    torch.testing.assert_close(path.at(u), scheduler.sigmas[:-1].float(), atol=1e-6, rtol=0)


def test_flux_is_told_the_guidance_of_the_config_and_schnell_none(world, tmp_path):
    from diffalign.assemble import assemble
    from diffalign.config import parse

    def guidance(model: str, **train) -> float | None:
        table = config(world, tmp_path / "run", model)
        table["train"] |= train
        parts = assemble(parse(table))
        assert parts.reference is not None
        assert parts.reference.denoiser.policy.guidance == parts.policy.guidance
        return parts.policy.guidance

    assert guidance("flux") == 3.5
    assert guidance("flux", guidance=1.0) == 1.0
    assert guidance("flux_schnell") is None
    with pytest.raises(
        InputError, match=r"train\.guidance must be left out with this model, which has no guidance emb"
    ):
        guidance("flux_schnell", guidance=1.0)


def test_schnell_does_not_take_the_cache_of_dev(world, tmp_path):
    diffalign.train(config(world, tmp_path / "dev", "flux"))
    table = config(world, tmp_path / "schnell", "flux_schnell")
    table["data"]["cache"] = str(world / "cache-flux")
    with pytest.raises(InputError, match="differs in guidance_embeds: True there, False here"):
        diffalign.train(table)


def test_prompts_have_the_length_that_each_flux_was_trained_with(world):
    for name, length in (("flux", 512), ("flux_schnell", 256)):
        source = ModelSource(path=str(world / name))
        family = detect_family(source)
        alone = family.encode_prompts(load_pipeline(source, only=family.text), TEXTS)
        whole = family.encode_prompts(load_pipeline(source), TEXTS)
        assert alone["prompt_embeds"].shape == (2, length, 16)
        assert torch.equal(alone["prompt_embeds"], whole["prompt_embeds"])


# --- SD3


def test_sd3_with_t5_has_its_tokens_behind_those_of_clip(world):
    _, _, cond, pipeline = parts(world, "sd3_t5")
    clip = 24
    assert cond["prompt_embeds"].shape == (2, clip + 256, 32)
    with torch.no_grad():
        ids = pipeline.tokenizer_3(TEXTS, padding="max_length", max_length=256, return_tensors="pt").input_ids
        assert torch.equal(cond["prompt_embeds"][:, clip:], pipeline.text_encoder_3(ids)[0])


@pytest.mark.parametrize("name", ["sd3_t5", "flux"])
def test_t_of_a_flow_is_logit_normal_before_the_shift(world, name):
    denoiser, _, _, _ = parts(world, name)
    t = denoiser.path.sample_t(SampleRng(0, tuple(range(4000)))).double()
    shift = denoiser.path.shift
    u = t / (shift - (shift - 1) * t)
    logit = torch.log(u / (1 - u))
    assert logit.mean() == pytest.approx(0, abs=0.05)
    assert logit.std() == pytest.approx(1, abs=0.05)


# --- perception


@pytest.mark.parametrize("name", MODELS)
def test_the_encoder_of_a_family_shows_maps_that_carry_gradient(world, name):
    denoiser, x, cond, _ = parts(world, name)
    x = x.requires_grad_()
    levels = denoiser.features(x, denoiser.path.sample_t(SampleRng(0, (0, 1))), cond)
    assert len(levels) >= 2
    assert all(level.dim() == 4 and len(level) == 2 for level in levels)
    levels[-1].square().sum().backward()
    assert x.grad.abs().sum() > 0


# --- DiT


def test_a_class_has_a_name_or_a_number_and_the_empty_prompt_is_none_of_them(world):
    source = ModelSource(path=str(world / "dit"))
    family = detect_family(source)
    pipeline = load_pipeline(source, only=family.text)
    assert family.encode_prompts(pipeline, ["a", "green", "word of green", "999", "", " red "])["class"].tolist() == [
        0, 3, 3, 999, 1000, 2,
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"names of classes or numbers below 1000 .* got 'gren'; did you mean 'green'"):
        family.encode_prompts(pipeline, ["gren"])


# --- bad input


def edit(world: Path, folder: Path, model: str, file: str, **changes) -> Path:
    shutil.copytree(world / model, folder)
    place = folder / file
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "must be a pipeline of a known family, got 'Kandin"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "must have the component 'text_encoder_2' of the fam"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow_prediction"},
            "prediction_type must be epsilon, ",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "must have a DDPM sch"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean must be absent"),
    ],
)
def test_a_folder_that_is_not_of_its_family_gives_one_clear_line(world, tmp_path, file, changes, message):
    edit(world, tmp_path / "model", "sdxl", file, **changes)
    table = config(tmp_path, tmp_path / "run", "model")
    table["data"]["path"] = str(world / "pairs.parquet")
    with pytest.raises(InputError, match=message) as error:
        diffalign.train(table)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "section", "values", "message"),
    [
        ("sdxl", "data", {"resolution": 17}, "resolution must be a multiple of 2 with this model; got 17"),
        (
            "flux",
            "data",
            {"resolution": 18},
            "multiple of 4 with this model, 2 pixels a latent and 2 latents a token; got",
        ),
        ("flux", "timesteps", {"levels": 4}, "timesteps.levels must be left out on a flow"),
        ("sdxl", "train", {"guidance": 3.0}, "guidance must be left out with the family 'sdxl'"),
        ("sd", "data", {"empty_prompt": "zeros"}, "empty_prompt must be 'encode' with the family 'sd'"),
        ("sd", "data", {"sizes": "original"}, "sizes must be 'target' with the family 'sd'"),
    ],
)
def test_what_a_family_does_not_have_is_named(world, tmp_path, model, section, values, message):
    worlds.sd(tmp_path / "sd")
    table = config(tmp_path if model == "sd" else world, tmp_path / "run", model)
    table["data"]["path"] = str(world / "pairs.parquet")
    table[section] = {**table.get(section, {}), **values}
    with pytest.raises(InputError, match=message):
        diffalign.train(table)
