"""Keeps paths that are being sent from Nix's garbage collector, by *temporary roots* that the Nix daemon takes for us.

A root lasts as long as the connection over which it was taken, and none can be given back alone. So a connection takes
roots for a minute only, and is closed when nothing needs any of them any longer.

One thread does it all, beside the downloads: where the daemon is slow or not there, they neither wait nor fail, and a
path that is collected meanwhile breaks them off.
"""

import logging
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue

from harmonia.errors import RemoteError
from harmonia.nix.store_path import StorePath
from harmonia.store.nix_daemon import Daemon

_TIMEOUT_S = 5.0  # seconds for an answer of the daemon
_RETRY_S = 2.0  # seconds before another try, where it gave none
_CHECK_INTERVAL_S = 1.0  # seconds between two looks for what is over, and for a daemon that has ended
_CONNECTION_AGE_S = 60.0  # seconds for which a connection takes further roots
_MAX_CONNECTIONS = 4  # connections, each a process of the daemon

_log = logging.getLogger("harmonia")


class TempRootLease:
    """Protects a path from garbage collection until it is released."""

    __slots__ = ("_roots", "is_released", "path")

    def __init__(self, path: StorePath, roots: "TempRoots") -> None:
        self.path = path
        self.is_released = False
        self._roots = roots

    def share(self) -> "TempRootLease":
        """Return another one of the same path, to be released as well."""
        return self._roots.acquire(self.path)

    def release(self) -> None:
        self.is_released = True


class _Connection:
    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.opened = time.monotonic()
        self.paths: set[StorePath] = set()
        self.leases: list[TempRootLease] = []


class TempRoots:
    """Roots of paths in `store_dir`, taken through the daemon that listens at `socket`.

    Whether anybody needs to know that there is none, `expected` tells.
    """

    def __init__(self, socket: str, store_dir: str, *, expected: bool) -> None:
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
        """Have a root taken, soon, and kept until what this returns is released. Waits for nothing."""
        lease = TempRootLease(path, self)
        self._asked.put(lease)
        if self._thread is None:
            with self._start, suppress(RuntimeError):  # where no thread can be started now, it may be later
                if self._thread is None:  # in the process that serves, not in the one that it was forked from
                    thread = threading.Thread(target=self._run, name="temp-roots", daemon=True)
                    thread.start()
                    self._thread = thread
        return lease

    def close(self) -> None:
        """Give up all roots and end the thread, as soon as the daemon has answered. Waits for nothing."""
        self._asked.put(None)

    def _run(self) -> None:
        while self._listen():
            if time.monotonic() >= self._look_at:
                self._let_go()
                self._look_at = time.monotonic() + _CHECK_INTERVAL_S
            if self._waiting and time.monotonic() >= self._retry_at:
                try:
                    self._take()
                except (OSError, RemoteError, MemoryError) as error:
                    self._failed(error)
        for connection in self._connections:
            connection.daemon.close()

    def _listen(self) -> bool:
        """Wait for something to do, and gather what there is. Return False once this is closed."""
        with suppress(Empty):
            lease = self._asked.get(timeout=_CHECK_INTERVAL_S if self._waiting or self._connections else None)
            while lease is not None:
                self._waiting.append(lease)
                lease = self._asked.get_nowait()
            return False
        return True

    def _let_go(self) -> None:
        """Close the connections that nobody needs. What was kept by one that is lost waits for another."""
        kept = []
        for connection in self._connections:
            connection.leases = _unreleased(connection.leases)
            if connection.leases and not connection.daemon.lost:
                kept.append(connection)
            else:
                connection.daemon.close()
                self._waiting += connection.leases
        self._connections = kept
        self._waiting = _unreleased(self._waiting)

    def _take(self) -> None:
        while self._waiting:
            lease = self._waiting[-1]
            if not lease.is_released:
                connection = self._connection()
                if lease.path not in connection.paths:
                    try:
                        connection.daemon.add_temp_root(f"{self._store_dir}/{lease.path}")
                    except BaseException:
                        connection.daemon.close()  # which makes it a lost one
                        raise
                    connection.paths.add(lease.path)
                connection.leases.append(lease)
            self._waiting.pop()
        if self._failing:
            _log.info("the Nix daemon at %s keeps what is sent from being collected again", self._socket)
            self._failing = False

    def _connection(self) -> _Connection:
        usable = [connection for connection in self._connections if not connection.daemon.lost]
        if usable and (time.monotonic() - usable[-1].opened < _CONNECTION_AGE_S or len(usable) >= _MAX_CONNECTIONS):
            return usable[-1]
        self._connections.append(_Connection(Daemon(self._socket, _TIMEOUT_S)))
        return self._connections[-1]

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + _RETRY_S
        if not self._failing:
            level = logging.DEBUG if isinstance(error, FileNotFoundError) and not self._expected else logging.WARNING
            what = "nothing keeps what is sent from being collected, for want of the Nix daemon at %s: %s"
            _log.log(level, what, self._socket, error)
            self._failing = True


def _unreleased(leases: list[TempRootLease]) -> list[TempRootLease]:
    return [lease for lease in leases if not lease.is_released]
