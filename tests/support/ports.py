"""Ports for servers that start later, or again, at a known port."""

import socket
from typing import Self


class ReservedPort:
    """A TCP port of `host` that no other program gets before the `with` ends.

    The kernel hands out any port that no socket has, so a port that was free a moment ago need not be free now. This
    socket has it, but does not listen: connections are refused, and a server that sets SO_REUSEADDR can listen.
    """

    def __init__(self, number: int = 0, host: str = "127.0.0.1") -> None:
        """Reserve port `number`, or any. Raises OSError if another socket has it."""
        self._socket = socket.socket()
        try:
            self._socket.bind((host, number))
        except OSError:
            self._socket.close()
            raise
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # before `bind` it would share the port
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
