"""The client of the Nix daemon speaks every protocol since Nix 2.3, and survives any reply."""

import asyncio
import select
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harmonia.errors import RemoteError
from harmonia.nix import nar
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.push.loop_daemon import LoopDaemon
from harmonia.store import nix_daemon
from harmonia.store.nix_daemon import BlockingDaemon
from support.daemon_server import LAST, DaemonServer, number
from support.running import PATIENCE_S

ROOT = "/nix/store/0000000000000000000000000000000a-näme"
INFO = PathInfo(
    path=StorePath("0000000000000000000000000000000a-name"),
    nar_hash=bytes(32),
    nar_size=1 << 20,
    references=(),
    deriver=None,
    sigs=(),
    ca=None,
)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory, "socket")


@pytest.mark.parametrize("version", [0x115, 0x11A, 0x121, 0x122, 0x123, 0x126, 0x140])
def test_all_protocol_versions_since_nix_2_3_work(place: Path, version: int) -> None:
    with DaemonServer(place, version) as server, BlockingDaemon(server.path, 5) as daemon:
        daemon.add_temp_roots([ROOT])
        daemon.add_temp_roots([ROOT, ROOT + "2"])
        assert server.roots == [ROOT, ROOT + "2"]
        assert not daemon.lost


def test_log_messages_before_the_reply_are_skipped(place: Path) -> None:
    fields = number(2, 0, 7, 1) + nar.encode(b"field")
    reply = (
        number(0x6F6C6D67) + nar.encode(b"a line of the log\n")
        + number(0x53545254, 1, 3, 0) + nar.encode(b"begins") + fields + number(0)
        + number(0x52534C54, 1, 105) + fields + number(0x53544F50, 1)
    )  # fmt: skip
    with DaemonServer(place, answer=reply + number(LAST, 1)) as server, BlockingDaemon(server.path, 5) as daemon:
        daemon.add_temp_roots([ROOT, ROOT + "2"])
        assert not daemon.lost


def test_log_messages_of_a_greeting_are_skipped_if_it_comes_in_pieces(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nix_daemon, "_RECEIVE_BYTES", 1)
    log = number(0x6F6C6D67) + nar.encode(b"a line of the log\n")
    greeting = number(0x6478696F, 0x125) + nar.encode(b"2.34") + number(1) + log * 2 + number(LAST)
    with DaemonServer(place, greet=lambda connection: connection.sendall(greeting)) as server:
        daemon = BlockingDaemon(server.path, PATIENCE_S)
        assert not daemon.lost
        daemon.close()


@pytest.mark.parametrize(
    ("version", "error"),
    [
        (0x115, nar.encode(b"no luck") + number(1)),
        (0x126, nar.encode(b"Error") + number(0) + nar.encode(b"Error", b"no luck") + number(0, 0)),
    ],
)
def test_error_of_the_daemon_is_raised_with_its_message(place: Path, version: int, error: bytes) -> None:
    with (
        DaemonServer(place, version, number(0x63787470) + error) as server,
        BlockingDaemon(server.path, 5) as daemon,
        pytest.raises(RemoteError, match="the Nix daemon reports: no luck"),
    ):
        daemon.add_temp_roots([ROOT])


def test_connection_is_usable_after_errors_in_one_round_trip(place: Path) -> None:
    error = number(0x63787470) + nar.encode(b"Error") + number(0) + nar.encode(b"Error", b"no luck") + number(0, 0)
    with DaemonServer(place, answer=error) as server, BlockingDaemon(server.path, 5) as daemon:
        with pytest.raises(RemoteError, match="no luck"):
            daemon.add_temp_roots([ROOT, ROOT + "2"])
        assert not daemon.lost
        server.answer = number(LAST, 1)
        daemon.add_temp_roots([ROOT, ROOT + "2"])
        assert server.roots == [ROOT, ROOT + "2"] * 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a Nix daemon"),
        (number(0x6478696F, 0x114), "older than that of Nix 2.3"),
        (number(0x6478696F, 0x115, 0), "sent the unknown message 0x0"),
        (number(0x6478696F, 0x115, 0x6F6C6D67, 1 << 40), "more than the maximum of 65536"),
        (number(0x6478696F, 0x115, 0x6F6C6D67, 1, 0x100), "nonzero padding"),
        (number(0x6478696F, 0x115, 0x52534C54, 1, 1, 1 << 30), "more than the maximum of 1024"),
    ],
)
def test_malformed_reply_raises_remote_error(place: Path, reply: bytes, message: str) -> None:
    with (
        DaemonServer(place, greet=lambda connection: connection.sendall(reply)) as server,
        pytest.raises(RemoteError, match=message),
    ):
        BlockingDaemon(server.path, 5)


