"""Commands about rewards: `serve-reward`, for programs that cannot share our environment, and `reference`."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console(emoji=False)

HeardHz = Annotated[
    int | None, typer.Option(help="Samples a second at which rewards hear clips; their own if left out.")
]
Mono = Annotated[bool, typer.Option("--mono", help="Rewards hear the mean of a clip's channels.")]


def serve_reward(
    name: Annotated[str, typer.Argument(help="NAME, NAME:MODEL or package.module:object.")],
    host: Annotated[str, typer.Option(help="Address to bind to; other machines can reach any but this one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8100,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="key=value", help="Option of the reward; repeat it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve a reward over HTTP as JSON, for the reward `http` and for other programs."""
    from diffalign import rewards
    from diffalign.evaluate.preflight import pick_device
    from diffalign.rewards.serve import RewardServer

    reward = rewards.load(name, **options(option or []))
    rewards.move(reward, pick_device(device))
    with RewardServer(reward, host=host, port=port) as server:
        lines = [f"reward {reward.name} ({reward.version}): {server.url}"]
        if not server.is_private:
            lines.append("anybody who can reach this address can use it: it asks for no key")
        lines += ["for example:", example(server.url), "Ctrl-C ends it"]
        for line in lines:
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            out.print("stopped", highlight=False)
        finally:
            signal.signal(signal.SIGTERM, previous)


def reference(
    images: Annotated[
        Path, typer.Argument(help="Folder of images or of .wav clips, of which the reference set is made.")
    ],
    reward: Annotated[str, typer.Option(help="Reward of sets, such as frechet:clip:tiny-clip.")],
    out_file: Annotated[Path, typer.Option("--out", help="A .safetensors file.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="key=value", help="Option of the reward; repeat it.")
    ] = None,
    heard_hz: HeardHz = None,
    mono: Mono = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Keep what a reward of sets needs of a reference set, for `evaluate --reference`."""
    from diffalign import rewards
    from diffalign.errors import InputError
    from diffalign.evaluate.media import medium_of_files
    from diffalign.evaluate.preflight import pick_device
    from diffalign.progress import bar

    if out_file.suffix != ".safetensors":
        raise InputError(f"--out must be a .safetensors file, got {str(out_file)!r}")
    chosen = rewards.load_set(reward, **options(option or []))
    if not chosen.needs_reference:
        raise InputError(f"--reward must be one that needs a reference set, got {reward!r}")
    if isinstance(chosen, rewards.OnDevice):
        chosen.to(pick_device(device))
    medium, count = medium_of_files(chosen.modality, images, heard_hz=heard_hz, mono=mono), 0
    with bar("reference", None) as shown:

        def counted() -> Iterator[Any]:
            nonlocal count
            for batch in medium.exemplars(images):
                yield batch
                count += len(batch)
                shown.advance(len(batch))

        chosen.fit_reference(counted())
    chosen.save_reference(out_file)
    out.print(f"{count} {medium.folder}, {chosen.version}: {out_file}", highlight=False, soft_wrap=True)


def example(url: str) -> str:
    """A request for a shell."""
    return (
        """printf '{"prompt": ["a red circle"], "image": ["%s"]}' "$(base64 < image.png | tr -d '\\n')" | """
        f"curl -s {url}/compute -H 'Content-Type: application/json' -d @-"
    )


def options(pairs: list[str]) -> dict[str, Any]:
    """Options of a reward from `key=value`; a value that is not TOML is text, and a.b=c goes into table a."""
    from diffalign.errors import InputError
    from diffalign.strict import apply_override

    table: dict[str, Any] = {}
    for pair in pairs:
        if not pair.partition("=")[1]:
            raise InputError(f"--option must have the form key=value, got {pair!r}")
        apply_override(table, pair)
    return table
