"""Which store path has the debug info of a build id: an index over `lib/debug/.build-id` of all valid paths.

Separate debug info lies in `lib/debug/.build-id/xx/yyyy.debug`, where `xxyyyy` is the build id that the linker noted in
the binary. What counts is what Nix counts that writes the same index into a binary cache (`index-debug-info`,
`src/libstore/binary-cache-store.cc`): regular files, in directories that are no symlinks, so that they are in the NAR.

Each path is looked at once, when it is new. The database numbers paths in the order in which they become valid and uses
no number twice, so that one number tells how far we came. The index is a file that all processes read and one at a time
writes: the one with the lock on the file beside it, which the kernel takes from it when it dies. Of what the index says
nothing is believed of a path before the database was asked.
"""

import fcntl
import hashlib
import logging
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

from harmonia.errors import FormatError, StoreUnavailableError
from harmonia.nix.store_path import StorePath
from harmonia.store import Store

BUILD_ID = re.compile(r"[0-9a-f]{4,128}")
"""20 bytes with GNU ld's SHA-1, 16 with its MD5 or a UUID, 8 with lld; any number can be given to the linker."""

_DIRECTORY = "lib/debug/.build-id"
_SUFFIX = ".debug"
_BATCH = 4000  # paths that are looked at between two transactions
_POLL = 10.0  # seconds between two looks for new paths that nobody asked for
_SWEEP = 3600.0  # seconds between two searches for paths of the index that are gone

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

_log = logging.getLogger("harmonia")


def member(build_id: str) -> str:
    """Where a debug file with that build id lies in its store path."""
    return f"{_DIRECTORY}/{build_id[:2]}/{build_id[2:]}{_SUFFIX}"


