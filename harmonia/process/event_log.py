"""Log of recent events in an SQLite file, which all processes of a server write and read. The oldest are deleted.

SQLite numbers the events: each number is one higher than the one before it. Its transactions make the events and the
cursor of their source consistent, whichever process ends. The file is a cache: a damaged one is replaced.

A GAP event stands where events may be missing, because no process recorded any.
"""

import fcntl
import json
import mmap
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from harmonia.errors import EventLogError

MAX_EVENTS = 4096
"""Events in the log, some 300 bytes each."""
RECORD_S = 300.0
"""Seconds for which events are recorded after the last client left, so that it can resume."""
GAP = "gap"
_MAX_UNWRITTEN = 4096
_WRITE_INTERVAL_S = 0.1
_BUSY_TIMEOUT_S = 2.0
_BUSY_PAUSE_S = 0.01

_SCHEMA = """
create table if not exists events (number integer primary key autoincrement, name text not null, data text not null);
create table if not exists state (one integer primary key check (one = 1), cursor text not null);
"""
_TRIM = "delete from events where number <= (select max(number) from events) - ?"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Event(NamedTuple):
    number: int
    name: str
    data: str
    """JSON in one line."""


class EventLog:
    """One process's connection to the log, opened at the first use. Not thread-safe.

    The methods block, and raise EventLogError if the file cannot be read or written.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = os.path.join(directory, "log.sqlite")
        self._connection: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None

    def append(self, events: Iterable[tuple[str, str]], cursor: str | None = None) -> None:
        """Add events, names with data. With `cursor`, also store how far their source has been read."""
        try:
            with (connection := self._connected()):
                connection.execute("begin immediate")
                connection.executemany("insert into events (name, data) values (?, ?)", events)
                connection.execute(_TRIM, (MAX_EVENTS,))
                if cursor is not None:
                    connection.execute("insert or replace into state values (1, ?)", (cursor,))
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error

    def events(self, after: int) -> list[Event]:
        """Return the events with a higher number than `after`, in their order."""
        rows = self._query("select number, name, data from events where number > ? order by number", after)
        return [Event(*row) for row in rows]

    def cursor(self) -> str | None:
        """Return the last stored cursor."""
        rows = self._query("select cursor from state")
        return str(rows[0][0]) if rows else None

    def _query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        try:
            return self._connected().execute(statement, parameters).fetchall()
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from error

    def _connected(self) -> sqlite3.Connection:
        """Return the connection. Open it again if another process has replaced the file."""
        if self._connection is not None and self._file is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(self._file, os.stat(self._path)):
                    return self._connection
            self.close()
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        deadline = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                return self._open()
            except sqlite3.OperationalError as error:
                # If another connection creates the file at the same time, SQLite fails at once, whatever the timeout.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_BUSY_PAUSE_S)

    def _open(self) -> sqlite3.Connection:
        self._file = None
        with suppress(FileNotFoundError):
            self._file = os.stat(self._path)
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = off")  # after a power failure, the log may be replaced
            connection.executescript(_SCHEMA)
            # Numbers begin with the time, so that those of a log that was replaced are not used again.
            first = "insert into events select ?, ?, '{}' where not exists (select 1 from sqlite_sequence)"
            connection.execute(first, (time.time_ns() // 1_000_000, GAP))
            self._file = os.stat(self._path)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _failure(self, error: sqlite3.Error | OSError) -> EventLogError:
        self.close()
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            with suppress(OSError):
                if self._file is not None and os.path.samestat(self._file, os.stat(self._path)):
                    os.unlink(self._path)  # SQLite ignores the log of a file that does not exist
        return EventLogError(f"cannot use {self._path}: {getattr(error, 'strerror', None) or error}")

    def close(self) -> None:
        """Close the connection. The next use opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class Leadership:
    """Lock that one process holds at a time. The kernel releases it when that process ends. Not thread-safe."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, "leader")
        self._file: int | None = None

    def take(self) -> bool:
        """Return True if this process holds the lock, or has just taken it. Does not wait.

        Raises EventLogError if the file cannot be created.
        """
        if self._file is not None:
            return True
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise EventLogError(f"cannot use {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


class Recorder:
    """Records events of this process into the log, but only while clients of any process want them. Thread-safe.

    Create it before the fork: its memory is shared. `record` never blocks, and costs 0.1 µs if nobody wants events.
    """

    def __init__(self, directory: str) -> None:
        self._shared = memoryview(mmap.mmap(-1, 8)).cast("d")
        self._log = EventLog(directory)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="event-log")
        self._lock = threading.Lock()
        self._unwritten: deque[tuple[str, str]] = deque()
        self._overflowed = False
        self.recorded = 0
        """The number of events that this process has recorded."""

    @property
    def is_recording(self) -> bool:
        """Return True if a client of any process has wanted events in the last RECORD_S seconds."""
        return self._shared[0] > time.monotonic()

    def want(self) -> None:
        """Record events for the next RECORD_S seconds, in all processes."""
        self._shared[0] = time.monotonic() + RECORD_S

    def record(self, name: str, **data: object) -> None:
        """Record an event, if clients want any. Its data must be JSON values."""
        if not self.is_recording:
            return
        with self._lock:
            if len(self._unwritten) >= _MAX_UNWRITTEN:
                self._overflowed = True
                return
            self._unwritten.append((name, encode(data)))
            if len(self._unwritten) > 1:
                return
        with suppress(RuntimeError):  # this process ends
            self._writer.submit(self._write)

    def _write(self) -> None:
        time.sleep(_WRITE_INTERVAL_S)  # one transaction for all events of this time
        with self._lock:
            events, overflowed = list(self._unwritten), self._overflowed
            self._unwritten.clear()
            self._overflowed = False
        with suppress(EventLogError):  # the reader of the log reports it
            self._log.append([*events, (GAP, "{}")] if overflowed else events)
            self.recorded += len(events)


def encode(data: object) -> str:
    """Return JSON in one line."""
    return json.dumps(data, separators=(",", ":"))
