"""Rewards over HTTP: the server against the client, the client against servers that misbehave, and the reverse."""

import email.utils
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
import torch
from typer.testing import CliRunner

from diffalign import cli, cli_rewards, rewards
from diffalign.errors import InputError, RunError
from diffalign.rewards import wire
from diffalign.rewards.composite import CompositeReward, Part
from diffalign.rewards.http import HTTPReward
from diffalign.rewards.oracle import OracleReward
from diffalign.rewards.serve import HOST, PORT, Limits, RewardServer, running
from diffalign.rewards.transport import Network
from diffalign.types import FunctionReward, RewardBatch, RewardOutput
from tests.loopback import Said, closed_url, scripted

FAST = Network(timeout_seconds=2.0, retries=2, first_delay_seconds=0.002, longest_delay_seconds=0.05)
HEALTH = {"name": "far", "version": "7", "range": [0, None], "requires": ["images", "prompts"]}


class Local:
    """Brightness, red and green as components; NaN for a black picture."""

    name, version, modality, licence = "local", "1", "image", "MIT"
    requires = frozenset({"images", "prompts"})
    range = (0.0, float("inf"))
    differentiable = False

    def __init__(self):
        self.seen, self.inside, self.most_inside = [], 0, 0

    def score(self, batch):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(0.002)
        self.seen.append(batch)
        scores = batch.images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in batch.prompts])
        scores = torch.where(batch.images.amax((1, 2, 3)) == 0, torch.nan, scores)
        self.inside -= 1
        return RewardOutput(scores=scores, raw={"red": batch.images[:, 0].mean((1, 2))})


def pictures(count: int) -> torch.Tensor:
    """Random 8-bit pictures as floats."""
    return torch.randint(0, 256, (count, 3, 5, 4), generator=torch.Generator().manual_seed(0)) / 255


def batch(count: int = 3) -> RewardBatch:
    return RewardBatch(images=pictures(count), prompts=["x" * i for i in range(count)])


def server_of(answer):
    """A server with a good /health, whose /compute is scripted."""
    return scripted(lambda asked: Said(HEALTH) if asked.path == "/health" else answer(asked))


def good(asked) -> Said:
    return Said({"rewards": [float(len(p)) for p in asked.body["prompt"]]})


# --- both ends together


def test_a_served_reward_scores_as_at_home_bit_for_bit_and_in_order():
    images = pictures(23)
    images[4] = 0
    asked = RewardBatch(images=images, prompts=["x" * (i % 7) for i in range(23)])
    local = Local()
    expected = Local().score(asked)
    with running(RewardServer(local, port=0)) as url:
        far = HTTPReward(url, batch_size=3, network={"concurrency": 4})
        out = far.score(asked)
        assert far.version == "local, 1"
        assert far.range == (0.0, float("inf"))
        assert far.requires == {"images", "prompts"}
        assert far.licence == "MIT"
    torch.testing.assert_close(out.scores, expected.scores, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out.raw["red"], expected.raw["red"], rtol=0, atol=0)
    assert out.valid.tolist() == [i != 4 for i in range(23)]
    assert local.most_inside == 1
    assert sorted(len(b) for b in local.seen) == [2, 3, 3, 3, 3, 3, 3, 3]


def test_every_8_bit_value_survives_the_way_and_others_are_rounded():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    local = Local()
    with running(RewardServer(local, port=0)) as url:
        far = HTTPReward(url)
        far.score(RewardBatch(images=levels, prompts=["a"]))
        far.score(RewardBatch(images=(levels + 0.4 / 255).clamp(max=1), prompts=["a"]))
        far.score(RewardBatch(images=(levels - 0.4 / 255).clamp(min=0), prompts=["a"]))
    for seen in local.seen:
        assert torch.equal(seen.images, levels)


