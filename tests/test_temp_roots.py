"""Temporary GC roots: held exactly as long as needed, and no download waits for them."""

import http.client
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from harmonia.nix.store_path import StorePath
from harmonia.store import temp_roots
from harmonia.store.temp_roots import TempRoots
from harmonia.tools.store_builder import StoreBuilder
from support.daemon_server import DaemonServer
from support.running import PATIENCE_S, Sample, Server, download, nar_url, patched, wait_until

Start = Callable[..., Server]

ONE, OTHER, THIRD = (StorePath(f"{digit * 32}-name") for digit in "012")


def full(path: StorePath) -> str:
    return f"/nix/store/{path}"


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Return a short path, because paths of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory, "socket")


@pytest.fixture
def roots(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TempRoots]:
    monkeypatch.setattr(temp_roots, "_CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(temp_roots, "_RETRY_S", 0.1)
    roots = TempRoots(str(socket_path), "/nix/store", expected=True)
    yield roots
    roots.close()
    wait_until(lambda: "temp-roots" not in {thread.name for thread in threading.enumerate()})


def wait_for_check(roots: TempRoots) -> None:
    """Wait until the thread has begun and ended a check for released leases and lost connections."""
    for _ in range(2):
        last = roots._look_at  # noqa: SLF001 (a private part is tested)
        wait_until(lambda: roots._look_at > last)  # noqa: B023, SLF001 (called at once)


def test_root_is_registered_once_and_released_with_its_last_lease(socket_path: Path, roots: TempRoots) -> None:
    with DaemonServer(socket_path) as daemon:
        first, second, other = roots.acquire(ONE), roots.acquire(ONE), roots.acquire(OTHER)
        wait_until(lambda: [sorted(each) for each in daemon.open] == [[full(ONE), full(OTHER)]])
        first.release()
        other.release()
        wait_for_check(roots)
        third = roots.acquire(THIRD)  # gets the same connection if that is still open
        wait_until(lambda: [sorted(each) for each in daemon.open] == [[full(ONE), full(OTHER), full(THIRD)]])
        third.release()
        second.release()
        wait_until(lambda: not daemon.open)
        again = roots.acquire(ONE)
        wait_until(lambda: daemon.open == [[full(ONE)]])
        shared = again.share()
        again.release()
        wait_for_check(roots)
        third = roots.acquire(THIRD)
        wait_until(lambda: daemon.open == [[full(ONE), full(THIRD)]])
        third.release()
        shared.release()
        wait_until(lambda: not daemon.open)


def test_released_lease_is_not_registered(socket_path: Path, roots: TempRoots) -> None:
    waits = threading.Event()

    def greet(_: socket.socket) -> None:
        waits.wait(PATIENCE_S)

    with DaemonServer(socket_path, greet=greet) as daemon:
        first = roots.acquire(ONE)
        wait_until(lambda: daemon.open)
        for _ in range(10_000):
            roots.acquire(OTHER).release()
        waits.set()
    first.release()
    with DaemonServer(socket_path) as daemon:
        last = roots.acquire(ONE)
        wait_until(lambda: daemon.roots)
        assert daemon.roots == [full(ONE)]
        last.release()


def test_silent_daemon_is_tried_again(socket_path: Path, roots: TempRoots, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier roots are registered again, too, because the timeout closes their connection."""
    monkeypatch.setattr(temp_roots, "_TIMEOUT_S", 0.2)
    with DaemonServer(socket_path) as daemon:
        roots.acquire(ONE)
        wait_until(lambda: daemon.open == [[full(ONE)]])
        answer, daemon.answer = daemon.answer, b""
        roots.acquire(OTHER)
        wait_until(lambda: len(daemon.roots) > 2)
        daemon.answer = answer
        wait_until(lambda: [sorted(each) for each in daemon.open] == [[full(ONE), full(OTHER)]])


def test_long_download_does_not_keep_roots_of_others(
    socket_path: Path, roots: TempRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temp_roots, "_CONNECTION_AGE_S", 0.0)
    with DaemonServer(socket_path) as daemon:
        short = roots.acquire(ONE)
        wait_until(lambda: daemon.open == [[full(ONE)]])
        roots.acquire(OTHER)
        wait_until(lambda: daemon.open == [[full(ONE)], [full(OTHER)]])
        short.release()
        wait_until(lambda: daemon.open == [[full(OTHER)]])


def test_number_of_connections_is_bounded(socket_path: Path, roots: TempRoots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temp_roots, "_CONNECTION_AGE_S", 0.0)
    paths = [StorePath(f"{number:032}-name") for number in range(10)]
    with DaemonServer(socket_path) as daemon:
        for path in paths:
            roots.acquire(path)
        wait_until(lambda: len(daemon.roots) == len(paths))
        assert len(daemon.open) == 4


def test_roots_are_registered_again_when_the_daemon_returns(
    socket_path: Path, roots: TempRoots, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "harmonia")
    roots.acquire(ONE)
    wait_until(lambda: caplog.records)
    for _ in range(2):  # further tries log nothing
        last = roots._retry_at  # noqa: SLF001 (a private part is tested)
        wait_until(lambda: roots._retry_at > last)  # noqa: B023, SLF001 (called at once)
    for _ in range(2):
        with DaemonServer(socket_path) as daemon:
            wait_until(lambda: daemon.open == [[full(ONE)]])
            wait_until(lambda: len(caplog.records) % 2 == 0)
        wait_until(lambda: len(caplog.records) % 2)
    failed = f"cannot register temporary GC roots with the Nix daemon at {socket_path}: "
    again = f"registered temporary GC roots with the Nix daemon at {socket_path} again"
    messages = [record.getMessage() for record in caplog.records]
    assert [message.startswith(failed) for message in messages] == [True, False, True, False, True]
    assert messages[1] == messages[3] == again
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING", "INFO", "WARNING"]


def test_released_lease_is_no_sign_that_the_daemon_returned(
    roots: TempRoots, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "harmonia")
    monkeypatch.setattr(temp_roots, "_CHECK_INTERVAL_S", 60)  # in which released leases stay in the queue
    monkeypatch.setattr(temp_roots, "_RETRY_S", 0)
    lease = roots.acquire(ONE)
    wait_until(lambda: caplog.messages)
    lease.release()
    roots._asked.put(lease)  # noqa: SLF001 (a lease that is released before the thread sees it)
    wait_until(lambda: not roots._waiting and roots._asked.empty())  # noqa: SLF001 (a private part is tested)
    roots.close()
    wait_until(lambda: "temp-roots" not in {thread.name for thread in threading.enumerate()})
    assert [message.partition(" GC roots")[0] for message in caplog.messages] == ["cannot register temporary"]


def test_close_releases_every_root_and_ends_the_thread(socket_path: Path, roots: TempRoots) -> None:
    with DaemonServer(socket_path) as daemon:
        roots.acquire(ONE)
        wait_until(lambda: daemon.open == [[full(ONE)]])
        roots.close()
        wait_until(lambda: not daemon.open)


def test_missing_daemon_gives_no_warning_if_not_configured(socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "harmonia")
    with closing(TempRoots(str(socket_path), "/nix/store", expected=False)) as roots:
        roots.acquire(ONE)
        wait_until(lambda: caplog.records)
    assert caplog.records[0].levelname == "DEBUG"


# In the server.


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_download_registers_a_root(start: Start, tmp_path: Path, socket_path: Path, suffix: str) -> None:
    store = StoreBuilder(tmp_path / "store")
    big = store.add(store.output_path("big"), {"file": os.urandom(1 << 20) * 20})
    small = store.add_text("small", b"small")
    server = start(store=tmp_path / "store", settings=f"daemon_socket = '{socket_path}'")
    with DaemonServer(socket_path) as daemon:
        for path in (f"/{big.path.hash_part}.narinfo", nar_url(small)):
            server.get(path)
        assert not daemon.open
        with server.connect(receive_buffer=8192) as connection:
            connection.sendall(f"GET {nar_url(big)}{suffix} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
            wait_until(lambda: set(daemon.roots) == {full(big.path)})
        wait_until(lambda: not daemon.open)


def test_interrupted_download_releases_its_root(start: Start, socket_path: Path) -> None:
    sample = Sample.make(socket_path.parent)
    server = start(store=sample.root, settings=f"daemon_socket = '{socket_path}'")
    with DaemonServer(socket_path) as daemon:
        with download(server, sample.big) as response:
            wait_until(lambda: daemon.roots)
            os.truncate(sample.root / "nix/store" / str(sample.big.path), 1000)
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()
        wait_until(lambda: not daemon.open)


def test_silent_daemon_delays_no_download(start: Start, sample: Sample, socket_path: Path) -> None:
    patient = patched("from harmonia.store import temp_roots\ntemp_roots._TIMEOUT_S = 600.0")
    with DaemonServer(socket_path, greet=lambda _: None) as daemon:
        server = start(store=sample.root, settings=f"daemon_socket = '{socket_path}'", program=patient)
        for _ in range(3):  # a client that waits for the daemon fails after PATIENCE_S
            assert sha256(server.get(nar_url(sample.big)).body).digest() == sample.big.nar_hash
        wait_until(lambda: daemon.open == [[]])


def test_empty_daemon_socket_disables_roots(start: Start, socket_path: Path) -> None:
    sample = Sample.make(socket_path.parent)
    beside = socket_path.parent / "nix/var/nix/daemon-socket"
    beside.mkdir()
    for settings, expected in (("", True), ("daemon_socket = ''", False)):
        server = start(store=sample.root, settings=settings)
        with DaemonServer(beside / "socket") as daemon:
            with download(server, sample.big) as response:
                if expected:
                    wait_until(lambda: daemon.roots)
                else:
                    response.read()
            server.stop()
            assert bool(daemon.roots) == expected
