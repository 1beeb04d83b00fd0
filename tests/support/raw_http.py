"""Raw bytes on a connection, and all responses until it ends."""

import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import NamedTuple

from support.running import PATIENCE_S


class Seen(NamedTuple):
    status: int
    body: str
    closes: bool


def exchange(url: str, payload: bytes) -> list[Seen]:
    """Send bytes; return all responses until the connection ends. Every response must be complete."""
    return list(answers(raw_response(url, payload)))


def raw_response(url: str, payload: bytes) -> bytes:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(payload)
        received = b""
        try:
            while data := connection.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass  # the server closed before it read everything
    return received


class _Bytes:
    """A replacement for the socket that `HTTPResponse` reads."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def makefile(self, _mode: str) -> "_Bytes":
        return self

    def readline(self, limit: int = -1) -> bytes:
        end = self.left.find(b"\n") + 1 or len(self.left)
        return self.read(end if limit < 0 else min(end, limit))

    def read(self, size: int = -1) -> bytes:
        size = len(self.left) if size is None or size < 0 else size
        data, self.left = self.left[:size], self.left[size:]
        return data

    def close(self) -> None: ...

    def flush(self) -> None: ...


def answers(received: bytes) -> Iterator[Seen]:
    source = _Bytes(received)
    while source.left:
        response = HTTPResponse(source)  # type: ignore[arg-type]
        response.begin()
        assert response.length is not None or response.chunked
        body = response.read().decode()
        yield Seen(response.status, body, closes=response.getheader("connection") == "close")
