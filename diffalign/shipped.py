"""Where the files lie that travel with the package: `assets/` and `configs/`, in a checkout and in a wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).parent

MODELS = {
    "tiny-sd": "tiny/sd",
    "tiny-sd3": "tiny/sd3",
    "tiny-clip": "tiny/clip",
    "tiny-aesthetic": "tiny/aesthetic",
}
"""Shipped models by the name under which a config or a command may ask for them."""

DATASETS = {"tiny-sd-pairs": "tiny/preferences/sd.parquet", "tiny-sd3-pairs": "tiny/preferences/sd3.parquet"}
"""Shipped preference data by name."""

PROMPTS = {"tiny": "tiny/prompts.jsonl", "tiny-train": "tiny/train-prompts.jsonl"}
"""Shipped prompt sets by name."""


def assets() -> Path:
    """Folder of shipped assets."""
    return _folder("assets")


def configs() -> Path:
    """Folder of shipped run configs."""
    return _folder("configs")


def resolve(name: str, table: dict[str, str]) -> str:
    """A local path if there is one of that name, else the shipped asset of that name, else the name (a hub id)."""
    if not Path(name).exists() and name in table:
        return str(assets() / table[name])
    return name


def _folder(name: str) -> Path:
    wheel = _PACKAGE / "_shipped" / name
    return wheel if wheel.is_dir() else _PACKAGE.parent / name
