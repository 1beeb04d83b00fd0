"""TLS: only current versions, renewal without a restart, and truncation is always visible."""

import fcntl
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import pytest

from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs
from support.running import (
    LONG_GRACE,
    PATIENCE_S,
    Sample,
    Server,
    ServiceManager,
    nar_url,
    read_answer,
    wait_until,
    wait_until_refused,
)

Start = Callable[..., Server]

pytestmark = needs("openssl")

REQUEST = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


def renew(directory: Path) -> bytes:
    """Put a new certificate and its key into `directory`. Return the certificate in DER."""
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=cache -keyout key.pem"
    )
    certificate = subprocess.run(command.split(), cwd=directory, capture_output=True, check=True, text=True).stdout
    (directory / "key.pem").chmod(0o600)
    (directory / "cert.pem").write_text(certificate)
    return ssl.PEM_cert_to_DER_cert(certificate)


def secured(directory: Path) -> str:
    """Return the settings."""
    return f"tls_cert_path = '{directory}/cert.pem'\ntls_key_path = '{directory}/key.pem'"


def presented(server: Server) -> bytes | None:
    with server.connect() as connection:
        return cast("ssl.SSLSocket", connection).getpeercert(binary_form=True)


def handshake(server: Server, version: str) -> subprocess.CompletedProcess[str]:
    """Connect with a client that supports only this version, including weak ciphers."""
    address = server.url.removeprefix("https://")
    command = ["openssl", "s_client", "-connect", address, f"-{version}", "-cipher", "ALL:@SECLEVEL=0"]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize(
    ("version", "accepted"), [("tls1", False), ("tls1_1", False), ("tls1_2", True), ("tls1_3", True)]
)
def test_tls_1_2_and_1_3_are_accepted(
    start: Start, sample: Sample, tmp_path: Path, version: str, *, accepted: bool
) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=secured(tmp_path))
    done = handshake(server, version)
    assert (done.returncode == 0) == accepted
    assert accepted or re.search(r"has read \d bytes and written \d\d+ bytes", done.stdout)  # the client sent its part


def test_new_connections_get_the_renewed_certificate(start: Start, sample: Sample, tmp_path: Path) -> None:
    before = renew(tmp_path)
    with ServiceManager(f"{tmp_path}/notify") as manager:
        server = start(store=sample.root, settings=secured(tmp_path), workers=2, environment=manager.environment)
        assert manager.receive() == "READY=1"  # of both workers: before, SIGHUP has no effect
    with server.connect() as old:
        assert presented(server) == before
        after = renew(tmp_path)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum("INFO TLS certificate reloaded" in line for line in server.log) == 2)
        assert {presented(server) for _ in range(10)} == {after}
        old.sendall(REQUEST)
        assert read_answer(old).status == 200


def test_no_handshake_fails_during_a_reload(start: Start, sample: Sample, tmp_path: Path) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=secured(tmp_path))
    for _ in range(40):
        server.process.send_signal(signal.SIGHUP)
        assert presented(server)


@pytest.mark.parametrize("broken", ["cert.pem", "key.pem", "mismatch", "missing"])
def test_broken_new_certificate_keeps_the_old_one(start: Start, sample: Sample, tmp_path: Path, broken: str) -> None:
    before = renew(tmp_path)
    server = start(store=sample.root, settings=secured(tmp_path))
    if broken == "mismatch":
        key = (tmp_path / "key.pem").read_bytes()
        renew(tmp_path)
        (tmp_path / "key.pem").write_bytes(key)
    elif broken == "missing":
        (tmp_path / "cert.pem").unlink()
    else:
        (tmp_path / broken).write_text("broken")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log(r"ERROR TLS reload failed, still using the old certificate: .*\.pem")
    assert presented(server) == before
    assert server.get("/version").status == 200


def test_replaced_worker_has_the_current_certificate(start: Start, sample: Sample, tmp_path: Path) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=secured(tmp_path))
    after = renew(tmp_path)
    os.kill(server.workers[0], signal.SIGKILL)
    server.wait_for_log("replacing it")
    assert presented(server) == after


def test_truncated_body_breaks_the_transfer(start: Start, tmp_path: Path) -> None:
    renew(tmp_path)
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("truncated"), os.urandom(3 << 20))
    path = os.fsdecode(store.real_path(info.path))
    os.chmod(path, 0o600)
    os.truncate(path, 2 << 20)
    server = start(store=tmp_path / "store", settings=secured(tmp_path))
    try:
        status = server.get(nar_url(info)).status
    except (http.client.IncompleteRead, OSError):
        status = None
    assert status in {None, 404}  # 404 if the walk ends before the first byte was sent
    server.wait_for_log("ERROR")


