"""Index from build IDs to the store paths with their debug info, `lib/debug/.build-id` of all valid paths.

Each path is scanned once, when it is new. The database numbers paths in the order in which they become valid, and never
reuses a number, so the highest scanned number is the progress of the index. A lookup checks each path from the index
against the database before it returns it.
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

_BATCH_PATHS = 4000  # paths that are scanned between two transactions
_WORK_S = 0.001  # for which the background scan works, before it rests: each system call of the event loop waits for it
_REST_S = 0.01
_POLL_S = 10.0  # between two scans for new paths in the background
_SWEEP_INTERVAL_S = 3600.0  # between two searches for paths in the index that are no longer valid
_SWEEP_BATCH_PATHS = 500  # paths of the index that are compared with the database while lookups wait for the lock

_SCHEMA = """
begin immediate;
create table if not exists State (origin text not null, checked integer not null);
create table if not exists Paths (number integer primary key, path text not null);
create table if not exists Files (build_id text, number integer, primary key (build_id, number)) without rowid;
commit
"""

# ValidPaths.id is `autoincrement` (Nix `src/libstore/schema.sql`), so sqlite_sequence has the highest number ever used.
_NEWEST = "select coalesce(max(seq), 0) from sqlite_sequence where name = 'ValidPaths'"
_NEW = """
select id, cast(path as text) from ValidPaths
where id > ? and id <= ? and path not glob '*.drv' order by id limit ?
"""
_VALID = "select 1 from ValidPaths where id = ? and path = ?"
_VALID_BATCH = "select id, cast(path as text) from ValidPaths where id in (select value from json_each(?))"

_log = logging.getLogger("harmonia")


class DebugInfo:
    """The index of a store, in a file in `directory`, or in memory if the directory is not writable.

    Thread-safe. The methods block. They raise StoreUnavailableError if the store's database cannot be read.
    """

    def __init__(self, store: Store, db_path: str, directory: str) -> None:
        """Open nothing yet, so that the process may still fork. No other code may use `store`."""
        name = hashlib.blake2b(os.fsencode(os.path.abspath(db_path)), digest_size=8).hexdigest()
        self._store = store
        self._db_path = db_path
        self._index = IndexFile(os.path.join(directory, f"{name}.sqlite"))
        self._lock = threading.Lock()  # for the two databases; free while paths are scanned
        self._wanted = threading.Event()
        self._gone: set[int] = set()
        self._next_sweep = 0.0
        self._damaged = False

    def start(self) -> None:
        """Start a daemon thread that keeps the index up to date."""
        threading.Thread(target=self._run, name="debug-info", daemon=True).start()

    def scan_soon(self) -> None:
        """Make the thread scan new paths at once, because a request waits for them."""
        self._wanted.set()

    def look_up(self, build_id: str) -> tuple[list[StorePath], bool]:
        """Return the valid paths with the debug file, and whether the index covers all valid paths."""
        with self._lock:
            try:
                complete = self._is_complete()  # first, so that the search covers all paths that are valid now
                rows = self._index.connection().execute(
                    "select number, path from Files join Paths using (number) where build_id = ?", (build_id,)
                )
                numbered = rows.fetchall()
            except FAILURES as error:
                self._index.close()
                # OperationalError: the index does not exist yet, or is locked. All others: its content is damaged.
                self._damaged |= not isinstance(error, sqlite3.OperationalError)
                return [], False
            gone = {number for number, path in numbered if not self._is_valid(number, path)}
            self._gone |= gone
            return [StorePath(path) for number, path in numbered if number not in gone], complete

    def update(self) -> None:
        """Scan all new paths, unless another process is doing it."""
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
            _log.warning(
                "cannot store the index of debug info: %s: %s; keeping it in memory", error.filename, error.strerror
            )
            with self._lock:
                if self._index.move_to_memory():
                    self.scan_soon()

    def _run(self) -> None:
        while True:
            try:
                self.update()
            except StoreUnavailableError as error:
                # A request that needs the index gets 503.
                _log.debug("cannot update the index of debug info: %s; trying again in %g s", error, _POLL_S)
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
            _log.warning("cannot use the index of debug info: %s; rebuilding it", error)
            with self._lock:
                self._index.start_over()
            self.scan_soon()

    def _prepare(self) -> int:
        """Create the tables, reset an index of another database, and return the highest scanned number."""
        index = self._index.connection(create=True)
        index.executescript(_SCHEMA)
        if self._damaged and index.execute("pragma quick_check").fetchall() != [("ok",)]:
            raise sqlite3.DatabaseError("the file is damaged")
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
        """Remove invalid paths from the index: those found by lookups at each call, and all others once an hour."""
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
                index.execute("delete from Files where number not in (select number from Paths)")  # one scan for all
            self._gone.clear()

    def _sweep(self, last: int) -> int | None:
        """Collect the invalid paths in the next batch of the index, after number `last`.

        Returns the last number of the batch, or None after the last batch. The lock is free between two batches, so a
        lookup waits for at most one.
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
        """Scan the next batch of paths, after number `checked`.

        Returns the highest scanned number, or None if there was nothing to scan.
        """
        with self._lock:
            newest = self._newest()
            rows = self._store.database.query(_NEW, checked, newest, _BATCH_PATHS)
        if checked == newest:
            return None
        scanned: list[tuple[int, StorePath, list[str]]] = []
        began = time.monotonic()
        for number, text in rows:
            if time.monotonic() - began > _WORK_S:
                self._wanted.wait(_REST_S)
                began = time.monotonic()
            name = os.path.basename(text)
            with suppress(FormatError):
                try:
                    if ids := list(build_ids(os.fsencode(f"{self._store.real_dir}/{name}"))):
                        scanned.append((number, StorePath.in_dir(self._store.store_dir, text), ids))
                except OSError as error:
                    if error.errno in SHORTAGES:  # a temporary problem: scan the path again later
                        raise StoreUnavailableError(f"cannot read {name}: {error.strerror}") from error
                    _log.warning(
                        "cannot scan %s for debug info: %s; its debug info is not served", name, error.strerror
                    )
        checked = rows[-1][0] if len(rows) == _BATCH_PATHS else newest
        with self._lock, self._index.transaction() as index:
            index.executemany("insert or replace into Paths values (?, ?)", (row[:2] for row in scanned))
            files = ((build_id, number) for number, _, ids in scanned for build_id in ids)
            index.executemany("insert or replace into Files values (?, ?)", files)
            index.execute("update State set checked = ?", (checked,))
        return checked

    def _newest(self) -> int:
        [(newest,)] = self._store.database.query(_NEWEST)
        return int(newest)

    def _is_valid(self, number: int, path: str) -> bool:
        return bool(self._store.database.query(_VALID, number, f"{self._store.store_dir}/{path}"))

    def _is_complete(self) -> bool:
        return self._checked() == self._newest()

    def _checked(self) -> int | None:
        """Return the highest scanned number, or None if the index belongs to another database."""
        row = (
            self._index.connection()
            .execute("select cast(checked as integer) from State where origin = ?", (self._origin(),))
            .fetchone()
        )
        return row and int(row[0])

    def _origin(self) -> str:
        """Return the identity of the database, because each database has its own numbers."""
        try:
            return f"{self._store.store_dir}\n{self._store.real_dir}\n{os.stat(self._db_path).st_ino}"
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self._db_path}: {error}") from error

    def close(self) -> None:
        """Close the index."""
        self._index.close()