def test_references_groups_and_metadata_travel_where_they_are_required():
    class Curious(Local):
        requires = frozenset({"images", "references", "group_ids", "metadata"})

        def score(self, batch):
            self.seen.append(batch)
            return RewardOutput(scores=torch.zeros(len(batch)))

    images = pictures(3)
    references = [[images[0]], [images[1], images[2][:, :2]], [images[2]]]
    asked = RewardBatch(
        images=images, prompts=["a", "b", "c"], references=references, group_ids=[4, 4, 9], metadata=[{}, {"n": 2}, {}]
    )
    local = Curious()
    with running(RewardServer(local, port=0)) as url:
        HTTPReward(url, batch_size=2, network={"concurrency": 1}).score(asked)
    first, second = local.seen
    assert first.prompts is None
    assert [len(row) for row in first.references] == [1, 2]
    assert torch.equal(first.references[1][1], references[1][1])
    assert (first.group_ids, second.group_ids) == ([4, 4], [9])
    assert first.metadata == [{}, {"n": 2}]


def test_the_smaller_of_both_ends_batch_limits_holds():
    local = Local()
    with running(RewardServer(local, port=0, limits=Limits(samples=2))) as url:
        HTTPReward(url, batch_size=16).score(batch(5))
    assert sorted(len(b) for b in local.seen) == [1, 2, 2]


def test_what_the_reward_refuses_is_an_input_error_with_its_words():
    with running(RewardServer(OracleReward(), port=0)) as url, pytest.raises(InputError, match="64x64 images"):
        HTTPReward(url, network=FAST).score(batch())


@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyError("tangled")])
def test_a_reward_that_breaks_is_one_line_without_traceback(error):
    def broken(images, prompts):
        raise error

    with running(RewardServer(FunctionReward(name="broken", function=broken), port=0)) as url:
        with pytest.raises(RunError, match=r"status 500: .*(disk is full|KeyError: 'tangled').* after 3 attempts") as e:
            HTTPReward(url, network=FAST).score(batch())
        assert "Traceback" not in str(e.value)


def test_an_empty_batch_asks_nobody_for_scores():
    with server_of(good) as server:
        assert HTTPReward(server.url).score(RewardBatch(images=torch.zeros(0, 3, 4, 4), prompts=[])).scores.shape == (
            0,
        )
    assert server.paths() == ["/health"]


# --- the client against a server that misbehaves


def test_making_the_client_asks_nothing_and_health_is_asked_once():
    with server_of(good) as server:
        far = HTTPReward(server.url, network=FAST)
        assert server.asked == []
        assert far.name == "http"
        assert (far.version, far.range) == ("far, 7", (0.0, float("inf")))
        assert far.score(batch()).scores.tolist() == [0.0, 1.0, 2.0]
        far.score(batch())
    assert server.paths() == ["/health", "/compute", "/compute"]


def test_the_name_tells_servers_apart():
    with server_of(good) as server:
        far = rewards.load(f"http:{server.url}", name="far")
    assert far.name == "far"


def test_answers_that_overtake_each_other_are_put_in_order():
    def slow_first(asked):
        return Said(good(asked).body, delay_seconds=0.06 if asked.body["prompt"] == [""] else 0.0)

    with server_of(slow_first) as server:
        far = HTTPReward(server.url, batch_size=1, network=Network(concurrency=4))
        assert far.score(batch(6)).scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_no_more_requests_are_under_way_than_was_said():
    with server_of(lambda asked: Said(good(asked).body, delay_seconds=0.02)) as server:
        HTTPReward(server.url, batch_size=1, network=Network(concurrency=2)).score(batch(8))
    assert server.most_under_way == 2


