"""systemd: passed sockets are served and survive a restart, and notifications are true."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from support.activation import SocketUnit, activated
from support.running import PATIENCE_S, Sample, Server, ServiceManager, patched, read_answer, wait_until

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.fixture
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    abstract = getattr(request, "param", "path") == "abstract"
    with ServiceManager(f"@harmonia-test-{os.getpid()}" if abstract else f"{tmp_path}/notify") as manager:
        yield manager


@contextmanager
def tcp_socket() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@contextmanager
def unix_socket(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{directory}/socket")
        listening.listen()
        yield listening


def ask(address: object, family: int) -> int:
    with socket.socket(family) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(address)  # type: ignore[arg-type]
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n")
        return read_answer(connection).status


def test_sockets_of_systemd_replace_bind(start: Start, sample: Sample, tmp_path: Path) -> None:
    with tcp_socket() as first, tcp_socket() as second, unix_socket(tmp_path) as third, tcp_socket() as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"  # in use
        sockets = [first, second, third]
        server = start(store=sample.root, bind=bind, workers=2, **activated(*(each.fileno() for each in sockets)))
        for each in sockets:
            assert ask(each.getsockname(), each.family) == 200
        urls = [f"http://127.0.0.1:{first.getsockname()[1]}", f"http://127.0.0.1:{second.getsockname()[1]}"]
        for url in [*urls, f"unix:{tmp_path}/socket"]:
            server.wait_for_log(f"at {re.escape(url)}$")
        assert server.stop() == 0
    assert (tmp_path / "socket").exists()  # systemd removes it


def test_server_ends_when_idle_and_starts_again_at_the_next_connection(sample: Sample, tmp_path: Path) -> None:
    with SocketUnit(tmp_path / "unit", sample.root, "idle_exit = 1") as unit:
        address = ("127.0.0.1", int(unit.url.rpartition(":")[2]))
        for count in (1, 2):
            assert ask(address, socket.AF_INET) == 200
            wait_until(lambda: len(unit.servers) == count)  # noqa: B023 (called at once)
            unit.servers[-1].wait_for_log("no request for 1 s: stopping")
            assert unit.servers[-1].process.wait(PATIENCE_S) == 0


def test_running_download_keeps_the_server_from_ending(sample: Sample, tmp_path: Path) -> None:
    with SocketUnit(tmp_path / "unit", sample.root, "idle_exit = 1\nenable_compression = false") as unit:
        with socket.create_connection(("127.0.0.1", int(unit.url.rpartition(":")[2])), PATIENCE_S) as connection:
            request = f"GET /nar/{sample.big.path.hash_part}.nar HTTP/1.1\r\nHost: x\r\n\r\n"
            connection.sendall(request.encode())
            first = connection.recv(1000)
            assert first.startswith(b"HTTP/1.1 200")
            time.sleep(3)
            assert unit.is_running
        assert unit.servers[-1].process.wait(PATIENCE_S) == 0


def test_idle_exit_without_sockets_of_systemd_has_no_effect(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="idle_exit = 1")
    server.wait_for_log("WARNING.* idle_exit has no effect: systemd passed no socket")
    time.sleep(2)
    assert server.get("/version").status == 200


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_restart_refuses_no_connection(start: Start, sample: Sample, tmp_path: Path, family: int) -> None:
    with tcp_socket() if family == socket.AF_INET else unix_socket(tmp_path) as listening:
        first = start(store=sample.root, workers=2, **activated(listening.fileno()))
        assert first.stop() == 0
        with socket.socket(family) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(listening.getsockname())
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n")
            start(store=sample.root, workers=2, **activated(listening.fileno()))
            assert read_answer(connection).status == 200


def test_sockets_for_another_process_are_ignored(start: Start, sample: Sample) -> None:
    with tcp_socket() as listening:
        server = start(store=sample.root, environment={"LISTEN_PID": "1"}, **activated(listening.fileno()))
        assert server.url != f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_keepalive_ends_lost_connections_but_not_slow_ones(start: Start, sample: Sample) -> None:
    with tcp_socket() as listening:  # accepted connections inherit its options
        start(store=sample.root, **activated(listening.fileno()))
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert (
            listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        )  # it would end slow connections, too


def test_max_connections_counts_all_sockets_together(start: Start, sample: Sample) -> None:
    with tcp_socket() as first, tcp_socket() as second:
        passed = activated(first.fileno(), second.fileno())
        server = start(store=sample.root, settings="max_connections = 1", **passed)
        server.settle()
        with server.connect() as only:
            only.sendall(b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n")
            assert read_answer(only).status == 200
            assert ask(second.getsockname(), second.family) == 503


def wrong_descriptors(stack: ExitStack) -> Iterator[tuple[str, Sequence[int], dict[str, str]]]:
    with open(os.devnull) as file:
        yield "file", [file.fileno()], {}
    yield "unconnected", [stack.enter_context(socket.socket()).fileno()], {}
    datagrams = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    datagrams.bind(("127.0.0.1", 0))
    yield "datagrams", [datagrams.fileno()], {}
    listening = stack.enter_context(tcp_socket())
    yield "missing", [listening.fileno()], {"LISTEN_FDS": "2"}


def test_descriptor_that_does_not_listen_is_reported_in_one_line(sample: Sample, tmp_path: Path) -> None:
    with ExitStack() as stack:
        for name, passed, environment in wrong_descriptors(stack):
            server = Server(tmp_path / name, sample.root, environment=environment, **activated(*passed))  # type: ignore[arg-type]
            server.launch()
            assert server.wait() == 2
            fd = 3 if name != "missing" else 4
            remedy = "use ListenStream= in the socket unit"
            assert server.log == [f"harmonia: systemd passed descriptor {fd}, which does not listen; {remedy}\n"], name


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
def test_manager_gets_ready_and_stopping(start: Start, sample: Sample, manager: ServiceManager) -> None:
    server = start(store=sample.root, workers=2, environment=manager.environment)
    assert manager.receive() == "READY=1"
    server.process.send_signal(signal.SIGHUP)
    assert server.stop() == 0
    assert manager.receive() == "STOPPING=1"
    with pytest.raises(TimeoutError):
        manager.receive(0.1)


@pytest.mark.parametrize("watchdog", [{}, {"WATCHDOG_USEC": "100000"}], ids=["no watchdog", "watchdog"])
def test_ready_is_sent_once_every_worker_serves(
    start: Start, sample: Sample, manager: ServiceManager, tmp_path: Path, watchdog: dict[str, str]
) -> None:
    late = patched(
        "import os, time\nfrom harmonia.server import worker\nserve = worker.run\n"
        "def wait(*arguments):\n"
        "  try: os.mkdir(os.environ['GO'] + '-first')\n"  # only the first worker succeeds
        "  except FileExistsError:\n"
        "    while not os.path.exists(os.environ['GO']): time.sleep(0.01)\n"
        "  serve(*arguments)\n"
        "worker.run = wait"
    )
    go = tmp_path / "go"
    environment = {**manager.environment, **watchdog, "GO": str(go)}
    server = start(store=sample.root, workers=2, environment=environment, program=late)
    with pytest.raises(TimeoutError):
        manager.receive(0.5)
    go.touch()
    assert manager.receive() == "READY=1"
    assert server.get("/version").status == 200


def test_watchdog_messages_stop_while_workers_hang(start: Start, sample: Sample, manager: ServiceManager) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "400000"}
    server = start(store=sample.root, workers=2, environment=environment)
    messages = [manager.receive() for _ in range(10)]
    assert messages.count("READY=1") == 1
    assert messages.count("WATCHDOG=1") == 9

    workers = server.workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    with suppress(TimeoutError):
        while True:  # until there has been no message for longer than the interval
            manager.receive(1)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert manager.receive() == "WATCHDOG=1"

    assert server.stop() == 0
    messages = ["WATCHDOG=1"]
    while messages[-1] == "WATCHDOG=1":
        messages.append(manager.receive())
    assert messages[-1] == "STOPPING=1"


def test_heartbeat_interval_is_half_the_watchdog_interval(
    start: Start, sample: Sample, manager: ServiceManager
) -> None:
    logged = patched(
        "import sys\nfrom harmonia.server import worker\nserve = worker.run\n"
        "def run(*arguments):\n"
        "  print('interval:', arguments[-1], file=sys.stderr, flush=True)\n"
        "  serve(*arguments)\n"
        "worker.run = run"
    )
    environment = {**manager.environment, "WATCHDOG_USEC": "500000"}
    server = start(store=sample.root, environment=environment, program=logged)
    assert float(server.wait_for_log("interval: (.*)")[1]) == 0.25
    assert [manager.receive() for _ in range(3)] == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]


def test_watchdog_of_another_process_is_ignored(start: Start, sample: Sample, manager: ServiceManager) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    server = start(store=sample.root, environment=environment)
    assert manager.receive() == "READY=1"
    with pytest.raises(TimeoutError):
        manager.receive(0.5)
    assert server.stop() == 0
    assert manager.receive() == "STOPPING=1"


def test_missing_notify_socket_is_ignored(start: Start, sample: Sample, tmp_path: Path) -> None:
    server = start(store=sample.root, environment={"NOTIFY_SOCKET": f"{tmp_path}/gone", "WATCHDOG_USEC": "100000"})
    assert server.get("/version").status == 200
    assert server.stop() == 0
