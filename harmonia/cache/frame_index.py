"""Index of a compressed file: size and digest of each frame. It outlives the file, whose frames can be made again."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import xxhash

from harmonia.cache.disk_cache import NarCache, open_cache
from harmonia.config.settings import Settings
from harmonia.errors import StoreObjectError

_FILES_BYTES = 64 << 20
"""Of disk for all indexes: each takes 4 KiB, or 16 bytes for each frame of 8 MiB if that is more."""
_HASH_BYTES = 32
_FRAME = struct.Struct("<Q8s")


@dataclass(frozen=True, slots=True)
class FrameIndex:
    sha256: bytes
    """Of the file."""
    frames: Sequence[tuple[int, bytes]]
    """The size of each frame and the XXH3-64 of its bytes."""

    @property
    def size(self) -> int:
        """The size of the file."""
        return sum(size for size, _ in self.frames)

    def frame_end(self, position: int) -> int:
        """Return where the frame ends that has the byte at `position`."""
        return next(end for end in accumulate(size for size, _ in self.frames) if end > position)

    def check(self, number: int, frame: bytes) -> None:
        """Raise StoreObjectError if a frame was made again with other bytes."""
        if frame_entry(frame) != self.frames[number]:
            raise StoreObjectError(f"frame {number} of the compressed NAR differs from the one made before")

    def dump(self) -> bytes:
        return self.sha256 + b"".join(_FRAME.pack(*frame) for frame in self.frames)

    @classmethod
    def load(cls, data: bytes) -> Self:
        """Return what was dumped."""
        return cls(data[:_HASH_BYTES], tuple(_FRAME.iter_unpack(data[_HASH_BYTES:])))


def frame_entry(frame: bytes) -> tuple[int, bytes]:
    """Return what an index has of a frame."""
    return len(frame), xxhash.xxh3_64_digest(frame)


def index_files(settings: Settings) -> NarCache | None:
    """Return the files of the indexes in `cache_dir`, or None if they cannot be kept."""
    return open_cache(settings, "frames", "frame indexes of compressed NARs", _FILES_BYTES)
