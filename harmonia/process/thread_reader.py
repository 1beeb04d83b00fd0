"""Reader in threads: has threads run a generator of chunks, and gives its chunks to the event loop.

While a chunk is sent, a thread reads the next: no more than these two are in memory. When a reader has ended, in
whatever way, no thread runs the generator any longer, and it is closed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any

from harmonia.store.file_reader import CHUNK_BYTES, Chunk, OpenSlice, Step

_MAX_GATHER_S = 0.001  # for which small chunks that are there already wait for more
_MIN_POLL_S = 0.001  # until a generator that yielded None is asked again; doubled each time
_MAX_POLL_S = 0.02

_END = object()

Submit = Callable[..., "Future[Any]"]
"""Runs a function in a thread."""


async def read_in_threads(steps: Generator[Step | None], submit: Submit) -> AsyncGenerator[Chunk]:
    """Yield the chunks of a generator. An open slice has to be read to its end before the next chunk is asked for.

    If the generator yields a future, nobody asks for more before that has ended. After None, it is asked again soon.
    """
    running: Future[Any] | None = None
    poll_s = _MIN_POLL_S
    try:
        running = submit(_pull, steps)
        while True:
            pulled = await asyncio.wrap_future(running)
            while pulled:
                match step := pulled.popleft():
                    case bytes():
                        if not pulled:
                            running = submit(_pull, steps)
                        yield step
                        poll_s = _MIN_POLL_S
                        continue
                    case OpenSlice():
                        yield step
                        poll_s = _MIN_POLL_S
                    case Future():
                        await _ended(step)
                    case None:
                        await asyncio.sleep(poll_s)
                        poll_s = min(2 * poll_s, _MAX_POLL_S)
                    case _:
                        return
                running = submit(_pull, steps)
    finally:
        if running is not None:
            await _stopped(running)
        steps.close()


async def read_bytes(chunks: AsyncGenerator[Chunk], submit: Submit) -> AsyncGenerator[bytes | bytearray]:
    """Yield the bytes of chunks. What the page cache has of an open slice is read at once, the rest by a thread.

    To wake a thread takes longer than to copy what is in memory.
    """
    async with aclosing(chunks):
        async for chunk in chunks:
            if isinstance(chunk, bytes):
                if chunk:
                    yield chunk
                continue
            while len(chunk):
                data: bytes | bytearray | None = chunk.read_cached()
                if data is not None:
                    await asyncio.sleep(0)  # it is the turn of others
                elif not (data := await _run(chunk.read, submit)):
                    break
                yield data


async def _run(function: Callable[[], bytes], submit: Submit) -> bytes:
    """Return what a function returns in a thread. If cancelled, wait for the thread to end it."""
    running = submit(function)
    try:
        return await asyncio.wrap_future(running)
    finally:
        await _stopped(running)


def _pull(steps: Generator[Step | None]) -> deque[object]:
    """Return the next steps, at least one: bytes, and at the end perhaps another step, or `_END`.

    Chunks that are small, and there at once, come together: to wake a thread takes longer than to read them.
    """
    pulled: deque[object] = deque()
    size = 0
    began = perf_counter()
    for step in steps:
        data = step.read() if isinstance(step, OpenSlice) and len(step) < CHUNK_BYTES else step
        pulled.append(data)
        if not isinstance(data, bytes):
            return pulled
        size += len(data)
        if size >= CHUNK_BYTES or perf_counter() - began > _MAX_GATHER_S:
            return pulled
    pulled.append(_END)
    return pulled


async def _ended(future: "Future[Any]") -> None:
    """Wait for the end of a future, whatever comes of it."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: "Future[Any]") -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended.set)

    future.add_done_callback(wake)
    await ended.wait()


async def _stopped(running: "Future[Any]") -> None:
    """Wait until no thread runs the job, also if cancelled meanwhile."""
    running.cancel()
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await _ended(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
