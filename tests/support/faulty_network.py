"""A network to an S3 service that can be slow, and in which the service can be overloaded."""

import socket
import socketserver
import threading
import time
from contextlib import suppress

from support.serving import ThreadServer

_BUFFER_BYTES = 64 * 1024
_SLOW_DOWN = b'<?xml version="1.0"?>\n<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'
SLOW_DOWN = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_SLOW_DOWN),
    _SLOW_DOWN,
)
"""The response of S3 to too many requests."""


class FaultyNetwork(ThreadServer):
    """Forwards connections to `port` of this machine. Signatures stay valid, because they sign the port of this one.

    `delay` is the seconds that each piece of a request waits. With an `answer`, each request gets that instead. While
    `down`, connections end at their next request.
    """

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.port = port
        self.delay = 0.0
        self.answer: bytes | None = None
        self.down = False


class _Connection(socketserver.BaseRequestHandler):
    server: FaultyNetwork

    def handle(self) -> None:
        with socket.socket() as origin, suppress(OSError):
            origin.connect(("127.0.0.1", self.server.port))
            responses = threading.Thread(target=_copy, args=(origin, self.request), daemon=True)
            responses.start()
            while data := self.request.recv(_BUFFER_BYTES):
                time.sleep(self.server.delay)
                if self.server.down:
                    return
                if self.server.answer is not None:
                    self.request.sendall(self.server.answer)
                else:
                    origin.sendall(data)
            origin.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(_BUFFER_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
