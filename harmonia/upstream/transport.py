"""HTTP to one upstream, and to where it leads. What goes wrong is raised; what follows from that is `client.py`'s."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from harmonia import __version__
from harmonia.config.proxy import ProxyRules
from harmonia.config.settings import Upstream
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics.shared_counters import UpstreamCounters
from harmonia.untrusted import excerpt
from harmonia.upstream.address_filter import AddressFilter, PrivateAddressError
from harmonia.upstream.header_fields import content_range_start, retry_after_s
from harmonia.upstream.loop_guard import VIA, Via
from harmonia.upstream.refusals import Reason, Refusals

_MAX_REDIRECTS = 5
_REDIRECT = {301, 302, 303, 307, 308}
_MISSING = {403, 404, 410, 416}  # 403 is what S3 says of what is not there, 416 is for a part that is not
_HTTPS_PORT = 443
BUFFER_BYTES = 256 * 1024  # of a body that wait to be taken

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What aiohttp raises where an upstream does not do as it should."""

_T = TypeVar("_T")

Part = tuple[int, int | None]
"""The bytes from one position to another, or to the end."""
WHOLE: Part = (0, None)


class UpstreamRejectedError(UpstreamError):
    """An upstream does not answer."""

    def __init__(self, base: str, why: str) -> None:
        super().__init__(f"{base}: {why}")
        self.why = why


class UpstreamUnavailableError(UpstreamRejectedError):
    """Likewise, which counts against it. It may have asked to be left alone for some seconds."""

    def __init__(self, base: str, why: str, retry_after: float = 0) -> None:
        super().__init__(base, why)
        self.retry_after = retry_after


