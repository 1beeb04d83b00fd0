"""Temporary GC roots, registered with the Nix daemon, that protect paths from garbage collection while they are sent.

A temporary root lasts as long as the connection to the daemon; a single root cannot be released. So a connection is
used for new roots for only a minute, and closed when none of its roots is needed any more.

One thread does all of this. Downloads do not wait for it, and do not fail if the daemon is slow or missing. A download
breaks off if its path is garbage-collected meanwhile.
"""

import logging
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue

from harmonia.errors import RemoteError
from harmonia.nix.store_path import StorePath
from harmonia.store.nix_daemon import BlockingDaemon

_TIMEOUT_S = 5.0  # for a response of the daemon
_RETRY_S = 2.0  # until the next try after a failure
_CHECK_INTERVAL_S = 1.0  # between two checks for released roots, and for a daemon that has ended
_CONNECTION_AGE_S = 60.0  # for which a connection gets new roots
_MAX_CONNECTIONS = 4  # each is a process of the daemon

_log = logging.getLogger("harmonia")


class TempRootLease:
    """Protects a path from garbage collection until it is released."""

    __slots__ = ("_roots", "is_released", "path")

    def __init__(self, path: StorePath, roots: "TempRoots") -> None:
        self.path = path
        self.is_released = False
        self._roots = roots

    def share(self) -> "TempRootLease":
        """Return another lease for the same path. Each lease must be released."""
        return self._roots.acquire(self.path)

    def release(self) -> None:
        self.is_released = True


class _Connection:
    def __init__(self, daemon: BlockingDaemon) -> None:
        self.daemon = daemon
        self.opened = time.monotonic()
        self.leases: list[TempRootLease] = []


class TempRoots:
    """The temporary roots of one process."""

    def __init__(self, socket: str, store_dir: str, *, expected: bool) -> None:
        """Use the daemon at `socket` for paths in `store_dir`. Warn of a missing socket only if it is `expected`."""
        self._socket = socket
        self._store_dir = store_dir
        self._expected = expected
        self._asked: SimpleQueue[TempRootLease | None] = SimpleQueue()
        self._waiting: list[TempRootLease] = []
        self._connections: list[_Connection] = []
        self._look_at = 0.0
        self._retry_at = 0.0
        self._failing = False
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None

    def acquire(self, path: StorePath) -> TempRootLease:
        """Return a lease of a root for a path. The thread registers the root soon. Does not block."""
        lease = TempRootLease(path, self)
        self._asked.put(lease)
        if self._thread is None:
            with self._start, suppress(RuntimeError):  # if no thread can be started now, a later call tries again
                if self._thread is None:  # started here and not earlier, because a thread does not survive a fork
                    thread = threading.Thread(target=self._run, name="temp-roots", daemon=True)
                    thread.start()
                    self._thread = thread
        return lease

    def close(self) -> None:
        """Release all roots and end the thread, as soon as the daemon has answered. Does not block."""
        self._asked.put(None)

    def _run(self) -> None:
        while self._listen():
            if time.monotonic() >= self._look_at:
                self._close_unused()
                self._look_at = time.monotonic() + _CHECK_INTERVAL_S
            if self._waiting and time.monotonic() >= self._retry_at:
                try:
                    self._register()
                except (OSError, RemoteError, MemoryError) as error:
                    self._failed(error)
        for connection in self._connections:
            connection.daemon.close()

    def _listen(self) -> bool:
        """Wait for leases to register, and gather them. Return False once this is closed."""
        with suppress(Empty):
            lease = self._asked.get(timeout=_CHECK_INTERVAL_S if self._waiting or self._connections else None)
            while lease is not None:
                self._waiting.append(lease)
                lease = self._asked.get_nowait()
            return False
        return True

    def _close_unused(self) -> None:
        """Close connections without leases. Queue the leases of lost connections again."""
        used = []
        for connection in self._connections:
            connection.leases = _unreleased(connection.leases)
            if connection.leases and not connection.daemon.lost:
                used.append(connection)
            else:
                connection.daemon.close()
                self._waiting += connection.leases
        self._connections = used
        self._waiting = _unreleased(self._waiting)

    def _register(self) -> None:
        while self._waiting:
            lease = self._waiting[-1]
            if not lease.is_released:
                connection = self._connection()
                try:
                    connection.daemon.add_temp_roots([f"{self._store_dir}/{lease.path}"])
                except BaseException:
                    connection.daemon.close()  # now it counts as lost
                    raise
                connection.leases.append(lease)
                if self._failing:
                    _log.info("registered temporary GC roots with the Nix daemon at %s again", self._socket)
                    self._failing = False
            self._waiting.pop()

    def _connection(self) -> _Connection:
        usable = [connection for connection in self._connections if not connection.daemon.lost]
        if usable and (time.monotonic() - usable[-1].opened < _CONNECTION_AGE_S or len(usable) >= _MAX_CONNECTIONS):
            return usable[-1]
        self._connections.append(_Connection(BlockingDaemon(self._socket, _TIMEOUT_S)))
        return self._connections[-1]

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + _RETRY_S
        if not self._failing:
            level = logging.DEBUG if isinstance(error, FileNotFoundError) and not self._expected else logging.WARNING
            what = "cannot register temporary GC roots with the Nix daemon at %s: %s;"
            what += " paths may be garbage-collected while they are sent"
            _log.log(level, what, self._socket, error)
            self._failing = True


def _unreleased(leases: list[TempRootLease]) -> list[TempRootLease]:
    return [lease for lease in leases if not lease.is_released]
