"""Cursor over the paths of a store in the order in which they become valid, and a wait for the next ones.

Nix numbers valid paths: `ValidPaths.id` is `autoincrement` (Nix `src/libstore/schema.sql`), so a number is never used
again. SQLite has one writer at a time, so a reader never sees a number before a lower one. Both together make the
highest number read so far a complete record of progress.
"""

import ctypes
import os
import select
import time
from contextlib import suppress
from typing import NamedTuple

from harmonia.errors import StoreUnavailableError
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Store

PAGE_PATHS = 1000
"""The default size of a page."""
POLL_S = 1.0
"""The longest delay of `DatabaseChanges.wait` if the kernel reports no change, as in a network file system."""

# sqlite_sequence has the highest number ever used, even if its path was garbage-collected.
_NEWEST = "select coalesce(max(cast(seq as integer)), 0) from sqlite_sequence where name = 'ValidPaths'"
_PAGE = "select id, cast(path as text) from ValidPaths where id > ? order by id limit ?"
_DESCENDING = "select id, cast(path as text) from ValidPaths where id > ? and id <= ? order by id desc limit ?"

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100  # inotify(7)
_EVENTS_BYTES = 1 << 16


class Cursor(NamedTuple):
    """Progress in a database: all paths up to a number have been read."""

    database: str
    """The identity of the database, because each has its own numbers."""
    number: int


class NewPath(NamedTuple):
    number: int
    """The path's `ValidPaths.id`."""
    path: StorePath


class Page(NamedTuple):
    paths: list[NewPath]
    """Paths in the order in which they became valid. Malformed ones are left out."""
    cursor: Cursor
    """The cursor for the next page."""
    complete: bool
    """True if no valid path was left after this page."""


class NewPaths:
    """The paths that became valid after a cursor.

    Synchronous and stateless: the caller keeps the cursor. Not thread-safe, like the store. The methods raise
    StoreUnavailableError if the store's database cannot be read.
    """

    def __init__(self, store: Store, db_path: str) -> None:
        """Open nothing yet."""
        self._store = store
        self._db_path = db_path

    def newest(self) -> Cursor:
        """Return a cursor after all paths that are or were valid."""
        database = self._identity()
        [(number,)] = self._store.database.query(_NEWEST)
        return Cursor(database, number)

    def page(self, after: Cursor | None, limit: int = PAGE_PATHS) -> Page:
        """Return at most `limit` valid paths with a higher number than `after`.

        Begins with the first path if `after` is None, or belongs to another database, or is ahead of this one because
        a backup was restored.
        """
        newest = self.newest()
        is_ours = after is not None and after.database == newest.database and after.number <= newest.number
        number = after.number if after is not None and is_ours else 0
        rows = self._store.database.query(_PAGE, number, limit)
        complete = len(rows) < limit
        # A path may have become valid since `newest`. Paths up to `newest` without a row were garbage-collected.
        number = max([row[0] for row in rows[-1:]] + ([newest.number] if complete else [number]))
        return Page([new for row in rows if (new := self._new_path(*row))], Cursor(newest.database, number), complete)

    def newest_first(self, after: int, last: int, limit: int) -> tuple[list[NewPath], int]:
        """Return at most `limit` valid paths with numbers above `after`, from `last` down, and the last number left.

        If no path is left, that number is `after`.
        """
        rows = self._store.database.query(_DESCENDING, after, last, limit)
        left = rows[-1][0] - 1 if len(rows) == limit else after
        return [new for row in rows if (new := self._new_path(*row))], left

    def _new_path(self, number: int, text: str) -> NewPath | None:
        path = self._store.usable_path(text)
        return None if path is None else NewPath(number, path)

    def _identity(self) -> str:
        try:
            return f"{self._store.store_dir}\n{self._store.real_dir}\n{os.stat(self._db_path).st_ino}"
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self._db_path}: {error.strerror}") from error


class DatabaseChanges:
    """Notice of changes of an SQLite database, by inotify(7) on the directory of its log.

    Reports a superset: also changes of other tables, and of files beside the database. Open it before the first page is
    read, so that no change is missed. Not thread-safe.
    """

    def __init__(self, db_path: str) -> None:
        """Begin to collect changes.

        Without inotify, because its limits are reached or the directory is missing, `wait` polls.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify: int | None = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        directory = os.fsencode(os.path.dirname(db_path) or ".")
        # The directory, because Nix up to 2.21 removes and remakes the log. Reading the database modifies no file:
        # SQLite changes the -shm file through a mapping, which inotify does not report.
        events = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE
        if self._inotify == -1 or libc.inotify_add_watch(self._inotify, directory, events) == -1:
            self.close()

    def fileno(self) -> int | None:
        """Return a descriptor that is readable after a change until `clear`, or None without inotify."""
        return self._inotify

    def clear(self) -> None:
        """Forget all changes so far."""
        if self._inotify is not None:
            with suppress(BlockingIOError):
                while os.read(self._inotify, _EVENTS_BYTES):
                    pass

    def wait(self, timeout: float = POLL_S) -> bool:
        """Wait for a change since the last call, at most `timeout` seconds. Return True if there may be one.

        False means only that the kernel reported none: look at the database even then.
        """
        if self._inotify is None:
            time.sleep(timeout)
            return True
        ready, _, _ = select.select([self._inotify], [], [], timeout)
        if ready:
            self.clear()
        return bool(ready)

    def close(self) -> None:
        """Stop. `wait` may still be called, and polls then."""
        if self._inotify is not None and self._inotify >= 0:
            os.close(self._inotify)
        self._inotify = None
