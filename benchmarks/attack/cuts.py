"""Downloads that are cut at random and resumed as Nix does: with Range, without If-Range.

A body that is complete by HTTP must be a NAR with the registered hash.
"""

import asyncio
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.attack.arena import Arena, Outcome, restart
from benchmarks.connection import BrokenError, Connection, unpacking
from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.cutting_proxy import CuttingProxy
from support.disk_cache import flip
from support.running import Server, file_url, nar_url
from support.small_disk import with_small_disk

_SIZES = (*[1000] * 8, *[200_000] * 8, *[2_000_000] * 4)  # bytes of one file in each path
_CLIENTS = 32
_LARGEST_CUT = 100_000  # bytes of responses on one connection
_RETRY_S = 0.02
_PATIENCE_S = 180.0
"""Only a bound against hangs: the attack ends with the last wanted cut."""
_CUTS_PER_S = 10  # minimum, in addition
_SMALL_DISK = "4m"


@dataclass
class _Cuts:
    """Clients that download until `wanted` transfers were cut and the server was disturbed `least_disturbed` times."""

    proxy: CuttingProxy
    infos: list[PathInfo]
    wanted: int
    least_disturbed: int
    until: float
    """Latest end, on the monotonic clock."""
    outcome: Outcome
    replaced_at: dict[PathInfo, float] = field(default_factory=dict)
    """Last time when a file of the path had wrong bytes. Infinite while it has."""
    cuts: int = 0
    """Number of responses that were cut after their head."""
    disturbed: int = 0

    @property
    def over(self) -> bool:
        enough = self.cuts >= self.wanted and self.disturbed >= self.least_disturbed
        return enough or time.monotonic() > self.until

    async def run(self, disturb: Coroutine[None, None, None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(_CLIENTS):
                tasks.create_task(self._client(random.Random(number)))
            tasks.create_task(disturb)

    async def _client(self, chance: random.Random) -> None:
        while not self.over:
            await self._download(chance.choice(self.infos), chance)

    async def _download(self, info: PathInfo, chance: random.Random) -> None:
        url = chance.choice([nar_url, file_url])(info)
        received = bytearray()
        # Some clients begin with a range.
        stop = chance.randrange(1, 100_000) if chance.random() < 0.2 else None
        began = time.monotonic()
        resumed = False
        while True:
            headers = f"Range: bytes={len(received)}-{'' if stop is None else stop - 1}\r\n" if received or stop else ""
            if await self._receive(url, headers, received):
                if stop is None:
                    break
                stop = None
            elif received:
                resumed = True
                stop = None
            if self.over:
                return
        self._judge(info, url, bytes(received), began, resumed=resumed)

    async def _receive(self, url: str, headers: str, received: bytearray) -> bool:
        """Append the response body to `received`. Return True if the response was complete."""
        connection = Connection(int(self.proxy.url.rpartition(":")[2]))
        try:
            answer = await connection.get(url, headers)
        except BrokenError:  # refused, or cut before the response
            self.outcome.counts["without a response"] += 1
            await asyncio.sleep(_RETRY_S)
            return False
        try:
            if answer.status not in (200, 206):
                self.outcome.counts[str(answer.status)] += 1
                await answer.read()
                await asyncio.sleep(_RETRY_S)
                # After 416, start again, as Nix does.
                if answer.status == 416:
                    received.clear()
                return False
            if answer.status == 200:
                received.clear()
            async for part in answer.body:
                received += part
        except BrokenError:
            self.cuts += 1
            return False
        finally:
            connection.leave()
        return True

    def _judge(self, info: PathInfo, url: str, body: bytes, began: float, *, resumed: bool) -> None:
        digest, size = sha256(), 0

        def take(data: bytes) -> None:
            nonlocal size
            digest.update(data)
            size += len(data)

        try:
            (unpacking(take) if url.endswith(".zst") else take)(body)
        except Exception as error:  # noqa: BLE001 (any error means that the body is not a NAR)
            digest.update(str(error).encode())
        kind = "resumed" if resumed else "whole"
        if digest.digest() == info.nar_hash:
            self.outcome.counts[f"{kind} and right"] += 1
        elif (
            url.endswith(".nar") and self.replaced_at.get(info, 0) >= began
        ):  # compressed NARs are checked by the server
            self.outcome.counts["rejected by hash, because the source had changed"] += 1
        else:
            self.outcome.counts["wrong"] += 1
            self.outcome.broken.append(f"{kind}, but wrong: {url}, {size} of {info.nar_size} bytes")


@contextmanager
def _store() -> Iterator[tuple[Path, StoreBuilder, list[PathInfo]]]:
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        builder = StoreBuilder(directory)
        chance = random.Random(1)
        infos = [
            builder.add(
                builder.output_path(f"cut-{number}"),
                {
                    "random": chance.randbytes(chance.randrange(size // 2, size)),
                    "zeros": bytes(chance.randrange(size)),
                    "small": {f"{each:03}": chance.randbytes(each) for each in range(50)},
                },
            )
            for number, size in enumerate(_SIZES)
        ]
        yield Path(directory), builder, infos


Disturb = Callable[[Server, StoreBuilder, list[PathInfo], _Cuts, random.Random], Coroutine[None, None, None]]


def _attack(
    arena: Arena, name: str, disturb: Disturb, *, part: float, least_disturbed: int = 0, **options: object
) -> None:
    wanted = round(arena.form.cuts * part)
    with (
        _store() as (root, builder, infos),
        arena.served(f"{wanted:,} cuts: {name}", root=root, **options) as (  # type: ignore[arg-type]
            server,
            outcome,
        ),
        CuttingProxy(urlsplit(server.url).port or 0, 1, _LARGEST_CUT) as proxy,
    ):
        began = time.monotonic()
        until = began + _PATIENCE_S + wanted / _CUTS_PER_S
        cuts = _Cuts(proxy, infos, wanted, least_disturbed, until, outcome)
        asyncio.run(cuts.run(disturb(server, builder, infos, cuts, random.Random(1))))
        outcome.counts.update({"cuts": cuts.cuts, "seconds": round(time.monotonic() - began)})
        outcome.require(cuts.cuts >= wanted, "too few cuts before the timeout")
        outcome.require(cuts.disturbed >= least_disturbed, "too few disturbances before the timeout")
        outcome.require(outcome.counts["resumed and right"], "no download was resumed")


async def _leave_alone(*_: object) -> None:
    """Do not disturb the server; only the network cuts."""


async def _kill(server: Server, _: object, __: object, cuts: _Cuts, chance: random.Random) -> None:
    while not cuts.over:
        await asyncio.sleep(chance.uniform(0, 0.05))
        if cuts.cuts < cuts.wanted * (cuts.disturbed + 1) / (cuts.least_disturbed + 1):
            continue
        server.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(server.wait)
        await asyncio.to_thread(restart, server)
        cuts.proxy.port = urlsplit(server.url).port or 0
        cuts.outcome.counts["kill -9"] += 1
        cuts.disturbed += 1


async def _change_sources(
    _: object, builder: StoreBuilder, infos: list[PathInfo], cuts: _Cuts, chance: random.Random
) -> None:
    while not cuts.over:
        info = chance.choice(infos)
        file = Path(os.fsdecode(builder.real_path(info.path))) / "random"
        content, times = file.read_bytes(), os.stat(file)
        kind = chance.choice(["truncated", "grown", "replaced"])
        cuts.outcome.counts[f"sources {kind}"] += 1
        if kind == "replaced":
            cuts.replaced_at[info] = math.inf
        os.chmod(file.parent, 0o755)
        os.chmod(file, 0o644)
        if kind == "truncated":
            os.truncate(file, chance.randrange(len(content)))
        elif kind == "grown":
            file.write_bytes(content + b"more")
        else:
            other = file.with_name("other")
            other.write_bytes(chance.randbytes(len(content)))
            other.replace(file)
        await asyncio.sleep(chance.uniform(0, 0.05))
        file.write_bytes(content)
        os.chmod(file, 0o444)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        await asyncio.sleep(chance.uniform(0, 0.05))
        if kind == "replaced":
            cuts.replaced_at[info] = time.monotonic()


async def _change_cache(server: Server, _: object, __: object, cuts: _Cuts, chance: random.Random) -> None:
    while not cuts.over:
        await asyncio.sleep(chance.uniform(0, 0.05))
        files = [*(server.cache_dir / "nar").iterdir()]
        if files:
            with suppress(FileNotFoundError, ValueError):
                _damage(chance.choice(files), chance, cuts.outcome)


def _damage(file: Path, chance: random.Random, outcome: Outcome) -> None:
    size = file.stat().st_size
    kind = chance.choice(["flipped", "truncated", "removed", "emptied"])
    if kind == "flipped":
        flip(file, chance.randrange(size))
    elif kind == "truncated":
        os.truncate(file, chance.randrange(size))
    elif kind == "emptied":
        os.truncate(file, 0)
    else:
        file.unlink()
    outcome.counts[f"cache files {kind}"] += 1


def network_cuts(arena: Arena) -> None:
    _attack(arena, "by the network", _leave_alone, part=0.4)


def kill_cuts(arena: Arena) -> None:
    _attack(arena, "by kill -9 of the server and the network", _kill, part=0.15, least_disturbed=arena.form.kills)


def source_cuts(arena: Arena) -> None:
    _attack(arena, "by sources that change, and the network", _change_sources, part=0.15)


def cache_cuts(arena: Arena) -> None:
    _attack(arena, "by files of the cache that change, and the network", _change_cache, part=0.15)


def full_disk_cuts(arena: Arena) -> None:
    """Put the cache on a disk that is always full. Needs root."""
    if os.geteuid() != 0:
        print("SKIPPED: cuts with a full disk: not root")
        return
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        program = with_small_disk(Path(directory), _SMALL_DISK)
        name = f"with a full disk of {_SMALL_DISK} for the cache, and the network"
        _attack(arena, name, _leave_alone, part=0.15, program=program, cache_dir=Path(directory))


ALL = [network_cuts, kill_cuts, source_cuts, cache_cuts, full_disk_cuts]
