"""The modules of Harmonia that one request uses, and those of them that a reader has to open to understand it.

`PYTHONPATH=tests .venv/bin/python -m support.modules_used` prints them. Each request has its own connection to a worker
that has answered `/version` and probed its upstream. `sys.setprofile` records each call from the first byte of the
connection to two seconds after the last byte of the response. Periodic tasks of the worker are left out.

A module is vocabulary, not one to open, if its name and signatures are enough to understand a call of it.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from types import FrameType

from harmonia.config import loader
from harmonia.nix.path_info import PathInfo
from harmonia.server import worker
from harmonia.tools.store_builder import StoreBuilder
from support.upstream_paths import KEY, entry, make_path
from support.upstream_server import UpstreamServer

VOCABULARY = {
    *("ownership", "untrusted", "metrics.shared_counters", "config.proxy"),
    *(
        "nix.base32",
        "nix.content_address",
        "nix.content_coding",
        "nix.decompress",
        "nix.hashes",
        "nix.path_info",
        "nix.signing",
    ),
    *("nix.store_path", "process.event_log"),
    *("process.fair_executor", "process.loop_reads", "process.loop_turns", "process.single_flight", "process.threads"),
    "process.request_trace",
    *("store.confined", "store.daemon_messages", "store.new_paths", "store.nix_daemon"),
    *("server.absent_paths", "server.connections", "server.events", "server.routes"),
    *("server.http.access_log", "server.http.byte_range", "server.http.negotiation", "server.http.rate_limit"),
    *("server.http.outcome", "server.http.small_uploads"),
    *("upstream.failed_nars", "upstream.header_fields", "upstream.lookup_cache", "upstream.tasks"),
}
"""Modules whose calls are understood without their code: `base32.encode`, `threads.run_db`, `limiter.admit`."""
_PERIODIC = {worker._heartbeat.__code__, worker._trim_heap.__code__}  # noqa: SLF001 (a private part is tested)


class Recorder:
    """Names of the modules with called functions."""

    def __init__(self) -> None:
        self.modules: set[str] = set()

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("harmonia.") and frame.f_code not in _PERIODIC:
            self.modules.add(module.removeprefix("harmonia."))


LEAN = "narinfo, as usual"
"""A request without Sanic, because its client has requested another narinfo before."""


def _requests(local: PathInfo, another: PathInfo, remote: PathInfo) -> Iterator[tuple[str, str]]:
    """Yield a name and a path for each request. The first narinfo response gives the URL of the NAR."""
    yield "narinfo", f"/{local.path.hash_part}.narinfo"
    yield LEAN, f"/{another.path.hash_part}.narinfo"
    yield "cold .nar.zst", "/{URL}"
    # Last, because later requests check whether its remembered response is still valid.
    yield "narinfo of an upstream", f"/{remote.path.hash_part}.narinfo"


def _ask(port: int, path: str) -> Mapping[str, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 200, (path, answer.status)
    lines = body.decode("latin-1").splitlines() if path.endswith(".narinfo") else []
    return dict(line.partition(": ")[::2] for line in lines)


def modules_used() -> dict[str, list[str]]:
    """Serve one request of each kind in this process, whose main thread must be free; return the modules of each."""
    used: dict[str, list[str]] = {}
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as directory, UpstreamServer() as upstream:
        root = Path(directory)
        store = StoreBuilder(root / "store")
        local = store.add(store.output_path("local"), {"file": bytes(1 << 21)})
        another = store.add_text("another", b"")
        remote = make_path(root / "remote")
        upstream.add(remote.info, remote.file, remote.nar, (KEY,))
        settings = loader.parse(
            f"real_nix_store = '{store.real_dir}'\ncache_dir = '{root}/cache'\nworkers = 1\ndebug_info = false\n"
            f"upstream_timeout = 60.0\n{entry(upstream)}",
            "modules_used",
            {},
        )
        listening = socket.create_server(("127.0.0.1", 0))
        lifeline, worker_end = socket.socketpair()
        port = listening.getsockname()[1]

        def client() -> None:
            try:
                while not upstream.asked["GET /nix-cache-info"]:  # requested by the worker when it starts
                    time.sleep(0.05)
                time.sleep(0.5)
                _ask(port, "/version")
                fields: Mapping[str, str] = {}
                for name, path in _requests(local, another, remote.info):
                    recorder.modules = set()
                    fields = {**_ask(port, path.format_map(fields)), **fields}  # the URL of the first
                    time.sleep(2)  # work after the response: compression, temporary roots, cache of narinfos
                    used[name] = sorted(recorder.modules)
                recorder.modules = set()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        asking = threading.Thread(target=client)
        context = worker.prepare(settings, [])
        run = partial(worker.run, context, (), 0, [listening], worker_end, 3600.0)
        threading.setprofile(recorder.profile)
        sys.setprofile(recorder.profile)
        try:
            asking.start()
            run()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            asking.join()
            lifeline.close()
    return used


def main() -> None:
    used = {name: set(modules) for name, modules in modules_used().items()}
    common = set.intersection(*(modules for name, modules in used.items() if name != LEAN)) - VOCABULARY
    print(f"read once for all requests: {len(common)}: {', '.join(sorted(common))}")  # noqa: T201 (a command)
    for name, modules in used.items():
        read = modules - VOCABULARY
        own = read - common
        print(f"{name}: {len(modules)} run, {len(read)} to read, of these its own {len(own)}:")  # noqa: T201 (a command)
        print(f"  {', '.join(sorted(own))}")  # noqa: T201 (a command)


if __name__ == "__main__":
    main()