def test_callers_in_several_threads_share_that_bound():
    with server_of(lambda asked: Said(good(asked).body, delay_seconds=0.02)) as server:
        far = HTTPReward(server.url, batch_size=1, network=Network(concurrency=2))
        far.score(batch(1))
        threads = [threading.Thread(target=far.score, args=(batch(3),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.asked) == 11
    assert server.most_under_way == 2


def test_requests_keep_their_rate():
    with server_of(good) as server:
        far = HTTPReward(server.url, batch_size=1, network=Network(concurrency=8, requests_per_second=100.0))
        far.score(batch(6))
    times = [asked.at for asked in server.asked]
    assert times[-1] - times[0] >= 0.05  # 7 requests with health


def test_a_server_that_is_down_is_one_error():
    with pytest.raises(RunError, match=r"/health must answer, got no connection .*refused.* after 3 attempts"):
        HTTPReward(closed_url(), network=FAST).score(batch())


def test_a_slow_server_is_not_asked_again():
    with server_of(lambda asked: Said({}, delay_seconds=0.3)) as server:
        far = HTTPReward(server.url, network=Network(timeout_seconds=0.05, first_delay_seconds=0.001))
        with pytest.raises(RunError, match=r"no whole answer within 0\.05 s"):
            far.score(batch())
    assert server.paths() == ["/health", "/compute"]


def test_a_server_that_drips_is_cut_off_at_the_time_of_the_whole_answer():
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.01)

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with listener, pytest.raises(RunError, match="no whole answer within"):
        HTTPReward(f"http://127.0.0.1:{listener.getsockname()[1]}", network=Network(timeout_seconds=0.1)).score(batch())
    assert time.monotonic() - start < 0.6
    thread.join()


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_trouble_is_tried_again(status):
    def twice(asked):
        return good(asked) if asked.index > 2 else Said({"error": "busy"}, status=status)

    with server_of(twice) as server:
        assert HTTPReward(server.url, network=FAST).score(batch()).scores.tolist() == [0.0, 1.0, 2.0]
    assert server.paths() == ["/health", "/compute", "/compute", "/compute"]


def test_delays_double_and_end_after_the_retries():
    network = Network(retries=3, first_delay_seconds=0.02, timeout_seconds=1.0)
    with server_of(lambda asked: Said({"error": {"message": "over\n loaded"}}, status=503)) as server:
        with pytest.raises(RunError, match="got status 503: over loaded after 4 attempts"):
            HTTPReward(server.url, network=network).score(batch())
    times = [asked.at for asked in server.asked[1:]]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert [gap >= least for gap, least in zip(gaps, (0.02, 0.04, 0.08), strict=True)] == [True] * 3
    assert sum(gaps) < 0.5


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 301])
def test_an_answer_that_will_not_change_is_not_asked_for_again(status):
    with server_of(lambda asked: Said({"error": "no such thing"}, status=status)) as server:
        with pytest.raises((InputError, RunError), match=f"status {status}: no such thing") as caught:
            HTTPReward(server.url, network=FAST).score(batch())
    assert server.paths() == ["/health", "/compute"]
    assert isinstance(caught.value, InputError) == (status in (400, 413, 422))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_named_and_not_followed(status):
    with server_of(good) as other:
        moved = Said({}, status=status, headers={"Location": f"{other.url}/health"})
        with server_of(lambda asked: moved) as server:
            with pytest.raises(RunError, match=f"status {status}, which points to '{other.url}/health'"):
                HTTPReward(server.url, network=FAST).score(batch())
    assert other.asked == []


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_a_server_asks_for_is_kept(form):
    asks = "0.03" if form == "seconds" else email.utils.formatdate(time.time() - 5, usegmt=True)

    def once(asked):
        return good(asked) if asked.index > 1 else Said({}, status=429, headers={"Retry-After": asks})

    with server_of(once) as server:
        HTTPReward(server.url, network=FAST).score(batch())
    assert server.asked[2].at - server.asked[1].at >= (0.03 if form == "seconds" else 0.002)


@pytest.mark.parametrize("asks", ["3600", email.utils.formatdate(4102444800, usegmt=True)])
def test_a_pause_beyond_the_longest_is_given_up_at_once(asks):
    with server_of(lambda asked: Said({}, status=503, headers={"Retry-After": asks})) as server:
        with pytest.raises(RunError, match="status 503"):
            HTTPReward(server.url, network=FAST).score(batch())
    assert len(server.asked) == 2