@given(st.binary(max_size=300).map(lambda reply: number(0x6478696F, 0x125) + reply) | st.binary(max_size=100))
@example(number(0x6478696F, 0x125))
def test_arbitrary_replies_raise_only_oserror_or_remote_error(reply: bytes) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)

    with tempfile.TemporaryDirectory() as directory, DaemonServer(Path(directory, "s"), greet=greet) as server:
        try:
            BlockingDaemon(server.path, 5).close()
        except (OSError, RemoteError):
            return
        assert number(LAST) in reply


@pytest.mark.parametrize("drips", [False, True])
def test_timeout_covers_the_whole_handshake(place: Path, *, drips: bool) -> None:
    greeting = list(number(0x6478696F, 0x126, 1, 0, 0))  # 8 s of it
    given_up = threading.Event()

    def drip(connection: socket.socket) -> None:
        while drips and greeting and not given_up.wait(0.2):
            connection.sendall(bytes([greeting.pop(0)]))

    with DaemonServer(place, greet=drip) as server:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            BlockingDaemon(server.path, 0.3)
        given_up.set()
        assert time.monotonic() - began > 0.25
    assert greeting


@pytest.mark.parametrize("is_dripping", [False, True])
def test_connection_on_the_event_loop_is_like_one_of_a_thread(place: Path, *, is_dripping: bool) -> None:
    reply = number(0x6F6C6D67) + nar.encode(b"a line of the log\n") + number(LAST, 1)
    replies = [number(0x6478696F, 0x126), nar.encode(b"2.34") + number(1, LAST), reply * 2]

    def talk(connection: socket.socket) -> None:
        for response in replies:
            connection.recv(1 << 16)
            for part in [bytes([byte]) for byte in response] if is_dripping else [response]:
                connection.sendall(part)
        connection.recv(1 << 16)
        connection.shutdown(socket.SHUT_WR)

    async def ask(path: str) -> None:
        daemon = await LoopDaemon.open(path, PATIENCE_S)
        assert not daemon.lost
        await daemon.register_roots([ROOT, ROOT + "2"])
        assert not daemon.lost
        with pytest.raises(RemoteError, match="closed the connection"):
            await daemon.register_roots([ROOT])
        assert daemon.lost
        daemon.close()

    with DaemonServer(place, greet=talk) as server:
        asyncio.run(ask(server.path))
        daemon = BlockingDaemon(server.path, PATIENCE_S)
        daemon.add_indirect_roots([ROOT, ROOT + "2"])
        daemon.close()


def test_request_on_the_event_loop_times_out(place: Path) -> None:
    async def ask(path: str) -> None:
        daemon = await LoopDaemon.open(path, 0.1)
        daemon.close()

    with DaemonServer(place, greet=lambda _: None) as server, pytest.raises(TimeoutError):
        asyncio.run(ask(server.path))


def test_connection_to_a_daemon_that_does_not_read_is_closed_at_once(place: Path) -> None:
    ended = threading.Event()

    def hang(connection: socket.socket) -> None:
        connection.sendall(number(0x6478696F, 0x126) + nar.encode(b"2.34") + number(1, LAST))
        poll = select.poll()
        poll.register(connection, 0)
        if any(events & select.POLLHUP for _, events in poll.poll(PATIENCE_S * 1000)):
            ended.set()

    async def ask(path: str) -> None:
        daemon = await LoopDaemon.open(path, PATIENCE_S)
        sending = asyncio.create_task(daemon.add_to_store(INFO, "/nix/store", [bytes(1 << 20)], "/link"))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        daemon.close()
        assert await asyncio.to_thread(ended.wait, PATIENCE_S)

    with DaemonServer(place, greet=hang) as server:
        asyncio.run(ask(server.path))


def test_collector_that_closes_each_connection_delays_no_longer_than_the_timeout(place: Path) -> None:
    class Close(socketserver.BaseRequestHandler):
        pass

    daemon_path, collector_path = (place.with_name(name) / "socket" for name in ("daemon-socket", "gc-socket"))
    for path in (daemon_path, collector_path):
        path.parent.mkdir()
    with (
        DaemonServer(daemon_path) as server,
        socketserver.ThreadingUnixStreamServer(str(collector_path), Close) as collector,
        ThreadPoolExecutor(1) as threads,
        BlockingDaemon(server.path, 1) as daemon,
    ):
        serving = threads.submit(collector.serve_forever, 0.02)
        with pytest.raises(TimeoutError):
            daemon.add_temp_roots([ROOT])
        collector.shutdown()
        serving.result()


def test_lost_is_true_after_the_daemon_ended(place: Path) -> None:
    with DaemonServer(place) as server:
        daemon = BlockingDaemon(server.path, 5)
        daemon.add_temp_roots([ROOT])
        assert not daemon.lost
    assert daemon.lost
    with pytest.raises((OSError, RemoteError)):
        daemon.add_temp_roots([ROOT + "2"])
    daemon.close()
    with pytest.raises(FileNotFoundError):
        BlockingDaemon(server.path, 5)
