"""Hundreds of clients that vanish, fall silent, or are slow: other clients are served, and nothing leaks."""

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from support.networks import network
from support.programs import require
from support.running import Sample, Server, nar_url, open_files, patched, read_answer, wait_until
from support.unscathed import MANY, serves, unscathed

Start = Callable[..., Server]

REQUEST = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


def ask(info: PathInfo, suffix: str = "") -> bytes:
    return f"GET {nar_url(info)}{suffix} HTTP/1.1\r\nHost: cache\r\n\r\n".encode()


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    """Reset the connection, as a killed process with unread bytes does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    connection.close()


@pytest.mark.parametrize(
    "stage", ["connected", "within the head", "before the response", "within the body", "kept alive"]
)
def test_vanished_clients_leak_nothing(start: Start, sample: Sample, stage: str) -> None:
    server = start(store=sample.root)
    sent = {
        "connected": b"",
        "within the head": REQUEST[:-3],
        "before the response": ask(sample.big, ".zst"),
        "within the body": ask(sample.big),
        "kept alive": REQUEST,
    }[stage]
    with unscathed(server, sample.small, sample.big), ExitStack() as stack:
        clients = [stack.enter_context(server.connect(receive_buffer=8192)) for _ in range(MANY // 4)]
        for each in clients:
            each.sendall(sent)
        for each in clients:
            if stage == "within the body":
                each.recv(1000)
            elif stage == "kept alive":
                assert read_answer(each).status == 200
        for each, vanish in zip(clients, cycle((close, reset, half_close)), strict=False):
            vanish(each)
    assert not [line for line in server.log if " ERROR " in line]


def test_slow_clients_do_not_delay_others(start: Start, sample: Sample) -> None:
    """Hundreds of clients read one byte a second, and as many write one byte a second."""
    trimming = patched("from harmonia.server import worker\nworker._TRIM_INTERVAL_S = 1.0")
    server = start(store=sample.root, settings="header_timeout = 600", program=trimming)
    finished = threading.Event()

    def drip(connections: list[socket.socket], act: Callable[[socket.socket, int], object]) -> None:
        number = 0
        while not finished.wait(1):
            for each in connections:
                act(each, number)
            number += 1

    with unscathed(server, sample.small, sample.big), ExitStack() as stack:
        connections = [stack.enter_context(server.connect(receive_buffer=8192)) for _ in range(2 * MANY)]
        readers, writers = connections[:MANY], connections[MANY:]
        for reader in readers:
            reader.sendall(ask(sample.big))
            assert reader.recv(12) == b"HTTP/1.1 200"
        threads = [
            threading.Thread(target=drip, args=(readers, lambda each, _: each.recv(1))),
            threading.Thread(target=drip, args=(writers, lambda each, number: each.sendall(REQUEST[number:][:1]))),
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                serves(server, sample.small)  # long before a slow client has its whole response: that takes months
        finally:
            finished.set()
            for thread in threads:
                thread.join()
    assert not [line for line in server.log if " ERROR " in line]


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Create two linked network namespaces: of the server, at 192.0.2.1, and of the clients."""
    require("ip")
    names = f"harmonia-s{os.getpid()}", f"harmonia-c{os.getpid()}"
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("-n", names[0], "link", "add", "eth", "type", "veth", "peer", "name", "eth", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"192.0.2.{number}/24", "dev", "eth")
            for interface in ("lo", "eth"):
                ip("-n", name, "link", "set", interface, "up")
        yield names


@pytest.mark.slow
@pytest.mark.root
def test_clients_on_an_unreachable_machine_are_dropped(start: Start, sample: Sample, networks: tuple[str, str]) -> None:
    """No packet comes from there, not even a reset."""
    servers, clients = networks
    # The timeouts are seconds instead of minutes; the kernel does the same.
    quick = patched(
        "from harmonia.process import sockets\n"
        "sockets._OPTIONS = tuple((level, option, 1) for level, option, _ in sockets._OPTIONS)"
    )
    with network(servers), ExitStack() as stack:
        for name, value in {"tcp_keepalive_probes": 2, "tcp_retries2": 3}.items():
            Path("/proc/sys/net/ipv4", name).write_text(str(value))
        server = start(store=sample.root, bind="0.0.0.0:0", program=["env", *quick])  # in this network namespace
        with unscathed(server, sample.small, sample.big):
            for request in (b"", REQUEST[:-3], REQUEST, ask(sample.big)):
                for _ in range(10):
                    with network(clients):
                        each = stack.enter_context(socket.socket())
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                    each.connect(("192.0.2.1", int(server.url.rpartition(":")[2])))
                    each.sendall(request)
                    if request in (REQUEST, ask(sample.big)):
                        assert each.recv(12) == b"HTTP/1.1 200"
            (worker,) = server.workers
            wait_until(lambda: open_files(worker).count(f"{sample.root}/nix/store/{sample.big.path}") == 10)
            ip("-n", clients, "link", "set", "eth", "down")
    assert not [line for line in server.log if " ERROR " in line]
