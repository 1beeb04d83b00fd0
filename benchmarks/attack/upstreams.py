"""Attacks by upstreams: invalid responses, redirects to private addresses, and a worker killed during a fetch."""

import hashlib
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import zstandard

from benchmarks.attack.arena import Arena, restart
from benchmarks.attack.client import Request, going_on, hammer
from benchmarks.attack.stores import MIB
from harmonia.nix import base32
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.store import file_reader, tree_reader
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, nar_url, patched, wait_until
from support.upstream_server import Behaviour, Handler, UpstreamServer, file_url, half, status

_KEY = SecretKey.generate("upstream-1")
_CLIENTS = 16
_PATHS = 1000
_DIGITS = "5" * 5000
_LOG_KIB = 64
_EMPTY_STREAMS = zstandard.compress(b"") * (2 * MIB // len(zstandard.compress(b"")))
_INSIDE = "127.0.0.2"


def _raw(head: str, body: bytes = b"", *, endless: bool = False) -> Behaviour:
    """Respond with these bytes. If `endless`, repeat the body until the client disconnects."""

    def behave(handler: Handler) -> None:
        handler.close_connection = True
        with suppress(OSError):
            handler.wfile.write(head.replace("\n", "\r\n").encode() + body)
            while endless and not handler.server.stop.is_set():
                handler.wfile.write(body)

    return behave


NONSENSE = {
    "a length of 5,000 digits": _raw(f"HTTP/1.1 200 OK\nContent-Length: {_DIGITS}\n\n"),
    "a status of 5,000 digits": _raw(f"HTTP/1.1 {_DIGITS} OK\nContent-Length: 0\n\n"),
    "a header of 1 MB": _raw(f"HTTP/1.1 200 OK\nX: {'x' * MIB}\nContent-Length: 0\n\n"),
    "2 MB of control characters": lambda handler: handler.answer(200, b"\x1b[31m\0\r\x07" * (2 * MIB // 8)),
    "a narinfo with numbers of 5,000 digits": lambda handler: handler.answer(
        200, f"StorePath: {handler.path}\nNarSize: {_DIGITS}\nFileSize: {_DIGITS}\n".encode()
    ),
    "2 MiB of empty streams": lambda handler: handler.answer(200, _EMPTY_STREAMS, {"Content-Encoding": "zstd"}),
    "an endless body": _raw("HTTP/1.1 200 OK\nTransfer-Encoding: identity\n\n", b"x" * 65536, endless=True),
    "endless chunks": _raw(
        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", b"10000\r\n" + b"x" * 65536 + b"\r\n", endless=True
    ),
}


def nonsense(arena: Arena) -> None:
    """Request paths from upstreams, each of which sends another kind of invalid response."""
    chance = random.Random(1)
    hash_parts = [base32.encode(chance.randbytes(20)) for _ in range(_PATHS)]
    requests: list[Request] = [(f"/{each}{kind}", {}) for each in hash_parts for kind in (".narinfo", ".ls")]
    requests += [(f"/log/{each}-n.drv", {}) for each in hash_parts]
    with ExitStack() as stack:
        upstreams = [stack.enter_context(UpstreamServer()) for _ in NONSENSE]
        for upstream, behaviour in zip(upstreams, NONSENSE.values(), strict=True):
            upstream.behaviours["^/(?!nix-cache-info)"] = behaviour
        settings = "".join(f"[[upstream]]\nurl = '{upstream.url}'\n" for upstream in upstreams)
        name = "upstreams with invalid responses: " + ", ".join(NONSENSE)
        with arena.attacked(name, settings) as (server, outcome):
            with going_on(hammer, server.url, requests, _CLIENTS) as outcome.counts:
                arena.wait()
            for upstream in upstreams:
                upstream.disconnect()  # close idle connections, which live for a minute
        logged = sum(map(len, server.log))
        outcome.counts["bytes of log"] = logged
        outcome.counts["asked of upstreams"] = sum(upstream.asked.total() for upstream in upstreams)
        outcome.require(logged <= _LOG_KIB * 1024, f"{logged:,} bytes of log")
        outcome.require("\x1b" not in "".join(server.log), "control characters in the log")


@contextmanager
def _remote(upstream: UpstreamServer, url: str = "") -> Iterator[tuple[PathInfo, bytes]]:
    """Add a path with this NAR to `upstream`, at `url` if given."""
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        store = StoreBuilder(directory)
        info = store.add(store.output_path("there"), random.Random(1).randbytes(4 * MIB))
        nar = b"".join(file_reader.read(tree_reader.dump(store.real_path(info.path))))
        digest = hashlib.sha256(nar).digest()
        upstream.add(info, nar, NarFile(url or file_url(digest, ""), "none", digest, len(nar)), keys=(_KEY,))
        yield info, nar


def _entry(upstream: UpstreamServer) -> str:
    return f"[[upstream]]\nurl = '{upstream.url}'\npublic_keys = ['{_KEY.public_key}']\n"


def from_outside_to_inside(arena: Arena) -> None:
    """Let a public upstream refer to private addresses by redirects and NAR URLs. 127.0.0.1 counts as public here."""
    outside = patched(
        f"from harmonia.upstream import address_filter as filter; filter.is_public = lambda host: host != '{_INSIDE}'"
    )
    name = "a public upstream that refers to private addresses, by redirects and URLs of narinfos"
    with (
        UpstreamServer() as upstream,
        UpstreamServer(_INSIDE) as inside,
        arena.served(name, _entry(upstream), program=outside) as (server, outcome),
    ):
        for url in ("", f"{inside.url}/secret.nar", f"{inside.url.removeprefix('http:')}/secret.nar"):
            with _remote(upstream, url) as (info, nar):
                inside.files |= {"/secret.nar": nar}
                for paths in (r"\.narinfo$", r"^/nar/|\.ls$|^/log/"):
                    upstream.behaviours = {paths: status(302, Location=f"{inside.url}/secret.nar")}
                    for asked in (*_urls(server, info), f"/{info.path.hash_part}.ls", f"/log/{info.path}.drv"):
                        outcome.counts[str(server.get(asked).status)] += 1
                    server.stop()  # forget the cached lookup
                    restart(server)
        outcome.counts["requests at private addresses"] = inside.asked.total()
        outcome.require(not inside.asked, f"requests at private addresses: {dict(inside.asked)}")


def _urls(server: Server, info: PathInfo) -> list[str]:
    """Return the URLs of the narinfo and of its NAR."""
    narinfo = f"/{info.path.hash_part}.narinfo"
    lines = server.get(narinfo).text.splitlines()
    return [narinfo, *("/" + line.removeprefix("URL: ") for line in lines if line.startswith("URL: ")), nar_url(info)]


def worker_killed_amid_a_fetch(arena: Arena) -> None:
    """Kill the worker while it fetches a NAR from an upstream, and fetch the NAR again."""
    with UpstreamServer() as upstream, _remote(upstream) as (info, nar):
        name = "a worker killed while it fetches from an upstream"
        with arena.served(name, _entry(upstream)) as (server, outcome):
            wait_until(lambda: len(_urls(server, info)) == 3)
            url = _urls(server, info)[1]
            for _ in range(3):
                upstream.behaviours = {"^/nar/": half}
                with server.connect() as connection:
                    connection.sendall(f"GET {url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
                    received = connection.recv(65536)
                    workers = server.workers
                    for worker in workers:
                        os.kill(worker, signal.SIGKILL)
                    with suppress(ConnectionResetError):
                        while data := connection.recv(65536):
                            received += data
                outcome.counts["kill -9"] += 1
                outcome.require(len(received) < len(nar), "the download was complete before the worker was killed")
                wait_until(lambda: server.workers not in ([], workers))  # noqa: B023 (called in the same iteration)
                upstream.behaviours = {}
            wait_until(lambda: len(_urls(server, info)) == 3)
            outcome.require(server.get(url).body == nar, "a wrong NAR")
            wait_until(lambda: not [*server.cache_dir.glob("nar/*.growing")])


ALL = [nonsense, from_outside_to_inside, worker_killed_amid_a_fetch]
