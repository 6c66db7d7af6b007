"""True pictures of the tiny world's training captions, a reference for rewards of sets.

python -m benchmarks.scene_pictures FOLDER
"""

import shutil
import sys
from pathlib import Path

from diffalign.data.prompts import read_prompts
from diffalign.tiny import scenes

CAPTIONS = "tiny-train"


def draw_pictures(folder: Path) -> Path:
    """The folder with an exact picture of every training caption, made if it is not there yet; whole or not at all."""
    if folder.is_dir():
        return folder
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for place, caption in enumerate(read_prompts(CAPTIONS).prompts):
        scenes.render(scenes.parse(caption)).save(fresh / f"{place:05d}.png")
    fresh.replace(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(f"{len(list(draw_pictures(Path(sys.argv[1])).iterdir()))} pictures in {sys.argv[1]}")
