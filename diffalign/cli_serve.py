"""`diffalign serve-reward`: a reward for programs that cannot share our environment."""

import signal
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()


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
