"""A fake Nix daemon that sends given replies and records the requests."""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from harmonia.nix import nar

LAST = 0x616C7473


def number(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


class DaemonServer:
    """Listens at `path` as a daemon of that `version`, until the end of its `with`.

    `answer` is its reply to each request. `greet`, if given, replaces the whole conversation.
    """

    def __init__(
        self,
        path: Path,
        version: int = 0x126,
        answer: bytes = number(LAST, 1),
        greet: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self.path = str(path)
        self.roots: list[str] = []
        self._open: dict[int, list[str]] = {}
        self._version = version
        self.answer = answer
        self._greet = greet
        self._connections: list[socket.socket] = []

    @property
    def open(self) -> list[list[str]]:
        """Return the roots of each open connection, in the order in which the connections began."""
        return list(self._open.values())

    def __enter__(self) -> Self:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()  # connections accepted until then must be closed, too
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listening.close()
        Path(self.path).unlink()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        roots: list[str] = []
        self._open[id(roots)] = roots
        with connection, suppress(OSError, EOFError):
            if self._greet is not None:
                self._greet(connection)
                while connection.recv(4096):
                    pass
            else:
                self._talk(connection, roots)
        del self._open[id(roots)]

    def _talk(self, connection: socket.socket, roots: list[str]) -> None:
        self._agree(connection)
        while _numbers(connection, 1) == (11,):  # wopAddTempRoot
            (size,) = _numbers(connection, 1)
            root = _exactly(connection, size + -size % 8)[:size].decode()
            roots.append(root)
            self.roots.append(root)
            connection.sendall(self.answer)

    def _agree(self, connection: socket.socket) -> None:
        connection.sendall(number(0x6478696F, self._version))
        magic, theirs = _numbers(connection, 2)
        assert magic == 0x6E697863
        version = min(theirs, self._version)
        assert version < 0x126, "the exchange of features is not implemented"
        assert _numbers(connection, 2) == (0, 0)
        greeting = nar.encode(b"2.34") if version >= 0x121 else b""
        connection.sendall(greeting + (number(2) if version >= 0x123 else b"") + number(LAST))


def _numbers(connection: socket.socket, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", _exactly(connection, 8 * count))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data
