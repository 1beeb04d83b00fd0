"""NAR of a valid store path, as the store object is now on disk."""

import os
import sys
from collections.abc import Generator, Hashable, Iterator
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

from harmonia.errors import CacheFileError, StoreObjectError
from harmonia.nix import base32
from harmonia.nix.nar import Segment
from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader
from harmonia.store.file_reader import Step
from harmonia.store.nar_layout import Layout
from harmonia.store.temp_roots import TempRootLease


class LayoutSource(Protocol):
    def open_layout(self, key: str, root: bytes, client: Hashable) -> Layout:
        """Return the layout of that key, which may still grow. Never waits."""

    def forget(self, key: str) -> None:
        """Drop a layout that is not true any longer."""


@dataclass(frozen=True, slots=True)
class StoreNar:
    """The NAR of a valid path, which is as long as was registered if the store object is still what it was then.

    To be closed.
    """

    info: PathInfo
    root: bytes
    layouts: LayoutSource
    temp_root: TempRootLease | None = None
    """What keeps the path from being collected until this is closed."""
    client: Hashable = None
    """Who asks: one client's walks do not keep others waiting."""

    def __str__(self) -> str:
        return os.fsdecode(self.root)

    @property
    def size(self) -> int:
        return self.info.nar_size

    @property
    def sha256(self) -> bytes:
        return self.info.nar_hash

    @property
    def key(self) -> str:
        """Name of its layout. The same path may come to be registered with other contents."""
        return f"{self.info.path.hash_part}-{base32.encode(self.info.nar_hash)}"

    def share(self) -> "StoreNar":
        """Return the same NAR for another owner, who closes it as well."""
        return replace(self, temp_root=self.temp_root and self.temp_root.share())

    def close(self) -> None:
        if self.temp_root is not None:
            self.temp_root.release()

    def layout(self) -> Layout:
        """Return what lies where in it, as far as that is known yet."""
        return self.layouts.open_layout(self.key, self.root, self.client)

    def check_layout(self, layout: Layout) -> None:
        """Raise the error of the walk, or StoreObjectError if the size found is not the size registered."""
        if layout.error is not None:
            raise copy(layout.error)
        if layout.size is not None and layout.size != self.size:
            self.layouts.forget(self.key)
            raise StoreObjectError(f"{self} has a NAR of {layout.size} bytes, but {self.size} were registered")

    def wait_covered(self, stop: int) -> Future[bytes] | None:
        """Return a future that ends when the bytes up to `stop` can be read without a wait; None if they can now."""
        return self.layout().wait_covered(stop)

    def read(self, start: int, stop: int | None) -> Generator[Step]:
        """Read a part. A future stands for a wait for the walk, which a caller may do in its own way.

        A long archive is sent while it is walked, and breaks off at its end if the size is wrong. A short one, of one
        block, is checked before its first byte.
        """
        try:
            yield from file_reader.chunks(self._segments(start, self.size if stop is None else stop))
        except (OSError, StoreObjectError, CacheFileError):
            self.layouts.forget(self.key)
            raise

    def _segments(self, start: int, stop: int) -> Iterator[Segment | Future[bytes]]:
        layout = self.layout()
        self.check_layout(layout)
        # Of one that is longer than registered, more than `stop` comes: the reader must not take it for whole.
        window = layout.window(start, sys.maxsize if stop == self.size else stop)
        for segment in window:
            if not isinstance(segment, Future):
                self.check_layout(layout)
                yield segment
                break
            yield segment
        yield from window
        self.check_layout(layout)
