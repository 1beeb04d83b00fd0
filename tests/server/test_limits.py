"""Promises of the limits that are settings: each holds, and who keeps to it notices nothing."""

import select
import socket
import time
from collections.abc import Callable

import pytest

from support.running import PATIENCE_S, Answer, Sample, Server, read_answer

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(
    ("settings", "limit"), [("", 8192), ("max_header_size = 1024", 1024), ("max_header_size = 16384", 16384)]
)
def test_the_size_of_a_head(start: Start, sample: Sample, settings: str, limit: int) -> None:
    server = start(store=sample.root, settings=settings)
    assert server.get("/version", {"X": "x" * (limit - 100)}).status == 200
    assert server.get("/version", {"X": "x" * limit}).status == 431
    assert server.get(f"/version?{'x' * limit}").status == 414


def test_the_time_for_a_head(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="header_timeout = 1")
    began, sent = time.monotonic(), 0
    with server.connect() as dripped:
        # Each byte on its own does not begin the time anew.
        dripped.settimeout(0.2)
        answer = b""
        for byte in b"GET /version HTTP/1.1\r\n" + b"X: y\r\n" * 100:
            try:
                dripped.sendall(bytes([byte]))
                sent += 1
                answer = dripped.recv(4096)
                break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began > 0.9
    assert sent < 25  # bytes at 0.2 s each: 5 s if nothing else took time
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


def test_the_time_between_two_requests(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="keep_alive_timeout = 1")
    with server.connect() as connection:
        for _ in range(2):
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n")
            assert read_answer(connection).status == 200
            time.sleep(0.3)
        began = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - began < 60  # by default it would be 120


@pytest.fixture
def limited(start: Start, sample: Sample) -> Callable[[str, str], Answer]:
    settings = "browse = true\nmax_query_rate = 5\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=sample.root, settings=settings)
    return lambda path, client: server.get(path, {"X-Forwarded-For": client})


def test_the_rate_of_what_is_expensive(limited: Callable[[str, str], Answer], sample: Sample) -> None:
    paths = ["/search?q=a", f"/path/{sample.small.path.hash_part}", "/debuginfo/0123456789", "/search", "/search"]
    assert [limited(path, "10.0.0.1").status for path in paths] == [200, 200, 404, 200, 200]
    for path in paths:
        late = limited(path, "10.0.0.1")
        assert (late.status, late.text) == (429, "Too Many Requests\n")
        assert 1 <= int(late.headers["retry-after"]) <= 12
    assert limited("/search", "10.0.0.2").status == 200


def test_what_nix_asks_for_has_no_rate(limited: Callable[[str, str], Answer], sample: Sample) -> None:
    hash_part = sample.small.path.hash_part
    paths = [
        f"/{hash_part}.narinfo",
        f"/nar/{hash_part}.nar",
        f"/{hash_part}.ls",
        f"/serve/{hash_part}",
        "/nix-cache-info",
    ]
    for path in paths:
        assert {limited(path, "10.0.0.1").status for _ in range(8)} == {200}


def test_no_rate_is_no_rate(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="browse = true\nmax_query_rate = 0")
    assert {server.get("/search").status for _ in range(20)} == {200}


def test_a_slow_head_keeps_nobody_else_waiting(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="header_timeout = 5")
    slow: list[socket.socket] = []
    try:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        for _ in range(200):
            each = socket.create_connection((host, int(port)))
            each.sendall(b"GET /version HTTP/1.1\r\nX: ")
            slow.append(each)
        assert server.get("/version").status == 200
        assert select.select(slow, [], [], 0)[0] != slow  # it did not wait for their end
        for each in slow:
            each.settimeout(PATIENCE_S)
            assert each.recv(4096)[:12] in (b"", b"HTTP/1.1 408")
    finally:
        for each in slow:
            each.close()
