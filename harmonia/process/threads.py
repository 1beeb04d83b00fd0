"""Thread pools of a worker, for everything that would block the event loop."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import ParamSpec, TypeVar

from harmonia.errors import StoreUnavailableError
from harmonia.metrics.shared_counters import Metrics
from harmonia.nix.decompress import LARGE_MEMORY_BYTES, MEMORY_BYTES, WindowError
from harmonia.ownership import Closeable, hand_over
from harmonia.process.fair_executor import FairExecutor, start_threads
from harmonia.process.loop_reads import LoopReads
from harmonia.store.store import BUSY_TIMEOUT_S, Store

_READER_THREADS = 16  # for short reads from the disk
_BODY_THREADS = 16  # for bodies; a thread is busy only while it reads a chunk, not while the chunk is sent
_BODY_THREADS_PER_CLIENT = 2
_FIRST_THREADS = 4  # of these two, started with the worker; each thread that has read a body keeps some memory
_WRITER_THREADS = 4
_SYNC_THREADS = 4
_NICENESS = 10  # other threads run first, so that a busy machine still responds at once

_T = TypeVar("_T")
_P = ParamSpec("_P")
_C = TypeVar("_C", bound=Closeable | None)


class Threads:
    """Thread pools of one worker."""

    def __init__(self, browsed: Store, metrics: Metrics) -> None:
        """Create the pools. `browsed` is a second connection to the store: no narinfo waits for a slow query."""
        self.readers = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="read")
        self.bodies = FairExecutor(_BODY_THREADS, _BODY_THREADS_PER_CLIENT, "body")
        self.closure = ThreadPoolExecutor(1, thread_name_prefix="closure")
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._browsing = ThreadPoolExecutor(1, thread_name_prefix="browse")
        self.index = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._writers = ThreadPoolExecutor(_WRITER_THREADS, thread_name_prefix="fetch")
        self._syncers = ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync")
        processors = len(os.sched_getaffinity(0))
        # Few, because unpacking takes long, and much memory for each NAR.
        self._unpackers = ThreadPoolExecutor(processors, thread_name_prefix="unpack", initializer=lower_priority)
        self.much_memory = asyncio.Lock()
        """Lock for unpacking with LARGE_MEMORY_BYTES: one file at a time."""
        self.loop_db = LoopReads(lambda seconds: metrics.own.database.observe(seconds))  # noqa: PLW0108 (`own` changes)
        """Short queries on the event loop, with a connection of its own."""
        self.loop_io = LoopReads()
        """Short reads of files on the event loop."""
        self._browsed = browsed
        self._metrics = metrics

    def start(self) -> None:
        """Start the threads that most requests need."""
        self.bodies.start(_FIRST_THREADS)
        start_threads(self.readers, _FIRST_THREADS)
        start_threads(self._database, 1)

    async def run_io(self, function: Callable[[], _T]) -> _T:
        """Run a function that reads from the disk, in one of many threads."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, function)

    async def run_short_io(self, function: Callable[[], _T]) -> _T:
        """Run a function that reads little from the disk: on the event loop, if such reads come from memory."""
        return self.loop_io.run(function) if self.loop_io.allowed else await self.run_io(function)

    async def run_open(self, function: Callable[[], _C]) -> _C:
        """Run a function that opens a file, in one of many threads. The file is closed if the caller is cancelled."""
        return await hand_over(self.readers.submit(function))

    async def run_db(self, function: Callable[[], _T]) -> _T:
        """Run a short query in the database thread, and count its time.

        Raises StoreUnavailableError if the query takes longer than the database's timeout.
        """
        began = perf_counter()
        try:
            return await self.run_with_timeout(self._database, function)
        finally:
            self._metrics.own.database.observe(perf_counter() - began)

    async def run_slow_db(self, function: Callable[[Store], _T]) -> _T:
        """Run a slow query in the thread for slow queries.

        Raises StoreUnavailableError if the query takes longer than the database's timeout.
        """
        return await self.run_with_timeout(self._browsing, partial(function, self._browsed))

    async def run_with_timeout(self, thread: ThreadPoolExecutor, function: Callable[[], _T]) -> _T:
        """Run a query in a thread. Raises StoreUnavailableError if it takes longer than the database's timeout."""
        try:
            async with asyncio.timeout(BUSY_TIMEOUT_S + 1):
                return await asyncio.get_running_loop().run_in_executor(thread, function)
        except TimeoutError:
            raise StoreUnavailableError("the database does not answer") from None

    async def write(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Run a function that reads or writes a fetched file. A cancelled caller waits for its end."""
        return await _finished(self._writers, function, *arguments, **named)

    async def sync(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Like `write`, for a function that waits for the disk (fsync)."""
        return await _finished(self._syncers, function, *arguments, **named)

    async def unpack(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        """Like `write`, for a function that unpacks a file."""
        return await _finished(self._unpackers, function, *arguments, **named)

    async def with_enough_memory(self, unpack: Callable[[int], Awaitable[_T]]) -> _T:
        """Return the result of `unpack`, called with the bytes of memory that it may take.

        If MEMORY_BYTES are too few (WindowError), wait for the turn of this file, and call it with LARGE_MEMORY_BYTES.
        """
        try:
            return await unpack(MEMORY_BYTES)
        except WindowError:
            async with self.much_memory:
                return await unpack(LARGE_MEMORY_BYTES)


async def _finished(
    threads: ThreadPoolExecutor, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs
) -> _T:
    """Return the result of a function in a thread. If the caller is cancelled, wait for the thread first."""
    running = asyncio.wrap_future(threads.submit(function, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        running.add_done_callback(lambda job: job.cancelled() or job.exception())  # otherwise asyncio logs the error
        await asyncio.wait({running})
        raise


def lower_priority() -> None:
    """Raise the niceness of the calling thread, so that other threads run first."""
    thread = threading.get_native_id()
    with suppress(OSError):  # a service's system call filter may forbid it
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
