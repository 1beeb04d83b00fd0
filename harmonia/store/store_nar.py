"""NAR of a valid store path, read from the store object on disk."""

import hashlib
import os
import sys
from collections.abc import Generator, Hashable
from concurrent.futures import Future
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from harmonia.errors import CacheFileError, StoreObjectError
from harmonia.nix import base32
from harmonia.nix.nar import Segment
from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.store.file_reader import Step
from harmonia.store.nar_layout import Layout
from harmonia.store.temp_roots import TempRootLease

_STEP_S = 0.001  # for which small files are read to one chunk, so that the event loop can read them


class LayoutSource(Protocol):
    """A cache of layouts."""

    def open_layout(self, key: str, root: bytes, client: Hashable) -> Layout:
        """Return the layout with this key, which may still grow. The caller closes it. Do not block."""

    def forget(self, key: str) -> None:
        """Drop a layout that is no longer valid."""


@dataclass(frozen=True, slots=True)
class StoreNar:
    """The NAR of a valid path. The owner closes it.

    Size and hash are the registered ones, which the store object on disk may violate.
    """

    info: PathInfo
    root: bytes
    layouts: LayoutSource
    temp_root: TempRootLease | None = None
    """Protects the path from garbage collection until this NAR is closed."""
    client: Hashable = None
    """The client, for fair shares of the threads that walk trees."""
    reads_briefly: ClassVar[bool] = True
    """True because each step of `read` takes some milliseconds, unless it waits for the disk."""

    def __str__(self) -> str:
        return os.fsdecode(self.root)

    @property
    def size(self) -> int:
        """Return the registered size in bytes."""
        return self.info.nar_size

    @property
    def sha256(self) -> bytes:
        """Return the registered hash."""
        return self.info.nar_hash

    @property
    def key(self) -> str:
        """Return the key of the layout, which contains the hash: a path may be registered again with another NAR."""
        return f"{self.info.path.hash_part}-{base32.encode(self.info.nar_hash)}"

    def share(self) -> "StoreNar":
        """Return the same NAR for another owner, who closes it as well."""
        return replace(self, temp_root=self.temp_root and self.temp_root.share())

    def close(self) -> None:
        if self.temp_root is not None:
            self.temp_root.release()

    def layout(self) -> Layout:
        """Return the layout, which may still grow. The caller closes it."""
        return self.layouts.open_layout(self.key, self.root, self.client)

    def check_layout(self, layout: Layout) -> None:
        """Raise the error of the walk, or StoreObjectError if the actual size differs from the registered one."""
        if layout.error is not None:
            raise copy(layout.error)
        if layout.size is not None and layout.size != self.size:
            self.layouts.forget(self.key)
            raise StoreObjectError(f"{self}: its NAR has {layout.size} bytes, but {self.size} were registered")

    def wait_covered(self, stop: int) -> Future[bytes] | None:
        """Return a future that completes when the bytes up to `stop` are readable, or None if they are now."""
        with closing(self.layout()) as layout:
            return layout.wait_covered(stop)

    def read(self, start: int, stop: int | None) -> Generator[Step]:
        """Yield the bytes from `start` to `stop` or to the end. Yield a future if the caller has to wait for the walk.

        The bytes of a large tree follow its walk, and break off at the end if the size is wrong. The size of a tree
        with one block of entries is checked before the first byte.
        """
        try:
            with (
                closing(self.layout()) as layout,
                closing(self._segments(layout, start, self.size if stop is None else stop)) as segments,
            ):
                yield from file_reader.chunks(segments, max_seconds=_STEP_S)
        except (OSError, StoreObjectError, CacheFileError):
            self.layouts.forget(self.key)
            raise

    def read_whole(self) -> Generator[None, None, bytes]:
        """Return all bytes. Only for a NAR that fits into memory. Yields often, so that the caller can do other work.

        Raises StoreObjectError if the NAR does not have its registered size and hash.
        """
        nar = yield from tree_reader.read_small(self.root, self.size)
        if len(nar) != self.size:
            raise StoreObjectError(f"{self}: its NAR does not have its registered {self.size} bytes")
        if (sha256 := hashlib.sha256(nar).digest()) != self.sha256:
            actual, registered = map(base32.encode, (sha256, self.sha256))
            raise StoreObjectError(f"{self}: its NAR hash is sha256:{actual}, but sha256:{registered} was registered")
        return nar

    def _segments(self, layout: Layout, start: int, stop: int) -> Generator[Segment | Future[bytes]]:
        self.check_layout(layout)
        # Read beyond `stop` if the NAR is longer than registered, so that the reader does not accept it as complete.
        window = layout.window(start, sys.maxsize if stop == self.size else stop)
        for segment in window:
            if not isinstance(segment, Future):
                self.check_layout(layout)
                yield segment
                break
            yield segment
        yield from window
        self.check_layout(layout)