def test_download_over_tls_is_complete(start: Start, sample: Sample, tmp_path: Path) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=secured(tmp_path))
    assert len(server.get(nar_url(sample.big)).body) == sample.big.nar_size


def unread(connections: Iterable[socket.socket]) -> list[int]:
    """Return the number of bytes that wait in each connection to be read."""
    counts = [fcntl.ioctl(connection, termios.FIONREAD, bytes(4)) for connection in connections]
    return [int.from_bytes(count, sys.byteorder) for count in counts]


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["by Connection: close", "by SIGTERM"])
def test_last_download_of_a_connection_is_complete(start: Start, sample: Sample, tmp_path: Path, ended: str) -> None:
    """Bodies have many lengths: at some, uvloop still holds bytes that the kernel does not take yet."""
    renew(tmp_path)
    server = start(store=sample.root, settings=f"{secured(tmp_path)}\nshutdown_grace = 60")
    field = "Connection: close\r\n" if ended == "by Connection: close" else ""
    lengths = range(1 << 16, 6 << 20, 3 << 15)
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect(receive_buffer=8192)) for _ in lengths]
        for connection, length in zip(connections, lengths, strict=True):
            head = f"GET {nar_url(sample.big)} HTTP/1.1\r\nHost: cache\r\n{field}Range: bytes=0-{length - 1}\r\n\r\n"
            connection.sendall(head.encode())
        before: list[int] = []
        while 0 in before or unread(connections) != before:  # until the buffers are full
            before = unread(connections)
            time.sleep(0.3)
        if not field:
            server.process.send_signal(signal.SIGTERM)
            wait_until_refused(server)
        assert [len(read_answer(connection).body) for connection in connections] == list(lengths)


def test_idle_connections_do_not_delay_the_end(start: Start, sample: Sample, tmp_path: Path) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=f"{secured(tmp_path)}\n{LONG_GRACE}")
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(5)]
        for connection in connections:
            connection.sendall(REQUEST)
            assert read_answer(connection).status == 200
        assert server.stop() == 0


def test_client_without_a_handshake_does_not_delay_the_end(start: Start, sample: Sample, tmp_path: Path) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=f"{secured(tmp_path)}\n{LONG_GRACE}")
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port))):
        assert server.stop() == 0
    assert len(server.log) == 3, server.log  # start, overview and stop


def silent(server: Server, stack: ExitStack, count: int) -> list[socket.socket]:
    """Open connections that never send a handshake."""
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    return [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("limit", ["max_connections = 20", "max_connections_per_client = 20"])
def test_connections_count_before_their_handshake(start: Start, sample: Sample, tmp_path: Path, limit: str) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=f"{secured(tmp_path)}\n{limit}")
    server.settle()
    with ExitStack() as stack:
        connections = silent(server, stack, 200)
        wait_until(lambda: sum(map(is_open, connections)) == 20)
        assert open_sockets(server) <= 40
        with pytest.raises(OSError), server.connect():  # noqa: PT011 (the error comes before or during the handshake)
            pass
    wait_until(lambda: can_connect(server))
    assert server.get("/version").status == 200
    refused = re.search("^harmonia_refused_connections_total (.*)$", server.get("/metrics").text, re.MULTILINE)
    assert refused
    assert float(refused[1]) >= 181


def test_header_timeout_covers_the_handshake(start: Start, sample: Sample, tmp_path: Path) -> None:
    renew(tmp_path)
    server = start(store=sample.root, settings=f"{secured(tmp_path)}\nmax_connections = 20\nheader_timeout = 1")
    server.settle()
    with ExitStack() as stack:
        connections = silent(server, stack, 20)
        for connection in connections[:10]:
            connection.sendall(b"\x16\x03\x01")  # the beginning of a ClientHello
        wait_until(lambda: not any(map(is_open, connections)))
        wait_until(lambda: is_answered(server))
    assert len(server.log) == 2, server.log  # only start and overview


def is_answered(server: Server) -> bool:
    """Return True if a request is answered; a connection over the limit is closed during its handshake."""
    with suppress(OSError):
        return server.get("/version").status == 200
    return False


def can_connect(server: Server) -> bool:
    with suppress(OSError), server.connect():
        return True
    return False


def open_sockets(server: Server) -> int:
    [worker] = server.workers
    names = [os.readlink(f"/proc/{worker}/fd/{fd}") for fd in os.listdir(f"/proc/{worker}/fd")]
    return sum(name.startswith("socket:") for name in names)
