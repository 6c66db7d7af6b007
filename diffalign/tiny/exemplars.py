"""Folders of the tiny world's sounds: WAV files of one style, to be the reference set of a distance or to listen to."""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from diffalign.data.sounds import wav
from diffalign.errors import InputError, near_match
from diffalign.evaluate.sound_pictures import sheet
from diffalign.tiny import playing, sounds
from diffalign.tiny.playing import Carelessness
from diffalign.tiny.sounds import RATE_HZ, Sound, Split

TABLES: dict[str, Mapping[str, object]] = {
    "pitch": sounds.PITCHES,
    "timbre": sounds.TIMBRES,
    "rhythm": sounds.RHYTHMS,
    "length": sounds.LENGTHS,
    "loudness": sounds.LOUDNESS,
}
"""What a style may ask for: attributes, and their names."""

SHEET = 12
"""Clips on a contact sheet."""


def of_style(style: Mapping[str, str], split: Split) -> list[Sound]:
    """All sounds of a split whose attributes are those that the style names.

    Raises:
        InputError: An attribute or a name that the world does not know, or a style that no sound of the split has.
    """
    for attribute, name in style.items():
        if attribute not in TABLES:
            raise InputError(f"style must name known attributes, got {attribute!r}{near_match(attribute, TABLES)}")
        if name not in TABLES[attribute]:
            raise InputError(f"style.{attribute} must be known, got {name!r}{near_match(name, TABLES[attribute])}")
    names = [field.name for field in fields(Sound)]
    choices = itertools.product(*([style[name]] if name in style else TABLES[name] for name in names))
    found = [s for s in itertools.starmap(Sound, choices) if sounds.fits(s) and sounds.split_of(s) == split]
    if not found:
        raise InputError(f"style must be that of some sound of the split {split!r}, got {dict(style)}")
    return found


def write_clips(
    folder: Path,
    count: int,
    *,
    seed: int,
    style: Mapping[str, str] | None = None,
    split: Split = "train",
    care: Carelessness | None = None,
) -> list[Path]:
    """Writes clips of a style as 16-bit WAV files, `metadata.jsonl` with their captions, and a contact sheet.

    The folder comes into being whole, when all of it is written.

    Args:
        folder: Where to; it must be empty or not be there.
        count: Number of clips; the first ones of more clips are the same.
        seed: Of sounds, captions and clips.
        style: Names by attribute, such as {"timbre": "violin", "length": "long"}; everything without it.
        split: Which combinations to take.
        care: How far the player strays.

    Raises:
        InputError: An unknown or empty style, no clips asked for, or a folder with something in it.
    """
    choices = of_style(style or {}, split)
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out must be an empty folder or not be there, got {str(folder)!r}")
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    files, captions, shown = [], [], []
    for row in range(count):
        rng = np.random.default_rng([seed, row])
        sound = choices[int(rng.integers(len(choices)))]
        captions.append(sounds.caption(sound, rng))
        clip = playing.render(sound, rng, care)
        files.append(folder / f"{row:05d}.wav")
        (fresh / files[-1].name).write_bytes(wav(torch.from_numpy(clip)[None], RATE_HZ))
        shown += [torch.from_numpy(clip)[None]] if row < SHEET else []
    lines = [json.dumps({"file_name": f.name, "prompt": c}) for f, c in zip(files, captions, strict=True)]
    (fresh / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sheet(shown, captions[:SHEET], RATE_HZ).save(fresh / "sheet.png")
    fresh.replace(folder)
    return files


def is_written(folder: Path) -> bool:
    """Whether clips were written there."""
    return (folder / "metadata.jsonl").is_file()
