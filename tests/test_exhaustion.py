"""Exhausted resources (descriptors, memory, disk space, time): the server logs an error, recovers and continues."""

import http.client
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.held_compression import held_by
from support.programs import PRIVILEGED
from support.running import (
    Sample,
    Server,
    ServiceManager,
    download,
    nar_url,
    open_files,
    patched,
    read_answer,
    unpacked,
    wait_until,
)
from support.unscathed import MANY, serves, unscathed

if TYPE_CHECKING:
    from harmonia.nix.path_info import PathInfo

Start = Callable[..., Server]

BROKEN = (http.client.IncompleteRead, http.client.BadStatusLine, ConnectionResetError)
REQUEST = b"GET /version HTTP/1.1\r\nHost: cache\r\n\r\n"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample.make(tmp_path_factory.mktemp("store"))


def evict(server: Server) -> None:
    wait_until(lambda: not list(server.cache_dir.glob("nar/*.growing")))
    for kept in server.cache_dir.glob("nar/*"):
        kept.unlink(missing_ok=True)  # the server removes files, too


def limited(name: str, soft: int, hard: int) -> list[str]:
    return patched(f"import resource\nresource.setrlimit(resource.{name}, ({soft}, {hard}))")


# Descriptors


def test_limit_of_open_files_is_raised_and_respected(start: Start, sample: Sample) -> None:
    server = start(store=sample.root, program=limited("RLIMIT_NOFILE", 64, 560))
    server.wait_for_log("WARNING max_connections: the open-file limit allows only 24 per worker; raise LimitNOFILE= ")
    (worker,) = server.workers
    assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (560, 560)
    with unscathed(server, sample.small, sample.big), ExitStack() as stack:
        for _ in range(24):
            stack.enter_context(download(server, sample.big))
        for _ in range(MANY):
            with suppress(ConnectionError):  # the server may refuse it before the request is sent
                assert server.get("/version").status == 503
    assert not [line for line in server.log if "ERROR" in line]


