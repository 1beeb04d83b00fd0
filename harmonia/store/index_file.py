"""The file of an index: a SQLite database that all processes read, and one at a time writes.

That one has the lock on the file beside it, which the kernel takes from it when it dies. All that is in it can be found
out again: so it is made anew where it is damaged, and kept in memory where the disk does not let us.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

FAILURES = (sqlite3.Error, MemoryError)
"""What SQLite raises; the latter of some damage."""


class IndexFile:
    """For one thread at a time, but for `alone`."""

    def __init__(self, path: str) -> None:
        """Nothing is opened yet, so that the process may still fork."""
        self._path: str | None = path
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._started_over = False

    def connection(self, *, create: bool = False) -> sqlite3.Connection:
        """Another one when another process has made a new file. sqlite3.OperationalError where there is none."""
        if self._connection is not None and self._opened != self._file():
            self.close()
        if self._connection is None:
            if self._path is None and not create:
                raise sqlite3.OperationalError("it is not made yet")
            uri = f"file:{quote(self._path)}?mode={'rwc' if create else 'rw'}" if self._path else "file::memory:"
            self._connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            self._opened = self._file()
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self.connection()
        connection.execute("begin immediate")
        with connection:
            yield connection

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether this process may write. OSError where the disk does not let it."""
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
        """Make a new one, where the last is of no use; for the second time in memory, for then it is the disk."""
        self.close()
        if self._started_over:
            self._path = None
        self._started_over = True
        for path in [f"{self._path}-journal", self._path] if self._path else []:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def move_to_memory(self) -> bool:
        """Whether it was not there before."""
        self.close()
        moved, self._path = self._path is not None, None
        return moved

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _file(self) -> tuple[int, int] | None:
        with suppress(OSError):
            if self._path:
                status = os.stat(self._path)
                return status.st_dev, status.st_ino
        return None
