"""Single flight: one run of a job for all callers that want its result at the same time, within one event loop."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")


class SingleFlight:
    """Runs by key. A run goes on when all its callers have gone, and is forgotten when it ends."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Any]] = {}

    def start(
        self, key: Hashable, begin: Callable[[], "asyncio.Future[_T] | Coroutine[Any, Any, _T]"]
    ) -> "asyncio.Future[_T]":
        """Return the run under way for `key`, or else the one that `begin` starts. All callers share this future."""
        run = self._running.get(key)
        if run is None:
            run = self._running[key] = asyncio.ensure_future(begin())
            run.add_done_callback(partial(self._end, key))
        return run

    async def run(self, key: Hashable, begin: Callable[[], "asyncio.Future[_T] | Coroutine[Any, Any, _T]"]) -> _T:
        """Return the result of that run. Cancelling one caller cancels neither the run nor the other callers."""
        return await asyncio.shield(self.start(key, begin))

    def _end(self, key: Hashable, run: "asyncio.Future[Any]") -> None:
        del self._running[key]
        if not run.cancelled():
            run.exception()  # asyncio logs an exception that nobody retrieved, and all callers may have gone
