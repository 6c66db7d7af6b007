"""JSON over HTTP to rewards that live elsewhere: what is tried again, how fast, how much at once.

Only 408, 429, 5xx and connections that failed are tried again: any other answer would be the same the next time. A
request that timed out is not, for its server is still at work on it. Redirects are not followed, since a key would go
along, and a machine's own servers are asked without a proxy.
"""

import email.utils
import http.client
import json
import logging
import math
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from diffalign.errors import InputError, RunError
from diffalign.strict import build

MOST_ANSWER_BYTES = 1 << 26
"""What an answer may weigh; one that goes on for ever is cut there."""

_log = logging.getLogger(__name__)
_PASSING = (408, 429)
_HEADERS = {"Accept": "application/json", "User-Agent": "diffalign"}  # some hosts refuse urllib's own name
_SHOWN = 300
_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True, kw_only=True)
class Network:
    """How patiently an endpoint is asked, how fast, and how much at once."""

    timeout_seconds: float = 120.0
    """For one request and its answer."""
    retries: int = 4
    """Further attempts after 408, 429, 5xx or a connection that failed."""
    first_delay_seconds: float = 0.5
    """Before the first of these; it doubles from one to the next."""
    longest_delay_seconds: float = 60.0
    """Where the doubling ends; a server that asks for a longer pause (Retry-After) is given up."""
    requests_per_second: float | None = None
    """Of all attempts together; None is no limit."""
    concurrency: int = 4
    """Requests under way at a time."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "first_delay_seconds", "longest_delay_seconds", "requests_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"network.{name} must be positive and finite, got {value!r}")
        for name, least in (("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise InputError(f"network.{name} must be at least {least}, got {getattr(self, name)!r}")


class RequestFailed(RunError):
    """A request that got no usable answer, after all attempts."""

    def __init__(self, message: str, *, kind: str, status: int | None = None) -> None:
        """`kind` is "connection", "timeout", "nonsense" or "status 503"."""
        super().__init__(message)
        self.kind, self.status = kind, status


class Endpoint:
    """A server that takes and gives JSON objects, by its URL."""

    def __init__(self, url: str, network: Network, *, what: str, key_variable: str | None = None) -> None:
        """`what` names the option in errors; the environment variable `key_variable` may hold a bearer key.

        Raises:
            InputError: Not a plain http or https URL.
        """
        self.url = _checked(url, what)
        self.network = network
        self.key_variable = key_variable
        host = urllib.parse.urlsplit(self.url).hostname or ""
        direct = [urllib.request.ProxyHandler({})] if is_loopback(host) else []
        self._opener = urllib.request.build_opener(_NoRedirects(), *direct)
        self._room = threading.BoundedSemaphore(network.concurrency)
        self._turns = _Turns(network.requests_per_second)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path below the URL.

        Raises:
            RequestFailed: No usable answer.
        """
        return self._ask(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that answers another.

        Raises:
            RequestFailed: No usable answer.
        """
        return self._ask(path, json.dumps(body, allow_nan=False).encode())

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        key = self._key()
        delay = self.network.first_delay_seconds
        attempt = 1
        while True:
            self._turns.take()
            try:
                with self._room:
                    return self._attempt(path, body, key)
            except _Failure as failure:
                pause = max(min(delay, self.network.longest_delay_seconds), failure.wait)
                last = attempt > self.network.retries or pause > self.network.longest_delay_seconds
                reason = _short(failure.reason.replace(key, "***") if key else failure.reason)  # cut after that
                if last or not failure.passing:
                    after = f" after {attempt} attempts" if attempt > 1 else ""
                    raise RequestFailed(
                        f"{self.url}{path} must answer, got {reason}{after}", kind=failure.kind, status=failure.status
                    ) from None
            _log.debug("%s%s: %s; again in %.3g s", self.url, path, reason, pause)
            time.sleep(pause)
            delay, attempt = 2 * delay, attempt + 1

    def _attempt(self, path: str, body: bytes | None, key: str) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, data=body, headers=dict(_HEADERS))
        if body is not None:
            request.add_header("Content-Type", "application/json")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        timeout = self.network.timeout_seconds
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return _object(_read(answer, deadline))
        except urllib.error.HTTPError as error:
            raise _refused(error) from None
        except urllib.error.URLError as error:
            certain = isinstance(error.reason, ssl.SSLCertVerificationError)
            raise _Failure("connection", f"no connection ({error.reason})", passing=not certain) from None
        except TimeoutError:
            raise _Failure("timeout", f"no whole answer within {timeout:g} s") from None
        except (ConnectionError, http.client.IncompleteRead) as error:
            raise _Failure("connection", f"a connection that broke ({error})", passing=True) from None
        except http.client.HTTPException as error:
            raise _Failure("nonsense", f"something that is not HTTP ({error!r})") from None

    def _key(self) -> str:
        """The key, or "". It is never shown: errors name its variable alone."""
        key = os.environ.get(self.key_variable or "", "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"environment variable {self.key_variable} must hold a key of printable ASCII characters")
        return key


def network_of(given: Network | Mapping[str, Any] | None) -> Network:
    """Network settings from a table of their fields, strictly."""
    return given if isinstance(given, Network) else build(Network, given or {}, "network")


def ordered(function: Callable[[_A], _B], items: Sequence[_A], concurrency: int) -> list[_B]:
    """A function's results in the items' order, so many at a time; the first error ends it."""
    with ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(items)))) as pool:
        return list(pool.map(function, items))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, which alone can reach it."""
    return host in ("localhost", "::1") or host.startswith("127.")


class _Failure(Exception):
    """One attempt that failed."""

    def __init__(
        self, kind: str, reason: str, *, passing: bool = False, status: int | None = None, wait: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.passing, self.status, self.wait = kind, reason, passing, status, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the answer that it is."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class _Turns:
    """Spaces requests evenly over all threads."""

    def __init__(self, per_second: float | None) -> None:
        self._gap = 0.0 if per_second is None else 1 / per_second
        self._next = 0.0
        self._lock = threading.Lock()

    def take(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            time.sleep(turn - now)


def _checked(url: str, what: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        plain, parts = False, urllib.parse.urlsplit("")
    if "@" in url or parts.query or parts.fragment:
        raise InputError(f"{what} must be a URL without user, query or fragment; a key belongs in the environment")
    if not plain:
        raise InputError(f"{what} must be a URL such as http://127.0.0.1:8100, got {url!r}")
    return url.rstrip("/")


def _read(answer: Any, deadline: float) -> bytes:
    """The whole body before the deadline; one that ends early is a connection that broke."""
    said = answer.headers.get("Content-Length") or ""
    length = int(said) if said.isdecimal() else None
    parts: list[bytes] = []
    held = 0
    while (length is None or held < length) and (part := answer.read1(1 << 16)):
        parts.append(part)
        held += len(part)
        if held > MOST_ANSWER_BYTES:
            raise _Failure("nonsense", f"more than {MOST_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if length is not None and held < length:
        raise ConnectionError(f"{held} of {length} bytes came")
    return b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _Failure("nonsense", f"something that is not a JSON object ({_text(body)!r})")
    return found


def _refused(error: urllib.error.HTTPError) -> _Failure:
    """A status that is not 2xx, with what the server says about it."""
    with error:
        try:
            body = error.read(1 << 16)
        except (OSError, http.client.HTTPException):
            body = b""
    said = _text(body)
    try:
        told = json.loads(body)["error"]
        said = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    target = error.headers.get("Location") if 300 <= error.code < 400 else None
    reason = (
        f"status {error.code}" + (f", which points to {target!r}" if target else "") + (f": {said}" if said else "")
    )
    passing = error.code in _PASSING or error.code >= 500
    wait = _pause(error.headers.get("Retry-After") or "")
    return _Failure(f"status {error.code}", reason, passing=passing, status=error.code, wait=wait)


def _pause(said: str) -> float:
    """Seconds of a Retry-After header: a number, or a date."""
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _text(body: bytes) -> str:
    return body[: 1 << 16].decode(errors="replace").strip()


def _short(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]
