"""Durable queue of store paths to upload, in one SQLite file with one writer.

The queue survives the death of its process at any moment, and a full disk. A path leaves it by `remove` only. Its file
also holds the cursor up to which the store's new paths were queued: both change in one transaction, so no path is lost
or queued twice.

    with closing(UploadQueue("/var/lib/x/queue.sqlite")) as queue:
        queue.add(paths, cursor)
        for item in queue.due(limit):  # the oldest first
            queue.remove([item.path])  # uploaded, or no longer valid
            queue.postpone(item.path, "status 403")  # or failed: due again after a delay that doubles each time
"""

import logging
import os
import random
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from harmonia.errors import ConfigError, HarmoniaError
from harmonia.nix.store_path import StorePath
from harmonia.store.new_paths import Cursor

FIRST_DELAY_S = 2.0
MAX_DELAY_S = 3600.0
"""The bounds of the delay before a path that failed is due again. It doubles with each failure."""
_RETRY_S = 1.0  # after a full disk has refused a change
_JITTER = 0.25  # of the delay, in both directions, so that paths that failed together are not due together

_VERSION = 1
# An exclusive lock, kept while the file is open, is the only writer's. A journal that is overwritten instead of removed
# lets most deletions succeed on a full disk, because they need no new block.
_OPEN = """
pragma locking_mode = exclusive;
pragma journal_mode = persist;
pragma synchronous = full;
begin immediate;
commit
"""
_CREATE = f"""
begin;
create table if not exists Cursor (number integer not null, database text not null);
create table if not exists Items (
  number integer primary key,
  path text unique not null,
  added real not null,
  attempts integer not null default 0,
  due real not null default 0,
  error text);
create index if not exists ItemsByDue on Items (due);
pragma user_version = {_VERSION};
commit
"""

_ADD = "insert into Items (path, added) values (?, ?) on conflict (path) do nothing"
_REMOVE = "delete from Items where path = ?"
_POSTPONE = "update Items set attempts = ?, due = ?, error = ? where path = ?"
# A time further ahead than any delay means that the clock was set back.
_DUE = "select path, added, attempts, error from Items where due <= ? or due > ? order by number limit ?"
_NEXT = "select min(due) from Items where due > ?"
_STATISTICS = "select count(*), coalesce(sum(attempts > 0), 0), min(added) from Items"

_log = logging.getLogger("harmonia")


class QueueWriteError(HarmoniaError):
    """The queue's file cannot be written now, for example because the disk is full."""


class Item(NamedTuple):
    path: StorePath
    added: float
    """The time at which it was queued, in seconds since 1970."""
    attempts: int
    """The number of failures."""
    error: str | None
    """The cause of the last failure."""


class Statistics(NamedTuple):
    items: int
    failing: int
    """The number of items that failed at least once."""
    oldest: float | None
    """The time at which the oldest item was queued, in seconds since 1970."""


