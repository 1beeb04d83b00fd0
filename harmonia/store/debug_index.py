"""Which store path has the debug info of a build id: an index over `lib/debug/.build-id` of all valid paths.

Each path is looked at once, when it is new. The database numbers paths in the order in which they become valid and uses
no number twice, so that one number tells how far we came. Of what the index says nothing is believed of a path before
the database was asked.
"""

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from contextlib import suppress

from harmonia.errors import SHORTAGES, FormatError, StoreUnavailableError
from harmonia.nix.build_id import build_ids
from harmonia.nix.store_path import StorePath
from harmonia.store.index_file import FAILURES, IndexFile
from harmonia.store.store import Store

_BATCH_PATHS = 4000  # paths that are looked at between two transactions
_POLL_S = 10.0  # seconds between two looks for new paths that nobody asked for
_SWEEP_INTERVAL_S = 3600.0  # seconds between two searches for paths of the index that are gone
_SWEEP_BATCH_PATHS = 500  # paths of the index that are compared with the database while lookups wait

_SCHEMA = """
begin immediate;
create table if not exists State (origin text not null, checked integer not null);
create table if not exists Paths (number integer primary key, path text not null);
create table if not exists Files (build_id text, number integer, primary key (build_id, number)) without rowid;
commit
"""

# Nix `src/libstore/schema.sql`: ValidPaths.id is `autoincrement`, so SQLite keeps the highest ever given here.
_NEWEST = "select coalesce(max(seq), 0) from sqlite_sequence where name = 'ValidPaths'"
_NEW = """
select id, cast(path as text) from ValidPaths
where id > ? and id <= ? and path not glob '*.drv' order by id limit ?
"""
_VALID = "select 1 from ValidPaths where id = ? and path = ?"
_VALID_BATCH = "select id, cast(path as text) from ValidPaths where id in (select value from json_each(?))"

_log = logging.getLogger("harmonia")


