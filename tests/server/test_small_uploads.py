"""A small upload that is stored without Sanic gets the same response, and what it cannot store goes to the handler."""

import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import pytest

from harmonia.config.tokens import new
from harmonia.nix import base32
from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from support.lean_responses import COUNT_UPLOADS, count
from support.push_target import spooled
from support.pusher import Pushed, Pusher
from support.running import PATIENCE_S, Server, case, patched, read_answer, wait_until

Start = Callable[..., Server]

WITHOUT = patched(
    "from harmonia.server.http.small_uploads import SmallUploads\nSmallUploads.begin = lambda self, data: None"
)
COUNTING = patched(COUNT_UPLOADS)
QUICK = patched(
    f"""{COUNT_UPLOADS}
from harmonia.server.http import sanic_adapter
sanic_adapter._UPLOAD_TIMEOUT_S = 0.05
leave = sanic_adapter.Connection._leave_upload_to_sanic
def leaving(self):
    leave(self)
    open(os.path.join(os.path.dirname(sys.argv[-1]), "left"), "w").close()
sanic_adapter.Connection._leave_upload_to_sanic = leaving
"""
)
"""The same, but uploads are left to Sanic almost at once."""
HELD = patched(
    f"""{COUNT_UPLOADS}
import asyncio
from pathlib import Path
from harmonia.server.http.small_uploads import SmallUpload
directory = Path(sys.argv[-1]).parent
store = SmallUpload.store
async def holding(self):
    await store(self)
    (directory / "stored").touch()
    while not (directory / "released").exists():
        await asyncio.sleep(0.01)
SmallUpload.store = holding
"""
)
"""The same, but an upload without Sanic ends only when the file `released` exists."""
SLOW = patched(
    f"""{COUNT_UPLOADS}
import asyncio
from pathlib import Path
from harmonia.server.http import sanic_adapter, small_uploads
sanic_adapter._UPLOAD_TIMEOUT_S = 0.05
directory = Path(sys.argv[-1]).parent
store = small_uploads.SmallUpload.store
async def slow(self):
    (directory / "storing").touch()
    while not (directory / "released").exists():
        await asyncio.sleep(0.01)
    await store(self)
    (directory / "stored").touch()
small_uploads.SmallUpload.store = slow
"""
)
"""The same, but an upload without Sanic is left to Sanic while it is stored, and ends when `released` exists."""
FIELDS: Sequence[Sequence[str]] = (
    [],
    ["Expect: 100-continue"],
    ["Content-Type: application/x-nix-nar", "Accept: */*"],
    ["Content-Encoding: gzip"],
    ["Connection: close"],
    ["Connection: keep-alive"],
    ["Via: 1.1 harmonia-other"],
    ["Transfer-Encoding: chunked"],
    ["Content-Length: 3"],  # the second one
    ["Bad field"],
)
KINDS = [fields for fields in FIELDS if not re.search("Connection: close|chunked|-Length|Bad", str(fields))]
"""Fields of uploads that are stored without Sanic."""
VERSION = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"
_WHOLE = re.compile(
    rb"(?:HTTP/1\.1 100.*?\r\n\r\n)?"
    rb"HTTP/1\.1 (?!100).*?\r\ncontent-length: (?P<length>[0-9]+)\r\n.*?\r\n\r\n(?P<body>.*)",
    re.DOTALL,
)
PATHS = [Pushed.make(f"path-{number}", b"%d" % number * 1000) for number in range(8)]


@pytest.fixture
def make(start: Start, tmp_path: Path) -> Callable[..., Server]:
    """Return a function that starts a server for pushes, whose token is in a file."""
    StoreBuilder(tmp_path / "store")
    token, record = new("ci", ["push", "metrics"])
    (tmp_path / "tokens").write_text(str(record))
    (tmp_path / "token").write_text(token)

    def make(program: object = COUNTING, settings: str = "") -> Server:
        push = f"[push]\nenable = true\nallow_without_tls = true\nstate_dir = '{tmp_path}/state'\n"
        paths = f"tokens_path = '{tmp_path}/tokens'\ndaemon_socket = '{tmp_path}/none'\n"
        settings = f"debug_info = false\n{paths}{settings}{push}"
        return start(store=tmp_path / "store", settings=settings, program=program)

    return make


def pusher(server: Server) -> Pusher:
    return Pusher(server, (server.directory.parent / "token").read_text())


def metrics_of(server: Server) -> str:
    token = (server.directory.parent / "token").read_text()
    return server.get("/metrics", {"Authorization": f"Bearer {token}"}).text


@pytest.fixture
def connected(make: Callable[..., Server]) -> Iterator[tuple[Server, Pusher, socket.socket]]:
    """Connect to a server that has already answered the first upload of the kind."""
    server = make()
    pushing = pusher(server)
    with pushing.raw() as connection:
        put(pushing, connection, PATHS[0])
        yield server, pushing, connection


