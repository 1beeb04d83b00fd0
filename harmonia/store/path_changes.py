"""Store paths that became valid, and paths that were garbage-collected, since the last look at the database.

Nix never uses a number of ValidPaths again (new_paths.py), so the rows up to a number only become fewer: one count
shows whether paths were collected. Only then are they compared with a copy of the paths and numbers, which SQLite keeps
in a temporary file.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath
from harmonia.store.new_paths import Cursor, NewPaths
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

_PAGE_PATHS = 500  # new paths in one look; the rest waits for the next one
_MAX_COLLECTED = 10_000  # collected paths found by one comparison
_MAX_KNOWN_PATHS = 2_000_000  # for which the temporary file takes some 200 MB
_MAX_UNPUBLISHED = 4096  # new paths that the publish policy does not allow yet
_UNPUBLISHED_S = 600.0  # for which these are looked at again
_UNPUBLISHED_INTERVAL_S = 2.0
_COST_FACTOR = 10  # minimum pause after a comparison, in multiples of its duration

_NEW = "select id, cast(path as text), cast(narSize as integer) from ValidPaths where id > ? order by id limit ?"
_CREATE = "create temp table known (path text primary key, id integer not null) without rowid"
# The index on `path` covers this query and the comparison, so no table row is read.
_FILL = "insert into temp.known select path, id from main.ValidPaths where id <= ? order by path limit ?"
_ADD = "insert or replace into temp.known values (?, ?)"
_COUNTS = "select (select count(*) from main.ValidPaths), (select count(*) from main.ValidPaths where id > ?)"
_TAKE_COLLECTED = """
delete from temp.known where path in (
  select path from temp.known as before
  where not exists (select 1 from main.ValidPaths as now where now.path = before.path and now.id = before.id) limit ?)
returning cast(path as text)
"""


class ValidPath(NamedTuple):
    path: StorePath
    nar_size: int
    """In bytes; 0 if it is unknown."""


class Changes(NamedTuple):
    valid: list[ValidPath]
    """Published paths that became valid, or that the publish policy has come to allow, in this order."""
    collected: list[StorePath]
    """Paths that are not valid any more. Each was published before."""
    cursor: Cursor


class PathChanges:
    """The changes of one store after a cursor. Not thread-safe. Only its thread may use `store`."""

    def __init__(self, store: Store, db_path: str, policy: PublishPolicy | None) -> None:
        self._store = store
        self._new_paths = NewPaths(store, db_path)
        self._policy = policy
        self._knows_all = policy is None or policy.by_name_alone
        """True if the name shows whether a collected path was published. Otherwise, only reported paths are known."""
        self._cursor: Cursor | None = None
        self._generation: object = None
        self._old_paths = 0
        """The number of valid paths up to the cursor, at the last comparison."""
        self._unpublished: deque[tuple[float, ValidPath, int]] = deque(maxlen=_MAX_UNPUBLISHED)
        self._recheck_at = 0.0
        self._not_before = 0.0

    def begin(self, cursor: Cursor | None) -> Cursor:
        """Copy the paths up to the cursor, and return it, or the newest one if that one belongs to another database.

        Raises StoreUnavailableError if the database cannot be read.
        """
        newest = self._new_paths.newest()
        is_ours = cursor is not None and cursor.database == newest.database and cursor.number <= newest.number
        database = self._store.database
        database.close()  # the temporary table ends with its connection
        database.query(_CREATE)
        self._cursor = cursor if cursor is not None and is_ours else newest
        if self._knows_all:
            database.query(_FILL, self._cursor.number, _MAX_KNOWN_PATHS)
        self._old_paths = self._count_old(self._cursor.number)
        self._generation = None
        self._unpublished.clear()
        return self._cursor

    def poll(self) -> Changes | None:
        """Return the changes since the last call, or None if there are none.

        Raises StoreUnavailableError if the database cannot be read, or was replaced: then call `begin`.
        """
        assert self._cursor is not None  # noqa: S101 (`begin` is called first)
        generation = self._store.database.generation()
        now = time.monotonic()
        if generation == self._generation and (not self._unpublished or now < self._recheck_at):
            return None
        collected: list[StorePath] = []
        complete = True
        if now >= self._not_before:
            collected, complete = self._take_collected()
            self._not_before = time.monotonic() + _COST_FACTOR * (time.monotonic() - now)
        elif generation != self._generation:
            complete = False
        rows = self._store.database.query(_NEW, self._cursor.number, _PAGE_PATHS)
        new = list(self._new_rows(rows))
        before = self._cursor
        if rows:
            self._cursor = before._replace(number=rows[-1][0])
            self._old_paths += len(rows)
        valid = list(self._published(new))
        if complete and len(rows) < _PAGE_PATHS:
            self._generation = generation
        return Changes(valid, collected, self._cursor) if valid or collected or before != self._cursor else None

    def _new_rows(self, rows: list[tuple[int, str, int | None]]) -> Iterator[tuple[float, ValidPath, int]]:
        until = time.monotonic() + _UNPUBLISHED_S
        for number, text, size in rows:
            if (path := self._store_path(text)) is not None:
                yield until, ValidPath(path, max(size or 0, 0)), number

    def _published(self, new: list[tuple[float, ValidPath, int]]) -> Iterator[ValidPath]:
        """Yield the published ones of the new paths, and of the earlier ones that were not published yet."""
        if self._policy is None:
            is_published: Callable[[StorePath], bool] = lambda _: True  # noqa: E731 (a name for the default)
        elif new or self._unpublished:
            is_published = self._policy.published_filter(self._store)
        candidates = new
        if (now := time.monotonic()) >= self._recheck_at:
            candidates = [each for each in self._unpublished if each[0] > now] + new
            self._unpublished.clear()
            self._recheck_at = now + _UNPUBLISHED_INTERVAL_S
        for each in candidates:
            _, valid, number = each
            published = is_published(valid.path)
            if published:
                yield valid
            elif not self._knows_all:
                self._unpublished.append(each)
            if published or self._knows_all:
                self._store.database.query(_ADD, f"{self._store.store_dir}/{valid.path}", number)

    def _take_collected(self) -> tuple[list[StorePath], bool]:
        """Return collected paths, and whether these are all."""
        assert self._cursor is not None  # noqa: S101 (`begin` is called first)
        count = self._count_old(self._cursor.number)
        if count == self._old_paths:
            return [], True
        rows = self._store.database.query(_TAKE_COLLECTED, _MAX_COLLECTED)
        complete = len(rows) < _MAX_COLLECTED
        if complete:
            self._old_paths = count
        paths = filter(None, (self._store_path(text) for (text,) in rows))
        return [path for path in paths if self._policy is None or self._policy.permits_name(path)], complete

    def _count_old(self, number: int) -> int:
        [(total, newer)] = self._store.database.query(_COUNTS, number)
        return int(total) - int(newer)

    def _store_path(self, text: str) -> StorePath | None:
        try:
            return StorePath.in_dir(self._store.store_dir, text)
        except FormatError:
            return None
