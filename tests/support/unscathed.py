"""Check that a server is unharmed after a fault: nothing leaks, and the next responses are right."""

import re
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from harmonia.cache.growing_file import GROWING
from harmonia.nix.path_info import PathInfo
from support.running import Server, nar_url, open_files, unpacked, wait_until

THREADS = 48
"""More than the pools of a worker have at most (`harmonia/process/threads.py`), fewer than one for each of `MANY`."""
CONNECTIONS = 6
"""Database connections: one for each thread that uses the database."""
MEMORY = 48 << 20
"""Bytes that the malloc of a worker may keep for reuse, for 16 reading and 8 compressing threads."""
MANY = 200
"""Number of clients: enough that a leaked connection, file, thread, or share of `MEMORY` of each would be noticed."""


@dataclass(frozen=True)
class Held:
    """The resources of a server's workers."""

    descriptors: Counter[str]
    threads: int
    memory: int
    growing: tuple[str, ...]
    workers: int

    @classmethod
    def by(cls, server: Server) -> "Held":
        names = [re.sub(r":\[\d+\]", "", name) for worker in server.workers for name in open_files(worker)]
        # Layouts are cached: each large one keeps one complete file open.
        layouts = {name for name in names if "/cache/layouts/" in name and Path(name).exists()}
        names = [name for name in names if name not in layouts or name.endswith(GROWING)]
        # libuv's spare descriptor, for a shortage of descriptors, is another file after it was used.
        names = ["/dev/null" if name == "/" else name for name in names]
        resident = [int(Path(f"/proc/{worker}/statm").read_text().split()[1]) for worker in server.workers]
        return cls(
            Counter(names),
            max(map(threads, server.workers)),
            sum(resident) * resource.getpagesize(),
            tuple(path.name for path in server.cache_dir.glob(f"*/*{GROWING}")),
            len(server.workers),
        )

    def beyond(self, before: "Held") -> list[object]:
        """Return the resources that exceed those before."""
        more = (self.descriptors - before.descriptors).items()
        return [
            *[(name, count) for name, count in more if "sqlite" not in name or self.descriptors[name] > CONNECTIONS],
            *[f"{self.threads} threads"] * (self.threads > THREADS),
            *[f"{self.memory - before.memory} bytes"] * (self.memory - before.memory > MEMORY * self.workers),
            *self.growing,
        ]


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@contextmanager
def unscathed(server: Server, *paths: PathInfo, seconds: float = 20) -> Iterator[None]:
    """Check that the block leaks nothing after `seconds`, and that all of `paths` are served before and after it."""
    for _ in range(2):
        serves(server, *paths)
    server.settle()
    wait_until(lambda: all(threads(worker) > 1 for worker in server.workers))  # serving starts threads
    before = Held.by(server)
    yield
    left: list[object] = []

    def is_as_before() -> bool:
        try:
            left[:] = Held.by(server).beyond(before)
        except (FileNotFoundError, ProcessLookupError):
            left[:] = ["a worker that ended just now"]
        return not left

    try:
        wait_until(is_as_before, seconds)
    except AssertionError:
        raise AssertionError(f"left behind: {left}") from None
    serves(server, *paths)


def serves(server: Server, *paths: PathInfo) -> None:
    """Check that the server serves these paths correctly."""
    for info in paths:
        narinfo = server.get(f"/{info.path.hash_part}.narinfo")
        assert narinfo.status == 200, narinfo
        assert f"\nNarSize: {info.nar_size}\n" in narinfo.text
        assert sha256(server.get(nar_url(info)).body).digest() == info.nar_hash
        assert sha256(unpacked(server.get(nar_url(info) + ".zst").body)).digest() == info.nar_hash
