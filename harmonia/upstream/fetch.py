"""NARs of upstreams: written to the cache as they come, once however many want them, and read from there.

What was written becomes whole only when it has proved to be what the narinfo said. Until then its last bytes are held
back (nar_cache.py), so that nobody ever gets a complete body that is wrong. Where the cache cannot take one, it is
passed on as it comes, no faster than it is taken, and likewise.
"""

import asyncio
import errno
import logging
import os
import re
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, ParamSpec, Self, TypeVar

import aiohttp

from harmonia.errors import StoreObjectError, UpstreamError
from harmonia.nar_cache import CachedFile, Filler, NarCache
from harmonia.nix.nar import OpenSlice
from harmonia.upstream.client import Client, Timeouts
from harmonia.upstream.content import Check
from harmonia.upstream.question import Found

_PIECE = 256 * 1024  # bytes that are taken at once
_RESUMES = 5  # in a row that bring nothing
_RESUME_DELAY = 0.1  # seconds; it doubles with each of them
_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+|\*)", re.ASCII)

_T = TypeVar("_T")
_P = ParamSpec("_P")

_log = logging.getLogger("harmonia")


class Passed:
    """An upstream's answer, as it comes. A NAR is checked, and its end held back until it has proved right."""

    def __init__(
        self,
        client: Client,
        request: Callable[[int, int | None], Coroutine[Any, Any, aiohttp.ClientResponse]],
        size: int | None = None,
        check: Callable[[], Check | None] = lambda: None,
        response: aiohttp.ClientResponse | None = None,
    ) -> None:
        """`request` asks for the bytes from one position to another, or to the end. The answer may have all of them.

        `response` is one to a request for all, where that was made already.
        """
        self.size = size
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._request = request
        self._check = check
        self._response = response

    async def begin(self) -> Self:
        """Ask for the whole now. UpstreamError where there is none."""
        self._response = await self._request(0, None)
        self.size = self._response.content_length
        return self

    def read(self, start: int, stop: int | None) -> Generator[bytes | None]:
        check = self._check() if start == 0 and stop in {None, self.size} else None
        left = None if stop is None else stop - start
        held = b""
        try:
            yield from self._wait(self._open(start, stop))
            while data := (yield from self._wait(self._next(left))):
                left = None if left is None else left - len(data)
                if check is None:
                    yield data
                    continue
                check.feed(data)
                if held:
                    yield held
                held = data
            if check is not None:
                check.finish()
            if held:
                yield held
        finally:
            self._close()

    def _wait(self, coroutine: Coroutine[Any, Any, _T]) -> Generator[None, None, _T]:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while not future.done():
                yield None
        finally:
            future.cancel()
        return future.result()

    async def _open(self, start: int, stop: int | None) -> None:
        if start or stop not in {None, self.size} or self._response is None:
            if self._response is not None:
                self._response.close()
            self._response = await self._request(start, stop)
        if self._response.status == HTTPStatus.OK:
            while start and (data := await self._next(start)):
                start -= len(data)

    async def _next(self, most: int | None) -> bytes:
        assert self._response is not None  # noqa: S101 (it was opened)
        try:
            return await self._client.read(self._response, _PIECE if most is None else min(_PIECE, most))
        except Timeouts:
            raise UpstreamError("the upstream's answer breaks off") from None

    def _close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            with suppress(RuntimeError):  # the loop is closed, and with it the session
                self._loop.call_soon_threadsafe(response.close)

    __del__ = _close  # of one that nobody came to read


class Kept:
    """A NAR in the cache, whole or growing. Where it stops to grow, the rest is passed on."""

    def __init__(self, file: CachedFile, fetch: "Fetch | None", size: int | None, rest: Passed | None) -> None:
        """`rest` may be None where the file is whole."""
        self._file = file
        self._fetch = fetch
        self._rest = rest
        self.size = file.size if file.whole else size

    def read(self, start: int, stop: int | None) -> Generator[bytes | OpenSlice | None]:
        position = yield from self._file.follow(start, stop)
        if self._file.whole:
            self.size = self._file.size
        if self._file.whole or position == stop:
            return
        if self._fetch is not None and self._fetch.error is not None:
            raise self._fetch.error
        withdrawn = start < position and self._file.size < position
        self._file.close()
        if withdrawn:
            raise StoreObjectError("what the upstream sent is wrong")
        if self._rest is not None:
            yield from self._rest.read(position, stop)


