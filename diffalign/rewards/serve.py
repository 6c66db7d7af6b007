"""A reward behind HTTP, in the JSON of `wire`: a server for this machine, one sample set at a time."""

import http.server
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from diffalign.errors import InputError, RunError
from diffalign.rewards import wire
from diffalign.rewards.composite import is_pointwise
from diffalign.rewards.transport import is_loopback
from diffalign.types import Reward

HOST, PORT = "127.0.0.1", 8100

_log = logging.getLogger(__name__)
_PATHS = {"/health": "GET", "/compute": "POST"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may hold."""

    body_bytes: int = 1 << 27
    samples: int = 64
    seconds: float = 60.0
    """Of silence, after which a connection is closed."""


class RewardServer(http.server.ThreadingHTTPServer):
    """Answers GET /health and POST /compute; requests come in at once, and the reward sees one at a time."""

    daemon_threads = True

    def __init__(self, reward: Reward, *, host: str = HOST, port: int = PORT, limits: Limits | None = None) -> None:
        """Binds to a port, 0 for any that is free; without a name for the host only this machine can reach it.

        Raises:
            InputError: A reward that needs what does not travel or depends on a batch's other samples, or a host and
                port that cannot be had.
        """
        self.reward, self.limits = reward, limits or Limits()
        foreign = sorted(reward.requires - set(wire.FIELDS.values()))
        if foreign or reward.modality != "image" or not is_pointwise(reward):
            reason = f"requires {', '.join(foreign)}" if foreign else f"is of {reward.modality}"
            if reward.modality == "image" and not foreign:
                reason = "compares the samples of a batch"
            raise InputError(f"reward to serve must judge images one by one, got {reward.name!r}, which {reason}")
        self.about = wire.about(reward, self.limits.samples)
        self.lock = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"host and port must be free and of this machine, got {host}:{port}: {error}") from error

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    @property
    def is_private(self) -> bool:
        """Whether this machine alone can reach it."""
        return is_loopback(str(self.server_address[0]))

    def compute(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request's body."""
        try:
            batch = wire.read_request(_object(body), self.limits.samples)
            with self.lock:
                return 200, wire.answer(self.reward.score(batch))
        except InputError as error:
            return 400, {"error": str(error)}
        except RunError as error:
            return 500, {"error": str(error)}
        except Exception as error:
            _log.exception("reward %r failed", self.reward.name)
            return 500, {"error": f"reward {self.reward.name!r} failed: {type(error).__name__}: {error}"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke or timed out concerns its client alone."""
        _log.debug("connection from %s ended early", client_address, exc_info=True)


@contextmanager
def running(server: RewardServer) -> Iterator[str]:
    """A server at work in a thread of its own while the block lasts; gives its URL."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.seconds)

    def do_GET(self) -> None:
        if self._known("GET"):
            self._answer(200, self.server.about)

    def do_POST(self) -> None:
        if not self._known("POST"):
            return
        length = self.headers.get("Content-Length") or ""
        kind = self.headers.get_content_type()
        if not length.isdecimal():
            self.send_error(411, "a request must say its Content-Length")
        elif int(length) > self.server.limits.body_bytes:
            self._skip(int(length))
            self.send_error(413, f"a request must have at most {self.server.limits.body_bytes} bytes, got {length}")
        elif kind != "application/json":
            self._skip(int(length))
            self.send_error(415, f"a request must be application/json, got {kind}")
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                self.send_error(400, f"a request must be whole, got {len(body)} of {length} bytes")
            else:
                self._answer(*self.server.compute(body))

    def do_PUT(self) -> None:
        self._known("PUT")

    do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_PUT

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Every error is JSON, and ends its connection, whose rest may be unread."""
        self.close_connection = True
        self._answer(code, {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("%s: " + format, self.address_string(), *args)

    def _known(self, method: str) -> bool:
        """Whether this path takes this method; if not, it has been said."""
        expected = _PATHS.get(self.path)
        if expected is None:
            self.send_error(404, f"a request must be to {' or '.join(_PATHS)}, got {self.path}")
        elif expected != method:
            self.send_error(405, f"{self.path} must be asked by {expected}, got {self.command}")
        return expected == method

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _skip(self, length: int) -> None:
        """Reads what will not be used, so that its sender gets to hear why; far too much is cut off."""
        left = min(length, 4 * self.server.limits.body_bytes)
        while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"request must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"request must be a JSON object, got {type(found).__name__}")
    return found
