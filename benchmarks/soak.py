"""Soak test: hours of a busy cache in minutes, `make soak MINUTES=5`. Needs root, and Nix on the PATH.

A thousand connections are open. 200 of them download NARs: plain, compressed, resumed half-way, slowly, or aborted. The
others request narinfos and listings, and pause. Meanwhile real Nix builds paths and collects garbage, and workers are
killed and stopped. Every response is compared with the Nix database. A response may fail only if a worker was killed or
the path was collected; the client then asks again.

Prints the figures. Exits with status 1 if a response was wrong, or if a process or file was left behind.
"""

import asyncio
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles

from benchmarks.connection import Answer, BrokenError, Connection, WrongError, unpacking
from harmonia.nix import base32
from support.nix_client import NIXES, Client
from support.running import Server
from support.unscathed import unscathed

CONNECTIONS, DOWNLOADS = 1000, 200
OPEN_FILES = 2 * CONNECTIONS
WORKERS = 2
ROWS = 12  # about so many rows in the table of memory


@dataclass
class Figures:
    """Counters of the run."""

    counts: Counter[str] = field(default_factory=Counter)
    received: int = 0
    wrong: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds until the response, for each narinfo."""
    kills: list[float] = field(default_factory=list)
    memory: list[tuple[float, float, int, int]] = field(default_factory=list)
    """Samples: seconds since the start, MiB of all processes, requests, descriptors."""


class Store:
    """Paths that real Nix builds. Some are kept, the others are garbage at once."""

    def __init__(self, client: Client, chance: random.Random) -> None:
        self.client = client
        self._chance = chance
        self._numbers = itertools.count()
        self.kept: list[str] = []
        self.fleeting: list[str] = []

    def build(self, count: int, largest: int, *, keep: bool = False) -> None:
        """Build paths of random bytes and many sizes with one nix-build."""
        made = [(next(self._numbers), int(largest ** self._chance.uniform(0.4, 1))) for _ in range(count)]
        texts = (
            f'(make "soak-{number}" "mkdir $out; echo {number} > $out/a; head -c {size} /dev/urandom > $out/b;'
            f' head -c {size} /dev/zero > $out/c; ln -s a $out/d")'
            for number, size in made
        )
        expression = (
            "let make = name: script: derivation { inherit name; system = builtins.currentSystem; PATH = "
            '"/usr/bin:/bin"; builder = "/bin/sh"; args = [ "-euc" script ]; }; in [ ' + " ".join(texts) + " ]"
        )
        paths = self.client.build(expression)
        if keep:
            roots = self.client.directory / "nix/var/nix/gcroots"
            for path in paths:
                (roots / Path(path).name).symlink_to(path)
        (self.kept if keep else self.fleeting).extend(paths)

    def collect(self) -> None:
        self.client.run("nix-store", "--gc")
        self.fleeting = [path for path in self.fleeting if self.is_there(path)]

    def is_there(self, path: str) -> bool:
        return self.client.real_path(path).exists()

    def any(self) -> str:
        return self._chance.choice(self._chance.choice([self.kept, self.fleeting or self.kept]))


class Soak:
    def __init__(self, server: Server, store: Store, chance: random.Random, until: float) -> None:
        self._server = server
        self._store = store
        self._chance = chance
        self._until = until
        self._port = int(server.url.rpartition(":")[2])
        self.figures = Figures()

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self._until

    async def run(self) -> Figures:
        clients = [self._client(self._download) for _ in range(DOWNLOADS)]
        clients += [self._client(self._ask) for _ in range(CONNECTIONS - DOWNLOADS)]
        async with asyncio.TaskGroup() as tasks:
            for each in (*clients, self._watch(), self._kill(), self._build(), self._collect()):
                tasks.create_task(each)
        return self.figures

    async def _client(self, act: Callable[[Connection, str], Awaitable[None]]) -> None:
        await asyncio.sleep(self._chance.uniform(0, 2))
        connection = Connection(self._port)
        while not self._over:
            path = self._store.any()
            try:
                await act(connection, path)
            except BrokenError:
                self._excuse(connection, path)
            except (WrongError, AssertionError) as error:
                self.figures.wrong.append(f"{path}: {error}")
                connection.leave()
        connection.leave()

    def _excuse(self, connection: Connection, path: str) -> None:
        counts = self.figures.counts
        if any(kill >= connection.used - 1 for kill in self.figures.kills):
            counts["ended with a killed worker, and asked again"] += 1
        elif not self._store.is_there(path):
            counts["broken off, for the path was collected"] += 1
        else:
            self.figures.wrong.append(f"{path}: broken, and nothing was the matter")

    async def _narinfo(self, connection: Connection, path: str) -> dict[str, str] | None:
        began = time.monotonic()
        answer = await connection.get(f"/{Path(path).name[:32]}.narinfo")
        text = (await answer.read()).decode()
        self.figures.waits.append(time.monotonic() - began)
        self.figures.counts["requests"] += 1
        if self._is_missing(answer, path):
            return None
        fields = dict(line.split(": ", 1) for line in text.splitlines())
        assert fields["StorePath"] == path, text
        return fields

    def _is_missing(self, answer: Answer, path: str) -> bool:
        if answer.status == 404 and path not in self._store.kept:
            self.figures.counts["404, for the path was collected"] += 1
            return True
        assert answer.status in (200, 206), f"status {answer.status}"
        return False

    async def _ask(self, connection: Connection, path: str) -> None:
        if await self._narinfo(connection, path) and self._chance.random() < 0.2:
            answer = await connection.get(f"/{Path(path).name[:32]}.ls")
            body = await answer.read()
            self.figures.counts["requests"] += 1
            if not self._is_missing(answer, path):
                assert set(json.loads(body)["root"]["entries"]) == set("abcd"), body
        await asyncio.sleep(self._chance.uniform(0, 2))

    async def _download(self, connection: Connection, path: str) -> None:
        if (info := await self._narinfo(connection, path)) is None:
            return
        nar_hash, size = base32.decode(info["NarHash"].removeprefix("sha256:")), int(info["NarSize"])
        plain = f"/nar/{Path(path).name[:32]}-{base32.encode(nar_hash)}.nar"
        kind = self._chance.choice(["plain", "compressed", "compressed", "resumed", "slow", "left"])
        digest, got = sha256(), 0
        if kind == "compressed":
            got = await self._receive(connection, path, "/" + info["URL"], unpacking(digest.update))
        elif kind == "resumed":
            stop = self._chance.randrange(1, size)
            got = await self._receive(connection, path, plain, digest.update, f"Range: bytes=0-{stop - 1}\r\n")
            if got:
                rest = await self._receive(connection, path, plain, digest.update, f"Range: bytes={stop}-\r\n")
                got = rest and got + rest
        else:
            most = self._chance.randrange(size) if kind == "left" else None
            pause = 0.05 if kind == "slow" else 0
            got = await self._receive(connection, path, plain, digest.update, most=most, pause=pause)
        if kind == "left":
            connection.leave()
            self.figures.counts["clients that left"] += 1
        elif got:
            assert digest.digest() == nar_hash, f"{kind}: {got} bytes of another hash"
            self.figures.counts["NARs that arrived whole"] += 1

    async def _receive(
        self,
        connection: Connection,
        path: str,
        url: str,
        take: Callable[[bytes], object],
        headers: str = "",
        *,
        most: int | None = None,
        pause: float = 0,
    ) -> int:
        """Download a NAR. Return its length in bytes, or 0 if the path was collected."""
        answer = await connection.get(url, headers)
        self.figures.counts["requests"] += 1
        if self._is_missing(answer, path):
            await answer.read()
            return 0
        got = 0
        async for part in answer.body:
            take(part)
            got += len(part)
            self.figures.received += len(part)
            if most is not None and got > most:
                break
            await asyncio.sleep(pause)
        return got

    async def _kill(self) -> None:
        while not await self._pause(4, 10):
            with suppress(ProcessLookupError, IndexError):
                worker = self._chance.choice(self._server.workers)
                if self._chance.random() < 0.3:
                    os.kill(worker, signal.SIGSTOP)
                    await asyncio.sleep(1)
                    os.kill(worker, signal.SIGCONT)
                    self.figures.counts["workers halted"] += 1
                else:
                    self.figures.kills.append(time.monotonic())
                    os.kill(worker, signal.SIGKILL)
                    self.figures.counts["workers killed"] += 1

    async def _build(self) -> None:
        while not await self._pause(1, 5):
            await asyncio.to_thread(self._store.build, 4, 8 << 20)
            self.figures.counts["builds"] += 1

    async def _collect(self) -> None:
        while not await self._pause(5, 10):
            await asyncio.to_thread(self._store.collect)
            self.figures.counts["collections of garbage"] += 1

    async def _watch(self) -> None:
        began = time.monotonic()
        while not await self._pause(1, 1):
            processes = [self._server.process.pid, *self._server.workers]
            pages, descriptors = map(sum, zip(*map(_held, processes), strict=True))
            resident = pages * resource.getpagesize() / (1 << 20)
            after = time.monotonic() - began
            self.figures.memory.append((after, resident, self.figures.counts["requests"], descriptors))

    async def _pause(self, least: float, most: float) -> bool:
        """Wait for a random time. Return True if the run is over then."""
        await asyncio.sleep(min(self._chance.uniform(least, most), max(self._until - time.monotonic(), 0)))
        return self._over


def _held(process: int) -> tuple[int, int]:
    """Return the number of resident pages and of descriptors of a process, or zeros if it has exited."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]), len(os.listdir(f"/proc/{process}/fd"))
    except OSError:
        return 0, 0


