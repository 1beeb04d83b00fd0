"""Requests on a real socket, to a server in this process: each is answered, and none fails inside the server."""

import asyncio
import logging
import re
import socket
import tempfile
import threading
from functools import cache

import uvloop
from sanic import Sanic

from harmonia.config import loader
from harmonia.nix import base32
from harmonia.server.app import create_app, create_metrics
from harmonia.server.connections import ConnectionLimiter, limited_connection
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import Guard
from harmonia.tools.fixture_tree import Executable, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder

WORDS = [b"GET /", b"HEAD /", b"PUT /", b" HTTP/1.1\r\nHost: x\r\n", b"\r\n\r\n", b"{hash}", b"{narhash}", b"{drv}"]
WORDS += [
    b".narinfo",
    b".ls",
    b"nar/",
    b".nar",
    b".nar.zst",
    b"?json",
    b"?hash=",
    b"log/",
    b"serve/",
    b"search?q=",
    b"path/",
]
WORDS += [
    b"realisations/sha256:",
    b"!out.doi",
    b"build-trace-v2/",
    b"debuginfo/",
    b".debug",
    b"upstream/",
    b"nix-cache-info",
]
WORDS += [
    b"Range: bytes=",
    b"If-Range: ",
    b"If-None-Match: ",
    b"Accept-Encoding: ",
    b"zstd",
    b"gzip",
    b";q=0",
    b"identity",
]
WORDS += [
    b"Content-Length: ",
    b"Transfer-Encoding: chunked",
    b"X-Forwarded-For: ",
    b"X-Forwarded-Host: ",
    b"X-Forwarded-Prefix: ",
]
WORDS += [
    b"Expect: 100-continue",
    b"Connection: ",
    b"close",
    b"Upgrade: ",
    b"Authorization: Basic ",
    b"Via: 1.1 harmonia-0123456789abcdef",
    b"%2f",
    b"%00",
    b"..",
]

_END = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
_SECONDS = 20  # for all responses, even on a busy machine
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


class _Problems(logging.Handler):
    """Collect what the server's threads log and no request may cause. The server never runs in the main thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        is_servers = record.thread != threading.main_thread().ident
        if is_servers and (record.exc_info or record.name.startswith(("sanic", "asyncio"))):
            self.found.append(self.format(record))


running: "list[FuzzedServer]" = []


class FuzzedServer:
    """A server in its own thread."""

    def __init__(self, more: str = "") -> None:
        """Start it with additional settings."""
        directory = tempfile.mkdtemp()
        builder = StoreBuilder(directory)
        derivation, output = builder.add_derivation("name", "/bin/sh")
        tree: Tree = {
            "bin": {"run": Executable(b"#!"), "link": Symlink("run")},
            "index.html": b"<p>",
            b"\xff": b"x" * 5000,
        }
        info = builder.add(output, tree, deriver=derivation.path)
        builder.add_log(derivation.path, b"log\n" * 1000)
        self.names = {
            b"{hash}": info.path.hash_part.encode(),
            b"{narhash}": base32.encode(info.nar_hash).encode(),
            b"{drv}": derivation.path.encode(),
        }
        self._problems = _Problems()
        for name in ("harmonia", "sanic.root", "sanic.error", "asyncio"):
            logging.getLogger(name).addHandler(self._problems)
        self._settings = loader.parse(
            f"real_nix_store = '{builder.real_dir}'\ncache_dir = '{directory}/cache'\nbrowse = true\nworkers = 1\n"
            f"max_query_rate = 0\ntrusted_proxies = ['127.0.0.1']\naccess_log = true\nheader_timeout = 5\n{more}",
            "fuzz",
            {},
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        metrics = create_metrics(self._settings)
        metrics.adopt_slot(0)
        self._context = ServerContext(self._settings, [], metrics)
        ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(120)
        running.append(self)

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        guard = Guard(self._settings, self._context.metrics.own.token_uses) if self._settings.tokens_path else None
        protocol = limited_connection(ConnectionLimiter(100, self._context.metrics.own))
        app = create_app(self._context, guard)
        Sanic.unregister_app(app)  # frees the name for the next server
        app.state.primary = not running  # Sanic can modify its own code only once in a process
        server = await app.create_server(
            sock=self._socket, protocol=protocol, asyncio_server_kwargs={"start_serving": False}
        )
        assert server is not None
        await server.startup()  # type: ignore[no-untyped-call]
        await server.start_serving()  # type: ignore[no-untyped-call]
        assert self._context.debug_info is not None
        self._context.debug_info.start()
        self._loop = asyncio.get_running_loop()
        ready.set()
        await self._stop.wait()
        server.close()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(120)
        self._socket.close()

    def answers(self, data: bytes) -> tuple[list[int], bytes]:
        """Send data; return the statuses of all responses, and all received bytes."""
        for name, value in self.names.items():
            data = data.replace(name, value)
        received = bytearray()
        with socket.create_connection(self._socket.getsockname(), _SECONDS) as connection:
            try:
                connection.sendall(data + b"\r\n\r\n" + _END * 2)
                while part := connection.recv(1 << 16):
                    received += part
            except ConnectionError:
                pass  # the server closed before it read everything
        statuses = [int(status) for status in _STATUS.findall(received)]
        assert not received or received.startswith(b"HTTP/1.1 ")
        assert not [status for status in statuses if not 200 <= status < 500 and status not in {501, 505}]
        assert b"Traceback" not in received
        assert not self._problems.found, self._problems.found
        return statuses, bytes(received)


_server = cache(FuzzedServer)


def check(data: bytes) -> bool:
    """Replace `{hash}`, `{narhash}` and `{drv}` by those of an existing path."""
    statuses, _ = _server().answers(data)
    return statuses[0] < 400 if statuses else False
