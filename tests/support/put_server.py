"""A binary cache that takes PUT: files in a directory, over HTTP. It records requests, and can fail on demand."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from support.ports import ReservedPort

Fault = Callable[[str, str], int | None]
"""A function of method and path that returns a status to fail with, 0 to close the connection, or None."""


class PutServer:
    """The cache in `directory`, at a reserved port. `bulk` announces and answers questions for many narinfos."""

    def __init__(self, directory: Path, port: int, *, bulk: bool = False) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.port = port
        self.bulk = bulk
        self.requests: list[tuple[str, str]] = []
        """Method and path of each answered request."""
        self.credentials: set[str] = set()
        """The values of Authorization that were sent."""
        self.fault: Fault = lambda _method, _path: None
        self.retry_after: str | None = None
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        cache = self

        class Handler(_Handler):
            server_cache = cache

        self._server = _Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def note(self, method: str, path: str) -> None:
        with self._lock:
            self.requests.append((method, path))

    def paths(self, method: str) -> list[str]:
        return [path for each, path in self.requests if each == method]

    def narinfo(self, path: str) -> tuple[PathInfo, narinfo.NarFile]:
        return narinfo.parse((self.directory / f"{path[:32]}.narinfo").read_text(), "/nix/store")

    def names(self) -> set[str]:
        """Return the base names of the paths with a narinfo. Fails if one's NAR or reference is missing."""
        infos = [self.narinfo(file.name)[0] for file in self.directory.glob("*.narinfo")]
        names = {str(info.path) for info in infos}
        for info in infos:
            assert set(map(str, info.references)) <= names, f"a reference of {info.path} is missing"
            nar = self.narinfo(info.path)[1]
            assert (self.directory / nar.url).stat().st_size == nar.file_size
        return names


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that disconnects."""

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_cache: PutServer
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", length: int | None = None) -> None:
        self.server_cache.note(self.command, self.path)
        self.send_response(status)
        if status >= 400 and self.server_cache.retry_after:
            self.send_header("Retry-After", self.server_cache.retry_after)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _file(self) -> Path:
        return self.server_cache.directory / self.path.lstrip("/")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _fails(self) -> bool:
        self.server_cache.credentials.add(self.headers.get("Authorization", ""))
        status = self.server_cache.fault(self.command, self.path)
        if status is None:
            return False
        if status:
            self._body()
            self._answer(status, b"because of the test\n" if self.command != "HEAD" else b"")
        else:
            self.close_connection = True
        return True

    def do_HEAD(self) -> None:
        if not self._fails():
            exists = self._file().is_file()
            self._answer(200 if exists else 404, length=self._file().stat().st_size if exists else 0)

    def do_GET(self) -> None:
        if self._fails():
            return
        if self.path == "/nix-cache-info" and self.server_cache.bulk:
            self._answer(200, b"StoreDir: /nix/store\nGetNarInfosV1: get-narinfos-v1\n")
        elif self._file().is_file():
            self._answer(200, self._file().read_bytes())
        else:
            self._answer(404)

    def do_POST(self) -> None:
        if self._fails():
            return
        asked = self._body().decode().split()
        files = [self.server_cache.directory / f"{hash_part}.narinfo" for hash_part in asked]
        self._answer(200, b"\n".join(file.read_bytes() for file in files if file.exists()))

    def do_PUT(self) -> None:
        if self._fails():
            return
        file = self._file()
        file.parent.mkdir(exist_ok=True)
        part = file.with_name(f".{threading.get_ident()}")
        part.write_bytes(self._body())
        part.rename(file)
        self._answer(201)


@contextmanager
def put_server(directory: Path, *, bulk: bool = False) -> Iterator[PutServer]:
    with ReservedPort() as port:
        server = PutServer(directory, port.number, bulk=bulk)
        server.start()
        try:
            yield server
        finally:
            server.stop()
