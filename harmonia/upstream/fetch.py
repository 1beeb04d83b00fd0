"""NARs of upstreams: written to the cache as they come, once however many want them, and read from there.

A NAR becomes whole, for those who read it already, when its file has proved to be what its narinfo said, and it is kept
for others when its content has, too. Until then its last bytes are held back (cached_file.py), so that nobody ever gets
a complete body that is not what the upstream meant to send. Where the cache cannot take one, it is passed on.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar

import aiohttp

from harmonia.cached_file import CachedFile, Filler
from harmonia.errors import StoreObjectError, UpstreamError
from harmonia.nar_cache import NarCache
from harmonia.nix.nar import OpenSlice
from harmonia.upstream import content
from harmonia.upstream.passed import Passed
from harmonia.upstream.question import Found
from harmonia.upstream.transport import WHOLE, Part
from harmonia.zstd import step_back

_PIECE = 256 * 1024  # bytes that are taken at once
_WRITERS = 4  # threads
_MOST = 100  # NARs that are fetched at once, whoever waits for them; each has a connection and an open file
_RESUMES = 5  # in a row that bring nothing
_RESUME_DELAY = 0.1  # seconds; it doubles with each of them

_T = TypeVar("_T")
_P = ParamSpec("_P")

_log = logging.getLogger("harmonia")


class Kept:
    """A NAR in the cache, whole or growing. Where it stops to grow, the rest is passed on."""

    def __init__(
        self, file: CachedFile, size: int | None = None, fetch: "Fetch | None" = None, rest: Passed | None = None
    ) -> None:
        """`rest` may be None where the file is whole."""
        self.size = file.size if file.whole else size
        self._file: CachedFile | None = file
        """None once nobody fills it: what is read again, to tell its size before (body.py), is passed on."""
        self._fetch = fetch
        self._rest = rest

    def read(self, start: int, stop: int | None) -> Generator[bytes | OpenSlice | Future[bytes] | None]:
        position = start
        if self._file is not None:
            position = yield from self._file.follow(start, stop)
            if self._file.whole:
                self.size = self._file.size
            if self._file.whole or position == stop:
                return
            if self._fetch is not None and self._fetch.error is not None:
                raise self._fetch.error
            withdrawn = start < position and self._file.size < position
            self._file.close()
            self._file = None
            if withdrawn:
                raise StoreObjectError("what the upstream sent is wrong")
        if self._rest is not None:
            yield from self._rest.read(position, stop)
            self.size = self._rest.size


class Fetch:
    """A NAR on its way into the cache."""

    def __init__(
        self, found: Found, headers: Mapping[str, str], filler: Filler, limit: int, threads: "_Threads"
    ) -> None:
        self.size = found.nar.file_size
        """None until it is known."""
        self.error: UpstreamError | None = None
        self.started = asyncio.Event()
        """Set when the upstream has begun to send it, or failed to."""
        self._found = found
        self._headers = headers
        self._filler = filler
        self._limit = limit
        self._threads = threads
        self._given_up = False

    async def run(self) -> None:
        write = self._threads.write
        try:
            await self._transfer()
            await self._check()
            await write(self._filler.commit)
        except UpstreamError as error:
            self.error = error
            _log.error("%s: %s", self._found.url, error)
            await write(self._filler.withdraw)
        except OSError:  # of which the cache has told, unless it is only too large
            await write(self._filler.abandon)
        except BaseException:
            self._filler.abandon()
            raise
        finally:
            self.started.set()

    async def _check(self) -> None:
        """See that all is as the narinfo says. What takes long is done after the first clients have it."""
        info, nar, filler = self._found.info, self._found.nar, self._filler
        content.check_file(info, nar, filler.sha256, filler.size)
        if nar.compression == "none":
            return
        if nar.file_hash is not None:
            await self._threads.write(filler.finish)
        await self._threads.unpack(content.check_content, info, nar, self._written())

    def give_up(self) -> None:
        """Keep nobody waiting: the task is about to be cancelled."""
        self._given_up = True

    def _written(self) -> Iterator[bytes]:
        position = 0
        while not self._given_up and (data := self._filler.read(position, _PIECE)):
            position += len(data)
            yield data

    async def _transfer(self) -> None:
        self._found.client.counters.add("fetches")
        response: aiohttp.ClientResponse | None
        response = first = await self._found.ask(self._headers, WHOLE)
        try:
            self._begin(first.content_length)
        except BaseException:
            first.close()
            raise
        self.started.set()
        resumable = first.headers.get("Accept-Ranges", "").lower() == "bytes"
        etag = first.headers.get("ETag", "")
        headers = dict(self._headers) | ({"If-Range": etag} if etag.startswith('"') else {})
        failures = 0
        while True:
            before = self._filler.size
            try:
                await self._take_all(response or await self._resume(headers))
            except UpstreamError as error:
                response = None
                failures = 1 if self._filler.size > before else failures + 1
                if not resumable or isinstance(error, _WrongError) or failures > _RESUMES:
                    raise
                await asyncio.sleep(_RESUME_DELAY * 2 ** (failures - 1))
            else:
                return

    def _begin(self, length: int | None) -> None:
        """What the upstream says of its length has to be what its narinfo says."""
        if self.size is not None and length not in {None, self.size}:
            raise _WrongError(f"it has {length} bytes where its FileSize is {self.size}")
        self.size = length if length is not None else self.size
        self._measure(self.size or 0)

    async def _resume(self, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        response = await self._found.ask(headers, (self._filler.size, None))
        if response.status != HTTPStatus.PARTIAL_CONTENT:  # it has become another file
            response.close()
            raise _WrongError("it does not go on where it broke off")
        return response

    async def _take_all(self, response: aiohttp.ClientResponse) -> None:
        async with response:
            while data := await self._found.client.read(response, _PIECE):
                size = self._filler.size + len(data)
                if self.size is not None and size > self.size:
                    raise _WrongError("it is longer than was said")
                self._measure(size)
                await self._threads.write(self._filler.append, data)
                self._found.client.counters.add("fetched_bytes", len(data))
        if self.size is not None and self._filler.size < self.size:
            raise UpstreamError("its answer breaks off")

    def _measure(self, size: int) -> None:
        if size > self._limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


class _WrongError(UpstreamError):
    """What no second try would mend."""


class Fetches:
    """All NARs that are on their way here."""

    def __init__(self, cache: NarCache | None) -> None:
        self._cache = cache
        self._running: dict[str, Fetch] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = asyncio.Lock()
        self._threads = _Threads()

    async def close(self) -> None:
        for fetch in self._running.values():
            fetch.give_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def find(self, key: str) -> Kept | None:
        """The NAR of that key, whole, if it is in the cache."""
        file = None if self._cache is None else await self._threads.write(self._cache.use, key)
        return None if file is None else Kept(file)

    async def open(self, found: Found, headers: Mapping[str, str]) -> Kept | Passed:
        """Its NAR: from the cache, or as it comes. UpstreamError where it does not."""
        # A client that goes away must not leave behind a file that nobody fills.
        return await asyncio.shield(self._task(self._open(found, headers)))

    async def _open(self, found: Found, headers: Mapping[str, str]) -> Kept | Passed:
        cache = self._cache
        key = found.name.key
        opened = None
        if cache is not None and content.conclusive(found.nar) and (found.nar.file_size or 0) <= cache.limit:
            async with self._opening:
                if key in self._running or len(self._running) < _MOST:
                    opened = await self._threads.write(cache.open, key)
                elif file := await self._threads.write(cache.use, key):
                    opened = file, None
                if opened is not None and opened[1] is not None:
                    fetch = self._running[key] = Fetch(found, headers, opened[1], cache.limit, self._threads)
                    self._task(self._run(key, fetch))
        if opened is None:
            return await _passed(found, headers)
        rest = Passed(found.client, lambda part: found.ask(headers, part, checked=False))
        running = self._running.get(key)
        if running is None:  # another worker fetches it
            return Kept(opened[0], found.nar.file_size, None, rest)
        await running.started.wait()
        if running.error is not None:
            raise running.error
        return Kept(opened[0], running.size, running, rest)

    async def _run(self, key: str, fetch: Fetch) -> None:
        try:
            await fetch.run()
        finally:
            if self._running.get(key) is fetch:  # and not the next one, which a failure may have called for
                del self._running[key]

    def _task(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _passed(found: Found, headers: Mapping[str, str]) -> Passed:
    """The NAR without the cache."""
    check = partial(content.check_file, found.info, found.nar) if content.has_hash(found.nar) else None

    async def ask(part: Part) -> aiohttp.ClientResponse:
        return await found.ask(headers, part, checked=check is not None and part == WHOLE)

    return Passed(found.client, ask, await ask(WHOLE), check)


class _Threads:
    """Those that write, none for long, and those that unpack, which takes long, and much memory for each NAR."""

    def __init__(self) -> None:
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="fetch")
        processors = len(os.sched_getaffinity(0))
        self._unpackers = ThreadPoolExecutor(processors, thread_name_prefix="unpack", initializer=step_back)

    async def write(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        return await _finished(self._writers.submit(function, *arguments, **named))

    async def unpack(self, function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        return await _finished(self._unpackers.submit(function, *arguments, **named))


async def _finished(future: "Future[_T]") -> _T:
    """What a thread gives, which goes on to its end, whatever becomes of who waits for it."""
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        await asyncio.wait({waiting})
        raise
