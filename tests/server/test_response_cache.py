"""A cached response is identical to the first, is counted and logged, and is used only while it is valid."""

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.lean_responses import COUNT_ALL, count
from support.running import Answer, Server, nar_url, patched, read_answer, wait_until

Start = Callable[..., Server]

LIMIT = 20_000
# The index of debug info opens the database in its own thread. Meanwhile, SQLite may report the database as busy, so
# the server does not cache its next response.
SETTINGS = "nar_compression = 'none'\ndebug_info = false"
COUNT_HITS = f"""
from harmonia.server.http.response_cache import ResponseCache
ResponseCache.__init__.__defaults__ = {LIMIT}, {LIMIT}
{COUNT_ALL}"""
COUNTING = patched(COUNT_HITS)


class Client:
    """One persistent connection."""

    def __init__(self, connection: socket.socket, server: Server) -> None:
        self._connection = connection
        self._server = server

    def ask(self, *packets: str, method: str = "GET") -> Answer:
        for packet in packets:
            self._connection.sendall(packet.encode())
            self._server.settle()  # so that packets arrive one by one
        return read_answer(self._connection, method)


@pytest.fixture
def info(store: StoreBuilder) -> PathInfo:
    return store.add(store.output_path("path"), b"contents" * 1000)


@pytest.fixture
def server(start: Start, info: PathInfo, tmp_path: Path) -> Server:  # noqa: ARG001 (adds the path)
    # A lookup of compressed NARs by other processes is valid for a second only, so nar_compression is none.
    return start(store=tmp_path / "store", settings=SETTINGS, program=COUNTING)


def head(info: PathInfo, *fields: str, method: str = "GET") -> str:
    return "\r\n".join([f"{method} /{info.path.hash_part}.narinfo HTTP/1.1", "Host: cache", *fields, "", ""])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "field", ["Accept-Encoding: zstd", "If-None-Match: *", "Range: bytes=0-3", "via: 1.1 harmonia"]
)
def test_identical_request_gets_the_cached_response(server: Server, info: PathInfo, method: str, field: str) -> None:
    with server.connect() as connection:
        client = Client(connection, server)
        first = client.ask(head(info, field, method=method), method=method)
        assert first.status == (304 if "If-None" in field else 200)

        def is_cached() -> bool:
            """Send the request again. The first of these may arrive before the response is cached."""
            assert client.ask(head(info, field, method=method), method=method) == first
            return count(server) >= 3

        wait_until(is_cached)
    assert server.request(method, f"/{info.path.hash_part}.narinfo", dict([field.split(": ")])).headers == {
        **first.headers,
        "connection": "close",
    }


def test_date_of_a_cached_response_is_current(server: Server, info: PathInfo) -> None:
    dates = set()
    with server.connect() as connection:

        def date() -> bytes:
            connection.sendall(head(info).encode())
            answer = connection.recv(65536)
            dates.update(re.findall(rb"\r\ndate: (\w{3}, .{20} GMT)\r\n", answer))
            return answer

        length = {len(date()) for _ in range(3)}
        wait_until(lambda: date() and len(dates) > 1)
        assert length == {len(date())}
    assert count(server) > 3


def test_cached_responses_are_counted(server: Server, info: PathInfo) -> None:
    with server.connect() as connection:
        client = Client(connection, server)
        sent = sum(len(client.ask(head(info)).body) for _ in range(5))
    metrics = server.get("/metrics").text
    assert 'harmonia_requests_total{route="narinfo",status="200"} 5.0\n' in metrics
    for outcome, answers in (("store", 1), ("memory", 4)):
        labels = f'outcome="{outcome}",route="narinfo"'
        assert f"harmonia_sent_bytes_total{{{labels}}} {sent / 5 * answers}\n" in metrics
        assert f"harmonia_head_seconds_count{{{labels}}} {answers}.0\n" in metrics


