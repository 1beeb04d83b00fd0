"""Local Nix store: read-only access to its database of valid paths and to its directory, without the Nix daemon.

The tables are those of Nix `src/libstore/schema.sql`, from Nix 2.3 on.
"""

import os
import sqlite3
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from harmonia.config.settings import NO_DATABASE, Settings
from harmonia.errors import FormatError, StoreObjectError, StoreUnavailableError
from harmonia.nix import content_address
from harmonia.nix.build_trace import Realisation
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.untrusted import excerpt

BUSY_TIMEOUT_S = 2.0
"""Timeout for a locked database. Nix writes in WAL mode, in which a reader does not wait."""

# One statement, so that a path and its references are consistent. The index on `path` finds the prefix.
# SQLite lets a column hold values of any type. The casts return only texts and numbers, like Nix's queries.
_PATH_INFO = """
select cast(path as text), cast(hash as text), cast(narSize as integer), cast(deriver as text), cast(sigs as text),
  cast(ca as text),
  (select group_concat(referred.path, ' ')
   from Refs join ValidPaths as referred on referred.id = reference where referrer = found.id)
from ValidPaths as found where path >= ? order by path limit 1
"""

_NEED_SIGNATURES = "select cast(path as text) from ValidPaths where coalesce(ca, '') = ''"

# Nix creates these tables at the first use of content-addressed derivations (`src/libstore/ca-specific-schema.sql`):
# Realisations up to Nix 2.34, BuildTraceV3 later. It never drops them.
_TABLES = "select count(*) from sqlite_master where type = 'table' and name in (?, ?)"
_REALISATION = """
select cast(path as text), cast(signatures as text),
  (select group_concat(other.drvPath || '!' || other.outputName || ' ' || referred.path, ' ')
   from RealisationsRefs join Realisations as other on other.id = realisationReference
   join ValidPaths as referred on referred.id = other.outputPath where referrer = found.id)
from Realisations as found join ValidPaths on ValidPaths.id = outputPath
where drvPath = ? and outputName = ? order by found.id limit 1
"""
_BUILD_TRACE = """
select cast(path as text), cast(signatures as text), null
from BuildTraceV3 as found join ValidPaths on path = outputPath
where drvPath = ? and outputName = ? order by found.id limit 1
"""
_REALISATION_IDS = """
select drvPath, outputName from Realisations join ValidPaths on ValidPaths.id = outputPath where path = ?
"""
_BUILD_TRACE_KEYS = "select drvPath, outputName from BuildTraceV3 where outputPath = ?"

_EMPTY = """
create table ValidPaths (id integer primary key autoincrement, path text unique, hash text, registrationTime integer,
  deriver text, narSize integer, ultimate integer, sigs text, ca text);
create table Refs (referrer integer, reference integer);
"""
"""The tables that we read, for a server without a local store."""

PathRow = tuple[str, str, int | None, str | None, str | None, str | None, str | None]
"""A row of _PATH_INFO."""

_NO_SHM = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)

_Signature = tuple[int, int, int, int]


