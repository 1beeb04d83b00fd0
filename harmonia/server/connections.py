"""Limits on open connections, counted from accept(2) on, before the TLS handshake."""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from harmonia.errors import SHORTAGES
from harmonia.metrics.shared_counters import WorkerCounters
from harmonia.server.http import access_log
from harmonia.server.http.rate_limit import network
from harmonia.server.http.sanic_adapter import Connection

_MAX_ACCEPTS = 64  # per turn of the event loop
_SHORTAGE_DELAY_S = 0.1
_FULL = (  # without a body, because the request may be HEAD
    b"HTTP/1.1 503 Service Unavailable\r\ncache-control: no-store\r\nretry-after: 1\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)

_log = logging.getLogger("harmonia")


class ConnectionLimiter:
    """Counter of a worker's connections: on all sockets together, and for each client."""

    def __init__(self, most: int, counters: WorkerCounters, most_each: int = 0, trusted: Sequence[str] = ()) -> None:
        """Create a limiter for `most` connections, and `most_each` for each client, where 0 means no limit.

        `most_each` does not apply to `trusted` proxies, because they stand for many clients.
        """
        self._most = most
        self._counters = counters
        self._most_each = most_each
        self._trusted = trusted
        self._admitted: dict[object, str | None] = {}
        self._clients: Counter[str | None] = Counter()

    def __contains__(self, connection: object) -> bool:
        return connection in self._admitted

    def admit(self, connection: object, peername: object) -> bool:
        """Count a connection from a peer and return True, or count its refusal and return False."""
        address = access_log.single_client(peername, self._trusted) if self._most_each else None
        client = network(address) if address else None
        if len(self._admitted) >= self._most or (client is not None and self._clients[client] >= self._most_each):
            self._counters.refuse()
            return False
        self._admitted[connection] = client
        self._clients[client] += 1
        return True

    def release(self, connection: object) -> None:
        """Stop counting a connection that was admitted."""
        client = self._admitted.pop(connection)
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]


def limited_connection(limiter: ConnectionLimiter) -> type[Connection]:
    """Return a protocol whose connections the limiter counts. TLS connections are counted before their handshake."""

    class LimitedConnection(Connection):
        def connection_made(self, transport: Any) -> None:  # noqa: ANN401 (untyped in Sanic)
            if self in limiter or limiter.admit(self, transport.get_extra_info("peername")):
                super().connection_made(transport)  # type: ignore[no-untyped-call]
            else:
                transport.write(_FULL)
                transport.close()

        def connection_lost(self, exc: Any) -> None:  # noqa: ANN401 (asyncio's signature)
            if self in limiter:
                limiter.release(self)
                super().connection_lost(exc)

    return LimitedConnection


class TlsListener:
    """Accepts connections and does their TLS handshakes. asyncio's servers report a connection only after that."""

    def __init__(
        self,
        listening: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext,
        limiter: ConnectionLimiter,
        handshake_timeout: float,
    ) -> None:
        self._listening = listening.dup()
        self._protocol = protocol
        self.tls = tls
        """Context of new connections. It may be replaced in any thread."""
        self._limiter = limiter
        self._handshake_timeout = handshake_timeout
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Stop accepting, and end connections whose handshake is not complete."""
        if self._later is not None:
            self._later.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        for handshake in self._handshakes:
            handshake.cancel()

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTS):
            try:
                connection, peername = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in SHORTAGES:
                    raise
                _log.warning("cannot accept connections: %s; trying again", error.strerror)
                self._loop.remove_reader(self._listening)
                self._later = self._loop.call_later(_SHORTAGE_DELAY_S, self.start)
                return
            protocol = self._protocol()
            if self._limiter.admit(protocol, peername):
                handshake = self._loop.create_task(self._shake_hands(connection, protocol))
                self._handshakes.add(handshake)
                handshake.add_done_callback(self._handshakes.discard)
            else:
                connection.close()

    async def _shake_hands(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self.tls, ssl_handshake_timeout=self._handshake_timeout
            )
        except OSError:  # the client's handshake is invalid, or too late
            self._give_up(connection, protocol)
        except BaseException:
            self._give_up(connection, protocol)
            raise

    def _give_up(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        connection.close()
        if protocol in self._limiter:
            self._limiter.release(protocol)