class UploadQueue:
    """The queue in a file. Not thread-safe; all methods block, for a few milliseconds unless the disk is slow.

    Methods that return what is in the file raise ConfigError if it cannot be read: it is damaged, or its disk fails.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time, *, setting: str = "watch.state_dir") -> None:
        """Open the file, or create it.

        `clock` returns seconds since 1970. `setting` is the name of the setting that `path` is from. Raises ConfigError
        if the file cannot be used, or another process uses it.
        """
        self._path = path
        self._setting = setting
        self._clock = clock
        self._unwritten: dict[StorePath, tuple[int, float, str] | None] = {}
        """Changes that a full disk has refused, by path: attempts, due and error, or None for a removal."""
        self._failed_at: float | None = None
        try:
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise _unusable(path, error, setting) from None
        try:
            [(version,)] = self._connection.execute("pragma user_version")
            if version not in (0, _VERSION):
                raise ConfigError(f"the queue {path!r} is of a newer version of Harmonia; set another {setting}")
            self._connection.executescript(_OPEN if version else _OPEN + ";" + _CREATE)
            [(state,)] = self._connection.execute("pragma quick_check(1)")
            if state != "ok":
                raise sqlite3.DatabaseError(state)
        except sqlite3.Error as error:
            self._connection.close()
            raise _unusable(path, error, setting) from None
        except BaseException:
            self._connection.close()
            raise

    def cursor(self) -> Cursor | None:
        """Return the cursor of the last `add` that had one, or None."""
        rows = self._read("select database, number from Cursor")
        return Cursor(*rows[0]) if rows else None

    def add(self, paths: Iterable[StorePath], cursor: Cursor | None = None) -> int:
        """Queue paths, and keep the cursor, in one transaction. Return the number of new paths.

        A path that is queued keeps its place and its delay. Raises QueueWriteError if the file cannot be written:
        nothing has changed then.
        """
        now = self._clock()
        added = [(path, now) for path in paths]

        def write() -> int:
            before = self._connection.total_changes
            self._connection.executemany(_ADD, added)
            count = self._connection.total_changes - before
            if cursor is not None:
                self._connection.execute("delete from Cursor")
                self._connection.execute("insert into Cursor (database, number) values (?, ?)", cursor)
            return count

        return self._write(write)

    def due(self, limit: int, excluded: Collection[StorePath] = ()) -> list[Item]:
        """Return at most `limit` paths that are due now, except `excluded`, the oldest first."""
        now = self._clock()
        most = limit + len(excluded) + len(self._unwritten)
        rows = self._read(_DUE, now, now + 2 * MAX_DELAY_S, most)
        items = (Item(StorePath(path), *rest) for path, *rest in rows)
        return [item for item in items if item.path not in excluded and item.path not in self._unwritten][:limit]

    def next_due(self) -> float | None:
        """Return the time at which the next path becomes due that is not due now, or None."""
        [(due,)] = self._read(_NEXT, self._clock())
        return None if due is None else float(due)

    def remove(self, paths: Iterable[StorePath]) -> None:
        """Remove paths. On a full disk, they return after the next start of the process."""
        self._unwritten.update(dict.fromkeys(paths))
        self._flush()

    def postpone(self, item: Item, error: str, least: float = 0) -> float:
        """Count a failure of an item. Return the delay until it is due again, in seconds, at least `least`."""
        jitter = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 (no secret)
        delay: float = max(min(FIRST_DELAY_S * 2 ** min(item.attempts, 30), MAX_DELAY_S) * jitter, least)
        self._unwritten[item.path] = item.attempts + 1, self._clock() + delay, error
        self._flush()
        return delay

    def statistics(self) -> Statistics:
        """Return counts of the queued paths."""
        [row] = self._read(_STATISTICS)
        return Statistics(*row)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._connection.close()

    def _read(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise _unusable(self._path, error, self._setting) from None

    def _flush(self) -> None:
        """Write the changes. If the disk has just refused that, wait for a second, or for the next `add`."""
        if self._failed_at is None or time.monotonic() - self._failed_at > _RETRY_S:
            with suppress(QueueWriteError):
                self._write(lambda: 0)

    def _write(self, write: Callable[[], int]) -> int:
        """Run `write` in a transaction, after the changes that a full disk has refused."""
        try:
            self._connection.execute("begin immediate")
            for path, change in self._unwritten.items():
                if change is None:
                    self._connection.execute(_REMOVE, (path,))
                else:
                    self._connection.execute(_POSTPONE, (*change, path))
            count = write()
            self._connection.execute("commit")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                self._connection.execute("rollback")
            if self._failed_at is None:
                _log.error("cannot write the queue %s: %s; trying again", self._path, error)
            self._failed_at = time.monotonic()
            raise QueueWriteError(f"cannot write {self._path}: {error}") from error
        if self._failed_at is not None:
            _log.info("the queue %s can be written again", self._path)
        self._failed_at = None
        self._unwritten.clear()
        return count


def _unusable(path: str, error: sqlite3.Error, setting: str) -> ConfigError:
    code = error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else None
    if code == sqlite3.SQLITE_BUSY:
        return ConfigError(f"another process uses the queue {path!r}; stop that process, or set another {setting}")
    if code == sqlite3.SQLITE_CANTOPEN:
        directory = os.path.dirname(path)
        return ConfigError(f"cannot open the queue {path!r}: {error}; make {directory!r} a writable directory")
    if code == sqlite3.SQLITE_FULL:
        return ConfigError(f"cannot write the queue {path!r}: {error}; make room on the disk")
    return ConfigError(
        f"cannot use the queue {path!r}: {error}; remove the file: the new queue begins with the next new path"
    )
