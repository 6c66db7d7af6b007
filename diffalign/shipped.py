"""Where the files lie that travel with the package, in a checkout and in a wheel alike: `assets/`, `configs/` and
`pipelines/`."""

from pathlib import Path

from diffalign.errors import InputError, near_match

_PACKAGE = Path(__file__).parent

MODELS = {
    "tiny-sd": "tiny/sd",
    "tiny-sd3": "tiny/sd3",
    "tiny-clip": "tiny/clip",
    "tiny-aesthetic": "tiny/aesthetic",
    "tiny-audio": "tiny/audio",
    "tiny-clap": "tiny/clap",
}
"""Shipped models by the name under which a config or a command may ask for them."""

DATASETS = {"tiny-sd-pairs": "tiny/preferences/sd.parquet", "tiny-sd3-pairs": "tiny/preferences/sd3.parquet"}
"""Shipped preference data by name."""

PROMPTS = {
    "tiny": "tiny/prompts.jsonl",
    "tiny-train": "tiny/train-prompts.jsonl",
    "tiny-sounds": "tiny/sound-prompts.jsonl",
    "tiny-sounds-train": "tiny/sound-train-prompts.jsonl",
}
"""Shipped prompt sets by name."""


def assets() -> Path:
    """Folder of shipped assets."""
    return _folder("assets")


def configs() -> Path:
    """Folder of shipped run configs."""
    return _folder("configs")


def pipelines() -> Path:
    """Folder of shipped pipelines for Diffusers."""
    return _folder("pipelines")


def pipeline(name: str) -> str:
    """The folder of a shipped pipeline, for `DiffusionPipeline.from_pretrained(model, custom_pipeline=...)`.

    Raises:
        InputError: None has that name.
    """
    known = sorted(file.parent.name for file in pipelines().glob("*/pipeline.py"))
    if name not in known:
        raise InputError(f"pipeline must be a shipped one, got {name!r}{near_match(name, known)}")
    return str(pipelines() / name)


def resolve(name: str, table: dict[str, str]) -> str:
    """A local path if there is one of that name, else the shipped asset of that name, else the name (a hub id)."""
    if not Path(name).exists() and name in table:
        return str(assets() / table[name])
    return name


def _folder(name: str) -> Path:
    wheel = _PACKAGE / "_shipped" / name
    return wheel if wheel.is_dir() else _PACKAGE.parent / name
