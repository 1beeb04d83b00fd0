"""Thread pools of a worker, for everything that the event loop must not wait for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import TypeVar

from harmonia.cache.fair_executor import FairExecutor
from harmonia.errors import StoreUnavailableError
from harmonia.metrics.shared_counters import Metrics
from harmonia.store.store import BUSY_TIMEOUT_S, Store

_READER_THREADS = 16  # threads that answer short questions to the disk
_BODY_THREADS = 16  # threads that read bodies; one is busy only while it reads a chunk, not while that is sent
_BODY_THREADS_PER_CLIENT = 2  # for one client

_T = TypeVar("_T")


class Threads:
    def __init__(self, browsed: Store, metrics: Metrics) -> None:
        """`browsed` is the store once more, for questions that take long: no narinfo waits behind them."""
        self.readers = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="read")
        self.bodies = FairExecutor(_BODY_THREADS, _BODY_THREADS_PER_CLIENT, "body")
        self.closure = ThreadPoolExecutor(1, thread_name_prefix="closure")
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._browsing = ThreadPoolExecutor(1, thread_name_prefix="browse")
        self.index = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._browsed = browsed
        self._metrics = metrics

    async def run_io(self, ask: Callable[[], _T]) -> _T:
        """Run a function that reads from the disk, in one of many threads."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, ask)

    async def run_db(self, ask: Callable[[], _T]) -> _T:
        """Run a short query, in the one thread for the database. Raises StoreUnavailableError."""
        began = perf_counter()
        try:
            return await self.run_with_timeout(self._database, ask)
        finally:
            self._metrics.own.database.observe(perf_counter() - began)

    async def run_slow_db(self, ask: Callable[[Store], _T]) -> _T:
        """Run a query that may take long, in a thread of its own. Raises StoreUnavailableError."""
        return await self.run_with_timeout(self._browsing, partial(ask, self._browsed))

    async def run_with_timeout(self, thread: ThreadPoolExecutor, ask: Callable[[], _T]) -> _T:
        """Run a query in a thread. Raises StoreUnavailableError if it takes longer than the database's timeout."""
        try:
            async with asyncio.timeout(BUSY_TIMEOUT_S + 1):
                return await asyncio.get_running_loop().run_in_executor(thread, ask)
        except TimeoutError:
            raise StoreUnavailableError("the database does not answer") from None
