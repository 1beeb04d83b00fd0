"""Background work that outlives the request that started it: tasks on the event loop, and thread pools."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from harmonia.process.threads import step_back

_WRITER_THREADS = 4
_SYNC_THREADS = 4

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Tasks:
    """Tasks that run until they end or `stop` cancels them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def spawn_shared(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Spawn a task whose result several callers may await. If none does, asyncio does not log its error."""
        task = self.spawn(coroutine)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


class FetchThreads:
    """Thread pools for fetched NARs: short writes, waits for the disk (fsync), and unpacking.

    Unpacking takes long, and much memory for each NAR: it has as many threads as there are processors.
    """

    def __init__(self) -> None:
        self._writers = ThreadPoolExecutor(_WRITER_THREADS, thread_name_prefix="fetch")
        self._syncers = ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync")
        processors = len(os.sched_getaffinity(0))
        self._unpackers = ThreadPoolExecutor(processors, thread_name_prefix="unpack", initializer=step_back)
        self.much_memory = asyncio.Lock()
        """Lock for unpacking with LARGE_MEMORY_BYTES: one NAR at a time."""

    async def write(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        return await _finished(self._writers, function, *arguments, **named)

    async def unpack(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        return await _finished(self._unpackers, function, *arguments, **named)

    async def sync(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        return await _finished(self._syncers, function, *arguments, **named)


async def _finished(
    threads: ThreadPoolExecutor, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs
) -> _T:
    """Return the result of a function in a thread. If the caller is cancelled, wait for the thread first."""
    running = asyncio.wrap_future(threads.submit(function, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
