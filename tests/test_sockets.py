"""Connections: listening addresses, limits, and the cost of slow and vanished clients."""

import os
import random
import re
import resource
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from harmonia.config import loader
from harmonia.config.settings import Settings
from harmonia.process import sockets
from support.running import PATIENCE_S, Sample, Server, download, nar_url, open_files, patched, read_answer, wait_until

Start = Callable[..., Server]

ANOTHER_ADDRESS = "choose another address, as by harmonia serve --bind :8080, or stop the program that uses it"
REQUEST = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


def ask(connection: socket.socket) -> int:
    connection.sendall(REQUEST)
    return read_answer(connection).status


def reject(sample: Sample, directory: Path, bind: str, settings: str = "") -> str:
    """Return the error of a server that cannot listen there, without the name of its file."""
    server = Server(directory, sample.root, settings, bind=bind)
    server.launch()
    assert server.wait() == 2
    (line,) = server.log
    place = f"harmonia: {server.config}:"
    assert line.startswith(place)
    return line.removeprefix(place)


@pytest.mark.parametrize(
    ("bind", "url"),
    [
        ("127.0.0.1:0", r"http://127\.0\.0\.1:\d+"),
        ("[::1]:0", r"http://\[::1\]:\d+"),
        ("localhost:0", r"http://(127\.0\.0\.1|\[::1\]):\d+"),
    ],
)
def test_server_listens_on_addresses_and_names(start: Start, sample: Sample, bind: str, url: str) -> None:
    server = start(store=sample.root, bind=bind)
    assert re.fullmatch(url, server.url)
    assert server.get("/version").status == 200


def test_unspecified_ipv6_address_accepts_ipv4(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, bind="[::]:0")
    port = int(server.url.rpartition(":")[2])
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, port), timeout=PATIENCE_S) as connection:
            assert ask(connection) == 200


def test_duplicate_address_of_a_name_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))] * 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with sockets.listen(loader.parse("bind = 'twice:0'", "h.toml", {}), "bind") as listening:
        assert len(listening) == 1


