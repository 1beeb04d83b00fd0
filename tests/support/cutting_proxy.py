"""A bad network: a TCP proxy that cuts each connection after a random number of response bytes."""

import random
import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress

from support.serving import ThreadServer

_BUFFER = 64 * 1024  # small, so that few bytes are in flight when a connection is cut


class CuttingProxy(ThreadServer):
    """Forwards connections to `port` of this machine, and cuts each after between `least` and `most` response bytes.

    `on_cut` is called before the client notices, and may set another `port` for the next connections. `cuts` counts the
    cuts, which are at the same places in every run. At the end of its `with`, it waits for all connections.
    """

    daemon_threads = False

    def __init__(self, port: int, least: int, most: int, on_cut: Callable[[], None] = lambda: None) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.port = port
        self.cuts = 0
        self._random = random.Random(1)
        self.least, self.most = least, most
        self._on_cut = on_cut

    def limit(self) -> int:
        return self._random.randint(self.least, self.most)

    def cut(self) -> None:
        self.cuts += 1
        self._on_cut()


class _Connection(socketserver.BaseRequestHandler):
    server: CuttingProxy

    def handle(self) -> None:
        with socket.socket() as origin:
            origin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            try:
                origin.connect(("127.0.0.1", self.server.port))
            except ConnectionRefusedError:  # the server is restarting
                return
            requests = threading.Thread(target=_copy, args=(self.request, origin))
            requests.start()
            if _copy(origin, self.request, self.server.limit()):
                self.server.cut()
            for end in (self.request, origin):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes the other thread
            requests.join()


def _copy(source: socket.socket, target: socket.socket, limit: int = 1 << 62) -> bool:
    """Copy until the source ends, or until `limit` bytes are copied, and then return True."""
    with suppress(OSError):
        while limit and (data := source.recv(min(limit, _BUFFER))):
            target.sendall(data)
            limit -= len(data)
        if limit:
            target.shutdown(socket.SHUT_WR)
    return not limit
