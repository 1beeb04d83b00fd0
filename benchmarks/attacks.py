"""What one client does to the others: attacks on a worker, and how long a narinfo takes for another client meanwhile.

`PYTHONPATH=tests python -m benchmarks.attacks [SCENARIO…] [--files N]`: prints a line of figures for each.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, nar_url, read_answer

SECONDS = 10.0  # for which an attack that never ends goes on
SLOW_READERS = 200


@dataclass(frozen=True)
class Target:
    """A server with one worker, and the paths of its store."""

    server: Server
    huge: PathInfo
    small: PathInfo

    @property
    def memory(self) -> int:
        """Resident bytes of its worker."""
        [worker] = self.server.workers
        return _status(worker, "VmRSS")

    @property
    def peak_memory(self) -> int:
        [worker] = self.server.workers
        return _status(worker, "VmHWM")


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def target(store: StoreBuilder, huge: PathInfo, small: PathInfo) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory) / "server", Path(store.real_dir).parents[1])
        server.start()
        try:
            yield Target(server, huge, small)
        finally:
            server.stop()


def tree(files: int, shape: str) -> dict[str, Any]:
    """Empty files in one directory, or a hundred in each of nested and neighbouring ones."""
    if shape == "flat":
        return {f"{number:08}": b"" for number in range(files)}
    top: dict[str, Any] = {}
    for number in range(0, files, 1000):
        inner: dict[str, Any] = {}
        top[f"{number:08}"] = inner
        for depth in range(10):
            inner |= {f"f{file:03}": b"" for file in range(min(100, files - number - 100 * depth))}
            inner[f"d{depth}"] = inner = {}
    return top


def request(where: str, headers: str = "") -> bytes:
    return f"GET {where} HTTP/1.1\r\nHost: cache\r\n{headers}\r\n".encode()


# The other client: a process of its own, which asks for a narinfo all the time.


def _ask(url: str, where: str, pipe: "multiprocessing.connection.Connection") -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    took = []
    with socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0)) as connection:
        pipe.send("ready")
        while not pipe.poll():
            began = time.perf_counter()
            connection.sendall(request(where))
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            took.append(time.perf_counter() - began)
            time.sleep(0.005)
    pipe.send(took)


@contextmanager
def other_client(target: Target) -> Iterator[list[float]]:
    """Yields a list that has the seconds of each narinfo when it is over."""
    took: list[float] = []
    ours, theirs = multiprocessing.Pipe()
    where = f"/{target.small.path.hash_part}.narinfo"
    process = multiprocessing.get_context("spawn").Process(target=_ask, args=(target.server.url, where, theirs))
    process.start()
    ours.recv()
    try:
        yield took
    finally:
        ours.send("stop")
        took += ours.recv()
        process.join()


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


# Attacks. Each returns what it has to tell besides.


def idle(target: Target) -> str:
    """Nobody attacks, for comparison."""
    del target
    time.sleep(SECONDS / 3)
    return ""


def ranges(target: Target) -> str:
    """40 ranges of one byte each of a huge path that nobody asked for before."""
    with ExitStack() as stack:
        connections = [stack.enter_context(target.server.connect(120)) for _ in range(40)]
        began = time.perf_counter()
        for number, connection in enumerate(connections):
            position = target.huge.nar_size * number // 40
            connection.sendall(request(nar_url(target.huge), f"Range: bytes={position}-{position}\r\n"))
        answers = [read_answer(connection) for connection in connections]
        assert {answer.status for answer in answers} == {206}
        return f"all answered after {time.perf_counter() - began:.1f} s"


def slow_readers(target: Target) -> str:
    """200 connections that ask for the whole of it and read hardly anything."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(target.server.connect(120, receive_buffer=4096)) for _ in range(SLOW_READERS)
        ]
        began = time.perf_counter()
        for connection in connections:
            connection.sendall(request(nar_url(target.huge)))
        firsts = []
        for connection in connections:
            assert connection.recv(512).startswith(b"HTTP/1.1 200")
            firsts.append(time.perf_counter() - began)
        deadline = time.monotonic() + 3 * SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            for connection in connections:
                connection.recv(256)
        return f"first byte {firsts[0]:.2f} s, of the last client {firsts[-1]:.2f} s; now {target.memory >> 20} MiB"


def first_byte(target: Target) -> str:
    """One download of a huge path that nobody asked for before."""
    with target.server.connect(120) as connection:
        began = time.perf_counter()
        connection.sendall(request(nar_url(target.huge), "Connection: close\r\n"))
        connection.recv(1)
        first = time.perf_counter() - began
        while connection.recv(1 << 20):
            if time.perf_counter() - began > 3 * SECONDS:
                break
        return f"after {first:.2f} s"


def _repeat(target: Target, connections: int, ask: bytes) -> str:
    """Ask the same again and again, on many connections."""
    stop = time.monotonic() + SECONDS
    statuses: dict[int, int] = {}

    def client() -> None:
        while time.monotonic() < stop:
            with target.server.connect(120) as connection:
                connection.sendall(ask)
                status = read_answer(connection).status
                statuses[status] = statuses.get(status, 0) + 1

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))


def pages(target: Target) -> str:
    """16 connections that ask for the page of a huge directory."""
    return _repeat(target, 16, request(f"/serve/{target.huge.path.hash_part}/"))


def listing_ranges(target: Target) -> str:
    """16 connections that ask for the end of a huge listing."""
    return _repeat(target, 16, request(f"/{target.huge.path.hash_part}.ls", "Range: bytes=-10\r\n"))


def listings(target: Target) -> str:
    """16 connections that ask for a huge listing, compressed."""
    return _repeat(target, 16, request(f"/{target.huge.path.hash_part}.ls", "Accept-Encoding: zstd\r\n"))


def landing(target: Target) -> str:
    """16 connections that ask for the page at `/`."""
    return _repeat(target, 16, request("/"))


SCENARIOS: dict[str, Callable[[Target], str]] = {
    each.__name__: each for each in (idle, first_byte, ranges, slow_readers, pages, listing_ranges, listings, landing)
}


def measure(store: StoreBuilder, huge: PathInfo, small: PathInfo, name: str) -> str:
    with target(store, huge, small) as attacked:
        with other_client(attacked) as took:
            told = SCENARIOS[name](attacked)
        p50, p99, most = (1000 * quantile(took, part) for part in (0.5, 0.99, 1))
        peak = attacked.peak_memory >> 20
        return f"{name}: narinfo p50 {p50:.1f}, p99 {p99:.1f}, max {most:.1f} ms; peak {peak} MiB; {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--shape", choices=["flat", "deep"], default="flat")
    parser.add_argument("--keep", type=Path, help="where the store is made, or was by an earlier run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        store = StoreBuilder(root / "store")
        names = (f"huge-{options.shape}-{options.files}", "small")
        known = [_known(store, name) for name in names]
        huge = known[0] or store.add(store.output_path(names[0]), tree(options.files, options.shape))
        small = known[1] or store.add(store.output_path(names[1]), {"file": b"contents"})
        for name in options.scenarios or SCENARIOS:
            print(measure(store, huge, small, name), f"(load {os.getloadavg()[0]:.1f})", flush=True)


def _known(store: StoreBuilder, name: str) -> PathInfo | None:
    path = store.output_path(name)
    with store.connect() as connection:
        row = connection.execute(
            "select hash, narSize from ValidPaths where path = ?", (f"{store.store_dir}/{path}",)
        ).fetchone()
    return row and PathInfo(path, bytes.fromhex(row[0].removeprefix("sha256:")), row[1])


if __name__ == "__main__":
    main()
