"""An upstream: a static binary cache that can misbehave in every way."""

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from support.serving import QuietHandler, ThreadServer

Behaviour = Callable[["Handler"], None]
"""A function that responds instead of the server."""


class Handler(QuietHandler):
    server: "UpstreamServer"

    def do_GET(self) -> None:  # noqa: N802 (name from http.server)
        self.server.asked[f"{self.command} {self.path}"] += 1
        self.server.headers.append(dict(self.headers.items()))
        for pattern, behaviour in self.server.behaviours.items():
            if re.search(pattern, self.path):
                behaviour(self)
                return
        self.serve()

    do_HEAD = do_GET  # noqa: N815 (name from http.server)

    def serve(self) -> None:
        """Send the file, like a plain web server."""
        content = self.server.files.get(self.path)
        if content is None:
            self.answer(404, b"")
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes"} if self.server.ranges else {}
        if part and self.server.ranges:
            start, stop = int(part[1]), int(part[2]) + 1 if part[2] else len(content)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.answer(206, content[start:stop], headers)
        else:
            self.answer(200, content, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class UpstreamServer(ThreadServer):
    """`files` maps paths to contents, `behaviours` maps patterns of paths to misbehaviour, `asked` counts requests."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), Handler)
        self.url = f"http://{address}:{self.server_address[1]}"
        self.reset()
        self.stop = threading.Event()
        self._connections: set[socket.socket] = set()

    def reset(self) -> None:
        """Become an empty cache without misbehaviour or requests."""
        self.files: dict[str, bytes] = {"/nix-cache-info": b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"}
        self.behaviours: dict[str, Behaviour] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.ranges = True

    def add(self, info: PathInfo, file: bytes, nar: NarFile, keys: tuple[SecretKey, ...] = ()) -> None:
        sigs = [key.sign(info.fingerprint("/nix/store")) for key in keys]
        self.files[f"/{info.path.hash_part}.narinfo"] = narinfo.render(info, "/nix/store", nar, sigs).encode()
        self.files[f"/{nar.url}"] = file

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def disconnect(self) -> None:
        """End all connections, including idle ones."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        super().__exit__()


def hang(handler: Handler) -> None:
    """Never respond."""
    handler.server.stop.wait()
    handler.close_connection = True


def reset(handler: Handler) -> None:
    """Reset the connection."""
    handler.close_connection = True
    handler.connection.close()


def status(number: int, **headers: str) -> Behaviour:
    return lambda handler: handler.answer(number, b"sorry\n", {k.replace("_", "-"): v for k, v in headers.items()})


def cut(*after: int) -> Behaviour:
    """Break off after these numbers of body bytes: one for each response, then send whole responses."""
    limits = list(after)

    def behave(handler: Handler) -> None:
        if not limits:
            handler.serve()
            return
        limit, whole = limits.pop(0), handler.wfile

        class Limited:
            def __init__(self) -> None:
                self.left = -1

            def write(self, data: bytes) -> int:
                if self.left < 0:
                    self.left = limit
                    return whole.write(data)  # the head
                whole.write(data[: self.left])
                whole.flush()
                handler.close_connection = True
                return len(data)

            flush = whole.flush
            close = whole.close
            closed = False

        handler.wfile = Limited()  # type: ignore[assignment]
        handler.serve()

    return behave


def chunked(handler: Handler) -> None:
    """Send the file without its length."""
    content = handler.server.files[handler.path]
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(content), 100_000):
        part = content[start : start + 100_000]
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
    handler.wfile.write(b"0\r\n\r\n")


def drip(size: int, pause: float) -> Behaviour:
    """Send the file, a few bytes at a time."""

    def behave(handler: Handler) -> None:
        content = handler.server.files[handler.path]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for start in range(0, len(content), size):
            if handler.server.stop.is_set():
                break
            handler.wfile.write(content[start : start + size])
            time.sleep(pause)

    return behave


def half(handler: Handler) -> None:
    """Send the first half of the file, and nothing more."""
    content = handler.server.files[handler.path]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    hang(handler)


def file_url(file_hash: bytes, extension: str) -> str:
    return f"nar/{base32.encode(file_hash)}.nar{extension}"