def _signature(path: str) -> _Signature | None:
    """Return values that change when the file is replaced or written, or None if there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class Database:
    """A read-only connection to a `db.sqlite`, opened at the first query, and again if the file was replaced.

    Not thread-safe. The methods raise StoreUnavailableError if the database is busy for longer than `timeout` seconds,
    missing, or not a database.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._connection: sqlite3.Connection | None = None
        self._immutable = False
        self._opened: Hashable = None
        self._openings = 0

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return all rows of a statement."""
        return self._query(statement, parameters)

    def _query(
        self, statement: str, parameters: Sequence[object] = (), *, looks_again: bool = True
    ) -> list[tuple[Any, ...]]:
        """Return all rows like `query`. With `looks_again`, they are those of the file that is there afterwards."""
        try:
            while True:
                rows = self._connected().execute(statement, parameters).fetchall()
                # SQLite does not lock an immutable database. The rows are consistent if no process wrote meanwhile.
                if not looks_again or self._opened == self._state():
                    return rows
        except (sqlite3.Error, OSError, UnicodeDecodeError, MemoryError) as error:  # damage can raise the last two
            self.close()
            raise StoreUnavailableError(f"cannot read {self._path}: {str(error) or 'out of memory'}") from error

    def query_as_of_generation(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return all rows like `query`, but do not look whether the file was replaced after the last `generation`."""
        if self._connection is None or self._immutable:
            return self.query(statement, *parameters)
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except (sqlite3.Error, UnicodeDecodeError, MemoryError):
            return self.query(statement, *parameters)

    def generation(self) -> Hashable:
        """Return a token that changes whenever the database changes (PRAGMA data_version). No disk access."""
        [(version,)] = self._query("pragma data_version", looks_again=False)
        return self._openings, version  # data_version starts again with each connection

    def close(self) -> None:
        """Close the connection. The next query opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _state(self) -> Hashable:
        """Return the state in which the connection is usable: the file, and also its content if it is immutable."""
        if self._path == NO_DATABASE:
            return None
        signature = _signature(self._path)
        if signature is None:
            raise FileNotFoundError("the file does not exist")
        return (signature, _signature(self._path + "-wal")) if self._immutable else signature[:2]

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._opened != self._state():
            self.close()
        if self._connection is None and self._path == NO_DATABASE:
            self._connection = sqlite3.connect(NO_DATABASE, isolation_level=None, check_same_thread=False)
            self._connection.executescript(_EMPTY)
        elif self._connection is None:
            try:
                self._connection = self._open("mode=ro", immutable=False)
            except sqlite3.OperationalError as error:
                # Without write permission, SQLite reads a WAL database only if its -shm file exists. Nix up to 2.21
                # removes that file when it closes the database. If the log has no rows, the database file is complete.
                if error.sqlite_errorcode & 0xFF not in _NO_SHM:
                    raise
                self._connection = self._open("immutable=1", immutable=True)
        assert self._connection is not None  # noqa: S101 (opened above)
        return self._connection

    def _open(self, mode: str, *, immutable: bool) -> sqlite3.Connection:
        self._immutable = immutable
        self._openings += 1
        self._opened = self._state()  # before the file is read, so that a later change is detected
        if immutable and self._has_log():
            raise sqlite3.OperationalError("its log has rows, which cannot be read without the -shm file")
        uri = f"file:{quote(self._path)}?{mode}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )
        # Text that is not UTF-8 must not make a search fail. It only makes its own row malformed.
        connection.text_factory = lambda text: text.decode(errors="backslashreplace")
        try:
            connection.execute("select 1 from ValidPaths limit 1").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def _has_log(self) -> bool:
        return any(file and file[3] for file in map(_signature, (self._path + "-wal", self._path + "-journal")))


class Store:
    """A store with its directories and its database. Store paths begin with `store_dir`; their files are in `real_dir`.

    Not thread-safe. The methods block, often for one index lookup only. They raise StoreUnavailableError if the
    database cannot be read.
    """

    def __init__(self, store_dir: str, real_dir: str, db_path: str, timeout: float = BUSY_TIMEOUT_S) -> None:
        self.store_dir = store_dir
        self.real_dir = real_dir
        self._store_path = partial(StorePath.in_dir, store_dir)
        self.database = Database(db_path, timeout)
        self._is_local = db_path != NO_DATABASE

    @classmethod
    def of(cls, settings: Settings) -> "Store":
        """Return the store of the settings."""
        return cls(settings.virtual_nix_store, settings.real_store, settings.database)

    def real_path(self, path: StorePath) -> bytes:
        """Return the path of the store object on disk."""
        return os.fsencode(f"{self.real_dir}/{path}")

    def usable_path(self, path: str) -> StorePath | None:
        """Return the store path of a full path in the database, or None if it is malformed or in another directory."""
        try:
            return StorePath.in_dir(self.store_dir, path)
        except FormatError:
            return None

    def relative(self, path: str) -> str | None:
        """Return a path relative to the store directory, or None if it is elsewhere."""
        for directory in (self.store_dir, self.real_dir):
            if path.startswith(f"{directory}/"):
                return path[len(directory) + 1 :]
        return None

    def path_info(self, hash_part: str) -> PathInfo | None:
        """Return the valid path with this hash part, or None.

        Raises StoreObjectError if the row in the database is malformed or incomplete.
        """
        row = self.path_row(hash_part)
        return None if row is None else self.parse_row(row)

    def path_row(self, hash_part: str, *, as_of_generation: bool = False) -> PathRow | None:
        """Return the row of the valid path with this hash part, with its references, or None.

        With `as_of_generation`, the database file is that of the last `generation`, which saves two system calls.
        """
        prefix = f"{self.store_dir}/{hash_part}"
        query = self.database.query_as_of_generation if as_of_generation else self.database.query
        rows = query(_PATH_INFO, prefix)
        return cast("PathRow", rows[0]) if rows and rows[0][0].startswith(prefix) else None

    def parse_row(self, row: PathRow) -> PathInfo:
        """Return the path of a row. Raises StoreObjectError if the row is malformed or incomplete."""
        path, nar_hash, nar_size, deriver, sigs, ca, references = row
        try:
            if nar_size is None or nar_size <= 0:
                raise FormatError("its NAR size is unknown")
            if ca:
                content_address.parse(ca)
            return PathInfo(
                path=self._store_path(path),
                nar_hash=_sha256(nar_hash),
                nar_size=nar_size,
                references=tuple(sorted(map(self._store_path, (references or "").split()))),
                deriver=self._store_path(deriver) if deriver else None,
                sigs=tuple((sigs or "").split()),
                ca=ca or None,
            )
        except FormatError as error:
            raise StoreObjectError(f"cannot use the database's row for {excerpt(path)}: {error}") from error

    def usable_path_info(self, hash_part: str) -> PathInfo | None:
        """Like `path_info`, but return None if the row is malformed."""
        try:
            return self.path_info(hash_part)
        except StoreObjectError:
            return None

    def valid_paths(self) -> tuple[list[str], int]:
        """Return all valid paths in full, sorted, even those with malformed rows, and the sum of their NAR sizes."""
        rows = self.database.query("select cast(path as text), cast(narSize as integer) from ValidPaths order by path")
        return [path for path, _ in rows], sum(max(size or 0, 0) for _, size in rows)

    def size(self) -> tuple[int, int]:
        """Return the number of valid paths, and the sum of their NAR sizes in bytes. Reads the whole table."""
        [row] = self.database.query("select count(*), cast(coalesce(sum(narSize), 0) as integer) from ValidPaths")
        return row[0], row[1]

    def paths_needing_signatures(self) -> set[str]:
        """Return the full valid paths that are not content-addressed, which clients accept only with a signature."""
        return {row[0] for row in self.database.query(_NEED_SIGNATURES)}

    def realisation(self, derivation_hash: str, output: str) -> Realisation | None:
        """Return the realisation of an output of the derivation with this hash, or None. For Nix up to 2.34.

        Raises StoreObjectError if the row in the database is malformed.
        """
        return self._realisation(("Realisations", "RealisationsRefs"), _REALISATION, derivation_hash, output)

    def build_trace(self, derivation: str, output: str) -> Realisation | None:
        """Return the realisation of an output of the derivation with this base name, or None. For Nix newer than 2.34.

        Raises StoreObjectError if the row in the database is malformed.
        """
        return self._realisation(("BuildTraceV3", "BuildTraceV3"), _BUILD_TRACE, derivation, output)

    def realisation_ids(self, path: StorePath) -> list[tuple[str, str]]:
        """Return the hash of the derivation and the output of each realisation of this path. For Nix up to 2.34."""
        return self._keys_of(("Realisations", "RealisationsRefs"), _REALISATION_IDS, path)

    def build_trace_keys(self, path: StorePath) -> list[tuple[str, str]]:
        """Return the derivation and the output of each realisation of this path. For Nix newer than 2.34."""
        return self._keys_of(("BuildTraceV3", "BuildTraceV3"), _BUILD_TRACE_KEYS, path)

    def _keys_of(self, tables: tuple[str, str], statement: str, path: StorePath) -> list[tuple[str, str]]:
        if not self._has_tables(tables):
            return []
        return [(str(drv), str(name)) for drv, name in self.database.query(statement, f"{self.store_dir}/{path}")]

    def _has_tables(self, tables: tuple[str, str]) -> bool:
        found: int = self.database.query(_TABLES, *tables)[0][0]
        return found == len(set(tables))

    def _realisation(self, tables: tuple[str, str], statement: str, derivation: str, output: str) -> Realisation | None:
        rows = self.database.query(statement, derivation, output) if self._has_tables(tables) else []
        if not rows:
            return None
        path, sigs, dependent = rows[0]
        words = (dependent or "").split()
        try:
            return Realisation(
                self._store_path(path),
                tuple((sigs or "").split()),
                dict(zip(words[::2], map(self._store_path, words[1::2]), strict=True)),
            )
        except FormatError as error:
            raise StoreObjectError(f"cannot use the database's row for {derivation}!{output}: {error}") from error

    def check(self) -> None:
        """Raise StoreUnavailableError if the database or the store directory cannot be read now."""
        self.database.query("select 1 from ValidPaths limit 1")
        if not self._is_local:
            return
        try:
            with os.scandir(self.real_dir) as entries:
                next(entries, None)
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self.real_dir}: {error}") from error


def _sha256(text: str) -> bytes:
    algorithm, _, digest = text.partition(":")
    try:
        value = bytes.fromhex(digest)
    except ValueError:
        value = b""
    if algorithm != "sha256" or len(value) != 32:  # noqa: PLR2004 (the bytes of a SHA-256)
        raise FormatError(f"its NAR hash is {excerpt(text)}")
    return value
