"""`python -m diffalign.tiny build` makes the tiny world again from its seeds; `sounds` writes clips of it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffalign.errors import InputError
from diffalign.shipped import assets
from diffalign.tiny.build import STAGES, build
from diffalign.tiny.exemplars import TABLES, write_clips


def main(words: Sequence[str] | None = None) -> None:
    """Does what the words say, those of the command line without any."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.tiny")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="train and write everything that lies in assets/tiny/")
    one.add_argument("--out", type=Path, default=assets() / "tiny", help="folder to write to; what is there stays")
    one.add_argument("--only", choices=sorted(STAGES), help="make this stage alone")
    two = commands.add_parser("sounds", help="write clips of a style as WAV files, with captions and a contact sheet")
    two.add_argument("--out", type=Path, required=True, help="an empty folder, or one that is not there")
    two.add_argument("--count", type=int, default=64)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--split", choices=("train", "held_out"), default="train")
    for name, table in TABLES.items():
        two.add_argument(f"--{name}", choices=list(table), help="all clips have this")
    arguments = parser.parse_args(words)
    if arguments.command == "build":
        build(arguments.out, arguments.only)
        return
    style = {name: value for name in TABLES if (value := getattr(arguments, name)) is not None}
    try:
        write_clips(arguments.out, arguments.count, seed=arguments.seed, style=style, split=arguments.split)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
