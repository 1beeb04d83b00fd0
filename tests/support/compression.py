"""In-memory sources that are compressed in small frames, and the expected results."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from unittest.mock import patch

from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.nar_compressor import CompressedNar, Compressor
from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.store.file_reader import OpenSlice, Step
from support.running import wait_until

FRAME = 1000


def nothing(_start: int) -> None:
    pass


@dataclass
class Memory:
    """A source that records where it was read."""

    content: bytes
    sha256: bytes | None = None
    before: Callable[[int], None] = nothing
    """Called before each read."""
    reads: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        return f"/nix/store/{hashlib.sha256(self.content).hexdigest()}"

    @property
    def size(self) -> int:
        return len(self.content)

    def share(self) -> "Memory":
        return self

    def close(self) -> None:
        pass

    def read(self, start: int, stop: int) -> Generator[bytes]:
        self.reads.append(start)
        self.before(start)
        yield self.content[start:stop]


def nar(size: int = 10 * FRAME + 1, seed: int = 0, **options: object) -> Memory:
    """Return a source of which half is compressible."""
    part = random.Random(seed).randbytes(size // 2)
    content = part + bytes(size - len(part))
    return Memory(content, hashlib.sha256(content).digest(), **options)  # type: ignore[arg-type]


@contextmanager
def compressing(
    cache: DiskCache | None = None,
    *,
    indexes: DiskCache | None = None,
    threads: int = 3,
    frame_size: int = FRAME,
    **options: int,
) -> Iterator[Compressor]:
    with (
        ThreadPoolExecutor(threads) as pool,
        patch("harmonia.cache.zstd_frames.encoders", lambda _: (threads, pool)),
        patch.object(Encoding, "frame_size", frame_size),
    ):
        compressor = Compressor(Zstd(**options), cache, indexes)  # type: ignore[arg-type]
        yield compressor
        if cache:
            wait_until(lambda: not any(name.endswith(".growing") for name in os.listdir(cache.path(""))))
        compressor.encoder.foreign_encoder.shutdown()
        compressor.encoder.first_encoder.shutdown()


def everything(chunks: Iterable[bytes | None]) -> bytes:
    parts = []
    for chunk in chunks:
        if chunk is None:
            time.sleep(0.001)
        else:
            parts.append(chunk)
    return b"".join(parts)


def plain(steps: Generator[Step | None]) -> Generator[bytes | None]:
    """Yield the bytes of the steps, and None for each wait."""
    with closing(steps):
        for step in steps:
            if isinstance(step, OpenSlice):
                yield from iter(step.read, b"")
            elif isinstance(step, Future):
                while not step.done():
                    yield None
            else:
                yield step


def reading(body: CompressedNar, start: int = 0, stop: int | None = None) -> Generator[bytes | None]:
    """Read a part of a body, and close it."""
    with closing(body):
        yield from plain(body.read(start, stop))


def read(compressor: Compressor, source: Memory, start: int = 0, stop: int | None = None) -> bytes:
    return everything(reading(CompressedNar(compressor, source), start, stop))


def reference(source: Memory, frame_size: int = FRAME) -> bytes:
    """Return the expected bytes: each piece in its own frame, with a small first frame if there is more than 1 MiB."""
    starts = [*range(0, source.size or 1, frame_size)]
    if source.size > 1 << 20:
        starts.insert(1, 1 << 16)
    pieces = [source.content[start:stop] for start, stop in zip_longest(starts, starts[1:])]
    return b"".join(map(Encoding.of(Zstd()).compress, pieces))
