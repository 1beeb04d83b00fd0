"""A network to an S3 service that can be slow, and in which the service can be overloaded."""

import re
import socket
import socketserver
import threading
from contextlib import suppress

from support.serving import ThreadServer

_BUFFER_BYTES = 64 * 1024
_REQUEST_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)\r\n", re.IGNORECASE)


def refusal(status: int, code: str) -> bytes:
    """Return a response of S3 that refuses a request, and closes the connection."""
    body = f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>Refused.</Message></Error>'
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


SLOW_DOWN = refusal(503, "SlowDown")
"""The response of S3 to too many requests."""


class FaultyNetwork(ThreadServer):
    """Forwards connections to `port` of this machine. Signatures stay valid, because they sign the port of this one.

    `delay` is the seconds that each piece of a request waits, or less after `released` is set. With an `answer`, each
    request gets that instead. With `refused_above`, requests with a longer body get the response in it. While `down`,
    connections end at their next request. `lookups` counts the requests for narinfos.
    """

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.port = port
        self.delay = 0.0
        self.released = threading.Event()
        self.lookups = 0
        self.answer: bytes | None = None
        self.refused_above: tuple[int, bytes] | None = None
        self.down = False


class _Connection(socketserver.BaseRequestHandler):
    server: FaultyNetwork

    def handle(self) -> None:
        with socket.socket() as origin, suppress(OSError):
            origin.connect(("127.0.0.1", self.server.port))
            responses = threading.Thread(target=_copy, args=(origin, self.request), daemon=True)
            responses.start()
            try:
                self._forward(origin)
            finally:
                for end in (self.request, origin):
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)  # wakes the other thread
                # Otherwise, it could read from the descriptor when that is already the one of another connection.
                responses.join()

    def _forward(self, origin: socket.socket) -> None:
        while data := self.request.recv(_BUFFER_BYTES):
            self.server.lookups += b".narinfo HTTP/1.1\r\n" in data
            self.server.released.wait(self.server.delay)
            if self.server.down:
                return
            if (answer := self._refusal(data)) is not None:
                self.request.sendall(answer)
                return
            origin.sendall(data)

    def _refusal(self, data: bytes) -> bytes | None:
        if self.server.answer is not None or self.server.refused_above is None:
            return self.server.answer
        most, answer = self.server.refused_above
        length = _REQUEST_LENGTH.search(data)
        return answer if length is not None and int(length[1]) > most else None


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(_BUFFER_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