def test_address_in_use_is_reported_in_one_line(sample: Sample, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        message = reject(sample, tmp_path / "server", bind)
    assert message == f"1: bind: {bind} is already in use; {ANOTHER_ADDRESS}\n"


def test_metrics_address_in_use_is_reported_in_one_line(sample: Sample, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        message = reject(sample, tmp_path / "server", "127.0.0.1:0", f"metrics_bind = '{address}'")
    assert message.startswith(f"6: metrics_bind: {address} is already in use; ")


def test_unknown_host_is_reported_in_one_line(sample: Sample, tmp_path: Path) -> None:
    message = reject(sample, tmp_path / "server", "no-such-host.invalid:5000")
    assert message.startswith("1: bind: no-such-host.invalid:5000 cannot be resolved: ")


def test_address_of_another_machine_is_reported_in_one_line(sample: Sample, tmp_path: Path) -> None:
    message = reject(sample, tmp_path / "server", "192.0.2.1:5000")
    assert message.startswith("1: bind: 192.0.2.1:5000 cannot be used: Cannot assign requested address; ")


@pytest.mark.parametrize("limit", [0, 10])
def test_nagle_delay_is_off(start: Start, sample: Sample, limit: int) -> None:
    spy = patched(
        "import logging, socket\nfrom sanic.server.protocols.http_protocol import HttpProtocol\n"
        "made = HttpProtocol.connection_made\n"
        "def connection_made(self, transport):\n"
        "  made(self, transport)\n"
        "  tcp = transport.get_extra_info('socket')\n"
        "  delay = not tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)\n"
        "  logging.getLogger('harmonia').info('delay is %s', delay)\n"
        "HttpProtocol.connection_made = connection_made"
    )
    server = start(store=sample.root, program=spy, settings=f"max_connections = {limit}")
    assert server.wait_for_log("delay is (.*)")[1] == "False"


def test_head_and_small_body_are_sent_in_one_packet(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    with server.connect() as connection:
        connection.sendall(b"GET /nix-cache-info HTTP/1.1\r\nHost: cache\r\n\r\n")
        assert b"\r\n\r\nStoreDir: /nix/store\n" in connection.recv(65536)


def test_idle_connection_stays_open(start: Start, sample: Sample) -> None:
    assert Settings().keep_alive_timeout >= 90
    server = start(store=sample.root, settings="header_timeout = 1")
    with server.connect() as idle:
        assert ask(idle) == 200
        with server.connect() as unfinished:
            unfinished.sendall(REQUEST[:-1])
            assert read_answer(unfinished).status == 408  # so header_timeout has passed, and closes no idle connection
        assert ask(idle) == 200


def test_burst_of_connections_waits_in_the_backlog(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    (worker,) = server.workers
    os.kill(worker, signal.SIGSTOP)
    with ExitStack() as stack:
        burst = [stack.enter_context(server.connect()) for _ in range(300)]
        os.kill(worker, signal.SIGCONT)
        assert all(ask(connection) == 200 for connection in burst)


def test_connections_beyond_max_connections_get_503(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="max_connections = 3")
    with ExitStack() as stack:
        server.settle()
        admitted = [stack.enter_context(server.connect()) for _ in range(3)]
        assert all(ask(connection) == 200 for connection in admitted)
        for _ in range(20):
            answer = server.get("/version")
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.headers["cache-control"] == "no-store"
        assert all(ask(connection) == 200 for connection in admitted)
        admitted[0].close()
        wait_until(lambda: server.get("/version").status == 200)
    assert server.stop() == 0
    assert len(server.log) == 3, server.log  # start, overview and stop


@pytest.mark.parametrize(("settings", "counted"), [("", True), ("trusted_proxies = ['127.0.0.1']", False)])
def test_max_connections_per_client_does_not_affect_other_clients(
    start: Start, sample: Sample, settings: str, *, counted: bool
) -> None:
    server = start(store=sample.root, settings=f"max_connections_per_client = 3\n{settings}")
    with ExitStack() as stack:
        server.settle()
        assert all(ask(stack.enter_context(server.connect())) == 200 for _ in range(3))
        assert server.get("/version").status == (503 if counted else 200)
        another = stack.enter_context(socket.socket())
        another.bind(("127.0.0.2", 0))
        another.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        assert ask(another) == 200
    wait_until(lambda: server.get("/version").status == 200)


def test_max_connections_per_client_ignores_unix_sockets(start: Start, sample: Sample, tmp_path: Path) -> None:
    server = start(store=sample.root, bind=f"unix:{tmp_path}/socket", settings="max_connections_per_client = 1")
    with ExitStack() as stack:
        assert all(ask(stack.enter_context(server.connect())) == 200 for _ in range(5))


def test_unix_socket_has_its_mode_and_is_removed_at_the_end(start: Start, sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = start(store=sample.root, bind=f"unix:{path}", settings="unix_socket_mode = '0620'")
    assert stat.S_IMODE(path.stat().st_mode) == 0o620
    with server.connect() as connection:
        assert ask(connection) == 200
        assert ask(connection) == 200
    assert server.stop() == 0
    assert not path.exists()


def test_unix_socket_removed_while_serving_is_ignored(start: Start, sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = start(store=sample.root, bind=f"unix:{path}")
    path.unlink()
    assert server.stop() == 0
    assert len(server.log) == 3, server.log  # start, overview and stop


def test_stale_unix_socket_is_replaced(start: Start, sample: Sample, tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/socket"
    start(store=sample.root, bind=bind).stop(signal.SIGKILL)
    assert (tmp_path / "socket").exists()
    wait_until(lambda: not is_listened_on(tmp_path / "socket"))
    assert start(store=sample.root, bind=bind).get("/version").status == 200


def is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_unix_socket_in_use_is_an_error_and_kept(start: Start, sample: Sample, tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/socket"
    server = start(store=sample.root, bind=bind)
    message = reject(sample, tmp_path / "second", bind)
    assert message == f"1: bind: {bind} is already in use; {ANOTHER_ADDRESS}\n"
    assert server.get("/version").status == 200


def test_file_at_the_socket_path_is_never_removed(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    message = reject(sample, tmp_path / "server", f"unix:{path}")
    assert message.startswith(f"1: bind: unix:{path} exists and is not a socket; ")
    assert path.read_text() == "precious"


def test_client_that_pauses_reading_gets_the_whole_body(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="header_timeout = 1\nkeep_alive_timeout = 1")
    with download(server, sample.big) as response:
        digest = sha256(response.read(100_000))
        with server.connect() as idle:
            assert ask(idle) == 200
            assert idle.recv(1) == b""  # so the pause is longer than both timeouts
        digest.update(response.read())
    assert digest.digest() == sample.big.nar_hash


def held(server: Server) -> list[str]:
    """Return the sockets and store files that the workers have open."""
    names = [name for worker in server.workers for name in open_files(worker)]
    return [name for name in names if name.startswith("socket:") or "/nix/store/" in name]


def vanish(connection: socket.socket) -> None:
    """Reset the connection, as a killed process with unread bytes does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_vanished_client_releases_files_and_threads(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    before = len(held(server))
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(download(server, sample.big))
        # A thread opens the file, maybe later. One of the earlier sockets may have been a closing connection.
        wait_until(lambda: len(held(server)) >= before + 2 * 20 - 1)
    wait_until(lambda: len(held(server)) <= before)
    with download(server, sample.big) as response:  # no thread is stuck
        assert sha256(response.read()).digest() == sample.big.nar_hash


def test_connections_dropped_at_any_point_leave_nothing_open(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, workers=2)
    before = len(held(server))
    chance = random.Random(1)
    request = f"GET {nar_url(sample.big)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode()
    for _ in range(200):
        with server.connect(receive_buffer=8192) as connection:
            connection.sendall(request[: chance.choice([0, 10, len(request), len(request)])])
            for _ in range(chance.randrange(4)):
                connection.settimeout(0.01)
                try:
                    connection.recv(chance.randrange(1, 100_000))
                except TimeoutError:
                    break
            if chance.random() < 0.5:
                vanish(connection)
    wait_until(lambda: len(held(server)) <= before)
    assert server.get("/version").status == 200
    assert server.stop() == 0
    assert len(server.log) == 3, server.log  # start, overview and stop


def test_slow_downloads_take_little_memory_each(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    server.get(nar_url(sample.big))
    (worker,) = server.workers

    def resident() -> int:
        return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * resource.getpagesize()

    count = 40
    with ExitStack() as stack:
        seen = [resident()]
        for _ in range(count):
            stack.enter_context(download(server, sample.big))
        while len(seen) < 3 or seen[-1] != seen[-2]:
            time.sleep(0.3)
            seen.append(resident())
    assert (max(seen) - seen[0]) / count < 2.5 * (1 << 20)
