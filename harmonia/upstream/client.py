"""One upstream: how it is asked, and whether it is asked at all."""

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Mapping
from contextlib import suppress
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

HOPS, ASKED, IDENTITY = "Harmonia-Hops", "Harmonia-Asked", "Harmonia-Id"

_CONNECTIONS = 25  # for questions, as many as Nix itself has; a NAR has one of its own, and no question waits behind it
_REDIRECTS = 5
_REDIRECT = {301, 302, 303, 307, 308}
_MISSING = {403, 404, 410}  # 403 is what S3 says of what is not there
_SMALL = 2 << 20  # bytes; a narinfo with 30,000 references
_BUFFER = 256 * 1024  # bytes of a body that wait to be taken

_log = logging.getLogger("harmonia")

Timeouts = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What aiohttp raises where an upstream does not do as it should."""


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
        """The same as long as its URL is: NARs are found by it."""
        self.identity: str | None = None
        """What it calls itself, where it is a Harmonia."""
        self.counters = counters
        self.keys = [PublicKey.parse(key) for key in settings.public_keys]
        self.breaker = Breaker(self._probe, self._changed)
        self._store_dir = store_dir
        self._authorization = authorization
        self._patience = patience
        self._said: str | None = None
        self._questions, self._nars = (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=limit, ssl=tls, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout),
                headers={"User-Agent": f"harmonia/{__version__}", "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=_BUFFER,
            )
            for limit in (_CONNECTIONS, 0)
        )

    async def close(self) -> None:
        await self.breaker.stop()
        await self._questions.close()
        await self._nars.close()

    async def ask(self, path: str, headers: Mapping[str, str], method: str = "GET") -> aiohttp.ClientResponse | None:
        """The answer to a question, to be released; None where it has none.

        UpstreamError where it fails, or is known to.
        """
        if not await self.breaker.usable():
            raise UpstreamError(f"{self.base} is down")
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._patience, self.breaker.failed)
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await self._open(self._questions, method, f"{self.base}/{path}", headers)
        except TimeoutError:
            self._failed()
            raise UpstreamError(f"{self.base} does not answer") from None
        finally:
            late.cancel()

    async def ask_small(self, path: str, headers: Mapping[str, str]) -> bytes | None:
        """Likewise, the whole body of a small answer, unpacked."""
        response = await self.ask(path, headers)
        if response is None:
            return None
        async with response:
            return await self.small(response)

    async def small(self, response: aiohttp.ClientResponse) -> bytes:
        """The body of an answer that is small, unpacked."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.timeout):
                async for data in response.content.iter_any():
                    body += data
                    if len(body) > _SMALL:
                        raise UpstreamError(f"{self.base} says too much")
        except Timeouts as error:
            self._failed()
            raise UpstreamError(f"{self.base}: {_phrase(error)}") from None
        try:
            return unpack(bytes(body), response.headers.get("Content-Encoding", "").lower(), _SMALL)
        except UpstreamError as error:
            raise UpstreamError(f"{self.base}: {error}") from None

    async def nar(self, url: str, headers: Mapping[str, str], method: str = "GET") -> aiohttp.ClientResponse | None:
        """The answer to a request for a NAR, likewise. It may be somewhere else."""
        if not await self.breaker.usable():
            raise UpstreamError(f"{self.base} is down")
        return await self._open(self._nars, method, url, headers, anywhere=True)

    async def read(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """The next bytes of an answer, none at its end. One of `Timeouts` where they do not come.

        The time is taken here: aiohttp's `sock_read` begins anew when the rest of a body is read that had come before,
        and then strikes the connection while nobody asks anything, and with it the next question.
        """
        async with asyncio.timeout(self.settings.timeout):
            return await response.content.read(most)

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
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        anywhere: bool = False,
    ) -> aiohttp.ClientResponse | None:
        for _ in range(_REDIRECTS + 1):
            here = self._is_here(url)
            # What is ours to know goes nowhere else: who redirects us may name any host.
            sent = dict(headers) if here else {k: v for k, v in headers.items() if not k.startswith("Harmonia-")}
            if here and self._authorization:
                sent["Authorization"] = self._authorization
            try:
                async with asyncio.timeout(self.settings.connect_timeout + self.settings.timeout):
                    response = await session.request(
                        method, URL(url, encoded=True), headers=sent, allow_redirects=False
                    )
            except Timeouts as error:
                self._failed()
                raise UpstreamError(f"{self.base}: {_phrase(error)}") from None
            status = response.status
            if here:
                self.identity = response.headers.get(IDENTITY, self.identity)
            if status in {200, 206}:
                self.breaker.succeeded()
                return response
            response.close()
            if status in _REDIRECT and (location := response.headers.get("Location")):
                url = self._redirected(url, location, anywhere=anywhere)
                continue
            if status in _MISSING or status == 416:  # noqa: PLR2004 (a range that is not there)
                self.breaker.succeeded()
                return None
            self._failed(_retry_after(response))
            raise UpstreamError(f"{self.base} answers with status {status}")
        raise UpstreamError(f"{self.base} redirects without end")

    def _redirected(self, url: str, location: str, *, anywhere: bool) -> str:
        with suppress(ValueError):
            target = urljoin(url, location)
            downgrade = url.startswith("https:") and not target.startswith("https:")
            if target.startswith(("http:", "https:")) and not downgrade and (anywhere or self._is_here(target)):
                return target
        raise UpstreamError(f"{self.base} redirects to where we do not follow")

    def _is_here(self, url: str) -> bool:
        with suppress(ValueError):
            one, other = URL(self.base), URL(url, encoded=True)
            return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)
        return False

    def _failed(self, retry_after: float = 0) -> None:
        self.counters.add("failures")
        self.breaker.failed(retry_after)

    def _changed(self, closed: bool) -> None:  # noqa: FBT001 (a callback)
        self.counters.set_up(closed)
        if closed:
            self._say("is used", logging.INFO)
        else:
            self._say("fails and is left alone until it answers again")

    def _say(self, what: str, level: int = logging.WARNING) -> None:
        if what != self._said:
            self._said = what
            _log.log(level, "upstream %s %s", self.base, what)

    async def _probe(self) -> bool:
        """Whether it is a cache of our store, and answers."""
        url = f"{self.base}/nix-cache-info"
        try:
            async with asyncio.timeout(self.settings.timeout):
                response = await self._open(self._questions, "GET", url, {HOPS: ""})
                if response is None:
                    self._say("has no nix-cache-info: is its URL right?")
                    return False
                async with response:
                    text = await self.small(response)
        except (UpstreamError, TimeoutError) as error:
            self._say(f"cannot be used: {error or 'it does not answer'}")
            return False
        lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
        fields: dict[str, str] = {name: value.strip() for name, _, value in lines}
        if fields.get("StoreDir", self._store_dir) != self._store_dir:
            self._say(f"cannot be used: it is for the store {fields['StoreDir']!r}")
            return False
        return True


def _retry_after(response: aiohttp.ClientResponse) -> float:
    with suppress(ValueError):
        return max(float(response.headers.get("Retry-After", "0")), 0)
    return 0


def _phrase(error: BaseException) -> str:
    kinds: dict[Any, str] = {
        TimeoutError: "it does not answer in time",
        aiohttp.ClientConnectorError: "no connection",
        aiohttp.ClientPayloadError: "its answer breaks off",
    }
    found = (phrase for kind, phrase in kinds.items() if isinstance(error, kind))
    return next(found, "it breaks the connection or the protocol")