def print_figures(figures: Figures, seconds: float) -> None:
    print(f"| in {seconds:.0f} s | |\n|---|---|")
    for name, count in sorted(figures.counts.items(), key=lambda it: it[0] != "requests"):
        print(f"| {name} | {count:,} |")
    print(f"| received | {figures.received / (1 << 30):.1f} GiB |")
    late = quantiles(figures.waits, n=100)[98]
    print(f"| a narinfo, median and 99th percentile | {median(figures.waits) * 1e3:.0f} and {late * 1e3:.0f} ms |")
    print(f"| wrong answers | {len(figures.wrong)} |\n")
    print("| after | memory of all processes | descriptors | requests |\n|---|---|---|---|")
    for after, memory, requests, descriptors in figures.memory[:: max(len(figures.memory) // ROWS, 1)]:
        print(f"| {after:.0f} s | {memory:.0f} MiB | {descriptors:,} | {requests:,} |")
    for wrong in figures.wrong[:20]:
        print(f"WRONG: {wrong}", file=sys.stderr)


def main(minutes: float) -> int:
    nix = NIXES[0]
    if nix.missing is not None:
        print(f"SKIPPED: the soak test: {nix.missing}", file=sys.stderr)
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < OPEN_FILES:  # -1 is no limit
        print(f"SKIPPED: the soak test: it needs {OPEN_FILES} open files; raise ulimit -Hn {hard}", file=sys.stderr)
        return 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    chance = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        client = Client(nix, Path(directory, "store"))
        server = Server(Path(directory, "server"), client.directory, workers=WORKERS)
        with client.daemon():
            store = Store(client, chance)
            store.build(30, 24 << 20, keep=True)
            server.start()
            try:
                with unscathed(server, seconds=150):  # longer than the timeout of idle connections
                    soak = Soak(server, store, chance, time.monotonic() + minutes * 60)
                    figures = asyncio.run(soak.run())
            finally:
                server.stop()
    print_figures(figures, minutes * 60)
    for line in server.log:
        if "Traceback" in line:
            figures.wrong.append(line)
            print(f"WRONG: {line}", file=sys.stderr)
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
