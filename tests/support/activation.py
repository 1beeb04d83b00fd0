"""Socket activation without systemd: listening sockets are passed to a server, which starts at the first connection."""

import os
import random
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from support.preloaded import PATCHED
from support.running import Server

# Moves the given descriptors to 3, 4, …, as systemd passes them, and runs Harmonia.
ACTIVATED = """
import fcntl, os, sys
given = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 100) for fd in sys.argv.pop(1).split(",")]
os.closerange(3, 100)
for fd, copy in enumerate(given, 3):
    os.dup2(copy, fd)
os.environ.setdefault("LISTEN_PID", str(os.getpid()))
os.environ.setdefault("LISTEN_FDS", str(len(given)))
os.environ["LISTEN_FDNAMES"] = ":".join(["harmonia"] * len(given))
from harmonia.cli import main
main()
"""
_POLL_S = 0.02
_LONGEST_LIFE_S = 1.0  # of a server that is killed at random


def activated(*passed: int) -> dict[str, object]:
    """Return options of a Server to which systemd passes descriptors."""
    program = [*PATCHED, ACTIVATED, ",".join(map(str, passed))]
    return {"program": program, "pass_fds": passed}


class SocketUnit:
    """A socket that starts a server when a connection waits and no server runs, like systemd's socket unit."""

    def __init__(self, directory: Path, store: Path, settings: str) -> None:
        directory.mkdir()
        self._directory, self._store, self._settings = directory, store, settings
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.servers: list[Server] = []
        self.kills = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._random = random.Random(directory.name)  # other times for each unit: a build may be shorter than some

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for server in self.servers:
            server.stop()
        self._socket.close()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            is_waiting = select.select([self._socket], [], [], _POLL_S)[0]
            if is_waiting and not self.is_running:
                server = Server(
                    self._directory / f"{len(self.servers)}",
                    self._store,
                    self._settings,
                    cache_dir=self._directory / "cache",
                    **activated(self._socket.fileno()),  # type: ignore[arg-type]
                )
                server.launch()
                self.servers.append(server)

    @property
    def is_running(self) -> bool:
        return bool(self.servers) and self.servers[-1].process.poll() is None

    @contextmanager
    def killed_at_random(self) -> Iterator[None]:
        """Kill each server or its worker at a random time after its start, which `kills` counts."""
        done = threading.Event()
        killer = threading.Thread(target=self._kill, args=(done,))
        killer.start()
        try:
            yield
        finally:
            done.set()
            killer.join()

    def _kill(self, done: threading.Event) -> None:
        while not done.wait(_POLL_S):
            server = self.servers[-1] if self.is_running else None
            if server is None or not any("serving" in line for line in server.log):
                continue
            if done.wait(self._random.uniform(0, _LONGEST_LIFE_S)):
                return
            with suppress(OSError, IndexError):  # it has ended meanwhile
                os.kill(self._random.choice([server.process.pid, server.workers[0]]), signal.SIGKILL)
                self.kills += 1
