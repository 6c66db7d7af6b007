"""Text encoders in 16 bits where a run is: which type each has, what is lost by it, and nothing where a run is not."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import diffalign
from diffalign.assemble import assemble
from diffalign.checks import text_dtype_of
from diffalign.config import parse
from diffalign.data.prepare import Encoders
from diffalign.denoisers import FAMILIES, Context
from diffalign.errors import InputError
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.models.text import text_dtypes
from diffalign.plan import GIB, plan
from tests import worlds
from tests.test_train import config

CPU = torch.device("cpu")
F16, B16, F32 = torch.float16, torch.bfloat16, torch.float32
BOUND = {F16: 0.005, B16: 0.03}
"""Relative error of a prompt's states after two layers, whose roundings are 2^-11 or 2^-8 each."""
PROMPTS = ["", "a red circle", "small blue square on white"]
NETS = ("sd", "sdxl", "sd3_t5", "pixart", "flux", "stable_audio_3", "dit")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    for name in NETS:
        getattr(worlds, name)(root / name)
    worlds.parquet(root / "pairs.parquet", worlds.preference_rows(12))
    return root


def encoders(world: Path, name: str, dtype: torch.dtype, *, offload: bool = False) -> Encoders:
    source = ModelSource(path=str(world / name))
    heard = {"context": Context(seconds=0.5)} if name == "stable_audio_3" else {}
    return Encoders(source, detect_family(source), CPU, text_dtype=dtype, offload=offload, **heard)


def kinds(world: Path, name: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Types of all weights of each network that is loaded to encode with."""
    source = ModelSource(path=str(world / name))
    family = detect_family(source)
    pipeline = load_pipeline(source, only=("vae", *family.text), text_dtype=dtype)
    nets = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = {}
    for n, net in nets.items():
        [found[n]] = {p.dtype for p in net.parameters()}
    return found


@pytest.mark.parametrize(
    ("name", "clip", "wide"),
    [
        ("sd", ["text_encoder"], []),
        ("sdxl", ["text_encoder", "text_encoder_2"], []),
        ("sd3_t5", ["text_encoder", "text_encoder_2"], ["text_encoder_3"]),
        ("pixart", [], ["text_encoder"]),
        ("flux", ["text_encoder"], ["text_encoder_2"]),
        ("stable_audio_3", [], ["text_encoder"]),
    ],
)
def test_float16_is_for_clip_and_everything_else_keeps_its_range(world, name, clip, wide):
    other = {"duration_embedder"} if name == "stable_audio_3" else set()
    for dtype, of_wide in ((F16, B16), (B16, B16), (F32, F32)):
        found = kinds(world, name, dtype)
        assert found == dict.fromkeys(clip, dtype) | dict.fromkeys(wide, of_wide) | dict.fromkeys({"vae", *other}, F32)


@pytest.mark.parametrize("dtype", [F16, B16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", NETS[:-1])
def test_states_are_near_those_of_float32_and_come_back_in_it(world, name, dtype):
    exact = encoders(world, name, F32).prompts(PROMPTS)
    near = encoders(world, name, dtype).prompts(PROMPTS)
    taken = encoders(world, name, dtype, offload=True).prompts(PROMPTS)
    for key, tensor in exact.tensors.items():
        assert near[key].dtype == tensor.dtype
        assert torch.equal(near[key], taken[key])
        if not tensor.is_floating_point():
            assert torch.equal(near[key], tensor)
            continue
        error = float((near[key] - tensor).norm() / tensor.norm())
        print(f"{name} {key} {dtype}: {error:.5f}")
        assert error < BOUND[dtype if name in ("sd", "sdxl") else B16]
        assert error > 0 or key == "duration_embeds"


def test_a_class_has_no_encoder_to_narrow(world):
    assert kinds(world, "dit", F16) == {"vae": F32}
    index = json.loads((world / "dit" / "model_index.json").read_text())
    assert text_dtypes(FAMILIES["dit"], index, F16) == {}


@pytest.mark.parametrize(
    ("precision", "named", "on_gpu", "on_cpu"),
    [
        ("no", "auto", F32, F32),
        ("bf16", "auto", B16, F32),
        ("fp16", "auto", F16, F32),
        ("fp16", "float32", F32, F32),
        ("no", "bfloat16", B16, B16),
    ],
)
def test_a_run_narrows_its_encoders_on_a_gpu_as_its_precision_says(world, precision, named, on_gpu, on_cpu):
    table = config(world, Path("nowhere"), train={"precision": precision}, data={"text_encoder_dtype": named})
    assert [text_dtype_of(parse(table), device) for device in ("cuda", "cpu")] == [on_gpu, on_cpu]


def test_float16_by_name_is_no_choice(world):
    table = config(world, Path("nowhere"), data={"text_encoder_dtype": "float16"})
    with pytest.raises(
        InputError, match=r"text_encoder_dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"
    ):
        parse(table)


def test_runs_in_float32_are_as_they_were_and_share_their_caches(world, tmp_path):
    cache = str(tmp_path / "cache")
    plain = parse(config(world, tmp_path / "plain", model="flux", data={"cache": cache}))
    first = assemble(plain).collator.rows.cond([0], [False])
    assert "text_encoder_dtype" not in json.loads((tmp_path / "cache" / "key.json").read_text())
    same = parse(config(world, tmp_path / "same", model="flux", data={"cache": cache}, train={"precision": "bf16"}))
    again = assemble(same).collator.rows.cond([0], [False])
    assert all(torch.equal(again[name], tensor) for name, tensor in first.tensors.items())
    narrow = {"cache": cache, "text_encoder_dtype": "bfloat16"}
    with pytest.raises(InputError, match=r"differs in text_encoder_dtype: None there, 'bfloat16' here"):
        assemble(parse(config(world, tmp_path / "narrow", model="flux", data=narrow)))


def test_a_run_in_16_bits_trains_on_what_they_say(world, tmp_path):
    data = {"cache": True, "text_encoder_dtype": "bfloat16"}
    run = diffalign.train(config(world, tmp_path / "run", model="flux", data=data, train={"steps": 2}))
    assert json.loads((run.folder / "cache" / "key.json").read_text())["text_encoder_dtype"] == "bfloat16"
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])["rewards/margins"] == 0


def test_a_plan_counts_their_bytes(world):
    def of(name, **data):
        table = config(world, Path("nowhere"), model=name, train={"precision": "bf16", "device": "auto"}, data=data)
        return plan(parse(table), memory=24 * GIB).encoding

    for name in ("flux", "sd3_t5", "sdxl"):
        wide, narrow = of(name, text_encoder_dtype="float32"), of(name)
        source = ModelSource(path=str(world / name))
        pipeline = load_pipeline(source, only=detect_family(source).text)
        texts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        halves = sum(p.nbytes for net in texts for p in net.parameters()) // 2
        assert wide.weights - narrow.weights == halves
        assert narrow.cond == wide.cond
        assert narrow.prompt_flop == wide.prompt_flop
