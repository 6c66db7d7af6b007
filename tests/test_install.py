"""The wheel in a clean environment: assets and configs travel with it, and a bare-name config runs."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a new environment with the wheel; dependencies are those of this one, without our checkout.

    Site packages of this environment are put on the path as a plain folder, so its editable install is not followed.
    """
    root = tmp_path_factory.mktemp("install")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(root), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = root.glob("diffalign-*.whl")
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((root / "venv" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def run(command: list[str], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_wheel_is_what_is_imported(installed, tmp_path):
    where = run([str(installed / "python"), "-c", "import diffalign; print(diffalign.__file__)"], tmp_path)
    assert str(installed.parent) in where


def test_a_bare_name_config_runs_from_the_wheel(installed, tmp_path):
    overrides = [
        "output=run",
        "train.steps=2",
        "train.batch_size=2",
        "data.limit=40",
        "validation.pairs=2",
        "validation.fraction=0.3",
    ]
    run([str(installed / "diffalign"), "train", "tiny_sd_diffusion_dpo", *overrides], tmp_path)
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_rewards_and_prompts_are_found_in_the_wheel(installed, tmp_path):
    listed = run([str(installed / "diffalign"), "list"], tmp_path)
    assert all(name in listed for name in ("oracle", "clip", "aesthetic", "tiny_sd_diffusion_dpo"))
    code = """
import diffalign, torch
from diffalign.data.prompts import read_prompts
prompts = read_prompts("tiny").prompts[:2]
for spec in ("oracle", "clip:tiny-clip", "aesthetic:tiny-aesthetic"):
    print(spec, diffalign.load_reward(spec)(torch.rand(2, 3, 64, 64), prompts))
"""
    assert run([str(installed / "python"), "-c", code], tmp_path).count("tensor") == 3


def test_a_pipeline_is_found_in_the_wheel_by_bare_name(installed, tmp_path):
    code = """
from diffalign import shipped
from diffusers import DiffusionPipeline
for model, name in (("tiny-sd", "sd_rollout"), ("tiny-sd3", "sd3_rollout"), ("tiny-sd", "aligned")):
    pipeline = DiffusionPipeline.from_pretrained(
        shipped.resolve(model, shipped.MODELS), custom_pipeline=shipped.pipeline(name), trust_remote_code=True
    )
    print(type(pipeline).__name__, pipeline("a red circle", num_inference_steps=1).images[0].size)
"""
    assert run([str(installed / "python"), "-c", code], tmp_path).count("DiffalignPipeline (64, 64)") == 3
