"""Helpers for tests of the NAR cache on disk."""

import gc
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import CachedFile, Filler
from support.running import wait_until


@contextmanager
def at(directory: object, limit: int | None = None, *, bare: bool = False) -> Iterator[DiskCache]:
    yield DiskCache(str(directory), limit, bare=bare)


@contextmanager
def no_leak() -> Iterator[None]:
    """Fail if there are more descriptors or threads than before. Fewer are fine: an earlier test may have left some."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = count()
    yield
    if count() != before:
        gc.collect()
    assert all(now <= earlier for now, earlier in zip(count(), before, strict=True))


def opened(cache: DiskCache, key: str = "key") -> tuple[CachedFile, Filler | None]:
    found = cache.open_file(key)
    assert found is not None
    return found


def filling(cache: DiskCache, key: str = "key") -> tuple[CachedFile, Filler]:
    file, filler = opened(cache, key)
    assert filler is not None
    return file, filler


def fill(cache: DiskCache, key: str = "key", content: bytes = b"content") -> str:
    """Fill a key; return the path of the complete file."""
    file, filler = filling(cache, key)
    filler.append(content)
    filler.commit()
    file.close()
    return cache.path(key)


def read(file: CachedFile) -> bytes:
    file.refresh()
    return file.slice(0, file.size).read(file.size)


def cached_file(cache_dir: Path) -> Path:
    """Return the only file of a server's cache when it is complete."""
    wait_until(lambda: [file for file in (cache_dir / "nar").iterdir() if file.suffix != ".growing"])
    (file,) = (cache_dir / "nar").iterdir()
    return file


def flip(file: Path, position: int) -> None:
    """Change a byte without changing size and times."""
    times = os.stat(file)
    with file.open("r+b") as content:
        content.seek(position)
        (byte,) = content.read(1)
        content.seek(position)
        content.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def without(directory: object, why: int) -> str:
    return f"cannot write to the cache {directory}: {os.strerror(why)}; serving without it"


def stress(cache: DiskCache, chance: random.Random, filled_now: set[str]) -> None:
    """Open, fill, abandon and evict a few random keys, and check every content that is read."""
    for _ in range(100):
        key = chance.choice("abc")
        content = random.Random(key).randbytes(70_000)
        file, filler = opened(cache, key)
        if filler:
            assert key not in filled_now
            filled_now.add(key)
            size = chance.choice([30_000, 70_000, 70_000])
            for start in range(0, size, 10_000):
                filler.append(content[start : start + 10_000])
            filled_now.remove(key)
            if size < len(content):
                filler.abandon()
            else:
                filler.commit()
        seen = read(file)
        assert seen == content[: len(seen)]
        assert file.sha256 in (None, hashlib.sha256(content).digest())
        if file.whole:
            assert seen == content
        file.close()
        if chance.random() < 0.1:
            cache.evict()