class DebugInfo:
    """The index of a store, kept in `directory`; in memory, where that cannot be written.

    For any thread. Its methods block, and raise StoreUnavailableError.
    """

    def __init__(self, store: Store, db_path: str, directory: str) -> None:
        """`store` is for the index alone. Nothing is opened yet, so that the process may still fork."""
        name = hashlib.blake2b(os.fsencode(os.path.abspath(db_path)), digest_size=8).hexdigest()
        self._store = store
        self._db_path = db_path
        self._index = IndexFile(os.path.join(directory, f"{name}.sqlite"))
        self._lock = threading.Lock()  # for the two databases, not for looking at paths
        self._wanted = threading.Event()
        self._gone: set[int] = set()
        self._next_sweep = 0.0
        self._damaged = False

    def start(self) -> None:
        """Keep the index up to date from now on, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="debug-info", daemon=True).start()

    def hurry(self) -> None:
        """Somebody waits for the paths that are new."""
        self._wanted.set()

    def look_up(self, build_id: str) -> tuple[list[StorePath], bool]:
        """The valid paths that have the debug file; and whether there are no new ones yet to be looked at."""
        with self._lock:
            try:
                complete = self._is_complete()  # before the search: what is valid by now is then found
                rows = self._index.connection().execute(
                    "select number, path from Files join Paths using (number) where build_id = ?", (build_id,)
                )
                found = rows.fetchall()
            except FAILURES as error:
                self._index.close()
                # Another than OperationalError tells of the content. That one: it is not made yet, or being written.
                self._damaged |= not isinstance(error, sqlite3.OperationalError)
                return [], False
            gone = {number for number, path in found if not self._is_valid(number, path)}
            self._gone |= gone
            return [StorePath(path) for number, path in found if number not in gone], complete

    def update(self) -> None:
        """Look at all paths that are new, unless another process just does."""
        with self._lock, suppress(*FAILURES):
            if not self._damaged and not self._gone and self._is_complete():
                return
        try:
            with self._index.alone() as alone:
                if alone:
                    self._update()
        except OSError as error:
            if error.errno in SHORTAGES:
                raise StoreUnavailableError(f"cannot open {error.filename}: {error.strerror}") from error
            _log.warning("the index of debug info is kept in memory: %s: %s", error.filename, error.strerror)
            with self._lock:
                if self._index.move_to_memory():
                    self.hurry()

    def _run(self) -> None:
        while True:
            try:
                self.update()
            except StoreUnavailableError as error:
                _log.debug("the index of debug info is not up to date: %s", error)  # a request is told
            self._wanted.wait(_POLL_S)
            self._wanted.clear()

    def _update(self) -> None:
        try:
            with self._lock:
                checked: int | None = self._prepare()
            self._remove_gone()
            while checked is not None:
                checked = self._look_at_some(checked)
        except FAILURES as error:
            _log.warning("the index of debug info cannot be used, it is built anew: %s", error)
            with self._lock:
                self._index.start_over()
            self.hurry()

    def _prepare(self) -> int:
        """Make the index one of this database, and return how far it came."""
        index = self._index.connection(create=True)
        index.executescript(_SCHEMA)
        if self._damaged and index.execute("pragma quick_check").fetchall() != [("ok",)]:
            raise sqlite3.DatabaseError("it is damaged")
        self._damaged = False
        checked = self._checked()
        if checked is None or checked > self._newest():
            with self._index.transaction() as index:
                for table in ("Files", "Paths", "State"):
                    index.execute(f"delete from {table}")  # noqa: S608 (the names above)
                index.execute("insert into State values (?, 0)", (self._origin(),))
            checked = 0
        return checked

    def _remove_gone(self) -> None:
        """Remove paths from the index that are no longer valid: those already seen, and hourly all others."""
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + _SWEEP_INTERVAL_S
            last: int | None = -1
            while last is not None:
                with self._lock:
                    last = self._sweep(last)
        with self._lock:
            if not self._gone:
                return
            with self._index.transaction() as index:
                index.executemany("delete from Paths where number = ?", [(number,) for number in self._gone])
                index.execute("delete from Files where number not in (select number from Paths)")  # one walk for all
            self._gone.clear()

    def _sweep(self, last: int) -> int | None:
        """Note which of the next paths of the index, after number `last`, are gone. Return where to go on, if anywhere.

        One query for each batch, with the lock free in between: a lookup waits for one batch at most.
        """
        rows = dict(
            self._index.connection().execute(
                "select number, path from Paths where number > ? order by number limit ?", (last, _SWEEP_BATCH_PATHS)
            )
        )
        prefix = f"{self._store.store_dir}/"
        valid = dict(self._store.database.query(_VALID_BATCH, json.dumps(list(rows))))
        self._gone |= {number for number, path in rows.items() if valid.get(number) != prefix + path}
        return max(rows) if len(rows) == _SWEEP_BATCH_PATHS else None

    def _look_at_some(self, checked: int) -> int | None:
        """Go on from there. Returns how far it came, None where that is the end."""
        began = time.monotonic()
        with self._lock:
            newest = self._newest()
            rows = self._store.database.query(_NEW, checked, newest, _BATCH_PATHS)
        if checked == newest:
            return None
        found: list[tuple[int, StorePath, list[str]]] = []
        for number, text in rows:
            with suppress(FormatError):
                path = StorePath.in_dir(self._store.store_dir, text)
                try:
                    if ids := list(build_ids(self._store.real_path(path))):
                        found.append((number, path, ids))
                except OSError as error:
                    if error.errno in SHORTAGES:  # what was not seen now must not count as looked at
                        raise StoreUnavailableError(f"cannot look into {path}: {error.strerror}") from error
                    _log.warning("%s is not looked through for debug info: %s", path, error.strerror)
        checked = rows[-1][0] if len(rows) == _BATCH_PATHS else newest
        with self._lock, self._index.transaction() as index:
            index.executemany("insert or replace into Paths values (?, ?)", (row[:2] for row in found))
            files = ((build_id, number) for number, _, ids in found for build_id in ids)
            index.executemany("insert or replace into Files values (?, ?)", files)
            index.execute("update State set checked = ?", (checked,))
        if not self._wanted.is_set():
            time.sleep(time.monotonic() - began)  # no more than half of one processor for what nobody waits for
        return checked

    def _newest(self) -> int:
        [(newest,)] = self._store.database.query(_NEWEST)
        return int(newest)

    def _is_valid(self, number: int, path: str) -> bool:
        return bool(self._store.database.query(_VALID, number, f"{self._store.store_dir}/{path}"))

    def _is_complete(self) -> bool:
        return self._checked() == self._newest()

    def _checked(self) -> int | None:
        """Up to which number paths were looked at. None where the index is of another store."""
        row = (
            self._index.connection()
            .execute("select cast(checked as integer) from State where origin = ?", (self._origin(),))
            .fetchone()
        )
        return row and int(row[0])

    def _origin(self) -> str:
        """What the numbers are good for: another database has others."""
        try:
            return f"{self._store.store_dir}\n{self._store.real_dir}\n{os.stat(self._db_path).st_ino}"
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self._db_path}: {error}") from error

    def close(self) -> None:
        self._index.close()
