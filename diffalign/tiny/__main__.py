"""`python -m diffalign.tiny build` makes the tiny world again from its seeds."""

import argparse
from pathlib import Path

from diffalign.shipped import assets
from diffalign.tiny.build import STAGES, build


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.tiny")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="train and write everything that lies in assets/tiny/")
    one.add_argument("--out", type=Path, default=assets() / "tiny", help="folder to write to; what is there stays")
    one.add_argument("--only", choices=sorted(STAGES), help="make this stage alone")
    arguments = parser.parse_args()
    build(arguments.out, arguments.only)


if __name__ == "__main__":
    main()
