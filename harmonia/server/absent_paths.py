"""Hash parts that no valid path has. They stay known while other paths become valid."""

import math
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TypeVar

from harmonia.errors import StoreUnavailableError
from harmonia.process.loop_reads import LoopReads
from harmonia.store.new_paths import Cursor, NewPaths

_MAX_PATHS = 8192
_MAX_AGE_S = 10.0  # for which only new rows are read to learn whether a missing path has become valid

_T = TypeVar("_T")


class AbsentPaths:
    """The hash parts for which recent lookups found no path. The caller calls `renew` when they may be out of date."""

    def __init__(self, new_paths: NewPaths, loop_reads: LoopReads) -> None:
        """Read `new_paths` on the event loop, through `loop_reads`."""
        self.hash_parts: set[str] = set()
        self.generation: Hashable = None
        """The generation of the database in which `hash_parts` have no path."""
        self.expires = math.inf
        """The time from which all of them are looked up again (time.monotonic). Finite after a commit."""
        self._newest: Cursor | None = None
        """The newest path before the lookups of all `hash_parts`, or None if it could not be read."""
        self._new_paths = new_paths
        self._loop_reads = loop_reads

    def add(self, hash_part: str, generation: Hashable) -> None:
        """Add a hash part that had no path in a generation of the database, unless a newer one is known."""
        if generation == self.generation and len(self.hash_parts) < _MAX_PATHS:
            self.hash_parts.add(hash_part)

    def renew(self, generation: Hashable) -> None:
        """Remove the hash parts that have expired, and those that have become valid before `generation`.

        Remove all if it is not certain which have become valid.
        """
        if monotonic() >= self.expires:
            self._clear()
        if generation == self.generation:
            return
        self.generation = generation
        page = None
        if self.hash_parts and self._newest is not None:
            page = self._read_now(partial(self._new_paths.page, self._newest))
        if page is not None and page.complete:
            self.hash_parts.difference_update(new.path.hash_part for new in page.paths)
            self._newest = page.cursor
            self.expires = min(self.expires, monotonic() + _MAX_AGE_S)
        else:
            self._clear()
            self._newest = self._read_now(self._new_paths.newest)

    def _clear(self) -> None:
        self.hash_parts.clear()
        self.expires = math.inf

    def _read_now(self, read: Callable[[], _T]) -> _T | None:
        """Return what is new in the database, or None if that would block."""
        if self._loop_reads.allowed:
            with suppress(StoreUnavailableError):  # perhaps only busy
                return self._loop_reads.run(read)
        return None