def test_cached_responses_are_logged(start: Start, info: PathInfo, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store", settings=f"access_log = true\n{SETTINGS}", program=COUNTING)
    with server.connect() as connection:
        for _ in range(3):
            Client(connection, server).ask(head(info))
    wait_until(lambda: sum(info.path.hash_part in line for line in server.log) == 3)


def test_changed_narinfo_is_sent_at_once(start: Start, store: StoreBuilder, info: PathInfo, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store", settings="debug_info = false", program=COUNTING)
    signature = SecretKey.generate("late-1").sign(b"")
    with server.connect() as connection:
        client = Client(connection, server)

        def text() -> str:
            """Return the text of two responses, of which the second may come from the cache."""
            first, second = client.ask(head(info)), client.ask(head(info))
            assert first == second
            return first.text

        before = text()
        with store.connect() as database:
            database.execute("update ValidPaths set sigs = ?", (signature,))
        assert text() == f"{before}Sig: {signature}\n"
        server.get(nar_url(info) + ".zst")
        wait_until(lambda: "FileHash" in client.ask(head(info)).text)
        assert "FileHash" in text()
        store.delete(info.path)
        assert text() == "Not Found\n"
        store.add(info.path, b"contents" * 1000)
        assert "FileHash" in text()
    assert count(server) >= 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_cached_404_is_used_until_the_path_exists(
    server: Server, store: StoreBuilder, info: PathInfo, method: str
) -> None:
    store.delete(info.path)
    with server.connect() as connection:
        client = Client(connection, server)
        asked = head(info, method=method)
        first = client.ask(asked, method=method)
        assert (first.status, first.headers["cache-control"]) == (404, "no-store")
        assert [client.ask(asked, method=method) for _ in range(3)] == [first] * 3
        assert count(server) == 3
        store.add(info.path, b"contents" * 1000)
        assert client.ask(asked, method=method).status == 200
    assert 'harmonia_requests_total{route="narinfo",status="404"} 4.0\n' in server.get("/metrics").text


def test_404s_evict_no_other_responses(server: Server, info: PathInfo) -> None:
    with server.connect() as connection:
        client = Client(connection, server)
        client.ask(nar_head(info))
        for number in range(100):
            assert client.ask(head(info).replace(info.path.hash_part, f"{number:032}")).status == 404
        before = count(server)
        client.ask(nar_head(info))
    assert count(server) == before + 1


@pytest.mark.parametrize("body", ["", "\r\n"])
def test_request_with_a_body_is_not_cached(server: Server, info: PathInfo, body: str) -> None:
    request = head(info, f"Content-Length: {len(body)}")
    for _ in range(3):
        with server.connect() as connection:
            client = Client(connection, server)
            assert client.ask(request, body).status == 200
            if body:
                assert connection.recv(1) == b""
            else:
                assert client.ask(request).status == 200
    assert count(server) == 0


@pytest.mark.parametrize("field", ["Connection: close", None])
def test_connection_close_is_respected(server: Server, info: PathInfo, field: str | None) -> None:
    request = head(info, field) if field else head(info).replace("HTTP/1.1", "HTTP/1.0")
    for _ in range(3):
        with server.connect() as connection:
            Client(connection, server).ask(head(info))
            Client(connection, server).ask(head(info))
            assert Client(connection, server).ask(request).status == 200
            assert connection.recv(1) == b""
    assert count(server) >= 3


def test_split_and_pipelined_requests_get_correct_responses(server: Server, info: PathInfo) -> None:
    request = head(info).encode()
    with server.connect() as connection:

        def ask(*packets: bytes) -> bytes:
            for packet in packets:
                connection.sendall(packet)
                server.settle()  # so that packets arrive one by one
            return received(b"".join(packets).count(b"\r\n\r\n"))

        def received(answers: int) -> bytes:
            wire = b""
            while len(wire) < answers * size:
                wire += connection.recv(answers * size - len(wire))
            return re.sub(rb"date: .*", b"", wire)

        connection.sendall(request)
        size = len(connection.recv(65536))
        answer = ask(request)
        assert ask(request[:20], request[20:]) == answer
        assert ask(request[:-1], request[-1:]) == answer
        assert ask(request[:-2], request[-2:] + request[:10], request[10:]) == 2 * answer
        assert ask(3 * request) == 3 * answer
        assert ask(request, request, request) == 3 * answer
    assert count(server) == 4


def test_revoked_token_gets_401_not_a_cached_response(start: Start, info: PathInfo, tmp_path: Path) -> None:
    secret, token = new("reader", ["read"])
    tokens = tmp_path / "tokens"
    tokens.write_text(str(token))
    settings = f"tokens_path = '{tokens}'\n{SETTINGS}"
    server = start(store=tmp_path / "store", settings=settings, program=COUNTING)
    with server.connect() as connection:
        client = Client(connection, server)
        asked = head(info, f"Authorization: Bearer {secret}")
        absent = asked.replace(info.path.hash_part, "0" * 32)
        assert [client.ask(asked).status for _ in range(3)] == [200] * 3
        assert [client.ask(absent).status for _ in range(3)] == [404] * 3
        before = count(server)
        assert before > 0
        tokens.write_text("")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("tokens reloaded")
        assert [client.ask(text).status for text in (asked, absent)] == [401] * 2
    assert count(server) == before


def test_expired_token_gets_401_not_a_cached_response(start: Start, info: PathInfo, tmp_path: Path) -> None:
    clock = """
import time, types
from harmonia.server.http import auth
late = os.path.join(os.path.dirname(sys.argv[-1]), "late")
auth.time = types.SimpleNamespace(time=lambda: 4e9 if os.path.exists(late) else time.time())
"""
    secret, token = new("reader", ["read"], 3e9)
    (tmp_path / "tokens").write_text(str(token))
    settings = f"tokens_path = '{tmp_path}/tokens'\n{SETTINGS}"
    server = start(store=tmp_path / "store", settings=settings, program=patched(COUNT_HITS + clock))
    with server.connect() as connection:
        client = Client(connection, server)
        kinds = [head(info, f"Authorization: Bearer {secret}"), nar_head(info, f"Authorization: Bearer {secret}")]
        assert [client.ask(asked).status for asked in kinds * 3] == [200] * 6
        before = count(server)
        assert before > 0
        (server.directory / "late").touch()
        assert [client.ask(asked).status for asked in kinds] == [401] * 2
    assert count(server) == before


def test_pushers_cached_narinfo_is_not_used_after_its_row_was_damaged(
    start: Start, store: StoreBuilder, info: PathInfo, tmp_path: Path
) -> None:
    secret, token = new("pusher", ["push"])
    (tmp_path / "tokens").write_text(str(token))
    push = f"[push]\nenable = true\nallow_without_tls = true\nstate_dir = '{tmp_path}/state'\n"
    settings = f"tokens_path = '{tmp_path}/tokens'\ndaemon_socket = '{tmp_path}/none'\n{SETTINGS}\n{push}"
    server = start(store=tmp_path / "store", settings=settings, program=COUNTING)
    kinds = [
        head(info, f"Authorization: Bearer {secret}", *fields).replace("GET /", "GET /push/")
        for fields in ([], ['If-None-Match: "x"'])
    ]
    with server.connect() as connection:
        client = Client(connection, server)
        assert [client.ask(asked).status for asked in kinds * 3] == [200] * 6
        before = count(server)
        assert before == 4
        with store.connect() as database:
            database.execute("update ValidPaths set narSize = null")
        assert [client.ask(asked).status for asked in kinds] == [404] * 2
    assert count(server) == before


def test_spool_is_not_read_on_the_event_loop_while_the_disk_is_slow(
    start: Start, info: PathInfo, tmp_path: Path
) -> None:
    slow = """
from harmonia.process.loop_reads import LoopReads
slow = os.path.join(os.path.dirname(sys.argv[-1]), "slow")
LoopReads.allowed = property(lambda self: not os.path.exists(slow))
"""
    secret, token = new("pusher", ["push"])
    (tmp_path / "tokens").write_text(str(token))
    push = f"[push]\nenable = true\nallow_without_tls = true\nstate_dir = '{tmp_path}/state'\n"
    settings = f"tokens_path = '{tmp_path}/tokens'\ndaemon_socket = '{tmp_path}/none'\n{push}"
    server = start(store=tmp_path / "store", settings=settings, program=patched(COUNT_HITS + slow))
    fields = "\r\n".join(["Host: cache", f"Authorization: Bearer {secret}", "", ""])
    asked = f"HEAD /push/nar/{base32.encode(info.nar_hash)}.nar.xz HTTP/1.1\r\n"
    kinds = [f"{asked}{fields}", f"{asked}If-None-Match: x\r\n{fields}"]
    with server.connect() as connection:
        client = Client(connection, server)
        assert [client.ask(kind, method="HEAD").status for kind in kinds * 3] == [404] * 6
        assert count(server) == 4
        (server.directory / "slow").touch()
        assert [client.ask(kind, method="HEAD").status for kind in kinds] == [404] * 2
    assert count(server) == 4


def nar_head(info: PathInfo, *fields: str, suffix: str = "") -> str:
    return "\r\n".join([f"GET {nar_url(info)}{suffix} HTTP/1.1", "Host: cache", *fields, "", ""])


@pytest.mark.parametrize(("suffix", "field"), [("", "A: b"), ("", "Accept-Encoding: zstd"), (".zst", "A: b")])
def test_small_nar_is_replayed_until_the_path_is_deleted(
    server: Server, store: StoreBuilder, info: PathInfo, suffix: str, field: str
) -> None:
    asked = nar_head(info, field, suffix=suffix)
    with server.connect() as connection:
        client = Client(connection, server)
        first = client.ask(asked)
        assert first.status == 200
        assert [client.ask(asked) for _ in range(3)] == [first] * 3
        assert count(server) == 3
        metrics = server.get("/metrics").text
        assert 'harmonia_requests_total{route="nar",status="200"} 4.0\n' in metrics
        labels = 'outcome="memory",route="nar"'
        assert f"harmonia_sent_bytes_total{{{labels}}} {float(3 * len(first.body))}\n" in metrics
        store.delete(info.path)
        assert client.ask(asked).status == 404


@pytest.mark.parametrize(
    ("suffix", "field", "replays"),
    [("", "A: b", 0), ("", "Accept-Encoding: zstd", 1), (".zst", "A: b", 1)],
)
def test_response_is_replayed_if_it_is_short_although_its_nar_is_not(
    start: Start, store: StoreBuilder, tmp_path: Path, suffix: str, field: str, replays: int
) -> None:
    info = store.add(store.output_path("zeros"), bytes(400_000))
    server = start(
        store=tmp_path / "store", settings=SETTINGS, program=patched(COUNT_HITS.replace(str(LIMIT), "1 << 20"))
    )
    with server.connect() as connection:
        client = Client(connection, server)
        first = client.ask(nar_head(info, field, suffix=suffix))
        assert client.ask(nar_head(info, field, suffix=suffix)) == first
    assert count(server) == replays


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_damaged_small_nar_gets_404_before_its_first_byte(
    server: Server, store: StoreBuilder, info: PathInfo, suffix: str
) -> None:
    file = Path(os.fsdecode(store.real_path(info.path)))
    intact = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(intact[::-1])
    with server.connect() as connection:
        client = Client(connection, server)
        assert client.ask(nar_head(info, suffix=suffix)).status == 404
        file.write_bytes(intact)
        assert client.ask(nar_head(info, suffix=suffix)).status == 200


def test_size_of_the_cache_is_bounded(server: Server, info: PathInfo) -> None:
    with server.connect() as connection:
        client = Client(connection, server)
        for number in range(100):
            client.ask(head(info, f'If-None-Match: "{number:03}"'))
        assert client.ask(head(info, 'If-None-Match: "099"')).status == 200
        assert count(server) == 1
        for number in reversed(range(100)):
            client.ask(head(info, f'If-None-Match: "{number:03}"'))
        assert 10 < count(server) < 1 + LIMIT / 500
