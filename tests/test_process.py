"""Processes: dead workers are replaced, signals are obeyed, and nothing is left behind."""

import http.client
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.running import (
    LONG_GRACE,
    Sample,
    Server,
    ServiceManager,
    download,
    nar_url,
    patched,
    read_answer,
    run,
    wait_until,
    wait_until_refused,
)

Start = Callable[..., Server]

KEEP_ALIVE_REQUEST = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"
HANG_TIMEOUT_S = 3
SHORT_TIMEOUT = (
    "from harmonia.process import supervisor\n"
    f"supervisor._HEARTBEAT_S, supervisor._HANG_TIMEOUT_S = 0.1, {HANG_TIMEOUT_S}\n"
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(f"{tmp_path}/notify") as manager:
        yield manager


def arrives_whole(response: http.client.HTTPResponse, info: PathInfo) -> bool:
    return sha256(response.read()).digest() == info.nar_hash


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_ended(connection: socket.socket) -> bool:
    """Return True if the server has closed the connection, perhaps before it has read all that was sent."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_killed_worker_is_logged_and_replaced(start: Start, sample: Sample, manager: ServiceManager) -> None:
    server = start(store=sample.root, workers=2, environment=manager.environment)
    assert manager.receive() == "READY=1"
    killed, other = server.workers
    os.kill(killed, signal.SIGKILL)
    server.wait_for_log(f"ERROR worker {killed} ended by SIGKILL; replacing it")
    assert server.get("/version").status == 200
    wait_until(lambda: len(server.workers) == 2)
    assert other in server.workers
    assert killed not in server.workers


def test_workers_killed_together_are_replaced(start: Start, sample: Sample, manager: ServiceManager) -> None:
    server = start(store=sample.root, workers=2, environment=manager.environment)
    assert manager.receive() == "READY=1"
    killed = server.workers
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(set(server.workers) - set(killed)) == 2)
    assert server.get("/version").status == 200


def test_hanging_worker_is_killed_and_replaced(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, program=patched(SHORT_TIMEOUT))
    (hanging,) = server.workers
    os.kill(hanging, signal.SIGSTOP)
    assert server.get("/version").status == 200  # the request waits for the next worker
    assert hanging not in server.workers
    server.wait_for_log(f"ERROR worker {hanging} hangs: no heartbeat for ")
    server.wait_for_log(f"ERROR worker {hanging} ended by SIGKILL; replacing it")


def test_workers_are_not_killed_after_a_pause_of_the_machine(start: Start, sample: Sample) -> None:
    late = patched(f"""
{SHORT_TIMEOUT}
import signal
from harmonia.process.supervisor import Supervisor
kill_overdue = Supervisor._kill_overdue
def look_before_the_worker_goes_on(self):
    kill_overdue(self)
    self._signal_all(signal.SIGCONT)
Supervisor._kill_overdue = look_before_the_worker_goes_on
""")
    server = start(store=sample.root, program=late)
    (worker,) = server.workers
    for pid in (server.process.pid, worker):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(HANG_TIMEOUT_S + 0.5)
    os.kill(server.process.pid, signal.SIGCONT)
    assert server.get("/version").status == 200
    assert server.workers == [worker]
    assert not [line for line in server.log if "hangs" in line]


def test_workers_that_cannot_start_end_the_service(sample: Sample, tmp_path: Path) -> None:
    broken = patched(
        "from harmonia.server import worker\ndef fail(*_): raise RuntimeError('no\\nluck')\nworker.run = fail"
    )
    server = Server(tmp_path / "server", sample.root, workers=2, program=broken)
    server.launch()
    assert server.wait() == 1
    ours = [line for line in server.log if "luck" not in line]  # the second worker may log its error last
    assert ours[-1].endswith(" CRITICAL no worker is left; stopping\n")
    assert sum("no worker is left" in line for line in server.log) == 1
    assert all(re.match(r"\S+ (INFO|ERROR|CRITICAL) ", line) for line in server.log), server.log


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_workers_end_when_the_main_process_is_killed(start: Start, sample: Sample, *, busy: bool) -> None:
    server = start(store=sample.root, workers=2)
    workers = server.workers
    with ExitStack() as connections:
        for _ in range(8 if busy else 0):
            connections.enter_context(download(server, sample.big))
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not any(map(is_alive, workers)))


def test_sighup_does_not_end_a_starting_worker(start: Start, sample: Sample) -> None:
    slow = patched(
        "import os, time\nfrom harmonia.server import worker\nserve = worker.run\n"
        "def slow(*a):\n"
        "  while not os.path.exists(os.environ['GO']): time.sleep(0.01)\n"
        "  serve(*a)\n"
        "worker.run = slow\n"
        "from harmonia.process.supervisor import Supervisor\nsignal_all = Supervisor._signal_all\n"
        "def forward(self, number):\n"
        "  signal_all(self, number)\n"
        "  open(os.environ['GO'], 'x')\n"
        "Supervisor._signal_all = forward"
    )
    go = sample.root / "go"
    go.touch()
    server = start(store=sample.root, program=slow, environment={"GO": str(go)})
    go.unlink()
    (killed,) = server.workers
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: server.workers not in ([], [killed]))
    (starting,) = server.workers
    server.process.send_signal(signal.SIGHUP)
    wait_until(go.exists)
    assert server.get("/version").status == 200
    assert server.workers == [starting]


def test_garbage_collection_in_a_worker_visits_no_objects_of_the_main_process(start: Start, sample: Sample) -> None:
    """To visit an object writes to it, so the pages that all processes share would be copied."""
    spy = patched("""
import gc
import logging
from harmonia.server import worker
run = worker.run
def counting(*arguments):
    logging.getLogger("harmonia").warning("%d objects are frozen", gc.get_freeze_count())
    run(*arguments)
worker.run = counting
""")
    server = start(store=sample.root, program=["env", *spy])
    frozen = server.wait_for_log("([0-9]+) objects are frozen")
    assert int(frozen[1]) > 10_000


def test_unexpected_error_of_a_chore_of_a_worker_is_logged(start: Start, sample: Sample) -> None:
    server = start(
        store=sample.root,
        program=patched("""
from harmonia.server import worker
async def trim_heap(context):
    raise ZeroDivisionError("a bug")
worker._trim_heap = trim_heap
"""),
    )
    server.wait_for_log("ERROR Task exception was never retrieved.*ZeroDivisionError: a bug")
    assert server.get("/health").status == 200


def test_idle_service_stops_at_once(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, workers=2, settings=LONG_GRACE)
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in connections[:10]:
            connection.sendall(KEEP_ALIVE_REQUEST)
            assert read_answer(connection).status == 200
        connections[10].sendall(KEEP_ALIVE_REQUEST[:10])
        workers = server.workers
        assert server.stop() == 0
        assert not any(map(is_alive, workers))
        assert all(map(is_ended, connections[:11]))


def test_sigterm_to_the_whole_group_stops_without_errors(start: Start, sample: Sample) -> None:
    slow = patched(
        "import time\nfrom harmonia.process.supervisor import Supervisor\nreap = Supervisor._reap\n"
        "Supervisor._reap = lambda self: (time.sleep(0.3), reap(self))"
    )
    server = start(store=sample.root, workers=2, program=slow, start_new_session=True)
    os.killpg(server.process.pid, signal.SIGTERM)
    assert server.wait() == 0
    assert [line.split()[1:4] for line in server.log[2:]] == [["INFO", "SIGTERM:", "stopping;"]]


def test_main_process_sleeps_until_an_ending_worker_has_ended(start: Start, sample: Sample) -> None:
    spy = patched(
        "import logging, time\n"
        "from harmonia.process.supervisor import Supervisor\nfrom harmonia.server import worker\n"
        "log, serve, listen = logging.getLogger('harmonia'), worker.run, Supervisor._listen\n"
        "def run(*arguments):\n"
        "  serve(*arguments)\n"
        "  arguments[-2].close()\n"
        "  time.sleep(0.5)\n"
        "def logged(*arguments):\n"
        "  log.info('heard')\n"
        "  listen(*arguments)\n"
        "worker.run, Supervisor._listen = run, logged"
    )
    server = start(store=sample.root, program=spy)
    before = len(server.log)
    assert server.stop() == 0
    assert len(server.log) - before < 20, server.log[-1]  # heartbeats, the end of the lifeline, and the stop


def test_running_download_completes_after_sigterm(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, workers=2)
    with download(server, sample.big) as response, server.connect() as idle:
        idle.sendall(KEEP_ALIVE_REQUEST)
        assert read_answer(idle).status == 200
        server.process.terminate()
        assert idle.recv(1) == b""
        wait_until_refused(server)
        assert server.wait_for_log(r"INFO SIGTERM: stopping; running requests have 30 s to finish")
        assert arrives_whole(response, sample.big)
    assert server.wait() == 0


def test_pipelined_request_after_sigterm_is_not_answered(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    with server.connect(receive_buffer=8192) as connection:
        connection.sendall(f"GET {nar_url(sample.big)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode() + KEEP_ALIVE_REQUEST)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            server.process.terminate()
            wait_until_refused(server)
            assert arrives_whole(response, sample.big)
        assert connection.recv(1) == b""


def test_download_breaks_off_after_shutdown_grace(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings="shutdown_grace = 1")
    with download(server, sample.big) as response:
        began = time.monotonic()
        server.process.terminate()
        assert server.wait() == 0
        assert time.monotonic() - began > 1
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()


def test_second_sigterm_stops_at_once(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, settings=LONG_GRACE)
    with download(server, sample.big) as response:
        server.process.terminate()
        server.wait_for_log("INFO SIGTERM: stopping")  # two signals at the same moment count as one
        server.process.terminate()
        server.wait()
        assert server.log[-1].endswith(" INFO SIGTERM again: stopping at once\n")
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()


def test_many_signals_do_not_change_the_exit_status(start: Start, sample: Sample) -> None:
    """Python restores the default handlers before it exits: by then, signals must not reach the process."""
    server = start(store=sample.root)
    while server.process.poll() is None:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            server.process.send_signal(number)
            time.sleep(0.0005)  # otherwise the kernel may merge two signals
    assert server.wait() == 0
    assert not [line for line in server.log if "Traceback" in line or "ignored" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_handled_once_the_address_is_logged(sample: Sample, tmp_path: Path, number: int) -> None:
    early = patched(
        "import os\nfrom harmonia.process.supervisor import Supervisor\nrun = Supervisor.run\n"
        f"def signalled(self):\n  os.kill(os.getpid(), {int(number)})\n  return run(self)\n"
        "Supervisor.run = signalled"
    )
    server = Server(tmp_path / "server", sample.root, program=early)
    server.launch()
    if number == signal.SIGHUP:  # SIGHUP does not end the server
        server.wait_for_log("serving")
        wait_until(lambda: server.workers)
        server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGINT, 130)]
)
def test_earlier_signal_ends_the_start_at_once(sample: Sample, tmp_path: Path, number: int, status: int) -> None:
    early = patched(
        "import os\nfrom harmonia.process import sockets\n"
        f"sockets.listen = lambda *_: os.kill(os.getpid(), {int(number)})"
    )
    server = Server(tmp_path / "server", sample.root, program=early)
    server.launch()
    assert server.wait() == status
    assert not [line for line in server.log if "Traceback" in line or "serving" in line]


ENDLESS_WALK = patched(
    "import time\nfrom harmonia.store import nar_layout, tree_reader\nnar_layout._SPILL_BYTES = 0\n"
    "walk = tree_reader.walk\n"
    "def halting(root):\n"
    "  for number, entry in enumerate(walk(root)):\n"
    "    if number == 500: time.sleep(600)\n"
    "    yield entry\n"
    "tree_reader.walk = halting"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_unfinished_files_are_removed(tmp_path: Path, number: int) -> None:
    store = StoreBuilder(tmp_path / "store")
    many = store.add(store.output_path("many"), {f"{each:04}": b"" for each in range(1000)})
    server = Server(tmp_path / "server", tmp_path / "store", program=ENDLESS_WALK)
    growing = server.cache_dir / "layouts"
    server.start()
    with server.connect() as connection:
        connection.sendall(f"GET /{many.path.hash_part}.ls HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        wait_until(lambda: list(growing.glob("*.growing")))
    workers = server.workers
    server.stop(number)
    wait_until(lambda: not any(map(is_alive, workers)))
    if number == signal.SIGKILL:  # the next server removes it
        server.log.clear()
        server.start()
        wait_until(lambda: not list(growing.iterdir()))
        server.stop()
    assert not list(growing.iterdir())


def test_ctrl_c_lets_downloads_complete(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, start_new_session=True)
    with download(server, sample.big) as response:
        os.killpg(server.process.pid, signal.SIGINT)  # a terminal signals the workers, too
        wait_until_refused(server)
        assert arrives_whole(response, sample.big)
    assert server.wait() == 0


def test_address_is_free_immediately_after_a_stop(start: Start, sample: Sample, new_port: Callable[[], int]) -> None:
    bind = f"127.0.0.1:{new_port()}"
    server = start(store=sample.root, bind=bind)
    assert server.get("/version").status == 200  # with "Connection: close", the server's end would wait in TIME_WAIT
    assert server.stop() == 0
    assert start(store=sample.root, bind=bind).get("/version").status == 200


def test_killed_worker_visibly_breaks_its_downloads(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    with download(server, sample.big) as response:
        os.kill(server.workers[0], signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()


def test_second_server_cannot_take_the_port(start: Start, sample: Sample) -> None:
    server = start(store=sample.root)
    second = Server(server.directory / "second", sample.root, bind=server.url.removeprefix("http://"))
    second_run = run("--config", str(second.config))
    assert second_run.returncode == 2
    assert second_run.stderr.count("\n") == 1
    assert "bind: 127.0.0.1:" in second_run.stderr
    assert (
        "already in use; choose another address, as by harmonia serve --bind :8080, or stop the program that uses it"
        in second_run.stderr
    )
