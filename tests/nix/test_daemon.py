"""Promises of the client of the Nix daemon: it understands each since Nix 2.3, and nothing that one says harms it."""

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harmonia.errors import RemoteError
from harmonia.nix import nar
from harmonia.store.nix_daemon import Daemon
from support.daemon_server import LAST, DaemonServer, number

ROOT = "/nix/store/0000000000000000000000000000000a-näme"


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory, "socket")


@pytest.mark.parametrize("version", [0x115, 0x11A, 0x121, 0x122, 0x123, 0x126, 0x140])
def test_it_understands_each_version(place: Path, version: int) -> None:
    with DaemonServer(place, version) as server, Daemon(server.path, 5) as daemon:
        daemon.add_temp_root(ROOT)
        daemon.add_temp_root(ROOT + "2")
        assert server.roots == [ROOT, ROOT + "2"]
        assert not daemon.lost


def test_it_listens_to_what_the_daemon_has_to_say_meanwhile(place: Path) -> None:
    fields = number(2, 0, 7, 1) + nar.encode(b"field")
    said = (
        number(0x6F6C6D67) + nar.encode(b"a line of the log\n")
        + number(0x53545254, 1, 3, 0) + nar.encode(b"begins") + fields + number(0)
        + number(0x52534C54, 1, 105) + fields + number(0x53544F50, 1)
    )  # fmt: skip
    with DaemonServer(place, answer=said + number(LAST, 1)) as server, Daemon(server.path, 5) as daemon:
        daemon.add_temp_root(ROOT)
        daemon.add_temp_root(ROOT)
        assert not daemon.lost


@pytest.mark.parametrize(
    ("version", "error"),
    [
        (0x115, nar.encode(b"no luck") + number(1)),
        (0x126, nar.encode(b"Error") + number(0) + nar.encode(b"Error", b"no luck") + number(0, 0)),
    ],
)
def test_it_tells_why_the_daemon_refuses(place: Path, version: int, error: bytes) -> None:
    with (
        DaemonServer(place, version, number(0x63787470) + error) as server,
        Daemon(server.path, 5) as daemon,
        pytest.raises(RemoteError, match="the Nix daemon reports: no luck"),
    ):
        daemon.add_temp_root(ROOT)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a Nix daemon"),
        (number(0x6478696F, 0x114), "older than that of Nix 2.3"),
        (number(0x6478696F, 0x115, 0), "sent the unknown message 0x0"),
        (number(0x6478696F, 0x115, 0x6F6C6D67, 1 << 40), "more than the maximum of 65536"),
        (number(0x6478696F, 0x115, 0x6F6C6D67, 1, 0x100), "nonzero padding"),
        (number(0x6478696F, 0x115, 0x52534C54, 1, 1, 1 << 30), "more than the maximum of 1024"),
    ],
)
def test_what_it_does_not_understand_it_does_not_guess(place: Path, said: bytes, why: str) -> None:
    with (
        DaemonServer(place, greet=lambda connection: connection.sendall(said)) as server,
        pytest.raises(RemoteError, match=why),
    ):
        Daemon(server.path, 5)


@given(st.binary(max_size=300).map(lambda said: number(0x6478696F, 0x125) + said) | st.binary(max_size=100))
@example(number(0x6478696F, 0x125))
def test_nothing_that_a_daemon_says_is_another_error(said: bytes) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)

    with tempfile.TemporaryDirectory() as directory, DaemonServer(Path(directory, "s"), greet=greet) as server:
        try:
            Daemon(server.path, 5).close()
        except (OSError, RemoteError):
            return
        assert number(LAST) in said


@pytest.mark.parametrize("drips", [False, True])
def test_it_waits_no_longer_than_it_is_told(place: Path, *, drips: bool) -> None:
    greeting = list(number(0x6478696F, 0x126, 1, 0, 0))  # 8 s of it
    given_up = threading.Event()

    def drip(connection: socket.socket) -> None:
        while drips and greeting and not given_up.wait(0.2):
            connection.sendall(bytes([greeting.pop(0)]))

    with DaemonServer(place, greet=drip) as server:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Daemon(server.path, 0.3)
        given_up.set()
        assert time.monotonic() - began > 0.25
    assert greeting


def test_it_notices_that_the_daemon_has_ended(place: Path) -> None:
    with DaemonServer(place) as server:
        daemon = Daemon(server.path, 5)
        daemon.add_temp_root(ROOT)
        assert not daemon.lost
    assert daemon.lost
    with pytest.raises((OSError, RemoteError)):
        daemon.add_temp_root(ROOT)
    daemon.close()
    with pytest.raises(FileNotFoundError):
        Daemon(server.path, 5)
