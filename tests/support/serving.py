"""Base classes of test servers, which run in a thread during their `with`."""

import socketserver
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Self

_POLL_S = 0.02


class ThreadServer(socketserver.ThreadingTCPServer):
    """Serves each connection in a thread, which ends with the connection, even after the `with`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    @property
    def server_port(self) -> int:
        return int(self.server_address[1])

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL_S,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    """Logs nothing, even if the client disconnects."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the client is gone
            super().handle()
