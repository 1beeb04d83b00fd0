"""Responses that are sent without Sanic: servers that count them, or send none, and a client that compares them."""

import re
import socket
from collections.abc import Iterator, Sequence

from support.running import PATIENCE_S, Server, patched

SEND_NONE = """
from harmonia.server.http.response_cache import ResponseCache
ResponseCache.response = lambda self, head: None
"""
COUNT_ALL = """
import os, sys
from harmonia.process.loop_reads import LoopReads
LoopReads.allowed = True  # after a read that waits for a busy machine, the handler would get the next requests
from harmonia.server.http.response_cache import ResponseCache
respond = ResponseCache.response
def counting(self, head):
    response = respond(self, head)
    if response is not None:
        with open(os.path.join(os.path.dirname(sys.argv[-1]), "without-sanic"), "a") as file:
            file.write("x")
    return response
ResponseCache.response = counting
"""
COUNT_UPLOADS = """
import os, sys
from harmonia.server.http.small_uploads import SmallUpload
respond = SmallUpload.response
def counting(self):
    with open(os.path.join(os.path.dirname(sys.argv[-1]), "without-sanic"), "a") as file:
        file.write("x")
    return respond(self)
SmallUpload.response = counting
"""
WITHOUT, COUNTING = patched(SEND_NONE), patched(COUNT_ALL)


class Client:
    """A client that keeps its connection, and returns whole responses without the value of Date."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connections = self._connect()
        self._connection = next(self._connections)

    def _connect(self) -> Iterator[socket.socket]:
        while True:
            with self._server.connect(PATIENCE_S) as connection:
                yield connection

    def ask(self, request: str, *, ends: bool = False) -> bytes:
        """Send a request. If the connection `ends`, read to its end, and open the next one."""
        self._connection.sendall(request.encode())
        received = b""
        while ends or not is_whole(received, request):
            data = self._connection.recv(1 << 16)
            if not data:
                self._connection = next(self._connections)
                break
            received += data
        return re.sub(rb"\r\ndate: [^\r]*", b"", received)

    def close(self) -> None:
        self._connections.close()  # type: ignore[attr-defined]


def is_whole(received: bytes, request: str) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    if not end or b"connection: close" in head:
        return False
    length = re.search(rb"\r\ncontent-length: ([0-9]+)", head)
    return request.startswith("HEAD") or length is None or len(body) >= int(length[1])


def text(method: str, target: str, fields: Sequence[str], version: str = "1.1") -> str:
    return "\r\n".join([f"{method} {target} HTTP/{version}", "Host: cache", *fields, "", ""])


def count(server: Server) -> int:
    """Return the number of responses, or of uploads, that were made without Sanic."""
    file = server.directory / "without-sanic"
    return len(file.read_text()) if file.exists() else 0
