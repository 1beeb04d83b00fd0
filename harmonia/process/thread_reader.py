"""Reader of chunks for the event loop, from a generator that runs in threads.

While a chunk is sent, a thread reads the next one; at most these two are in memory. When the reader ends, for any
reason, no thread runs the generator any more, and the generator is closed.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from functools import partial
from time import perf_counter
from typing import Any, TypeVar, cast

from harmonia.process.loop_reads import LoopReads
from harmonia.store.file_reader import CHUNK_BYTES, Chunk, OpenSlice, Step

_MAX_GATHER_S = 0.001  # for which small chunks wait for more
_MIN_POLL_S = 0.001  # until the next try after a generator has yielded None; doubled each time
_MAX_POLL_S = 0.02

_END = object()

_loop_reads = LoopReads()

_T = TypeVar("_T")

Submit = Callable[..., "Future[Any]"]
"""A function that runs another function in a thread."""


async def read_in_threads(
    steps: Generator[Step | None], submit: Submit, turn: Callable[[], Awaitable[None]] | None = None
) -> AsyncGenerator[Chunk]:
    """Yield the chunks of a generator. The caller reads an open slice to its end before it asks for the next chunk.

    After the generator yields a future, this waits for its end; after None, it waits for some milliseconds.
    If `turn` is given, each step is short, and runs on the event loop as long as its reads come from memory. `turn`
    waits until it may.
    """
    running: Future[Any] | None = None
    poll_s = _MIN_POLL_S
    try:
        while True:
            if running is None and turn is not None and _loop_reads.allowed:
                await turn()
                pulled = _loop_reads.run(partial(_pull_on_loop, steps))
            else:
                running = running or submit(_pull, steps)
                pulled = await asyncio.wrap_future(running)
                running = None
            while pulled:
                match step := pulled.popleft():
                    case bytes():
                        if not pulled and (turn is None or not _loop_reads.allowed):
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
    finally:
        if running is not None:
            await _stopped(running)
        steps.close()


async def read_bytes(chunks: AsyncGenerator[Chunk], submit: Submit) -> AsyncGenerator[bytes | bytearray]:
    """Yield the bytes of chunks. Bytes of open slices are read at once from the page cache, the others by a thread.

    To wake a thread takes longer than to copy bytes in memory.
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
                    await asyncio.sleep(0)  # let other tasks run
                elif not (data := await run_in_thread(chunk.read, submit)):
                    break
                yield data


async def run_in_thread(function: Callable[[], _T], submit: Submit) -> _T:
    """Run a function in a thread, and return its result. If cancelled, wait until the thread has ended it."""
    running = submit(function)
    try:
        return cast("_T", await asyncio.wrap_future(running))
    finally:
        await _stopped(running)


def _pull(steps: Generator[Step | None]) -> deque[object]:
    """Return the next steps, at least one: bytes, and at the end perhaps another step, or `_END`.

    Small chunks are gathered, because to wake a thread takes longer than to read them.
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


def _pull_on_loop(steps: Generator[Step | None]) -> deque[object]:
    """Return the next step, or `_END`. The caller reads the bytes of an open slice."""
    return deque((next(steps, _END),))


async def _ended(future: "Future[Any]") -> None:
    """Wait for the end of a future, without its result or error."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: "Future[Any]") -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended.set)

    future.add_done_callback(wake)
    await ended.wait()


async def _stopped(running: "Future[Any]") -> None:
    """Wait until no thread runs the job, even if this is cancelled meanwhile."""
    running.cancel()
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await _ended(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
