"""One upstream: how it is asked, and whether it is asked at all."""

import asyncio
import hashlib
import logging
import re
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from harmonia import __version__
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics import UpstreamCounters
from harmonia.nix import base32
from harmonia.nix.signing import PublicKey
from harmonia.settings import Upstream
from harmonia.upstream.breaker import Breaker
from harmonia.upstream.content import unpack
from harmonia.upstream.hops import HOPS, IDENTITY, names
from harmonia.upstream.reach import InsideError, Reach

_QUESTIONS = 100  # at once; of NARs any number: a question does not wait behind one of those
_REDIRECTS = 5
_REDIRECT = {301, 302, 303, 307, 308}
_MISSING = {403, 404, 410, 416}  # 403 is what S3 says of what is not there, 416 is for a part that is not
_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/(?:[0-9]+|\*)", re.ASCII)
_SMALL = 2 << 20  # bytes; a narinfo with 30,000 references
_BUFFER = 256 * 1024  # bytes of a body that wait to be taken

_log = logging.getLogger("harmonia")

Failures = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What aiohttp raises where an upstream does not do as it should."""

Part = tuple[int, int | None]
"""The bytes from one position to another, or to the end."""
WHOLE: Part = (0, None)


class Client:
    """To be made on the event loop that uses it."""

    def __init__(  # noqa: PLR0917 (what it is told by, each of its own kind)
        self,
        settings: Upstream,
        store_dir: str,
        authorization: str | None,
        tls: ssl.SSLContext,
        counters: UpstreamCounters,
        patience: float,
    ) -> None:
        """`patience` is after how many seconds an answer is so late that this counts as a failure."""
        self.settings = settings
        self.base = settings.url.rstrip("/")
        self.id = base32.encode(hashlib.sha256(self.base.encode()).digest()[:10])
        """The same as long as its URL is: some NARs are found by it."""
        self.identity: str | None = None
        """What it calls itself, where it is a Harmonia."""
        self.counters = counters
        self.keys = [PublicKey.parse(key) for key in settings.public_keys]
        self.breaker = Breaker(self._probe, self._changed)
        self._store_dir = store_dir
        self._authorization = authorization
        self._patience = patience
        self._why = ""
        self._said: str | None = None
        self._turns = asyncio.Semaphore(_QUESTIONS)
        reach = Reach()
        self._here = _session(settings, tls, reach.here)
        self._elsewhere = _session(settings, tls, reach.elsewhere)

    async def close(self) -> None:
        await self.breaker.stop()
        await self._here.close()
        await self._elsewhere.close()

    async def ask(
        self, path: str, headers: Mapping[str, str], method: str = "GET", part: Part = WHOLE
    ) -> aiohttp.ClientResponse | None:
        """The answer to a question, to be released; None where it has none. It may have all where a part was wanted.

        UpstreamError where it fails, or is known to.
        """
        async with self._in_time():
            return await self._open(method, f"{self.base}/{path}", headers, part)

    async def ask_small(self, path: str, headers: Mapping[str, str]) -> bytes | None:
        """Likewise, the whole body of a small answer, unpacked."""
        async with self._in_time():
            return await self._small(path, headers)

    @asynccontextmanager
    async def _in_time(self) -> AsyncGenerator[None]:
        """For a question. Who answers late has failed, although the answer is still taken. Waiting for its turn is not
        the upstream's fault.
        """
        async with self._turns:
            await self._be_usable()
            loop = asyncio.get_running_loop()
            late = loop.call_later(self._patience, self._failed, "it answers late")
            try:
                async with asyncio.timeout(self.settings.timeout):
                    yield
                if loop.time() < late.when():
                    self.breaker.succeeded()
            except TimeoutError:
                if loop.time() < late.when():
                    self._failed("it does not answer")
                raise self._error("it does not answer") from None
            finally:
                late.cancel()

    async def _be_usable(self) -> None:
        """UpstreamError where it is not. At the start, it takes a while to tell."""
        if not await self.breaker.usable():
            raise self._error("it is down")

    async def _small(self, path: str, headers: Mapping[str, str]) -> bytes | None:
        response = await self._open("GET", f"{self.base}/{path}", headers)
        if response is None:
            return None
        body = bytearray()
        async with response:
            while data := await self.read(response, _SMALL):
                body += data
                if len(body) > _SMALL:
                    raise self._error("it says too much")
        try:
            return unpack(bytes(body), response.headers.get("Content-Encoding", "").lower(), _SMALL)
        except UpstreamError as error:
            raise self._error(str(error)) from None

    async def nar(
        self,
        url: str,
        headers: Mapping[str, str],
        method: str = "GET",
        part: Part = WHOLE,
        *,
        anywhere: bool = True,
    ) -> aiohttp.ClientResponse:
        """The answer to a request for a NAR, likewise. One that is checked may come from `anywhere`. UpstreamError also
        where it is not there.
        """
        await self._be_usable()
        response = await self._open(method, url, headers, part, anywhere=anywhere)
        if response is None:
            raise self._error(f"{url} is not there")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise self._error(f"{url} comes encoded, though nobody asked for that")
        self.breaker.succeeded()
        return response

    async def read(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """The next bytes of an answer, none at its end. UpstreamError where they do not come.

        The time is taken here: aiohttp's `sock_read` begins anew when the rest of a body is read that had come before,
        and then strikes the connection while nobody asks anything, and with it the next question.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await response.content.read(most)
        except Failures as error:
            raise self._failed(_phrase(error)) from None

    def nar_url(self, relative: str) -> str:
        """Where a narinfo's URL leads. FormatError where it may not lead there.

        It stays on the upstream's host, unless one of the upstream's keys has signed: else any upstream could have us
        look into our own network.
        """
        try:
            url = urljoin(self.base + "/", relative)
            parts = urlsplit(url)
            fetchable = parts.scheme in {"http", "https"} and "@" not in parts.netloc and parts.port != 0
        except ValueError:
            raise FormatError("its URL is none") from None
        if not fetchable:
            raise FormatError("its URL is of another kind")
        if not self._is_here(url) and not self.keys:
            raise FormatError("its URL leads to another host, and no public_keys are set")
        return url

    async def _open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        part: Part = WHOLE,
        *,
        anywhere: bool = False,
    ) -> aiohttp.ClientResponse | None:
        start, stop = part
        ranged = {} if part == WHOLE else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        for _ in range(_REDIRECTS + 1):
            here = self._is_here(url)
            # What is ours to know goes nowhere else: who redirects us may name any host.
            sent = dict(headers) if here else {k: v for k, v in headers.items() if not k.startswith("Harmonia-")}
            if here and self._authorization:
                sent["Authorization"] = self._authorization
            session = self._here if here else self._elsewhere
            try:
                async with asyncio.timeout(self.settings.connect_timeout + self.settings.timeout):
                    response = await session.request(
                        method, URL(url, encoded=True), headers=sent | ranged, allow_redirects=False
                    )
            except Failures as error:
                if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, InsideError):
                    raise self._error(str(error.os_error)) from None
                raise self._failed(_phrase(error)) from None
            if here:
                self.identity = next(iter(names(response.headers.get(IDENTITY, ""))), self.identity)
            if _has_it(response, start, ranged=bool(ranged)):
                return response
            response.close()
            status = response.status
            if status in _REDIRECT and (location := response.headers.get("Location")):
                url = self._redirected(url, location, anywhere=anywhere)
            elif status in _MISSING:
                return None
            else:
                raise self._failed(f"it answers with status {status}", _retry_after(response))
        raise self._error("it redirects without end")

    def _redirected(self, url: str, location: str, *, anywhere: bool) -> str:
        with suppress(ValueError):
            target = urljoin(url, location)
            downgrade = url.startswith("https:") and not target.startswith("https:")
            if target.startswith(("http:", "https:")) and not downgrade and (anywhere or self._is_here(target)):
                return target
        raise self._error("it redirects to where we do not follow")

    def _is_here(self, url: str) -> bool:
        with suppress(ValueError):
            one, other = URL(self.base), URL(url, encoded=True)
            return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)
        return False

    def _failed(self, why: str, retry_after: float = 0) -> UpstreamError:
        """Likewise, where the upstream is to blame: take that down."""
        self.counters.add("failures")
        error = self._error(why)
        self.breaker.failed(retry_after)
        return error

    def _error(self, why: str) -> UpstreamError:
        """What to raise."""
        self._why = why
        return UpstreamError(f"{self.base}: {why}")

    def _changed(self, closed: bool) -> None:  # noqa: FBT001 (a callback)
        self.counters.set_up(closed)
        if closed:
            self._say("is used", logging.INFO)
        else:
            self._say(f"is left alone until it answers again: {self._why}")

    def _say(self, what: str, level: int = logging.WARNING) -> None:
        if what != self._said:
            self._said = what
            _log.log(level, "upstream %s %s", self.base, what)

    async def _probe(self) -> bool:
        """Whether it is a cache of our store, and answers."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                text = await self._small("nix-cache-info", {HOPS: ""})
        except (UpstreamError, TimeoutError) as error:
            self._say(f"cannot be used: {'it does not answer' if isinstance(error, TimeoutError) else self._why}")
            return False
        if text is None:
            self._say("has no nix-cache-info: is its URL right?")
            return False
        lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
        fields: dict[str, str] = {name: value.strip() for name, _, value in lines}
        if fields.get("StoreDir", self._store_dir) != self._store_dir:
            self._say(f"cannot be used: it is for the store {fields['StoreDir']!r}")
            return False
        return True


def _session(settings: Upstream, tls: ssl.SSLContext, connect: aiohttp.SocketFactoryType) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=60, socket_factory=connect),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout),
        headers={"User-Agent": f"harmonia/{__version__}", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_BUFFER,
    )


def _has_it(response: aiohttp.ClientResponse, start: int, *, ranged: bool) -> bool:
    """Whether it is an answer with what was asked for: all, or the part that begins at `start`."""
    if response.status == HTTPStatus.PARTIAL_CONTENT and ranged:
        told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return told is not None and int(told[1]) == start
    return response.status == HTTPStatus.OK


def _retry_after(response: aiohttp.ClientResponse) -> float:
    with suppress(ValueError):
        return max(float(response.headers.get("Retry-After", "0")), 0)
    return 0


def _phrase(error: BaseException) -> str:
    kinds: dict[Any, str] = {
        TimeoutError: "it does not answer in time",
        aiohttp.ClientConnectorCertificateError: "nobody we trust vouches for its certificate",
        aiohttp.ClientConnectorDNSError: "its name is not known",
        aiohttp.ClientConnectorError: "no connection",
        aiohttp.ClientPayloadError: "its answer breaks off",
    }
    found = (phrase for kind, phrase in kinds.items() if isinstance(error, kind))
    return next(found, "it breaks the connection or the protocol")
