"""A network that breaks: a TCP proxy that cuts every connection after so many bytes of answers."""

import socket
import socketserver
import threading
from contextlib import suppress
from typing import Self

# Small, so that few bytes are under way when a connection is cut.
_BUFFER = 64 * 1024


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Passes connections on to `port` of this machine until `limit` bytes have come back, and then cuts them.

    `with` serves until its end, and waits for all connections. `cuts` counts those that were cut.
    """

    def __init__(self, port: int, limit: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.port = port
        self.limit = limit
        self.cuts = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Connection(socketserver.BaseRequestHandler):
    server: CuttingProxy

    def handle(self) -> None:
        with socket.socket() as origin:
            origin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            origin.connect(("127.0.0.1", self.server.port))
            questions = threading.Thread(target=_copy, args=(self.request, origin))
            questions.start()
            with suppress(OSError):
                if _copy(origin, self.request, self.server.limit):
                    self.server.cuts += 1
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)  # wakes the other thread
            questions.join()


def _copy(source: socket.socket, target: socket.socket, limit: int = 1 << 62) -> bool:
    """Copy until the source ends, or `limit` bytes were copied: then True."""
    with suppress(OSError):
        while limit and (data := source.recv(min(limit, _BUFFER))):
            target.sendall(data)
            limit -= len(data)
        if limit:
            target.shutdown(socket.SHUT_WR)
    return not limit
