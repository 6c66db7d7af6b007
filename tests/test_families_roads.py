"""What families do beside training: rounds, grids of samples, evaluation, and their true sizes, counted on meta."""

import pytest
import torch

import diffalign
from diffalign.denoisers import FAMILIES
from diffalign.evaluate import EvaluationSettings, evaluate
from tests.test_families import MODELS, SAMPLED, config, metrics, world  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.mark.parametrize("name", ["sdxl", "pixart_sigma", "flux", "dit"])
def test_rounds_sample_their_losers_with_the_family_own_call(world, tmp_path, name):  # noqa: F811
    table = config(world, tmp_path / "run", name)
    table["method"] = {"name": "spin", "beta": 100.0}
    table["rounds"] = {"count": 2, "steps": 2, "guidance": 2.0, "batch_size": 2}
    lines = metrics(diffalign.train(table).folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx([0.6931471805599453] * 2, abs=1e-6)  # one step a round, the reference is its start


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", ["sdxl", "pixart_sigma", "dit"])
def test_a_run_with_grids_is_evaluated_against_its_base(world, tmp_path, name):  # noqa: F811
    texts = MODELS[name].texts
    table = config(world, tmp_path / "run", name)
    table["samples"] = {"every": 2, "prompts": list(texts), "steps": 2, "guidance": 2.0}
    run = diffalign.train(table)
    assert [file.name for file in sorted((run.folder / "samples").iterdir())] == [
        "step-000000.png",
        "step-000002.png",
    ]
    evaluate(
        str(world / name),
        str(run.folder),
        list(texts),
        rewards=[f"{__name__}:brightness"],
        output=tmp_path / "evaluation",
        settings=EvaluationSettings(images_per_prompt=1, steps=2, batch_size=2, device="cpu"),
    )
    files = sorted(p.name for p in (tmp_path / "evaluation" / "images" / "aligned").glob("*.png"))
    assert files == ["00000-0.png", "00001-0.png"]


def test_every_family_has_a_row_in_the_round_trips():
    assert {model.family for model in MODELS.values()} | {"sd", "stable_audio_3"} == set(
        FAMILIES
    )  # that of sound apart
    assert set(SAMPLED) == set(MODELS) - {"sdxl_refiner"}


def sdxl_net():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def pixart_net():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, use_additional_conditions=False, interpolation_scale=2
    )


def flux_net():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


@pytest.mark.parametrize(
    ("family", "build", "millions", "adapted", "shape"),
    [
        ("sdxl", sdxl_net, 2567, 560, (4, 128, 128)),
        ("pixart_sigma", pixart_net, 611, 28 * 8, (4, 128, 128)),
        ("flux", flux_net, 11901, 19 * 8 + 38 * 3, (16, 128, 128)),
    ],
)
def test_at_true_size_a_lora_sits_on_every_attention_projection(family, build, millions, adapted, shape):
    from diffalign.models.lora import LoraSettings, adapter_layers, add_lora

    with torch.device("meta"):
        net = build()
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
        add_lora(net, LoraSettings(rank=4), FAMILIES[family].lora_targets, seed=0)
    assert len(adapter_layers(net)) == adapted
    assert FAMILIES[family].latent_shape(net.config) == shape