class Transport:
    """To be made on the event loop that uses it."""

    def __init__(
        self,
        settings: Upstream,
        authorization: str | None,
        tls: ssl.SSLContext,
        proxies: ProxyRules,
        counters: UpstreamCounters,
    ) -> None:
        self.base = settings.url.rstrip("/")
        self.refusals = Refusals(self.base, counters)
        self.identity: str | None = None
        """What the upstream calls itself, where it is a Harmonia."""
        self._timeout = settings.timeout
        self._connect_timeout = settings.connect_timeout
        self._authorization = authorization
        self._proxies = proxies
        self._address_filter = AddressFilter()
        self._here = self._session(tls, self._address_filter.connect_direct)
        self._elsewhere = self._session(tls, self._address_filter.connect_redirected)
        self._proxied = self._session(tls)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")

    def _session(self, tls: ssl.SSLContext, connect: aiohttp.SocketFactoryType | None = None) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=60, socket_factory=connect),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
            headers={"User-Agent": f"harmonia/{__version__}", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        for session in (self._here, self._elsewhere, self._proxied):
            await session.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Call a function that decodes or parses answers, in the one thread of this upstream: it delays no other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def open_response(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        part: Part = WHOLE,
        *,
        anywhere: bool = False,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> aiohttp.ClientResponse | None:
        """The answer, to be released; None where nothing is there. It may have all where a part was wanted.

        Redirects are followed on the upstream's own host, or `anywhere`. Raise UpstreamUnavailableError if no answer
        comes, and UpstreamMismatchError if it leads to where we do not go.
        """
        asked = url
        start, stop = part
        ranged = {} if part == WHOLE else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._request(method, url, headers, ranged, asked, buffer_bytes)
            if _has_it(response, start, ranged=bool(ranged)):
                return response
            response.close()
            status = response.status
            if status in _REDIRECT and (location := response.headers.get("Location")):
                url = self._redirected(asked, url, location, anywhere=anywhere)
            elif status in _MISSING:
                return None
            else:
                raise UpstreamUnavailableError(
                    self.base, f"it answers with status {status}", retry_after_s(response.headers)
                )
        raise self.refusals.refuse(asked, Reason.TOO_MANY_REDIRECTS, f"it redirects more than {_MAX_REDIRECTS} times")

    async def read(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """The next bytes of an answer, none at its end. UpstreamUnavailableError where they do not come.

        The time is taken here: aiohttp's `sock_read` begins anew when the rest of a body is read that had come before,
        and then strikes the connection while nobody asks anything, and with it the next question.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await response.content.read(most)
        except _FAILURES as error:
            raise UpstreamUnavailableError(self.base, _phrase(error)) from None

    def is_here(self, url: str) -> bool:
        """Return whether a URL is of the upstream itself: of its host and port, or by https of its host.

        For https, the port may also be the default one, as sites have it that redirect from http.
        """
        with suppress(ValueError):
            one, other = URL(self.base), URL(url, encoded=True)
            if (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port):
                return True
            is_upgrade = (one.scheme, other.scheme) == ("http", "https")
            return is_upgrade and one.host == other.host and other.port in {one.port, _HTTPS_PORT}
        return False

    async def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        ranged: Mapping[str, str],
        asked: str,
        buffer_bytes: int,
    ) -> aiohttp.ClientResponse:
        here = self.is_here(url)
        # What is ours to know goes nowhere else: who redirects us may name any host.
        sent = {k: v for k, v in headers.items() if here or k != VIA} | dict(ranged)
        if here and self._authorization:
            sent["Authorization"] = self._authorization
        target = URL(url, encoded=True)
        try:
            proxy = self._proxies.proxy_for(url)
            async with asyncio.timeout(self._connect_timeout + self._timeout):
                if proxy is None:
                    session = self._here if here else self._elsewhere
                    response = await session.request(
                        method, target, headers=sent, allow_redirects=False, read_bufsize=buffer_bytes
                    )
                else:
                    await self._judge(target, here=here)
                    auth = None if proxy.user is None else aiohttp.BasicAuth(proxy.user, proxy.password, "utf-8")
                    response = await self._proxied.request(
                        method,
                        target,
                        headers=sent,
                        allow_redirects=False,
                        read_bufsize=buffer_bytes,
                        proxy=proxy.url,
                        proxy_auth=auth,
                    )
        except FormatError as error:
            raise self.refusals.refuse(asked, Reason.PROXY, str(error)) from None
        except _FAILURES as error:
            cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            if isinstance(cause, PrivateAddressError):
                raise self.refusals.refuse(asked, Reason.PRIVATE_ADDRESS, f"{_origin(target)}: {cause}") from None
            if isinstance(error, aiohttp.ClientHttpProxyError):
                self.refusals.note(asked, Reason.PROXY, f"{_origin(target)}: {_phrase(error)}")
            raise UpstreamUnavailableError(self.base, _phrase(error)) from None
        if response.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            response.close()
            why = f"its proxy answers with status {response.status}"
            self.refusals.note(asked, Reason.PROXY, f"{_origin(target)}: {why}")
            raise UpstreamUnavailableError(self.base, why)
        if here:
            self.identity = next(iter(Via.parse(response.headers.get(VIA, "")).through), self.identity)
        return response

    async def _judge(self, target: URL, *, here: bool) -> None:
        """Raise PrivateAddressError if the proxy must not be asked for this."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._connect_timeout):
                await self._address_filter.through_proxy(target.host or "", here=here)

    def _redirected(self, asked: str, url: str, location: str, *, anywhere: bool) -> str:
        """Return where a redirect leads. Raise UpstreamMismatchError if we do not follow it."""
        try:
            target = urljoin(url, location)
            parts = URL(target, encoded=True)
            is_http = parts.scheme in {"http", "https"} and bool(parts.host)
        except ValueError:
            is_http = False
        if not is_http:
            raise self.refusals.refuse(asked, Reason.REDIRECT_MALFORMED, f"it redirects to {excerpt(location)}")
        if url.startswith("https:") and parts.scheme == "http":
            why = f"it redirects from https to {_origin(parts)}"
            raise self.refusals.refuse(asked, Reason.REDIRECT_TO_HTTP, why)
        if not anywhere and not self.is_here(target):
            why = f"it redirects to another host, {_origin(parts)}"
            raise self.refusals.refuse(asked, Reason.REDIRECT_ELSEWHERE, why)
        return target


def _origin(url: URL) -> str:
    """Return the part of a URL that may be logged: the rest may be a secret, as in those that S3 signs."""
    return excerpt(f"{url.scheme}://{url.host}:{url.port}")


def _has_it(response: aiohttp.ClientResponse, start: int, *, ranged: bool) -> bool:
    """Whether it is an answer with what was asked for: all, or the part that begins at `start`."""
    if response.status == HTTPStatus.PARTIAL_CONTENT and ranged:
        return content_range_start(response.headers) == start
    return response.status == HTTPStatus.OK


def _phrase(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"its proxy answers with status {error.status}"
    kinds: dict[Any, str] = {
        TimeoutError: "it does not answer in time",
        aiohttp.ClientProxyConnectionError: "no connection to its proxy",
        aiohttp.ClientConnectorCertificateError: "nobody we trust vouches for its certificate",
        aiohttp.ClientConnectorDNSError: "its name is not known",
        aiohttp.ClientConnectorError: "no connection",
        aiohttp.ClientPayloadError: "its answer breaks off",
    }
    found = (phrase for kind, phrase in kinds.items() if isinstance(error, kind))
    return next(found, "it breaks the connection or the protocol")
