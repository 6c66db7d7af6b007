"""A control: the demo's run on pairs labelled by lot must not win. Writes benchmarks/shuffled_labels.json.

Models that are not asked for keep what the file says of them.

Same config, images, prompts and noise as the run that learns from the true labels; only who won is a coin toss. A win
here would mean that something other than the preferences moves the oracle.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import diffalign
from diffalign.cli import quiet_libraries
from diffalign.environment import describe
from diffalign.shipped import DATASETS, assets
from diffalign.tiny.build import GUIDANCE, STEPS
from diffalign.tiny.preferences import read_rows, write_rows

OUT = Path(__file__).with_name("shuffled_labels.json")
CONFIGS = {"tiny-sd": "tiny_sd_diffusion_dpo", "tiny-sd3": "tiny_sd3_diffusion_dpo"}
ROLES = {"oracle": "labeller", "clip": "held_out"}


def shuffle_labels(source: Path, target: Path, *, seed: int) -> None:
    """Copies Pick-a-Pic rows with every decided label drawn anew by a fair coin; ties stay ties."""
    rng = np.random.default_rng(seed)
    rows = read_rows(source)
    for row in rows:
        if row["label_0"] != 0.5:
            first = bool(rng.random() < 0.5)
            row["label_0"], row["label_1"] = float(first), float(not first)
            row["best_image_uid"] = row["image_0_uid" if first else "image_1_uid"]
    write_rows(rows, target)


def compare(model: str, data: str, folder: Path) -> dict[str, dict[str, float]]:
    """Trains on some pairs and compares with the base model on held-out prompts, by the oracle and by tiny-clip."""
    run = diffalign.train(CONFIGS[model], f"output={folder / 'run'}", f"data.path={data}")
    results = diffalign.evaluate(
        model,
        str(run.folder),
        rewards=["oracle", "clip:tiny-clip"],
        roles=ROLES,
        output=folder / "evaluation",
        steps=STEPS,
        guidance=GUIDANCE,
        batch_size=64,
    )
    keys = ("mean_against", "mean_arm", "win_rate", "ci_low", "ci_high", "p", "n")
    rewards = results.comparisons[0].rewards
    return {name: {k: v for k, v in asdict(reward.total).items() if k in keys} for name, reward in rewards.items()}


def main() -> None:
    """Trains with true labels and with shuffled ones."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=CONFIGS, default=["tiny-sd"])
    options.add_argument("--seed", type=int, default=0, help="of the coin")
    options.add_argument("--out", type=Path, default=OUT)
    asked = options.parse_args()
    quiet_libraries()
    found = json.loads(asked.out.read_text())["models"] if asked.out.exists() else {}
    for model in asked.models:
        name = f"{model}-pairs"
        with tempfile.TemporaryDirectory() as place:
            shuffled = Path(place) / "shuffled.parquet"
            shuffle_labels(assets() / DATASETS[name], shuffled, seed=asked.seed)
            found[model] = {
                "environment": describe(torch.device("cpu")),
                "true": compare(model, name, Path(place) / "true"),
                "shuffled": compare(model, str(shuffled), Path(place) / "lot"),
            }
        for labels in ("true", "shuffled"):
            for reward, row in found[model][labels].items():
                interval = f"{row['ci_low']:.3f} to {row['ci_high']:.3f}"
                print(f"{model}, {labels} labels, {reward}: win rate {row['win_rate']:.3f} ({interval})")
        asked.out.write_text(json.dumps({"version": 1, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
