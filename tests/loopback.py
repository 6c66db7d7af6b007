"""A server on this machine that answers by script, and writes down what it was asked."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    """One request."""

    index: int
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


@dataclass
class Said:
    """One answer: a JSON value, or bytes as they are; `cut` closes before the whole of it is sent."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    cut: bool = False


@dataclass
class Scripted:
    url: str
    asked: list[Asked] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    def paths(self) -> list[str]:
        return [one.path for one in self.asked]


@contextmanager
def scripted(answer: Callable[[Asked], Said]) -> Iterator[Scripted]:
    """A server that is up while the block lasts."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            with lock:
                asked = Asked(
                    len(state.asked), self.command, self.path, dict(self.headers.items()), body, time.monotonic()
                )
                state.asked.append(asked)
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
            said = answer(asked)
            time.sleep(said.delay_seconds)
            data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            with lock:
                state.under_way -= 1
            self.send_response(said.status)
            for name, value in {"Content-Length": str(len(data)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if said.cut else data)

        do_GET = do_POST = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has left."""

    server = Server(("127.0.0.1", 0), Handler)
    state = Scripted(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def closed_url() -> str:
    """A URL of this machine at which nobody listens."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"
