"""Index file, a SQLite database that all processes read and one process at a time writes.

The writer locks a file beside the database; the kernel releases the lock if the writer dies. The content can always be
computed again: a damaged file is rebuilt, and if the disk is not writable, the index is in memory.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

FAILURES = (sqlite3.Error, MemoryError)
"""The errors that SQLite raises. It raises MemoryError for some kinds of damage."""


class IndexFile:
    """The database of an index. Only `alone` is thread-safe."""

    def __init__(self, path: str) -> None:
        """Open nothing yet, so that the process may still fork."""
        self._path: str | None = path
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._started_over = False

    def connection(self, *, create: bool = False) -> sqlite3.Connection:
        """Return the connection. Reopen it if another process has replaced the file.

        Raises sqlite3.OperationalError if the file does not exist and `create` is false.
        """
        if self._connection is not None and self._opened != self._file():
            self.close()
        if self._connection is None:
            if self._path is None and not create:
                raise sqlite3.OperationalError("the index does not exist yet")
            uri = f"file:{quote(self._path)}?mode={'rwc' if create else 'rw'}" if self._path else "file::memory:"
            self._connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            self._opened = self._file()
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a write transaction: commit at the end, roll back after an error."""
        connection = self.connection()
        connection.execute("begin immediate")
        with connection:
            yield connection

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Try to lock the index for writing, and yield whether this process has the lock.

        Raises OSError if the lock file cannot be created.
        """
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

    def start_over(self) -> None:
        """Delete a damaged file, so that it is created again. The second time, assume a bad disk, and use memory."""
        self.close()
        if self._started_over:
            self._path = None
        self._started_over = True
        for path in [f"{self._path}-journal", self._path] if self._path else []:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def move_to_memory(self) -> bool:
        """Use an index in memory from now on. Return True if it was in a file before."""
        self.close()
        moved, self._path = self._path is not None, None
        return moved

    def close(self) -> None:
        """Close the connection. The next use opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _file(self) -> tuple[int, int] | None:
        with suppress(OSError):
            if self._path:
                status = os.stat(self._path)
                return status.st_dev, status.st_ino
        return None
