"""Connections to the Nix daemon, each used for one import after another.

A connection stays open for a minute after its last use, because its temporary roots end with it. A garbage collection
first reads the persistent roots and then the temporary ones: a path whose persistent root it missed must still have a
temporary one.
"""

import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from harmonia.errors import DaemonError, PushRefusedError, RemoteError
from harmonia.push.loop_daemon import LoopDaemon
from harmonia.store.nix_daemon import BlockingDaemon

HOLD_S = 60.0
"""Seconds for which temporary roots outlast the import: more than Nix needs to read its roots."""
_MAX_AGE_S = 300.0  # the daemon remembers all temporary roots of a connection
_TIMEOUT_S = 60.0

_D = TypeVar("_D", BlockingDaemon, LoopDaemon)
_log = logging.getLogger("harmonia")


@dataclass
class _Connection(Generic[_D]):
    daemon: _D
    opened: float = field(default_factory=time.monotonic)
    last_use: float = 0.0


class DaemonConnections(Generic[_D]):
    """The connections of all threads of a process, or of its event loop. Thread-safe."""

    def __init__(self, socket: str, connect: Callable[[str, float], Awaitable[_D]]) -> None:
        """Use `connect` to connect to `socket`, with a timeout for each request."""
        self._socket = socket
        self._connect: Callable[[str, float], Awaitable[_D]] = connect
        self._lock = threading.Lock()
        self._idle: list[_Connection[_D]] = []

    @asynccontextmanager
    async def borrowed(self) -> AsyncIterator[_D]:
        """Yield a connection for one import. Raises PushRefusedError if the daemon does not answer."""
        connection = self._take() or _Connection(await self._open())
        try:
            yield connection.daemon
        except (DaemonError, PushRefusedError):  # unless it is lost, the daemon waits for the next request
            self._put(connection)
            raise
        except BaseException:
            connection.daemon.close()
            raise
        self._put(connection)

    def close_unused(self) -> None:
        """Close the connections whose temporary roots are not needed any more."""
        oldest = time.monotonic() - HOLD_S
        with self._lock:
            unused = [each for each in self._idle if each.last_use <= oldest or each.daemon.lost]
            self._idle = [each for each in self._idle if each not in unused]
        for each in unused:
            each.daemon.close()

    def _take(self) -> _Connection[_D] | None:
        self.close_unused()
        with self._lock:
            for connection in self._idle:
                if time.monotonic() - connection.opened < _MAX_AGE_S:
                    self._idle.remove(connection)
                    return connection
        return None

    def _put(self, connection: _Connection[_D]) -> None:
        connection.last_use = time.monotonic()
        with self._lock:
            self._idle.insert(0, connection)

    async def _open(self) -> _D:
        try:
            return await self._connect(self._socket, _TIMEOUT_S)
        except (OSError, RemoteError) as error:
            _log.error("cannot import pushed paths: Nix daemon at %s: %s; start it", self._socket, error)
            raise PushRefusedError(409, "the server's Nix daemon does not answer; push again later") from None


async def connect(socket: str, timeout_s: float) -> BlockingDaemon:
    """Connect to the daemon, for threads."""
    return BlockingDaemon(socket, timeout_s)
