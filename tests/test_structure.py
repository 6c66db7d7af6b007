"""The house: imports go one way, importing is light, methods and families are listed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign

PACKAGE = Path(diffalign.__file__).parent
LAYERS = [
    ("errors", "shipped", "_torchvision", "progress", "rng", "strict", "recompute", "counting"),
    ("paths", "losses", "advantages"),
    ("types",),
    ("denoisers", "sampling", "tiny"),
    ("models", "checkpoint", "environment", "attention", "sharding"),
    ("methods", "rewards", "data", "workload"),
    ("evaluate", "fit", "validation", "logbook"),
    ("online",),
    ("guard",),
    ("settings", "online_checks", "checks", "config"),
    ("card", "grids", "run_folder", "placing", "rows", "assemble"),
    ("leaner", "bare", "own_work", "rehearsal", "timing", "memory", "costs", "plan"),
    ("pool", "fixed_draws"),
    ("rounds",),
    ("online_round", "online_scores", "online_rounds", "guarding"),
    ("train",),
    ("api",),
    ("cli", "cli_data", "cli_plan", "cli_rewards", "tiny makers"),
]
"""Lowest first; a module may import from its own layer and from those below."""


def layer(part: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if part in names)


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem not in ("__init__", "__main__"))


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "tiny" and file.stem not in ("__init__", "scenes", "oracle", "sounds", "playing", "voice", "hearing"):
        own = "tiny makers"  # they train and measure with the whole package
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffalign"):
            tail = node.module.split(".")[1:2]
            names = tail or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("diffalign.")]
        for name in names:
            assert layer(name) <= layer(own), f"{own} must not import {name}"


def test_importing_the_package_is_light():
    heavy = (
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "pandas",
        "matplotlib",
        "xformers",
        "open_clip",
    )
    code = f"import sys, diffalign; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_python_road_stays_callable_after_its_modules_are_imported():
    import diffalign.evaluate
    import diffalign.train

    assert all(callable(f) and not isinstance(f, type(sys)) for f in (diffalign.train, diffalign.evaluate))


def test_no_file_of_the_package_has_outgrown_its_readers():
    for file in modules():
        assert file.read_text().count("\n") <= 400, file