def test_a_connection_that_breaks_in_the_middle_is_tried_again():
    def once(asked):
        return Said(good(asked).body, cut=asked.index == 1)

    with server_of(once) as server:
        assert HTTPReward(server.url, network=FAST).score(batch()).scores.tolist() == [0.0, 1.0, 2.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Welcome!</html>", "not a JSON object .*Welcome!"),
        (b"", "not a JSON object"),
        (b"[1, 2, 3]", "not a JSON object"),
        (b'{"rewards": [NaN, 1, 2]}', "not a JSON object"),
        (b"\x80\x04\x95", "not a JSON object"),
        (b'{"rewards": [1e999, 1, 2]}', "finite numbers, or null, got inf"),
        ({"rewards": [1.0, 2.0]}, "rewards must hold 3 numbers, one per sample, got 2"),
        ({"rewards": [1, 2, 3, 4]}, "must hold 3 numbers, one per sample, got 4"),
        ({"scores": [1, 2, 3]}, "must hold 3 numbers, one per sample, got None"),
        ({"rewards": ["1", "2", "3"]}, "finite numbers, or null, got '1'"),
        ({"rewards": [True, 1, 2]}, "finite numbers, or null, got True"),
        ({"rewards": "abc"}, "must hold 3 numbers"),
        ({"rewards": [1, 2, 3], "raw": {"a": [1]}}, r"raw\.a must hold 3 numbers"),
        ({"rewards": [1, 2, 3], "raw": [1]}, "raw as an object"),
    ],
)
def test_nonsense_is_one_error_and_not_asked_for_again(body, message):
    with server_of(lambda asked: Said(body)) as server:
        with pytest.raises(RunError, match=message) as caught:
            HTTPReward(server.url, network=FAST).score(batch())
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 2


def test_something_that_is_not_http_is_said_to_be_that():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_say, args=(listener, b"SSH-2.0-OpenSSH_9.9\r\n\r\n"))
        thread.start()
        with pytest.raises(RunError, match="something that is not HTTP"):
            HTTPReward(f"http://127.0.0.1:{listener.getsockname()[1]}", network=FAST).score(batch())
        thread.join()


