"""Connection to the Nix daemon on the event loop."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Self, cast

from harmonia.errors import RemoteError
from harmonia.store.nix_daemon import CLOSED, DaemonClient


@asynccontextmanager
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError after so many seconds, with the message that a socket's has."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimeoutError("timed out") from None


class LoopDaemon(DaemonClient, asyncio.Protocol):
    """A connection whose requests wait on the event loop."""

    _transport: asyncio.Transport

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__(path, timeout_s)
        self._is_closed = False
        self._waiting: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, path: str, timeout_s: float) -> Self:
        """Connect to the socket `path`. Each request may take `timeout_s` seconds. Raises errors like a request."""
        async with _timeout(timeout_s):
            _, daemon = await asyncio.get_running_loop().create_unix_connection(partial(cls, path, timeout_s), path)
        try:
            await daemon.agree()
        except BaseException:
            daemon.close()
            raise
        return daemon

    @property
    def lost(self) -> bool:
        """True if the connection is closed, in the middle of a NAR, or the daemon has sent data without a request."""
        return self._is_closed or self._is_out_of_step or bool(self._received)

    def close(self) -> None:
        self._leave_collector()
        self._transport.abort()  # `close` would wait until a daemon that hangs has read all that was sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self._wake()

    def connection_lost(self, _: Exception | None) -> None:
        self._is_closed = True
        self._wake()

    async def _send(self, data: bytes) -> None:
        self._transport.write(data)

    async def _receive_more(self) -> None:
        if self._is_closed:
            raise RemoteError(CLOSED)
        self._waiting = asyncio.get_running_loop().create_future()
        async with _timeout(self._left_s()):
            await self._waiting

    async def _converse(self, peer: socket.socket, data: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        peer.setblocking(False)
        async with _timeout(self._left_s()):
            await loop.sock_sendall(peer, data)
            return await loop.sock_recv(peer, 1)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
