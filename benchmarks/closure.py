"""Time of a substitution over a slow network: directly, through a Harmonia, and through one that fetches ahead.

    python -m benchmarks.closure [--paths N…] [--latency MS…] [--mbit N…] [--nix host|trixie|sid…] [--rounds N]

An origin (a Harmonia) is behind a proxy that delays each direction by half of the latency, and sends so many Mbit/s.
"direct" is Nix with that URL; "plain" is Nix with a Harmonia on its own machine, whose upstream is the origin, without
plans and without fetching ahead; "accelerated" is the same with the default settings. Each round begins with empty
caches and stores, and counts the requests that the origin gets. As root, with the versions of Nix that tests use
(tests/e2e/newer-nix-roots.sh). All cases take two hours.
"""

import argparse
import asyncio
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.nix_client import NIXES, Client, Nix
from support.running import Server, patched

KEY = SecretKey.generate("origin-1")
DOCS = Path(__file__).parents[1] / "docs/explanation/slow-network.json"
WAYS = ("direct", "plain", "accelerated")
MIN_NAR_BYTES, MAX_NAR_BYTES = 2_000, 60_000
_BUFFER_BYTES = 1 << 14


def closure(root: Path, count: int) -> PathInfo:
    """Build a store with `count` paths that refer to two or three random earlier ones. Return the last path."""
    store = StoreBuilder(root)
    chosen = random.Random(count)
    infos: list[PathInfo] = []
    for number in range(count):
        references = {infos[-1 - min(int(chosen.expovariate(0.15)), number - 1)].path for _ in range(3) if infos}
        if number == count - 1:
            referred = {reference for info in infos for reference in info.references}
            references = {info.path for info in infos if info.path not in referred}
        content = chosen.randbytes(int(MIN_NAR_BYTES * (MAX_NAR_BYTES / MIN_NAR_BYTES) ** chosen.random()))
        infos.append(store.add(store.output_path(f"path-{number}"), content, references=references, keys=[KEY]))
    return infos[-1]


class Direction:
    """One direction of a link, which all connections share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def sent_at(self, now: float, size: int) -> float:
        """Return the time at which the link has sent the next `size` bytes."""
        self._free_at = max(self._free_at, now) + size / self._bytes_per_s
        return self._free_at


class SlowNetwork:
    """Forwards connections to a port of this machine, through a link with a bandwidth and a latency (a round trip)."""

    def __init__(self, port: int, latency_s: float, bytes_per_s: float = math.inf) -> None:
        self._port = port
        self._delay_s = latency_s / 2
        self._up, self._down = Direction(bytes_per_s), Direction(bytes_per_s)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # of connections that are cut at the end
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        self.port = started.result().sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._connect, "127.0.0.1", 0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self._delay_s)  # the handshake
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        up, down = self._forward(reader, back, self._up), self._forward(there, writer, self._down)
        await asyncio.gather(up, down, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        pending: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def send() -> None:
            while True:
                due, data = await pending.get()
                await asyncio.sleep(max(due - self._loop.time(), 0))
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        sending = asyncio.create_task(send())
        while data := await reader.read(_BUFFER_BYTES):
            sent_at = direction.sent_at(self._loop.time(), len(data))
            await pending.put((sent_at + self._delay_s, data))
        await pending.put((direction.sent_at(self._loop.time(), 0) + self._delay_s, b""))
        await sending


def requests(origin: Server) -> int:
    return sum("GET /" in line for line in origin.log)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def cpu(server: Server) -> float:
    """Return the CPU seconds of the workers of a server."""
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in server.workers)
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def measure(nix: Nix, root: Path, top: PathInfo, latency_s: float, bytes_per_s: float, way: str) -> dict[str, float]:
    """Return the seconds of one substitution, the requests at the origin, and the CPU seconds of each program."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harmonia-bench-")))
        origin = stack.enter_context(running(Server(scratch / "origin", root, "access_log = true")))
        proxy = stack.enter_context(SlowNetwork(int(origin.url.rpartition(":")[2]), latency_s, bytes_per_s))
        url = f"http://127.0.0.1:{proxy.port}"
        client = Client(nix, scratch / "client")
        client.run("nix-store", "--init")
        servers = {"origin": origin}
        if way != "direct":
            ahead = "" if way == "accelerated" else "fetch_ahead = '0'"
            settings = (
                f"upstream_timeout = 30.0\n[[upstream]]\nurl = '{url}'\npublic_keys = ['{KEY.public_key}']\n{ahead}"
            )
            program: dict[str, Any] = {} if way == "accelerated" else {"program": _without_plans()}
            servers["local"] = Server(scratch / "local", client.directory, settings, **program)
            url = stack.enter_context(running(servers["local"])).url
        client.settings |= {"substituters": url, "trusted-public-keys": str(KEY.public_key)}
        before = requests(origin)
        cpu_before = {name: cpu(server) for name, server in servers.items()}
        nix_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        client.run("nix-store", "--realise", f"/nix/store/{top.path}", timeout=900)
        result: dict[str, float] = {"s": time.monotonic() - began, "requests": requests(origin) - before}
        nix_after = resource.getrusage(resource.RUSAGE_CHILDREN)
        result["cpu_nix"] = nix_after.ru_utime + nix_after.ru_stime - nix_before.ru_utime - nix_before.ru_stime
        return result | {f"cpu_{name}": cpu(server) - cpu_before[name] for name, server in servers.items()}


def _without_plans() -> list[str]:
    return patched("from harmonia.upstream.plans import Plans\nPlans._is_needed = lambda self, path: False")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--paths", nargs="+", type=int, default=[150, 750])
    parser.add_argument("--latency", nargs="+", type=int, default=[0, 10, 50, 150], metavar="MS")
    parser.add_argument("--mbit", nargs="+", type=int, default=[10, 100, 1000], metavar="MBIT/S")
    parser.add_argument("--nix", nargs="+", choices=[nix.name for nix in NIXES], default=[nix.name for nix in NIXES])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--docs", action="store_true", help=f"replace the results in {DOCS.name}, for `make docs`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="harmonia-bench-") as directory:
        for count in arguments.paths:
            root = Path(directory, f"store-{count}")
            top = closure(root, count)
            for nix in (nix for nix in NIXES if nix.name in arguments.nix and nix.missing is None):
                cells = product(arguments.latency, arguments.mbit, arguments.ways)
                for latency, mbit, way in cells:
                    network = latency / 1000, mbit * 1e6 / 8
                    results = [measure(nix, root, top, *network, way) for _ in range(arguments.rounds)]
                    median = {key: round(statistics.median(each[key] for each in results), 2) for key in results[0]}
                    row = {"paths": count, "nix": ".".join(map(str, nix.version)), "ms": latency, "mbit": mbit}
                    row |= {"way": way} | median | {"load": round(os.getloadavg()[0], 1)}
                    print(row, flush=True)
                    if arguments.docs:
                        _replace(row)


def _replace(row: dict[str, Any]) -> None:
    """Add a result to DOCS, in place of an earlier one for the same case."""
    rows = json.loads(DOCS.read_text()) if DOCS.exists() else []
    case = ("paths", "nix", "ms", "mbit", "way")
    rows = [each for each in rows if any(each[key] != row[key] for key in case)]
    rows = sorted([*rows, row], key=lambda each: [each[key] for key in case])
    DOCS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