def _say(listener: socket.socket, words: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(words)


@pytest.mark.parametrize(
    ("health", "message"),
    [
        ({"requires": ["images", "audio"]}, "a reward of images and .*, got one that requires audio, images"),
        ({"requires": ["prompts"]}, "got one that requires prompts"),
        ({"requires": "images"}, "requires must be list, got 'images'"),
        ({"range": [0]}, r"range must be \[low, high\], got \[0\]"),
        ({"range": [0, "1"]}, r"range must be \[low, high\]"),
        ({"version": 3}, "version must be str, got 3"),
    ],
)
def test_a_health_that_makes_no_sense_is_one_error(health, message):
    with scripted(lambda asked: Said(health)) as server, pytest.raises(RunError, match=message):
        HTTPReward(server.url, network=FAST).score(batch())


def test_a_foreign_server_that_says_little_gets_images_and_prompts():
    def answer(asked):
        return Said({"status": "ok"}) if asked.path == "/health" else good(asked)

    with scripted(answer) as server:
        far = HTTPReward(server.url, network=FAST)
        assert far.score(batch()).scores.tolist() == [0.0, 1.0, 2.0]
        assert far.range == (float("-inf"), float("inf"))
    assert set(server.asked[1].body) == {"prompt", "image"}
    assert server.asked[1].headers["Content-Type"] == "application/json"


def test_a_proxy_of_the_environment_does_not_stand_before_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", closed_url())
    with server_of(good) as server:
        assert HTTPReward(server.url, network=FAST).score(batch()).scores.tolist() == [0.0, 1.0, 2.0]


def test_components_that_come_and_go_are_refused():
    def moody(asked):
        return Said(good(asked).body | {"raw": {"a": [1.0]} if asked.body["prompt"] == [""] else {}})

    with server_of(moody) as server, pytest.raises(RunError, match="same raw components"):
        HTTPReward(server.url, batch_size=1, network=FAST).score(batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ftp://127.0.0.1"}, "model must be a URL such as"),
        ({"model": "file:///etc/passwd"}, "model must be a URL such as"),
        ({"model": "127.0.0.1:8100"}, "model must be a URL such as"),
        ({"model": "http://[::1"}, "model must be a URL such as"),
        ({"model": "http://me:secret@127.0.0.1"}, "a key belongs in the environment"),
        ({"model": "http://127.0.0.1/?key=secret"}, "a key belongs in the environment"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"network": {"retry": 3}}, "network: unknown key 'retry'; did you mean 'retries'"),
        ({"network": {"retries": -1}}, r"network\.retries must be at least 0, got -1"),
        ({"network": {"concurrency": 0}}, r"network\.concurrency must be at least 1"),
        ({"network": {"timeout_seconds": 0}}, r"network\.timeout_seconds must be positive and finite, got 0"),
        ({"network": {"requests_per_second": "5"}}, r"network\.requests_per_second must be a number"),
    ],
)
def test_a_wrong_option_is_one_line_that_shows_no_secret(options, message):
    with pytest.raises(InputError, match=message) as caught:
        HTTPReward(**options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("images", [pictures(2) * 255, pictures(2) * 2 - 1, pictures(2) * torch.nan])
def test_images_that_are_wrong_are_not_sent(images):
    with server_of(good) as server, pytest.raises(InputError, match=r"RGB in \[0, 1\]"):
        HTTPReward(server.url, network=FAST).score(RewardBatch(images=images, prompts=["a", "b"]))
    assert server.paths() == ["/health"]


def test_metadata_that_json_does_not_know_is_an_input_error():
    needs = HEALTH | {"requires": ["images", "metadata"]}
    asked = RewardBatch(images=pictures(1), metadata=[{"a": {1, 2}}])
    with scripted(lambda asked: Said(needs)) as server, pytest.raises(InputError, match="metadata must be of JSON"):
        HTTPReward(server.url, network=FAST).score(asked)


# --- the server against a client that misbehaves


def ask(url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None):
    """(status, JSON) of a request as it is."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=2)
    connection.request(method, path, body, headers or {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    assert answer.getheader("Content-Type") == "application/json"
    connection.close()
    return answer.status, json.loads(data) if data else None


@pytest.fixture(scope="module")
def served():
    with running(RewardServer(Local(), port=0, limits=Limits(body_bytes=20_000, samples=3))) as url:
        yield url


PNG = wire.request(RewardBatch(images=torch.zeros(1, 3, 2, 2)), frozenset({"images"}))["image"][0]
WIDE = wire.request(RewardBatch(images=torch.zeros(1, 3, 2, 3)), frozenset({"images"}))["image"][0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "request must be JSON"),
        (b"[" * 15_000, "request must be JSON"),
        (b"\xff\xfe", "request must be JSON"),
        (b"[1]", "request must be a JSON object, got list"),
        ({"imgae": []}, "unknown key 'imgae'; did you mean 'image'"),
        ({"video": ["x"]}, "unknown key 'video'"),
        ({"prompt": "a"}, "request.prompt must be a list of 1 to 3 entries, got str"),
        ({"prompt": []}, "request.prompt must be a list of 1 to 3 entries, got 0"),
        ({"prompt": ["a"] * 4}, "request.prompt must be a list of 1 to 3 entries, got 4"),
        ({"prompt": ["a", 3], "image": [PNG, PNG]}, "request.prompt[1] must be str, got int"),
        ({"prompt": ["a", "b"], "image": [PNG]}, "lists of one length, got 2 in prompt, 1 in image"),
        ({"prompt": ["a"], "image": ["%%%"]}, "request.image[0] must be a PNG in base64, got str"),
        ({"prompt": ["a"], "image": [7]}, "request.image[0] must be a PNG in base64, got int"),
        ({"prompt": ["a"], "image": ["aGVsbG8="]}, "request.image[0]: image must be a PNG in base64, got 5 bytes"),
        ({"prompt": ["a"], "image": [PNG[:40]]}, "request.image[0]: image must be a PNG in base64"),
        ({"prompt": ["a", "b"], "image": [PNG, WIDE]}, "must hold images of one size"),
        ({"image": [PNG]}, "must get prompts"),
        ({"prompt": ["a"]}, "must get images"),
    ],
)
def test_a_bad_request_is_status_400_and_one_line(body, message):
    class Checked(Local):
        def score(self, batch):
            from diffalign.rewards.inputs import images_of

            images_of(batch, self.name, self.requires)
            return super().score(batch)

    with running(RewardServer(Checked(), port=0, limits=Limits(samples=3))) as url:
        status, said = ask(url, "POST", "/compute", body if isinstance(body, bytes) else json.dumps(body).encode())
    assert status == 400
    assert message in said["error"]
    assert "\n" not in said["error"]
    assert "Traceback" not in said["error"]


def test_a_picture_in_another_mode_or_format_is_refused():
    import base64
    import io

    from PIL import Image

    for mode, kind in (("L", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG")):
        buffer = io.BytesIO()
        Image.new(mode, (2, 2)).save(buffer, format=kind)
        with pytest.raises(InputError, match=r"request\.image\[0\]: image must be (RGB|a PNG)"):
            wire.read_request({"image": [base64.b64encode(buffer.getvalue()).decode()]}, 4)


def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_unpacked():
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8193, 8193, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match="at most 67108864 pixels, got RGB of 8193x8193"):
        wire.from_png(bomb)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "message"),
    [
        ("GET", "/", {}, 404, "to /health or /compute, got /"),
        ("GET", "/compute", {}, 405, "/compute must be asked by POST, got GET"),
        ("POST", "/health", {}, 405, "/health must be asked by GET, got POST"),
        ("DELETE", "/compute", {}, 405, "by POST, got DELETE"),
        ("BREW", "/compute", {}, 501, "Unsupported method"),
        (
            "POST",
            "/compute",
            {"Content-Type": "text/plain", "Content-Length": "0"},
            415,
            "application/json, got text/plain",
        ),
        ("POST", "/compute", {"Transfer-Encoding": "chunked"}, 411, "must say its Content-Length"),
        ("POST", "/compute", {"Content-Length": "-5"}, 411, "must say its Content-Length"),
        ("POST", "/compute", {"Content-Length": "999999999"}, 413, "at most 20000 bytes, got 999999999"),
    ],
)
def test_a_request_to_the_wrong_place_or_in_the_wrong_form_has_its_status(
    served, method, path, headers, status, message
):
    with socket.create_connection(("127.0.0.1", int(served.rpartition(":")[2])), timeout=2) as connection:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", *[f"{k}: {v}" for k, v in headers.items()], "", ""]
        connection.sendall("\r\n".join(lines).encode())
        connection.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    assert said.startswith(f"HTTP/1.1 {status} ")
    assert message in json.loads(said.partition("\r\n\r\n")[2])["error"]


def test_a_body_over_the_limit_is_refused_with_its_reason(served):
    status, said = ask(served, "POST", "/compute", b"x" * 50_000)
    assert (status, said) == (413, {"error": "a request must have at most 20000 bytes, got 50000"})


def test_the_server_is_whole_after_all_that(served):
    assert ask(served, "GET", "/health")[1]["name"] == "local"
    status, said = ask(
        served, "POST", "/compute", json.dumps({"prompt": ["ab"], "image": [PNG], "video": None}).encode()
    )
    assert (status, said) == (200, {"rewards": [None], "raw": {"red": [0.0]}})


def test_a_client_that_falls_silent_is_let_go():
    with running(RewardServer(Local(), port=0, limits=Limits(seconds=0.05))) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=2) as connection:
            connection.sendall(
                b"POST /compute HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            assert connection.recv(100) == b""
        assert ask(url, "GET", "/health")[0] == 200


def test_infinite_scores_and_invalid_samples_travel_as_null():
    class Wild(Local):
        def score(self, batch):
            return RewardOutput(
                scores=torch.tensor([1.0, float("inf"), 3.0]), valid=torch.tensor([False, True, True]), raw={}
            )

    with running(RewardServer(Wild(), port=0)) as url:
        out = HTTPReward(url, network=FAST).score(batch())
    assert out.valid.tolist() == [False, False, True]
    assert out.scores[2] == 3.0


def test_the_server_is_private_unless_told_and_its_end_frees_the_port():
    server = RewardServer(Local(), port=0)
    assert server.server_address[0] == "127.0.0.1"
    assert server.is_private
    port = server.server_address[1]
    with running(server), pytest.raises(InputError, match=f"must be free and of this machine, got 127.0.0.1:{port}"):
        RewardServer(Local(), port=port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    with RewardServer(Local(), host="0.0.0.0", port=0) as opened:
        assert not opened.is_private


def test_the_client_knocks_where_the_server_listens():
    assert HTTPReward().endpoint.url == f"http://{HOST}:{PORT}"
    import typer

    command = typer.main.get_command(cli.app).commands["serve-reward"]
    assert {p.name: p.default for p in command.params if p.name in ("host", "port")} == {"host": HOST, "port": PORT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality": "audio"}, "which is of audio"),
        ({"requires": frozenset({"images", "audio"})}, "which requires audio"),
        ({"pointwise": False}, "which compares the samples of a batch"),
    ],
)
def test_a_reward_that_cannot_be_served_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        RewardServer(type("Other", (Local,), change)(), port=0)


def test_a_sum_of_z_scores_is_not_served_and_a_plain_sum_is():
    with pytest.raises(InputError, match="compares the samples"):
        RewardServer(CompositeReward([Part(reward=Local())]), port=0)
    with RewardServer(CompositeReward([Part(reward=Local(), normalise="none")]), port=0) as server:
        assert server.about["name"] == "composite"


# --- the command


def test_the_command_names_its_url_and_a_request_and_ends_cleanly(monkeypatch):
    made = []

    def interrupted(self, poll_interval=0.5):
        made.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "serve_forever", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(cli.app, ["serve-reward", "oracle", "--port", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    [server] = made
    assert f"reward oracle (tiny world, 1): {server.url}\n" in result.output
    assert f"curl -s {server.url}/compute -H 'Content-Type: application/json' -d @-\n" in result.output
    assert "anybody" not in result.output
    assert result.output.endswith("stopped\n")
    assert server.socket.fileno() == -1
    assert signal.getsignal(signal.SIGTERM) is before


def test_options_on_the_command_line_are_toml_or_text():
    given = ["scale=logit", "batch_size=4", "network.retries=0", "model=a=b"]
    assert cli_rewards.options(given) == {
        "scale": "logit",
        "batch_size": 4,
        "network": {"retries": 0},
        "model": "a=b",
    }


@pytest.mark.slow
def test_the_command_serves_from_a_process_of_its_own_until_it_is_told_to_stop(tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "diffalign", "serve-reward", "tests.test_reward_http:brightness", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(4)]
    url = re.search(r"http://127\.0\.0\.1:\d+", lines[0])[0]
    assert HTTPReward(url).score(batch()).scores.tolist() == pytest.approx(batch().images.mean((1, 2, 3)).tolist())
    if shutil.which("curl"):
        said = subprocess.run(["bash", "-c", lines[2]], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert json.loads(said) == {"rewards": [0.0], "raw": {}}
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "stopped\n"
    process.stdout.close()
    assert process.wait(10) == 0


def brightness(images, prompts):
    """A user's reward."""
    return images.mean((1, 2, 3))
