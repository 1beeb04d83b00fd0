"""Attacks with idle connections and slow request heads, also on a server with few descriptors."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.attack.arena import Arena
from benchmarks.attack.client import going_on, hold
from support.certificates import authority, issue
from support.running import HARMONIA, Server, open_files

_SILENT = 6000
_MAX_CONNECTIONS = 100
_SLOW_HEADS = 500
_FEW = 256
_MARGIN = 20  # sockets of a worker that are not client connections


def silent_tls(arena: Arena) -> None:
    """Open connections without starting the TLS handshake."""
    name = f"{_SILENT:,} silent TLS connections, max_connections = {_MAX_CONNECTIONS}"
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        authority(Path(directory), "ca")
        both = issue(Path(directory), "ca", "cache")
        settings = (
            f"tls_cert_path = '{both}'\ntls_key_path = '{both}'\n"
            f"max_connections = {_MAX_CONNECTIONS}\nheader_timeout = 5"
        )
        with arena.attacked(name, settings, memory_bound_mib=150) as (server, outcome):
            with going_on(hold, server.url, b"", b"", _SILENT) as outcome.counts:
                most = _most_sockets(server, arena.form.seconds)
            outcome.counts["most open sockets"] = most
            outcome.require(most <= _MAX_CONNECTIONS + _MARGIN, f"{most} open sockets")


def _most_sockets(server: Server, seconds: float) -> int:
    """Watch a server for that many seconds. Return the largest number of open sockets."""
    most, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        most = max(most, sum(name.startswith("socket:") for pid in server.workers for name in open_files(pid)))
        time.sleep(0.1)
    return most


def slow_heads(arena: Arena) -> None:
    _drip(arena, f"{_SLOW_HEADS} slow heads")


def few_descriptors(arena: Arena) -> None:
    _drip(arena, f"{_SLOW_HEADS} slow heads, ulimit -n {_FEW}", ["prlimit", f"--nofile={_FEW}:{_FEW}", *HARMONIA])


def _drip(arena: Arena, name: str, program: Sequence[str] = HARMONIA) -> None:
    with (
        arena.attacked(name, program=program) as (server, outcome),
        going_on(hold, server.url, b"GET /version HTTP/1.1\r\nX: ", b"y", _SLOW_HEADS) as outcome.counts,
    ):
        arena.wait()


ALL = [silent_tls, slow_heads, few_descriptors]
