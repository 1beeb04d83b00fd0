"""HTTP transport to one upstream and the hosts that it redirects to. `client.py` decides what follows from errors."""

import asyncio
import re
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from harmonia import __version__
from harmonia.config.proxy import ProxyRules
from harmonia.config.tables.upstream import Upstream
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics.shared_counters import UpstreamCounters
from harmonia.upstream import redirects
from harmonia.upstream.address_filter import AddressFilter, PrivateAddressError
from harmonia.upstream.header_fields import content_range_start, retry_after_s
from harmonia.upstream.loop_guard import VIA, Via
from harmonia.upstream.redirects import RedirectError
from harmonia.upstream.refusals import Reason, Refusals

_MAX_REDIRECTS = 5
_REDIRECT = {301, 302, 303, 307, 308}
_WHOLE_BODY = {200, 201, 226}  # as in Nix
_MISSING = {403, 404, 410, 416}  # S3 sends 403 for a missing object; 416 is for a range beyond the end
BUFFER_BYTES = 256 * 1024  # of a body that wait to be read

_CODE = re.compile(rb"<Code>([A-Za-z]{1,64})</Code>")
_ERROR_BYTES = 2048  # of the response of an S3 service that have its code

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""Errors of aiohttp for a failed connection or an invalid response."""

_T = TypeVar("_T")

Part = tuple[int, int | None]
"""Range of bytes: the first position and the position after the last, or None for the end."""
WHOLE: Part = (0, None)

Sign = Callable[[str, str], str]
"""Returns a URL with a signature for a request, from its method and its URL."""


class UpstreamRejectedError(UpstreamError):
    """The circuit breaker of an upstream is open; the subclass: the upstream does not answer.

    Only the subclass counts as a failure.
    """

    def __init__(self, base: str, why: str) -> None:
        super().__init__(f"{base}: {why}")
        self.why = why


class UpstreamUnavailableError(UpstreamRejectedError):
    """An upstream does not answer. Counts as a failure for the circuit breaker.

    `retry_after` is the seconds that the upstream asked to wait, or 0.
    """

    def __init__(self, base: str, why: str, retry_after: float = 0) -> None:
        super().__init__(base, why)
        self.retry_after = retry_after


class Transport:
    """HTTP transport to one upstream. Create it on the event loop that uses it."""

    def __init__(
        self,
        settings: Upstream,
        authorization: str | None,
        tls: ssl.SSLContext,
        proxies: ProxyRules,
        counters: UpstreamCounters,
        sign: Sign | None = None,
        *,
        is_public: bool = False,
    ) -> None:
        """Create a transport.

        `sign` returns the URL to request instead, for URLs of the upstream itself. With `is_public`, the upstream leads
        to no private address but its own (`AddressFilter`).
        """
        self.base = settings.url.rstrip("/")
        self._sign = sign
        self.refusals = Refusals(self.base, counters)
        self.identity: str | None = None
        """Pseudonym of the upstream in Via, or None if it is not a Harmonia."""
        self._timeout = settings.timeout
        self._connect_timeout = settings.connect_timeout
        self._authorization = authorization
        self._proxies = proxies
        self._address_filter = AddressFilter(is_public=is_public)
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
        """Run a function that decodes or parses responses, in the one thread of this upstream.

        A slow response of one upstream does not delay another upstream.
        """
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
        """Send a request. Return the response, which the caller must close, or None if the resource does not exist.

        The response may have the whole body although a part was requested. Redirects are followed on the upstream's own
        host, or with `anywhere` to all hosts that the address filter allows. Raises UpstreamUnavailableError if the
        request fails, UpstreamMismatchError if a redirect is not allowed.
        """
        requested_url = url
        start, stop = part
        ranged = {} if part == WHOLE else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._request(method, url, headers, ranged, requested_url, buffer_bytes)
            if _has_it(response, start):
                return response
            code = "" if self._sign is None else await self._error_code(response)
            response.close()
            status = response.status
            if status in _REDIRECT and (location := response.headers.get("Location")):
                try:
                    url = redirects.target(url, location, None if anywhere else self.base)
                except RedirectError as error:
                    raise self.refusals.refuse(requested_url, error.reason, str(error)) from None
            elif status in _MISSING and not (self._sign is not None and status == HTTPStatus.FORBIDDEN):
                return None
            else:
                raise UpstreamUnavailableError(self.base, f"status {status}{code}", retry_after_s(response.headers))
        raise self.refusals.refuse(requested_url, Reason.TOO_MANY_REDIRECTS, f"more than {_MAX_REDIRECTS} redirects")

    async def _error_code(self, response: aiohttp.ClientResponse) -> str:
        """Return the code in an error of an S3 service, such as ` (RequestTimeTooSkewed)`. Empty if there is none."""
        with suppress(UpstreamUnavailableError):
            if found := _CODE.search(await self.read_response(response, _ERROR_BYTES)):
                return f" ({found[1].decode()})"
        return ""

    async def read_response(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """Return the next bytes of a response, `most` at most; empty at the end.

        Raises UpstreamUnavailableError if the transfer fails or takes longer than the upstream's `timeout`. aiohttp's
        `sock_read` is not used: it restarts when the rest of a buffered body is read, then fires while the connection
        is idle, and so breaks the next request.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await response.content.read(most)
        except _FAILURES as error:
            raise UpstreamUnavailableError(self.base, _phrase(error)) from None

    def is_own_site(self, url: str) -> bool:
        """Return True if a URL belongs to the upstream itself."""
        return redirects.is_same_site(self.base, url)

    async def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        ranged: Mapping[str, str],
        requested_url: str,
        buffer_bytes: int,
    ) -> aiohttp.ClientResponse:
        here = self.is_own_site(url)
        # Credentials and Via go to the upstream only: a redirect may lead to any host.
        sent = {k: v for k, v in headers.items() if here or k != VIA} | dict(ranged)
        if here and self._authorization:
            sent["Authorization"] = self._authorization
        target = URL(self._sign(method, url) if here and self._sign is not None else url, encoded=True)
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
            raise self.refusals.refuse(requested_url, Reason.PROXY, str(error)) from None
        except _FAILURES as error:
            cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            if isinstance(cause, PrivateAddressError):
                raise self.refusals.refuse(
                    requested_url, Reason.PRIVATE_ADDRESS, f"{redirects.origin(target)}: {cause}"
                ) from None
            if isinstance(error, aiohttp.ClientHttpProxyError):
                self.refusals.note(requested_url, Reason.PROXY, f"{redirects.origin(target)}: {_phrase(error)}")
            raise UpstreamUnavailableError(self.base, _phrase(error)) from None
        if response.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            response.close()
            why = f"status {response.status} from the proxy"
            self.refusals.note(requested_url, Reason.PROXY, f"{redirects.origin(target)}: {why}")
            raise UpstreamUnavailableError(self.base, why)
        if here:
            self.identity = next(iter(Via.parse(response.headers.get(VIA, "")).through), self.identity)
        return response

    async def _judge(self, target: URL, *, here: bool) -> None:
        """Raise PrivateAddressError if the address filter forbids this host behind the proxy."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._connect_timeout):
                await self._address_filter.through_proxy(target.host or "", here=here)


def _has_it(response: aiohttp.ClientResponse, start: int) -> bool:
    """Return True if a response has the requested bytes: the whole body, or the part that begins at `start`.

    A part from 0 may answer a request for the whole body; its reader verifies it.
    """
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        return content_range_start(response.headers) == start
    return response.status in _WHOLE_BODY


def _phrase(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"status {error.status} from the proxy"
    kinds: dict[Any, str] = {
        TimeoutError: "timeout",
        aiohttp.ClientProxyConnectionError: "cannot connect to the proxy",
        aiohttp.ClientConnectorCertificateError: "its TLS certificate is not trusted",
        aiohttp.ClientConnectorDNSError: "DNS does not know the host",
        aiohttp.ClientConnectorError: "cannot connect",
        aiohttp.ClientPayloadError: "the response ended early",
    }
    phrases = (phrase for kind, phrase in kinds.items() if isinstance(error, kind))
    return next(phrases, "connection closed, or invalid HTTP")
