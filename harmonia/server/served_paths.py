"""Queue in memory from the workers to the process that writes served store paths to the mirror's bucket.

It is a pipe, which outlives that process. Nobody waits for it: if it is full, the next download of a path tries again.
"""

import asyncio
import os
from contextlib import suppress

from cachetools import TTLCache

from harmonia.nix.store_path import StorePath

_AGAIN_S = 24 * 3600.0
"""Time after which a path that is still being served is handed over again. That keeps it in the bucket."""
_MAX_KNOWN_PATHS = 20_000
_BATCH_BYTES = 64 * 1024


class ServedPaths:
    """The queue. Create it before the fork."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._known: TTLCache[StorePath, None] = TTLCache(_MAX_KNOWN_PATHS, _AGAIN_S)

    def add(self, path: StorePath) -> None:
        """Hand a path over, unless this worker has done so today. Does not block."""
        if path not in self._known:
            with suppress(BlockingIOError):
                os.write(self._in, f"{path}\n".encode())  # atomic, because it is shorter than PIPE_BUF
                self._known[path] = None

    async def take(self) -> list[StorePath]:
        """Wait for paths, and return them. Only one process may call this."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._out, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._out)
        names = bytearray(os.read(self._out, _BATCH_BYTES))
        while not names.endswith(b"\n"):
            names += os.read(self._out, 1)
        return [StorePath(name) for name in names.decode().split()]
