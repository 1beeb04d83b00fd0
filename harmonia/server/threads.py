"""The threads of a worker: what the event loop must not wait for is done in them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import TypeVar

from harmonia.cache.fair_executor import FairExecutor
from harmonia.errors import StoreUnavailableError
from harmonia.metrics.shared_counters import Metrics
from harmonia.store.store import BUSY_TIMEOUT, Store

_READERS = 16  # threads that answer short questions to the disk
_BODY_READERS = 16  # threads that read bodies; one is busy only while it reads a chunk, not while that is sent
_BODY_READERS_EACH = 4  # for one client

_T = TypeVar("_T")


class Threads:
    def __init__(self, browsed: Store, metrics: Metrics) -> None:
        """`browsed` is the store once more, for questions that take long: no narinfo waits behind them."""
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self.bodies = FairExecutor(_BODY_READERS, _BODY_READERS_EACH, "body")
        self.closure = ThreadPoolExecutor(1, thread_name_prefix="closure")
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._browsing = ThreadPoolExecutor(1, thread_name_prefix="browse")
        self.index = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._browsed = browsed
        self._metrics = metrics

    async def read(self, ask: Callable[[], _T]) -> _T:
        """What `ask` finds on disk, in one of the threads that may wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, ask)

    async def query(self, ask: Callable[[], _T]) -> _T:
        """What `ask` finds in the store, in the one thread that may wait for its database. StoreUnavailableError."""
        began = perf_counter()
        try:
            return await self.wait_for(self._database, ask)
        finally:
            self._metrics.own.database.observe(perf_counter() - began)

    async def browse(self, ask: Callable[[Store], _T]) -> _T:
        """What `ask` finds in the store, where that may take long."""
        return await self.wait_for(self._browsing, partial(ask, self._browsed))

    async def wait_for(self, thread: ThreadPoolExecutor, ask: Callable[[], _T]) -> _T:
        """What `ask` finds, in that thread. StoreUnavailableError where it takes too long, or waits in vain."""
        try:
            async with asyncio.timeout(BUSY_TIMEOUT + 1):
                return await asyncio.get_running_loop().run_in_executor(thread, ask)
        except TimeoutError:
            raise StoreUnavailableError("the database does not answer") from None
