"""Store paths that became valid, and paths that were garbage-collected, since the last look at the database.

Nix never uses a number of ValidPaths again (new_paths.py), so the rows up to a number only become fewer: one count
shows whether paths were collected. Only then are they compared with a copy of the paths and numbers, which SQLite keeps
in a temporary file.
"""

import time
from typing import NamedTuple

from harmonia.nix.store_path import StorePath
from harmonia.store.new_paths import Cursor, NewPaths
from harmonia.store.newly_published import NewlyPublished
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

_PAGE_PATHS = 500  # new paths in one look; the rest waits for the next one
_MAX_COLLECTED = 10_000  # collected paths found by one comparison
_MAX_KNOWN_PATHS = 2_000_000  # for which the temporary file takes some 200 MB
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
    number: int
    """The path's `ValidPaths.id`."""


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
        self._newly_published: NewlyPublished[ValidPath] = NewlyPublished(store, policy)
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
        self._newly_published.forget()
        return self._cursor

    def poll(self) -> Changes | None:
        """Return the changes since the last call, or None if there are none.

        Raises StoreUnavailableError if the database cannot be read, or was replaced: then call `begin`.
        """
        assert self._cursor is not None  # noqa: S101 (`begin` is called first)
        generation = self._store.database.generation()
        now = time.monotonic()
        if generation == self._generation and not self._newly_published.is_due:
            return None
        collected: list[StorePath] = []
        complete = True
        if now >= self._not_before:
            collected, complete = self._take_collected()
            self._not_before = time.monotonic() + _COST_FACTOR * (time.monotonic() - now)
        elif generation != self._generation:
            complete = False
        rows = self._store.database.query(_NEW, self._cursor.number, _PAGE_PATHS)
        new = [path for row in rows if (path := self._valid_path(*row)) is not None]
        before = self._cursor
        if rows:
            self._cursor = before._replace(number=rows[-1][0])
            self._old_paths += len(rows)
        valid = list(self._newly_published.select(new))
        for path in new if self._knows_all else valid:
            self._store.database.query(_ADD, f"{self._store.store_dir}/{path.path}", path.number)
        if complete and len(rows) < _PAGE_PATHS:
            self._generation = generation
        return Changes(valid, collected, self._cursor) if valid or collected or before != self._cursor else None

    def _valid_path(self, number: int, text: str, size: int | None) -> ValidPath | None:
        path = self._store.usable_path(text)
        return None if path is None else ValidPath(path, max(size or 0, 0), number)

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
        paths = filter(None, (self._store.usable_path(text) for (text,) in rows))
        return [path for path in paths if self._policy is None or self._policy.permits_name(path)], complete

    def _count_old(self, number: int) -> int:
        [(total, newer)] = self._store.database.query(_COUNTS, number)
        return int(total) - int(newer)
