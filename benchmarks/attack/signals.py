"""Attacks with signals to the main process and to workers, in storms and during downloads."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.attack.arena import Arena, processes_of, restart
from benchmarks.attack.stores import MIB
from harmonia.config import tokens
from harmonia.config.tokens import Token
from support.running import LONG_GRACE, Sample, Server, download, file_url, wait_until
from support.unscathed import serves

_TOKENS = 100_000
_DOWNLOADS = 20
_STORM = 50
_SIZE = 64 * MIB


def token_storm(arena: Arena) -> None:
    """Send SIGHUP many times to a server with very many tokens."""
    secret, token = tokens.new("bystander", ["read"])
    others = (Token(f"token-{number}", token.scopes, os.urandom(32)) for number in range(_TOKENS))
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        file = Path(directory, "tokens")
        file.write_text("".join(f"{each}\n" for each in (*others, token)))
        settings = f"tokens_path = '{file}'"
        headers = {"Authorization": f"Bearer {secret}"}
        name = f"a storm of SIGHUP with {_TOKENS:,} tokens"
        with arena.attacked(name, settings, headers=headers, unharmed=[]) as (server, outcome):
            workers = server.workers
            until = time.monotonic() + arena.form.seconds
            while time.monotonic() < until:
                server.process.send_signal(signal.SIGHUP)
                outcome.counts["SIGHUP"] += 1
                time.sleep(0.02)
            outcome.require(server.workers == workers, "a worker was replaced")


@contextmanager
def _sample() -> Iterator[Sample]:
    with tempfile.TemporaryDirectory(prefix="harmonia-") as directory:
        yield Sample.make(Path(directory, "store"), _SIZE)


@contextmanager
def _downloads(server: Server, sample: Sample) -> Iterator[None]:
    """Run downloads during `with`: plain ones, and one that is compressed for the first time."""
    with ExitStack() as stack:
        for _ in range(_DOWNLOADS):
            stack.enter_context(download(server, sample.big))
        compressed = stack.enter_context(server.connect(receive_buffer=8192))
        compressed.sendall(f"GET {file_url(sample.big)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        compressed.recv(1)
        yield


def terminated(arena: Arena) -> None:
    """End a server with a storm of SIGHUP and SIGTERM during downloads."""
    name = "a storm of SIGHUP and SIGTERM"
    with _sample() as sample, arena.served(name, LONG_GRACE, root=sample.root) as (server, outcome):
        with _downloads(server, sample):
            for _ in range(_STORM):
                for number in (signal.SIGHUP, signal.SIGTERM):
                    if server.process.poll() is None:
                        server.process.send_signal(number)
                        outcome.counts[number.name] += 1
                        time.sleep(0.01)  # otherwise the kernel merges pending signals
            status = server.wait()  # fails if the server waits for its downloads
            outcome.require(status == 0, f"exit status {status}")
        restart(server)
        serves(server, sample.small)


def main_process_killed(arena: Arena) -> None:
    """Kill the main process during downloads, many times."""
    with _sample() as sample, arena.served("kill -9 of the main process", root=sample.root) as (server, outcome):
        for _ in range(3):
            with _downloads(server, sample):
                server.process.kill()
                server.process.wait()
                wait_until(lambda: not processes_of(server))
            server.wait()
            outcome.counts["kill -9"] += 1
            restart(server)
            serves(server, sample.small, sample.big)
            for file in (server.cache_dir / "nar").iterdir():
                file.unlink(missing_ok=True)  # the new server removes what the killed one has left


ALL = [token_storm, terminated, main_process_killed]
