"""Client of one upstream: requests with limits, timeouts and a circuit breaker."""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

from harmonia.config.tables.upstream import Upstream
from harmonia.metrics.shared_counters import UpstreamCounters
from harmonia.nix import base32, cache_info
from harmonia.nix.signing import PublicKey
from harmonia.untrusted import excerpt
from harmonia.upstream.answer import Answer
from harmonia.upstream.breaker import Breaker
from harmonia.upstream.loop_guard import PROBE
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.transport import WHOLE, Part, Sign, Transport, UpstreamRejectedError, UpstreamUnavailableError

_MAX_SMALL_REQUESTS = 100  # at once; requests for NARs are not limited, so that no small request waits behind a NAR
_LONG_ANSWERS = 4  # whole long responses in memory at once; others wait for their turn
_MAX_SMALL_BYTES = 2 << 20  # bytes; a narinfo with 30,000 references
_BUFFER_BYTES = 16 << 10  # of each response that waits for its turn
_PARSED_AT_ONCE = 4 << 10  # bytes of a response that are parsed on the event loop; signatures take 0.1 ms each

_IN_URLS = "".join(map(chr, range(0x21, 0x7F)))  # left as they are: the URL in a narinfo is encoded already

_CLOSURE_SUFFIX = re.compile(r"\.[a-z0-9.-]{1,32}")

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


class Client:
    """Client of one upstream. Create it on the event loop that uses it."""

    def __init__(
        self,
        settings: Upstream,
        transport: Transport,
        counters: UpstreamCounters,
        store_dir: str,
        patience: float,
        redirect: Sign | None = None,
    ) -> None:
        """Create a client. A response that takes longer than `patience` seconds counts as a failure.

        With `redirect`, our clients are sent to the URLs that it returns, instead of getting NARs through this server.
        """
        self.settings = settings
        self.redirect = redirect
        self.counters = counters
        self.keys = [PublicKey.parse(key) for key in settings.public_keys]
        self.breaker = Breaker(self._probe, self._changed)
        self._transport = transport
        self.base = transport.base
        self.refusals = transport.refusals
        self.id = base32.encode(hashlib.sha256(self.base.encode()).digest()[:10])
        """Hash of the URL, in base 32: part of the names of some NARs, so it must not change while the URL stays."""
        self.store_dir = store_dir
        self.closure_suffix: str | None = None
        """The end of the URL of a closure, after the hash part, or None if the upstream has no closures."""
        self._patience = patience
        self._logged_state: str | None = None
        self._turns = asyncio.Semaphore(_MAX_SMALL_REQUESTS)
        self._long_answers = asyncio.Semaphore(_LONG_ANSWERS)

    @property
    def identity(self) -> str | None:
        """Pseudonym of the upstream in Via, or None if it is not a Harmonia."""
        return self._transport.identity

    async def close(self) -> None:
        await self.breaker.stop()
        await self._transport.close()

    async def request(
        self, path: str, headers: Mapping[str, str], method: str = "GET", part: Part = WHOLE
    ) -> Answer | None:
        """Send a small request. Return the response, which the caller must close, or None if there is no such resource.

        The response may have the whole body although a part was requested. Raises UpstreamError if the request fails,
        or if the circuit breaker is open.
        """
        async with self._turn(path), self._timed():
            url = f"{self.base}/{path}"
            response = await self._transport.open_response(method, url, headers, part)
            return None if response is None else Answer(self._transport, response, url)

    async def request_small(
        self, path: str, headers: Mapping[str, str], parse: Callable[[bytes], _T], most: int = _MAX_SMALL_BYTES
    ) -> _T | None:
        """Return `parse` of the decoded body of a small resource, or None if the upstream does not have the resource.

        Runs `parse` in a thread if the body is long. Raises UpstreamError if the request fails or the body has more
        than `most` bytes, and any error of `parse`.
        """
        async with self._turn(path), AsyncExitStack() as memory:
            async with self._timed():
                text = await self._small(path, headers, memory, most)
            return None if text is None else await self.parse(parse, text)

    async def request_long(
        self, path: str, headers: Mapping[str, str], parse: Callable[[bytes], _T], most: int
    ) -> _T | None:
        """Like `request_small`, for a long response that is only an optimization: a failure does not count."""
        await self._require_usable()
        async with AsyncExitStack() as memory:
            async with self._answering():
                text = await self._small(path, headers, memory, most)
            return None if text is None else await self.parse(parse, text)

    async def parse(self, parse: Callable[[bytes], _T], text: bytes) -> _T:
        """Return `parse` of a body. Runs `parse` in the thread of this upstream if the body is long."""
        return parse(text) if len(text) < _PARSED_AT_ONCE else await self._transport.in_thread(parse, text)

    async def request_nar(
        self,
        url: str,
        headers: Mapping[str, str],
        method: str = "GET",
        part: Part = WHOLE,
        *,
        anywhere: bool,
    ) -> Answer:
        """Request a NAR. Return the response, which the caller must close.

        The response may have the whole body although a part was requested. With `anywhere`, redirects to other hosts
        are followed: only for a NAR that is verified. Raises UpstreamError if the request fails, if the circuit breaker
        is open, or if the upstream does not have the NAR.
        """
        await self._require_usable()
        with self._counting():
            response = await self._transport.open_response(method, url, headers, part, anywhere=anywhere)
        if response is None:
            raise self.refusals.refuse(url, Reason.MISSING_NAR, "the narinfo names this NAR, which does not exist")
        answer = Answer(self._transport, response, url)
        self.breaker.succeeded()
        return answer

    async def read_answer(self, answer: Answer, most: int) -> bytes:
        """Return the next bytes of a response, `most` at most; empty at the end.

        Raises UpstreamError if the transfer fails; that counts for the circuit breaker.
        """
        with self._counting():
            return await answer.read(most)

    def nar_url(self, relative: str, narinfo_path: str) -> str:
        """Return the absolute URL of a NAR, from the `relative` URL in the narinfo at `narinfo_path`.

        Raises UpstreamMismatchError if the URL is malformed, or if it leads to another host and the upstream has no
        `public_keys`: otherwise, any upstream could make us connect to hosts in our own network.
        """
        try:
            url = urljoin(self.base + "/", quote(relative.encode(errors="surrogateescape"), safe=_IN_URLS))
            parts = urlsplit(url)
            fetchable = parts.scheme in {"http", "https"} and "@" not in parts.netloc and parts.port != 0
        except ValueError:
            fetchable = False
        if not fetchable:
            raise self.refusals.refuse(narinfo_path, Reason.URL_MALFORMED, f"malformed URL {excerpt(relative)}")
        if not self._transport.is_own_site(url) and not self.keys:
            why = "the URL leads to another host, and no public_keys are set"
            raise self.refusals.refuse(narinfo_path, Reason.URL_ELSEWHERE, why)
        return url

    async def _require_usable(self) -> None:
        """Raise UpstreamRejectedError if the circuit breaker is open. Waits for the first probe."""
        if not await self.breaker.usable():
            raise UpstreamRejectedError(self.base, "the upstream is down")

    @asynccontextmanager
    async def _timed(self) -> AsyncGenerator[None]:
        """Time a small request for the circuit breaker. A late response is used, but counts as a failure."""
        await self._require_usable()
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._patience, self._failed, "late response")
        try:
            async with self._answering():
                yield
            if loop.time() < late.when():
                self.breaker.succeeded()
        except UpstreamUnavailableError as error:
            if loop.time() < late.when():
                self._failed(error.why, error.retry_after)
            raise
        finally:
            late.cancel()

    @asynccontextmanager
    async def _turn(self, path: str) -> AsyncGenerator[None]:
        """Wait for one of the _MAX_SMALL_REQUESTS slots. The wait does not count as a failure of the upstream.

        Raises UpstreamMismatchError after the upstream's `timeout`. Without a bound, requests that come after a burst
        would wait for the whole burst.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                await self._turns.acquire()
        except TimeoutError:
            why = f"{_MAX_SMALL_REQUESTS} other requests were pending for {self.settings.timeout:g} s"
            raise self.refusals.refuse(path, Reason.BUSY, why) from None
        try:
            yield
        finally:
            self._turns.release()

    @asynccontextmanager
    async def _answering(self) -> AsyncGenerator[None]:
        """Raise UpstreamUnavailableError if the block takes longer than the upstream's `timeout`."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        except TimeoutError:
            raise UpstreamUnavailableError(self.base, "timeout") from None

    @contextmanager
    def _counting(self) -> Generator[None]:
        """Count an UpstreamUnavailableError of the block as a failure of the upstream."""
        try:
            yield
        except UpstreamUnavailableError as error:
            self._failed(error.why, error.retry_after)
            raise

    async def _small(
        self, path: str, headers: Mapping[str, str], memory: AsyncExitStack, most: int = _MAX_SMALL_BYTES
    ) -> bytes | None:
        """Return the body of a small resource, or None if it does not exist.

        A long body takes one of the _LONG_ANSWERS slots until `memory` is closed.
        """
        url = f"{self.base}/{path}"
        response = await self._transport.open_response("GET", url, headers, buffer_bytes=_BUFFER_BYTES)
        if response is None:
            return None
        async with Answer(self._transport, response, url) as answer:
            return await answer.read_whole(most, partial(memory.enter_async_context, self._long_answers))

    def _failed(self, why: str, retry_after: float = 0) -> None:
        self.counters.add("failures")
        self.breaker.failed(why, retry_after)

    def _changed(self, why_not: str | None) -> None:
        self.counters.set_up(why_not is None)
        if why_not is None:
            self._log_state("is up", logging.INFO)
        else:
            self._log_state(f"is down: {why_not}; it is probed until it answers")

    def _log_state(self, state: str, level: int = logging.WARNING) -> None:
        """Log a new state of the upstream once, also if several probes in a row have the same result."""
        if state != self._logged_state:
            self._logged_state = state
            _log.log(level, "upstream %s %s", self.base, state)

    async def _probe(self) -> bool:
        """Return True if the upstream answers and is a cache for our store directory."""
        try:
            with self._counting():
                async with self._answering(), AsyncExitStack() as memory:
                    text = await self._small("nix-cache-info", PROBE, memory)
        except (UpstreamRejectedError, UpstreamMismatchError) as error:
            self._log_state(f"cannot be used: {error.why}")
            return False
        if text is None:
            self._log_state("cannot be used: it has no nix-cache-info; check its url")
            return False
        fields = cache_info.parse(text)
        if fields.get("StoreDir", self.store_dir) != self.store_dir:
            self._log_state(
                f"cannot be used: its store directory is {excerpt(fields['StoreDir'])}, not {self.store_dir}"
            )
            return False
        suffix = fields.get("ClosureV1", "")
        self.closure_suffix = suffix if _CLOSURE_SUFFIX.fullmatch(suffix) else None
        return True