def response(connection: socket.socket, data: bytes) -> bytes:
    """Send a request, and return its response without 100 Continue, or nothing if the connection is closed."""
    received = b""
    with suppress(ConnectionError):
        connection.sendall(data)
        while not (whole := _WHOLE.fullmatch(received)) or len(whole["body"]) < int(whole["length"]):
            part = connection.recv(1 << 16)
            if not part:
                break
            received += part
    return received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")


def request(pushing: Pusher, path: Pushed, *fields: str) -> bytes:
    return pushing.head("PUT", path.nar_url, len(path.body), *fields) + path.body


def put(pushing: Pusher, connection: socket.socket, path: Pushed, *fields: str) -> int:
    connection.sendall(request(pushing, path, *fields))
    return read_answer(connection).status


def successes(connection: socket.socket, number: int) -> int:
    """Read a number of responses without bodies. Return the number of those with status 200."""
    received = b""
    while received.count(b"\r\n\r\n") < number:
        received += connection.recv(1 << 16)
    return received.count(b"HTTP/1.1 200 ")


def test_response_is_identical_for_each_kind_of_upload(make: Callable[..., Server]) -> None:
    lean, full = make(), make(WITHOUT)
    wrong = Pushed.make("wrong", b"content")

    def answers(server: Server, method: str, path: Pushed, fields: Sequence[str]) -> list[bytes]:
        """Return the responses to requests for `/version`, an upload, and one with a wrong name."""
        asked = request(pusher(server), path, *fields).replace(b"PUT", method.encode(), 1)
        damaged = asked.replace(path.file_hash.encode(), wrong.file_hash.encode())
        with pusher(server).raw() as connection:
            responses = [response(connection, data) for data in (VERSION, asked, damaged)]
        return [re.sub(rb"\r\ndate: [^\r]*|harmonia-[0-9a-z]+", b"", each) for each in responses]

    for fields, method, path in product(FIELDS, ("PUT", "POST"), PATHS[:3]):
        with case((fields, method, path.nar_url)):
            ours = answers(lean, method, path, fields)
            assert ours == answers(full, method, path, fields)
            assert b"HTTP/1.1 " in ours[1]
    assert count(lean) == 2 * sum(fields in KINDS for fields in FIELDS)
    assert not [line for line in lean.log if "Traceback" in line], lean.log


def test_uploads_are_stored_without_sanic_and_counted(connected: tuple[Server, Pusher, socket.socket]) -> None:
    server, pushing, connection = connected
    for path in PATHS[1:]:
        assert put(pushing, connection, path) == 200
    assert count(server) == len(PATHS) - 1
    assert spooled(server) == sorted(path.file_hash for path in PATHS)
    for path in PATHS:
        assert (server.cache_dir / "push" / path.file_hash).read_bytes() == path.body
    metrics = metrics_of(server)
    assert f'harmonia_requests_total{{route="push_nar",status="200"}} {len(PATHS)}.0\n' in metrics
    assert 'harmonia_requests_in_flight{route="push_nar"} 0.0\n' in metrics


@pytest.mark.parametrize("size", [1, 100, 4000])
def test_body_that_arrives_in_pieces_is_stored(connected: tuple[Server, Pusher, socket.socket], size: int) -> None:
    server, pushing, connection = connected
    data = request(pushing, PATHS[1], "X: y")
    put(pushing, connection, PATHS[2], "X: y")
    end = data.index(b"\r\n\r\n") + 4
    for piece in (data[:end], data[end : end + size], data[end + size :]):
        connection.sendall(piece)
        server.settle()
    assert read_answer(connection).status == 200
    assert count(server) == 1
    assert PATHS[1].file_hash in spooled(server)


def test_client_that_waits_for_100_gets_it_before_it_sends_the_body(
    connected: tuple[Server, Pusher, socket.socket],
) -> None:
    server, pushing, connection = connected
    for path in PATHS[1:4]:
        connection.sendall(pushing.head("PUT", path.nar_url, len(path.body), "Expect: 100-continue"))
        assert connection.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(path.body)
        assert read_answer(connection).status == 200
    assert count(server) == 2


def test_pipelined_uploads_are_all_stored(connected: tuple[Server, Pusher, socket.socket]) -> None:
    server, pushing, connection = connected
    connection.sendall(b"".join(request(pushing, path) for path in PATHS[1:]))
    assert successes(connection, len(PATHS[1:])) == len(PATHS[1:])
    assert spooled(server) == sorted(path.file_hash for path in PATHS)


@contextmanager
def uploading_second(server: Server, until: str) -> Iterator[tuple[Pusher, socket.socket]]:
    """Upload the first path, and send the second one, which is stored without Sanic. Wait for the file `until`."""
    pushing = pusher(server)
    with pushing.raw() as connection:
        put(pushing, connection, PATHS[0])
        connection.sendall(request(pushing, PATHS[1]))
        wait_until((server.directory / until).exists)
        yield pushing, connection


