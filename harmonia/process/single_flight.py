"""Single flight: one run of a job for all callers that want its result at the same time, within one event loop."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")


class SingleFlight:
    """Running jobs by key. A run continues even if all its callers are cancelled."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Any]] = {}

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._running)

    def start(
        self, key: Hashable, begin: Callable[[], "asyncio.Future[_T] | Coroutine[Any, Any, _T]"]
    ) -> "asyncio.Future[_T]":
        """Return the future of the run for `key`, which all callers share. Start one with `begin` if there is none."""
        run = self._running.get(key)
        if run is None:
            run = self._running[key] = asyncio.ensure_future(begin())
            run.add_done_callback(partial(self._end, key))
        return run

    async def run(self, key: Hashable, begin: Callable[[], "asyncio.Future[_T] | Coroutine[Any, Any, _T]"]) -> _T:
        """Return the result of the run for `key`, as `start` does. Cancelling a caller affects only this caller."""
        return await asyncio.shield(self.start(key, begin))

    def _end(self, key: Hashable, run: "asyncio.Future[Any]") -> None:
        del self._running[key]
        if not run.cancelled():
            run.exception()  # otherwise asyncio logs the exception if all callers were cancelled