def build_ids(root: bytes) -> Iterator[str]:
    """The build ids of the debug files in the store object at `root`. For all but a few, that is one failing stat."""
    directory = f"{os.fsdecode(root)}/{_DIRECTORY}"
    try:
        status = os.lstat(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    above = (root, root + b"/lib", root + b"/lib/debug")
    if not all(stat.S_ISDIR(each.st_mode) for each in (status, *map(os.lstat, above))):
        return
    for first in list(os.scandir(directory)):
        if re.fullmatch("[0-9a-f]{2}", first.name) and first.is_dir(follow_symlinks=False):
            for file in list(os.scandir(first.path)):
                build_id = first.name + file.name.removesuffix(_SUFFIX)
                if file.name.endswith(_SUFFIX) and BUILD_ID.fullmatch(build_id) and file.is_file(follow_symlinks=False):
                    yield build_id


class DebugInfo:
    """The index of a store, kept in `directory`; in memory, where that cannot be written.

    For any thread. Its methods block, and raise StoreUnavailableError.
    """

    def __init__(self, store: Store, db_path: str, directory: str) -> None:
        """`store` is for the index alone. Nothing is opened yet, so that the process may still fork."""
        name = hashlib.blake2b(os.fsencode(os.path.abspath(db_path)), digest_size=8).hexdigest()
        self._store = store
        self._db_path = db_path
        self._path: str | None = os.path.join(directory, f"{name}.sqlite")
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._lock = threading.Lock()  # for the two databases, not for looking at paths
        self._wanted = threading.Event()
        self._gone: set[int] = set()
        self._next_sweep = 0.0
        self._damaged = False
        self._started_over = False

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
                rows = self._index().execute(
                    "select number, path from Files join Paths using (number) where build_id = ?", (build_id,)
                )
                found = rows.fetchall()
            except sqlite3.Error as error:
                self.close()
                # Another than OperationalError tells of the content. That one: it is not made yet, or being written.
                self._damaged |= not isinstance(error, sqlite3.OperationalError)
                return [], False
            gone = {number for number, path in found if not self._is_valid(number, path)}
            self._gone |= gone
            return [StorePath(path) for number, path in found if number not in gone], complete

    def update(self) -> None:
        """Look at all paths that are new, unless another process just does."""
        with self._lock, suppress(sqlite3.Error):
            if not self._damaged and not self._gone and self._is_complete():
                return
        try:
            with self._alone() as alone:
                if alone:
                    self._update()
        except OSError as error:
            _log.warning("the index of debug info is kept in memory: %s: %s", error.filename, error.strerror)
            with self._lock:
                self.close()
                self._path = None
            self.hurry()

    def _run(self) -> None:
        while True:
            try:
                self.update()
            except StoreUnavailableError as error:
                _log.debug("the index of debug info is not up to date: %s", error)  # a request is told
            self._wanted.wait(_POLL)
            self._wanted.clear()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether this process may write."""
        if self._path is None:
            yield True
            return
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            yield alone
        finally:
            os.close(descriptor)

    def _update(self) -> None:
        try:
            with self._lock:
                checked: int | None = self._prepare()
            while checked is not None:
                checked = self._look_at_some(checked)
        except sqlite3.Error as error:
            _log.warning("the index of debug info cannot be used, it is built anew: %s", error)
            with self._lock:
                self.close()
                if self._started_over:  # so it is the disk
                    self._path = None
                self._started_over = True
                for path in [f"{self._path}-journal", self._path] if self._path else []:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
            self.hurry()

    def _prepare(self) -> int:
        """Make the index one of this database, forget what is gone, and return how far it came."""
        index = self._index(create=True)
        index.executescript(_SCHEMA)
        if self._damaged and index.execute("pragma quick_check").fetchall() != [("ok",)]:
            raise sqlite3.DatabaseError("it is damaged")
        self._damaged = False
        checked = self._checked()
        if checked is None or checked > self._newest():
            with self._transaction() as index:
                for table in ("Files", "Paths", "State"):
                    index.execute(f"delete from {table}")  # noqa: S608 (the names above)
                index.execute("insert into State values (?, 0)", (self._origin(),))
            checked = 0
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + _SWEEP
            self._gone |= {row[0] for row in index.execute("select * from Paths") if not self._is_valid(*row)}
        if self._gone:
            with self._transaction() as index:
                index.executemany("delete from Paths where number = ?", [(number,) for number in self._gone])
                index.execute("delete from Files where number not in (select number from Paths)")  # one walk for all
            self._gone.clear()
        return checked

    def _look_at_some(self, checked: int) -> int | None:
        """Go on from there. Returns how far it came, None where that is the end."""
        began = time.monotonic()
        with self._lock:
            newest = self._newest()
            rows = self._store.database.query(_NEW, checked, newest, _BATCH)
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
                    _log.warning("%s is not looked through for debug info: %s", path, error.strerror)
        checked = rows[-1][0] if len(rows) == _BATCH else newest
        with self._lock, self._transaction() as index:
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
        row = self._index().execute("select checked from State where origin = ?", (self._origin(),)).fetchone()
        return row and int(row[0])

    def _origin(self) -> str:
        """What the numbers are good for: another database has others."""
        try:
            return f"{self._store.store_dir}\n{self._store.real_dir}\n{os.stat(self._db_path).st_ino}"
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self._db_path}: {error}") from error

    def _index(self, *, create: bool = False) -> sqlite3.Connection:
        """The connection to the index, of which another process may have made a new one."""
        if self._connection is not None and self._opened != self._file():
            self.close()
        if self._connection is None:
            if self._path is None and not create:
                raise sqlite3.OperationalError("it is not made yet")
            uri = f"file:{quote(self._path)}?mode={'rwc' if create else 'rw'}" if self._path else "file::memory:"
            self._connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            self._opened = self._file()
        return self._connection

    def _file(self) -> tuple[int, int] | None:
        with suppress(OSError):
            if self._path:
                status = os.stat(self._path)
                return status.st_dev, status.st_ino
        return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        index = self._index()
        index.execute("begin immediate")
        with index:
            yield index