def test_upload_is_counted_once_if_the_next_request_arrives_while_it_is_stored(make: Callable[..., Server]) -> None:
    server = make(HELD)
    with uploading_second(server, "stored") as (pushing, connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for path in PATHS[2:]:
            connection.sendall(request(pushing, path))
            server.settle()
        (server.directory / "released").touch()
        assert successes(connection, len(PATHS[1:])) == len(PATHS[1:])
    metrics = metrics_of(server)
    assert f'harmonia_requests_total{{route="push_nar",status="200"}} {len(PATHS)}.0\n' in metrics
    assert f"harmonia_pushed_bytes_total {sum(len(path.body) for path in PATHS)}.0\n" in metrics


def test_upload_that_takes_long_to_store_is_counted_once(make: Callable[..., Server]) -> None:
    server = make(SLOW)
    with uploading_second(server, "storing") as (_, connection):
        assert read_answer(connection).status == 200  # of Sanic, which has stored it again
        (server.directory / "released").touch()
        wait_until((server.directory / "stored").exists)
        assert count(server) == 0
    assert f"harmonia_pushed_bytes_total {sum(len(path.body) for path in PATHS[:2])}.0\n" in metrics_of(server)


def test_long_narinfo_is_parsed_in_a_thread(make: Callable[..., Server]) -> None:
    server = make(
        patched(
            "import os, sys, threading\n"
            "from harmonia.nix import narinfo\n"
            "parse = narinfo.parse\n"
            "def noting(*arguments):\n"
            "    with open(os.path.join(os.path.dirname(sys.argv[-1]), 'threads'), 'a') as file:\n"
            "        print(threading.current_thread() is threading.main_thread(), file=file)\n"
            "    return parse(*arguments)\n"
            "narinfo.parse = noting"
        )
    )
    names = [StorePath(f"{base32.encode(bytes(16) + number.to_bytes(4))}-name") for number in range(1000)]
    for references in (names[:10], names):
        assert pusher(server).put_narinfo(Pushed.make("path", b"", references=tuple(references))).status == 403
    assert (server.directory / "threads").read_text().split() == ["True", "False"]


def test_wrong_body_gets_400_from_the_handler_and_is_not_stored(
    connected: tuple[Server, Pusher, socket.socket],
) -> None:
    server, pushing, connection = connected
    data = request(pushing, PATHS[1])
    connection.sendall(data[:-1] + b"x")
    answer = read_answer(connection)
    assert (answer.status, b"SHA-256" in answer.body, count(server)) == (400, True, 0)
    assert spooled(server) == [PATHS[0].file_hash]


def test_client_that_disconnects_leaves_nothing(connected: tuple[Server, Pusher, socket.socket]) -> None:
    server, pushing, connection = connected
    for path in PATHS[1:]:
        put(pushing, connection, PATHS[0])
        with pushing.raw() as other:
            put(pushing, other, PATHS[0])
            other.sendall(request(pushing, path)[:-1])
            server.settle()
    server.settle()
    assert spooled(server) == [PATHS[0].file_hash]
    assert not [line for line in server.log if "Traceback" in line], server.log


def test_stalled_upload_is_left_to_sanic(make: Callable[..., Server]) -> None:
    server = make(QUICK)
    pushing = pusher(server)
    with pushing.raw() as connection:
        put(pushing, connection, PATHS[0])
        connection.sendall(request(pushing, PATHS[1])[:-1])
        wait_until((server.directory / "left").exists)
        connection.sendall(PATHS[1].body[-1:])
        assert read_answer(connection).status == 200
        assert put(pushing, connection, PATHS[2]) == 200
    assert PATHS[1].file_hash in spooled(server)


def test_token_that_was_revoked_gets_401(connected: tuple[Server, Pusher, socket.socket], tmp_path: Path) -> None:
    server, pushing, connection = connected
    assert put(pushing, connection, PATHS[1]) == 200
    (tmp_path / "tokens").write_text("")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("tokens reloaded")
    assert put(pushing, connection, PATHS[2]) == 401
    assert count(server) == 1
    assert PATHS[2].file_hash not in spooled(server)


def test_logged_uploads_go_to_the_handler(make: Callable[..., Server]) -> None:
    server = make(settings="access_log = true\n")
    pushing = pusher(server)
    with pushing.raw() as connection:
        for path in PATHS:
            assert put(pushing, connection, path) == 200
    assert count(server) == 0
    wait_until(lambda: sum("PUT /push/nar/" in line and "token=ci" in line for line in server.log) == len(PATHS))


def test_server_that_stops_answers_an_upload_that_has_begun(
    connected: tuple[Server, Pusher, socket.socket],
) -> None:
    server, pushing, connection = connected
    data = request(pushing, PATHS[1])
    connection.sendall(data[:-1])
    server.settle()
    server.process.terminate()
    wait_until(lambda: refuses(server))
    connection.sendall(data[-1:])
    assert read_answer(connection).status == 200
    assert connection.recv(1) == b""
    assert server.process.wait(PATIENCE_S) == 0


def refuses(server: Server) -> bool:
    try:
        with server.connect():
            return False
    except ConnectionError:
        return True
