"""Ownership of files, bodies and locks: an error or a cancellation during a handover must not leave one open."""

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar


class Closeable(Protocol):
    def close(self) -> object: ...


_C = TypeVar("_C", bound=Closeable | None)


@contextmanager
def closed_on_error(opened: _C) -> Generator[_C]:
    """Close `opened` if the block raises. Otherwise, the block has passed it on, and the new owner closes it."""
    try:
        yield opened
    except BaseException:
        if opened is not None:
            opened.close()
        raise


async def hand_over(opening: "asyncio.Future[_C] | Future[_C]") -> _C:
    """Wait for `opening`, and return its result. If the caller is cancelled meanwhile, close the result.

    If `opening` is a thread's job that has not begun, the job is cancelled instead.
    """
    waiting = asyncio.wrap_future(opening) if isinstance(opening, Future) else asyncio.shield(opening)
    try:
        return await waiting
    except asyncio.CancelledError:
        if not (isinstance(opening, Future) and opening.cancel()):
            opening.add_done_callback(_close_result)
        raise


def _close_result(opening: "asyncio.Future[Any] | Future[Any]") -> None:
    if not opening.cancelled() and opening.exception() is None and (opened := opening.result()) is not None:
        opened.close()
