"""Background tasks on the event loop, which outlive the request that started them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Tasks:
    """Tasks that run until they end or `stop` cancels them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Spawn a task. If nobody awaits its result, asyncio logs its error."""
        task = asyncio.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def spawn_shared(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Spawn a task whose result callers may await, who report its error. If none of them is left, nobody does."""
        task = self.spawn(coroutine)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
