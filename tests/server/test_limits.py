"""Configurable limits: each is enforced, and clients below it are not affected."""

import select
import socket
import time
from collections.abc import Callable

import pytest

from harmonia.config.settings import Settings
from support.running import FROZEN_RATES, PATIENCE_S, Answer, Sample, Server, patched, read_answer

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(
    ("settings", "limit"), [("", 8192), ("max_header_size = 1024", 1024), ("max_header_size = 16384", 16384)]
)
def test_head_larger_than_max_header_size_gets_431_or_414(
    start: Start, sample: Sample, settings: str, limit: int
) -> None:
    server = start(store=sample.root, settings=settings)
    assert server.get("/version", {"X": "x" * (limit - 100)}).status == 200
    assert server.get("/version", {"X": "x" * limit}).status == 431
    assert server.get(f"/version?{'x' * limit}").status == 414


def test_header_timeout_covers_the_whole_head(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="header_timeout = 1")
    head = b"GET /version HTTP/1.1\r\n" + b"X: y\r\n" * 100
    began, sent = time.monotonic(), 0
    with server.connect() as dripped:
        # A further byte does not restart the timeout.
        dripped.settimeout(0.2)
        answer = b""
        for byte in head:
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
    assert sent < len(head)  # one byte each 0.2 s: the whole head takes two minutes
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


def test_keep_alive_timeout_closes_an_idle_connection(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="keep_alive_timeout = 1")
    with server.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n")
        assert read_answer(connection).status == 200
        connection.settimeout(Settings().keep_alive_timeout / 2)
        assert connection.recv(1) == b""


@pytest.fixture
def limited(start: Start, sample: Sample) -> Callable[[str, str], Answer]:
    settings = "browse = true\nmax_query_rate = 5\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=sample.root, settings=settings, program=patched(FROZEN_RATES))
    return lambda path, client: server.get(path, {"X-Forwarded-For": client})


def test_max_query_rate_limits_expensive_requests(limited: Callable[[str, str], Answer], sample: Sample) -> None:
    paths = ["/search?q=a", f"/path/{sample.small.path.hash_part}", "/debuginfo/0123456789", "/search", "/search"]
    assert [limited(path, "10.0.0.1").status for path in paths] == [200, 200, 404, 200, 200]
    for path in paths:
        late = limited(path, "10.0.0.1")
        assert (late.status, late.text) == (429, "Too Many Requests\n")
        assert 1 <= int(late.headers["retry-after"]) <= 12
    assert limited("/search", "10.0.0.2").status == 200


def test_max_query_rate_does_not_limit_requests_of_nix(limited: Callable[[str, str], Answer], sample: Sample) -> None:
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


def test_max_query_rate_0_disables_the_limit(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="browse = true\nmax_query_rate = 0")
    assert {server.get("/search").status for _ in range(20)} == {200}


@pytest.mark.slow
def test_slow_heads_delay_no_other_client(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="header_timeout = 5")
    slow: list[socket.socket] = []
    try:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        for _ in range(200):
            each = socket.create_connection((host, int(port)))
            each.sendall(b"GET /version HTTP/1.1\r\nX: ")
            slow.append(each)
        assert server.get("/version").status == 200
        assert select.select(slow, [], [], 0)[0] != slow  # the answer came before the slow heads timed out
        for each in slow:
            each.settimeout(PATIENCE_S)
            assert each.recv(4096)[:12] in (b"", b"HTTP/1.1 408")
    finally:
        for each in slow:
            each.close()