def test_shortage_of_descriptors_leaves_the_server_unharmed(start: Start, sample: Sample) -> None:
    """The process runs out of descriptors, beyond its own limits."""
    server = start(store=sample.root)
    (worker,) = server.workers
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    with unscathed(server, sample.small, sample.big):
        for _ in range(2):
            with server.connect() as connection, ExitStack() as stack:
                connection.sendall(REQUEST)
                assert read_answer(connection).status == 200
                taken = max(int(each) for each in os.listdir(f"/proc/{worker}/fd")) + 1
                resource.prlimit(worker, resource.RLIMIT_NOFILE, (taken, limits[1]))
                stack.callback(resource.prlimit, worker, resource.RLIMIT_NOFILE, limits)
                connection.sendall(f"GET {nar_url(sample.big)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
                with suppress(*BROKEN):
                    assert read_answer(connection).status in (200, 503)
                for _ in range(20):
                    with suppress(*BROKEN, TimeoutError):
                        waiting = stack.enter_context(server.connect(2))
                        waiting.sendall(REQUEST)
                        read_answer(waiting)
    assert server.workers == [worker]


# Memory


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """Create a cgroup with a memory limit, of version 1 or 2, depending on the controller."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    first = next((where for _, where, kind, options, *_ in mounts if kind == "cgroup" and "memory" in options), None)
    second = next((where for _, where, kind, *_ in mounts if kind == "cgroup2"), None)
    group = Path(first or second or "/nonexistent", f"harmonia-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no cgroup with a memory limit can be made ({error.strerror}): {PRIVILEGED}")
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@pytest.mark.root
def test_worker_killed_for_its_memory_is_replaced(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("big"), {"file": os.urandom(1 << 20) * 16})
    server = start(store=tmp_path / "store")
    with memory_cgroup(4 << 20) as group, unscathed(server, info):
        (worker,) = server.workers
        (group / "cgroup.procs").write_text(str(worker))
        with ExitStack() as stack, suppress(*BROKEN, TimeoutError):
            for _ in range(MANY):
                stack.enter_context(download(server, info))
        server.wait_for_log(f"ERROR worker {worker} ended by SIGKILL; replacing it")
        wait_until(lambda: server.workers not in ([], [worker]))


def test_failed_allocation_gets_503_and_the_worker_survives(start: Start, tmp_path: Path) -> None:
    sample = Sample.make(tmp_path / "store", 40 << 20)
    server = start(store=sample.root, settings="zstd.window_log = 26")  # one frame for nearly all of it
    (worker,) = server.workers
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with unscathed(server, sample.small, sample.big):
        evict(server)
        taken = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(worker, resource.RLIMIT_AS, (taken, no_limit[1]))
        for _ in range(3):
            assert server.get(nar_url(sample.big) + ".zst").status == 503
            assert server.get("/version").status == 200
        resource.prlimit(worker, resource.RLIMIT_AS, no_limit)
    assert server.workers == [worker]


# Disk space


def test_file_size_limit_stops_no_download_and_is_logged_once(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("big"), {"file": os.urandom(12 << 20)})
    little = store.add(store.output_path("little"), {"file": os.urandom(1 << 20)})
    server = start(store=tmp_path / "store", program=limited("RLIMIT_FSIZE", 4 << 20, 4 << 20))
    with unscathed(server, info, little):
        for _ in range(3):
            assert sha256(unpacked(server.get(nar_url(info) + ".zst").body)).digest() == info.nar_hash
    assert len([line for line in server.log if "ERROR" in line]) == 1
    server.wait_for_log("ERROR cannot write to .*File too large")


# Time

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.mark.skipif(LIBRARY is None, reason="no faketime on this machine: apt-get install faketime")
def test_clock_jumps_change_no_timeout(start: Start, tmp_path: Path) -> None:
    """Only the wall clock jumps: timeouts and cache lifetimes do not depend on it."""
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("big"), {"file": os.urandom(1 << 20) * 12})
    clock = tmp_path / "clock"
    clock.write_text("+0")
    server = start(
        store=tmp_path / "store",
        settings="debug_info = false",  # its thread would sleep by a call that fails under libfaketime
        environment={
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        },
    )

    def response_time() -> float:
        with server.connect() as connection:
            connection.sendall(REQUEST)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return parsedate_to_datetime(response.headers["date"]).timestamp()

    with unscathed(server, info), server.connect() as idle, ExitStack() as stack:
        for jump in ("+400d", "-400d", "+0"):
            response = stack.enter_context(download(server, info))
            digest = sha256(response.read(100_000))
            (tmp_path / "next").write_text(jump)
            (tmp_path / "next").rename(clock)  # the server never reads an empty file
            days = 86400 * int(jump.removesuffix("d"))
            before = time.time()
            assert before - 5 < response_time() - days < time.time() + 5
            digest.update(response.read())
            assert digest.digest() == info.nar_hash
            serves(server, info)
            idle.sendall(REQUEST)
            assert read_answer(idle).status == 200
            evict(server)
    assert len(server.log) == 2, server.log  # start and overview


# Workers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_leaves_nothing_behind(start: Start, tmp_path: Path, number: int) -> None:
    store = StoreBuilder(tmp_path / "store")
    infos: list[PathInfo] = [
        store.add(store.output_path(f"big-{size}"), {"file": os.urandom(1 << 20) * size}) for size in (16, 60, 61)
    ]
    held = tmp_path / "held"
    server = start(store=tmp_path / "store", program=held_by(held, least=1 << 20))
    held.unlink()
    first, *others = infos
    with unscathed(server, first):
        for info in others:
            (worker,) = server.workers
            with ExitStack() as stack:
                for _ in range(8):
                    stack.enter_context(download(server, first))
                held.touch()  # compression does not end before the worker
                filling = stack.enter_context(server.connect(receive_buffer=8192))
                filling.sendall(f"GET {nar_url(info)}.zst HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
                filling.recv(1)
                assert list(server.cache_dir.glob("nar/*.growing"))
                os.kill(worker, number)
                held.unlink()
                wait_until(lambda: server.workers not in ([], [worker]))  # noqa: B023 (called at once)
    serves(server, *infos)


def test_main_process_survives_a_shortage_of_descriptors(start: Start, sample: Sample, tmp_path: Path) -> None:
    with ServiceManager(str(tmp_path / "notify")) as manager:
        server = start(store=sample.root, workers=2, environment={**manager.environment, "WATCHDOG_USEC": "1000000"})
        assert manager.receive() == "READY=1"
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        time.sleep(1.5)  # some messages cannot be sent
        os.kill(server.workers[0], 9)
        server.wait_for_log("cannot start a worker: .*Too many open files")
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: len(server.workers) == 2)
        manager.drain()
        assert manager.receive() == "WATCHDOG=1"
        assert server.get(nar_url(sample.small)).status == 200


def test_download_has_one_open_file(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    info = store.add(store.output_path("both"), {"a": b"small", "b": Sparse(64 << 20)})
    server = start(store=tmp_path / "store")
    with download(server, info) as response:
        response.read(1 << 20)  # beyond the first file, and far from the end of the second
        assert len([name for name in open_files(server.workers[0]) if "/nix/store/" in name]) == 1
