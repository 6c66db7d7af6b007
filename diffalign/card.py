"""The model card of a run: what it is, what it was trained on and how, and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.data.pairs import Counts
from diffalign.denoisers import Family
from diffalign.environment import versions
from diffalign.evaluate.watched import read_watch
from diffalign.models.single_file import is_single_file
from diffalign.settings import TrainConfig
from diffalign.strict import to_toml


def model_card(
    cfg: TrainConfig, table: Mapping[str, Any], family: Family, counts: Counts, step: int, folder: Path
) -> str:
    """README.md of an export, with the YAML header that the hub reads."""
    lora = cfg.train.trainable == "lora"
    name = table["method"]["name"]
    tag = f"text-to-{family.modality}"
    tags = ["diffalign", "diffusers", tag, "preference-alignment", name, *(["lora"] if lora else [])]
    header = "\n".join(
        [
            "---",
            f"base_model: {json.dumps(cfg.model.path)}",
            "library_name: diffusers",
            f"pipeline_tag: {tag}",
            "tags:",
            *[f"- {tag}" for tag in tags],
            "---",
        ]
    )
    used = versions(("diffalign", "torch", "diffusers", "peft"))
    return f"""{header}

# {cfg.model.path} aligned by {name}

{"A LoRA" if lora else "The whole denoiser"} of `{cfg.model.path}`, trained with method `{name}` for
{step} optimizer steps.

## How to load

```python
{_loading(cfg, family)}
```

## Data

{_data(cfg, counts, step)}

## Results

{_results(folder)}
{_guard(folder)}
## Config

```toml
{to_toml(table).strip()}
```

Made with {", ".join(f"{package} {version}" for package, version in used.items())}.
"""


def _guard(folder: Path) -> str:
    """What the guard of the run found, if it had one."""
    found = read_watch(folder)
    return "" if found is None else f"\n## Guard\n\n{found.sentence}\n"


def _data(cfg: TrainConfig, counts: Counts, step: int) -> str:
    """What it was trained on: rows of data, or its own images of prompts, and by whose judgement."""
    if cfg.online is None:
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.dropped.items())) or "none"
        cropped = f" {counts.cropped} losers were cropped to the shape of their winner." if counts.cropped else ""
        return f"`{cfg.data.path}`: {counts.rows} rows, of which {counts.kept} were used; dropped: {dropped}.{cropped}"
    own = cfg.online
    judges = [f"`{spec}`" for spec in (*own.rewards, *([own.set_reward] if own.set_reward else []))]
    rounds = step // own.updates
    return (
        f"Its own images of {counts.rows} prompts of `{cfg.data.path}`: {rounds} rounds of {own.images}, {own.group} a "
        f"prompt, judged by {', '.join(judges) or 'people'}."
        + (" Images of that data were trained on too." if cfg.method.needs.real else "")
    )


def _loading(cfg: TrainConfig, family: Family) -> str:
    cls = family.pipelines[0]
    lines = [f"from diffusers import {cls}"]
    if cfg.train.trainable == "full":
        net = family.net_class().__name__
        return "\n".join(
            [
                f"from diffusers import {cls}, {net}",
                f'{family.net} = {net}.from_pretrained("path/to/this/folder", subfolder="{family.net}")',
                f"pipeline = {cls}.{_base(cfg, f'{family.net}={family.net}')}",
            ]
        )
    lines.append(f"pipeline = {cls}.{_base(cfg)}")
    lines.append(family.lora_recipe)
    return "\n".join(lines)


def _base(cfg: TrainConfig, *parts: str) -> str:
    """The call that loads the base."""
    if not is_single_file(cfg.model.path):
        return f"from_pretrained({', '.join([json.dumps(cfg.model.path), *parts])})"
    config = [] if cfg.model.config is None else [f"config={json.dumps(cfg.model.config)}"]
    return f"from_single_file({', '.join([json.dumps(cfg.model.path), *config, *parts])})"


def _results(folder: Path) -> str:
    """Held-out measures at the start and at the end of training, if the run had any."""
    file = folder / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    held = [entry for entry in entries if "validation" in entry]
    if not held:
        return "Not evaluated yet: `diffalign evaluate` compares it with its base and writes a report."
    rows = ["| held-out measure | step " + " | step ".join(str(e["step"]) for e in (held[0], held[-1])) + " |"]
    rows.append("|---|---|---|")
    for name in ("loss", "rewards/accuracies", "rewards/margins", "winner_gain", "loser_gain"):
        if name in held[0]["validation"]:
            rows.append(f"| {name} | {held[0]['validation'][name]:.4g} | {held[-1]['validation'][name]:.4g} |")
    return "\n".join(rows) + "\n\n`diffalign evaluate` compares it with its base and writes a report."