class Fetch:
    """A NAR on its way into the cache."""

    def __init__(self, found: Found, headers: Mapping[str, str], filler: Filler, limit: int) -> None:
        self.size = found.nar.file_size
        """None until it is known."""
        self.error: UpstreamError | None = None
        self.started = asyncio.Event()
        """Set when the upstream has begun to send it, or failed to."""
        self._found = found
        self._headers = headers
        self._filler = filler
        self._limit = limit
        self._check = Check(found.info, found.nar)
        self._position = 0

    async def run(self) -> None:
        try:
            await self._transfer()
            await _blocking(self._check.finish)
            await _blocking(self._filler.commit)
        except UpstreamError as error:
            self.error = error
            _log.error("%s: %s", self._found.url, error)
            await _blocking(self._filler.withdraw)
        except OSError:  # of which the cache has told, unless it is only too large
            await _blocking(self._filler.abandon)
        except BaseException:
            self._filler.abandon()
            raise
        finally:
            self.started.set()

    async def _transfer(self) -> None:
        counters = self._found.client.counters
        counters.add("fetches")
        response: aiohttp.ClientResponse | None
        response = first = await request(self._found, self._headers, 0, None)
        try:
            self._begin(first.content_length)
        except Exception:
            first.close()
            raise
        resumable = first.headers.get("Accept-Ranges", "").lower() == "bytes"
        etag = first.headers.get("ETag", "")
        headers = dict(self._headers) | ({"If-Range": etag} if etag.startswith('"') else {})
        self.started.set()
        failures = 0
        while True:
            before = self._position
            try:
                await self._take_all(response or await self._resume(headers))
            except _BrokenError as error:
                response = None
                failures = 1 if self._position > before else failures + 1
                if not resumable or failures > _RESUMES:
                    raise UpstreamError(str(error)) from None
                await asyncio.sleep(_RESUME_DELAY * 2 ** (failures - 1))
            else:
                return

    def _begin(self, length: int | None) -> None:
        """What the upstream says of its length has to be what its narinfo says."""
        if self.size is not None and length not in {None, self.size}:
            raise UpstreamError(f"it has {length} bytes where its FileSize is {self.size}")
        self.size = length if length is not None else self.size
        self._measure(self.size or 0)

    async def _resume(self, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        try:
            response = await request(self._found, headers, self._position, None)
        except UpstreamError as error:
            raise _BrokenError(str(error)) from None
        part = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if part is None or int(part[1]) != self._position or part[3] not in {"*", str(self.size)}:
            response.close()
            raise UpstreamError("it does not go on where it broke off")
        return response

    async def _take_all(self, response: aiohttp.ClientResponse) -> None:
        async with response:
            while True:
                try:
                    data = await self._found.client.read(response, _PIECE)
                except Timeouts:
                    self._found.client.breaker.failed()
                    raise _BrokenError("its answer breaks off") from None
                if not data:
                    break
                await _blocking(self._take, data)
        if self.size is not None and self._position < self.size:
            raise _BrokenError("its answer breaks off")

    def _measure(self, size: int) -> None:
        if size > self._limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def _take(self, data: bytes) -> None:
        self._position += len(data)
        if self.size is not None and self._position > self.size:
            raise UpstreamError("it is longer than was said")
        self._measure(self._position)
        self._check.feed(data)
        self._filler.append(data)
        self._found.client.counters.add("fetched_bytes", len(data))


class _BrokenError(UpstreamError):
    """A transfer that may be resumed."""


class Fetches:
    """All NARs that are on their way here."""

    def __init__(self, cache: NarCache | None) -> None:
        self._cache = cache
        self._running: dict[str, Fetch] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def find(self, key: str) -> CachedFile | None:
        """The NAR of that key, whole, if it is in the cache."""
        cache = self._cache
        return None if cache is None else await _blocking(cache.use, key)

    async def open(self, key: str, found: Found, headers: Mapping[str, str]) -> Kept | Passed:
        """The NAR of that key: from the cache, or as it comes. UpstreamError where it does not."""
        # A client that goes away must not leave behind a file that nobody fills.
        return await asyncio.shield(self._task(self._open(key, found, headers)))

    async def _open(self, key: str, found: Found, headers: Mapping[str, str]) -> Kept | Passed:
        cache = self._cache
        rest = passed(found, headers)
        if cache is None or not Check(found.info, found.nar).conclusive or (found.nar.file_size or 0) > cache.limit:
            return await rest.begin()
        async with self._opening:
            opened = await _blocking(cache.open, key)
            if opened is not None and opened[1] is not None:
                self._running[key] = Fetch(found, headers, opened[1], cache.limit)
                self._task(self._running[key].run()).add_done_callback(lambda _: self._running.pop(key))
        if opened is None:
            return await rest.begin()
        file, fetch = opened[0], self._running.get(key)
        if fetch is None:
            return Kept(file, None, found.nar.file_size, rest)
        await fetch.started.wait()
        if fetch.error is not None:
            raise fetch.error
        return Kept(file, fetch, fetch.size, rest)

    def _task(self, coroutine: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def passed(found: Found, headers: Mapping[str, str]) -> Passed:
    """The NAR without the cache."""
    return Passed(
        found.client,
        lambda start, stop: request(found, headers, start, stop),
        found.nar.file_size,
        lambda: Check(found.info, found.nar),
    )


async def request(found: Found, headers: Mapping[str, str], start: int, stop: int | None) -> aiohttp.ClientResponse:
    """An upstream's answer with a NAR, or a part of it if it can tell parts. UpstreamError where it has none."""
    response = await found.client.nar(found.url, ranged(headers, start, stop))
    if response is None:
        raise UpstreamError(f"{found.url} is not there")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise UpstreamError(f"{found.url} comes encoded, though nobody asked for that")
    return response


def ranged(headers: Mapping[str, str], start: int, stop: int | None) -> dict[str, str]:
    part = {} if (start, stop) == (0, None) else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    return {**headers, **part}


async def _blocking(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """What `function` gives, which a thread runs to its end, whatever becomes of who waits for it."""
    future = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise
