"""One upstream: how it is asked, and whether it is asked at all."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

from harmonia.config.settings import Upstream
from harmonia.metrics.shared_counters import UpstreamCounters
from harmonia.nix import base32
from harmonia.nix.signing import PublicKey
from harmonia.untrusted import excerpt
from harmonia.upstream.answer import Answer
from harmonia.upstream.breaker import Breaker
from harmonia.upstream.loop_guard import PROBE
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.transport import WHOLE, Part, Transport, UpstreamRejectedError, UpstreamUnavailableError

_MAX_SMALL_REQUESTS = 100  # at once; of NARs any number: a question does not wait behind one of those
_LONG_ANSWERS = 4  # that are in memory at once, whole; others wait for their turn
_MAX_SMALL_BYTES = 2 << 20  # bytes; a narinfo with 30,000 references
_BUFFER_BYTES = 16 << 10  # of each answer that waits for its turn
_PARSED_AT_ONCE = 4 << 10  # bytes of an answer that are parsed on the event loop; signatures take 0.1 ms each

_IN_URLS = "".join(map(chr, range(0x21, 0x7F)))  # a narinfo's URL is encoded, but for what no URL may have

_T = TypeVar("_T")

_log = logging.getLogger("harmonia")


class Client:
    """To be made on the event loop that uses it."""

    def __init__(
        self, settings: Upstream, transport: Transport, counters: UpstreamCounters, store_dir: str, patience: float
    ) -> None:
        """`patience` is after how many seconds an answer is so late that this counts as a failure."""
        self.settings = settings
        self.counters = counters
        self.keys = [PublicKey.parse(key) for key in settings.public_keys]
        self.breaker = Breaker(self._probe, self._changed)
        self._transport = transport
        self.base = transport.base
        self.refusals = transport.refusals
        self.id = base32.encode(hashlib.sha256(self.base.encode()).digest()[:10])
        """The same as long as its URL is: some NARs are found by it."""
        self.store_dir = store_dir
        self._patience = patience
        self._said: str | None = None
        self._turns = asyncio.Semaphore(_MAX_SMALL_REQUESTS)
        self._long_answers = asyncio.Semaphore(_LONG_ANSWERS)

    @property
    def identity(self) -> str | None:
        """What it calls itself, where it is a Harmonia."""
        return self._transport.identity

    async def close(self) -> None:
        await self.breaker.stop()
        await self._transport.close()

    async def request(
        self, path: str, headers: Mapping[str, str], method: str = "GET", part: Part = WHOLE
    ) -> Answer | None:
        """Request a path. Return the answer, to be released, or None if the upstream lacks it.

        The answer may have the whole body although a part was requested. Raises UpstreamError if the upstream fails, or
        is known to.
        """
        async with self._turn(path), self._question():
            url = f"{self.base}/{path}"
            response = await self._transport.open_response(method, url, headers, part)
            return None if response is None else Answer(self._transport, response, url)

    async def request_small(
        self, path: str, headers: Mapping[str, str], parse: Callable[[bytes], _T], most: int = _MAX_SMALL_BYTES
    ) -> _T | None:
        """Request a path. Return what `parse` makes of the decoded body, which has at most so many bytes.

        Return None if the upstream does not have it. Raise UpstreamError if it fails, and what `parse` raises, which is
        called in a thread if the answer is long.
        """
        async with self._turn(path), AsyncExitStack() as memory:
            async with self._question():
                text = await self._small(path, headers, memory, most)
            return None if text is None else await self.parse(parse, text)

    async def parse(self, parse: Callable[[bytes], _T], text: bytes) -> _T:
        """Return what `parse` makes of an answer, in the thread of this upstream if the answer is long."""
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
        """Request a NAR. Return the answer, to be released. A NAR that is checked may come from `anywhere`.

        Raises UpstreamError if the upstream fails or lacks the NAR.
        """
        await self._be_usable()
        with self._counting():
            response = await self._transport.open_response(method, url, headers, part, anywhere=anywhere)
        if response is None:
            raise self.refusals.refuse(url, Reason.MISSING_NAR, "it does not have this NAR, of which it told")
        answer = Answer(self._transport, response, url)
        self.breaker.succeeded()
        return answer

    async def read_answer(self, answer: Answer, most: int) -> bytes:
        """Return the next bytes of an answer, none at its end. Raises UpstreamError if they do not arrive."""
        with self._counting():
            return await answer.read(most)

    def nar_url(self, relative: str, asked: str) -> str:
        """Return where the URL in a narinfo leads. Raise UpstreamMismatchError if it may not lead there.

        It stays on the upstream's host, unless one of the upstream's keys has signed: else any upstream could have us
        look into our own network. `asked` is the path of the narinfo.
        """
        try:
            url = urljoin(self.base + "/", quote(relative.encode(errors="surrogateescape"), safe=_IN_URLS))
            parts = urlsplit(url)
            fetchable = parts.scheme in {"http", "https"} and "@" not in parts.netloc and parts.port != 0
        except ValueError:
            fetchable = False
        if not fetchable:
            raise self.refusals.refuse(asked, Reason.URL_MALFORMED, f"its URL is {excerpt(relative)}")
        if not self._transport.is_here(url) and not self.keys:
            why = "its URL leads to another host, and no public_keys are set"
            raise self.refusals.refuse(asked, Reason.URL_ELSEWHERE, why)
        return url

    async def _be_usable(self) -> None:
        """UpstreamError where it is not. At the start, it takes a while to tell."""
        if not await self.breaker.usable():
            raise UpstreamRejectedError(self.base, "it is down")

    @asynccontextmanager
    async def _question(self) -> AsyncGenerator[None]:
        """A question. Who answers late has failed, although the answer is still taken."""
        await self._be_usable()
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._patience, self._failed, "it answers late")
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
        """To wait for it is not the upstream's fault, and nobody waits for ever: else those who come after a rush would
        wait for all of it.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                await self._turns.acquire()
        except TimeoutError:
            why = f"{_MAX_SMALL_REQUESTS} other questions were unanswered for {self.settings.timeout:g} s"
            raise self.refusals.refuse(path, Reason.BUSY, why) from None
        try:
            yield
        finally:
            self._turns.release()

    @asynccontextmanager
    async def _answering(self) -> AsyncGenerator[None]:
        """UpstreamUnavailableError where that takes too long."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        except TimeoutError:
            raise UpstreamUnavailableError(self.base, "it does not answer") from None

    @contextmanager
    def _counting(self) -> Generator[None]:
        """A failure counts."""
        try:
            yield
        except UpstreamUnavailableError as error:
            self._failed(error.why, error.retry_after)
            raise

    async def _small(
        self, path: str, headers: Mapping[str, str], memory: AsyncExitStack, most: int = _MAX_SMALL_BYTES
    ) -> bytes | None:
        """Return the body of an answer, None if there is none. It has a turn for its memory while `memory` is open."""
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
            self._say("is used", logging.INFO)
        else:
            self._say(f"is left alone until it answers again: {why_not}")

    def _say(self, what: str, level: int = logging.WARNING) -> None:
        """Once, however often a probe finds the same."""
        if what != self._said:
            self._said = what
            _log.log(level, "upstream %s %s", self.base, what)

    async def _probe(self) -> bool:
        """Whether it is a cache of our store, and answers."""
        try:
            with self._counting():
                async with self._answering(), AsyncExitStack() as memory:
                    text = await self._small("nix-cache-info", PROBE, memory)
        except (UpstreamRejectedError, UpstreamMismatchError) as error:
            self._say(f"cannot be used: {error.why}")
            return False
        if text is None:
            self._say("has no nix-cache-info: is its URL right?")
            return False
        lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
        fields: dict[str, str] = {name: value.strip() for name, _, value in lines}
        if fields.get("StoreDir", self.store_dir) != self.store_dir:
            self._say(f"cannot be used: it is for the store {excerpt(fields['StoreDir'])}")
            return False
        return True
