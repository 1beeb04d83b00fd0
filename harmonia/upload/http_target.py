"""Binary cache over HTTP that takes PUT: another Harmonia's `/push`, a static directory behind WebDAV, or ncps."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from harmonia import __version__
from harmonia.config import credentials, netrc
from harmonia.config.proxy import ProxyRules
from harmonia.errors import FormatError, HarmoniaError
from harmonia.nix import cache_info, narinfo
from harmonia.nix.store_path import StorePath
from harmonia.untrusted import excerpt
from harmonia.upload.target import Body, TargetError, TargetRefusedError, TargetUnavailableError
from harmonia.upload.task_group import task_group
from harmonia.upstream.header_fields import retry_after_s

ATTEMPTS = 5
_FIRST_DELAY_S = 0.5  # between two attempts; doubled each time
_MAX_DELAY_S = 60.0  # that an attempt waits because the target asks for it; longer waits are the caller's
_CONNECT_S = 15.0
_STALL_S = 300.0  # without progress of the transfer, as in Nix; a Harmonia that imports a NAR sends a byte each minute
_MAX_HEADS = 32  # narinfos that are asked for at once, of a target that does not answer bulk questions
_MAX_BULK_PATHS = 2000  # of a question; 10,000 are allowed, but the answer has all narinfos
_MAX_ANSWER_BYTES = 64 << 20
_MIN_ASKED_BYTES = 256 * 1024  # size from which a request asks if the target has the NAR, because a PUT takes longer
_SUCCESS = {200, 201, 204}
_MISSING = {403, 404, 410}  # S3 sends 403 for a missing object
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
_UNAVAILABLE = {408, 425, 429}
_PERMANENT = {501, 505, 511}


class _Answer(NamedTuple):
    status: int
    length: int | None
    body: bytes


class _Sent:
    """The body of a request, each chunk of which extends the deadline of the request."""

    def __init__(self, body: bytes | Body | None, deadline: asyncio.Timeout, broken: list[Exception]) -> None:
        """Add an error of reading the body to `broken`, because aiohttp reports it as one of the connection."""
        self.size = len(body) if isinstance(body, bytes) else body and body.size
        self._body = body
        self._deadline = deadline
        self._broken = broken

    async def chunks(self) -> AsyncIterator[bytes]:
        if isinstance(self._body, bytes):
            yield self._body
        elif self._body is not None:
            try:
                async for chunk in self._body.chunks():
                    yield chunk
                    _extend(self._deadline)
            except (HarmoniaError, OSError) as error:
                self._broken.append(error)
                raise


class HttpTarget:
    """The binary cache at a URL. Create it on the event loop that uses it. Call `check` before the other methods.

    Sends the credentials that netrc(5) has for the host, and uses the proxy of the environment, as Nix and curl do.
    """

    def __init__(self, url: str, store_dir: str, *, attempts: int = ATTEMPTS, authorization: str | None = None) -> None:
        """Prepare requests. `authorization` replaces the credentials of the user's netrc file.

        Raises FormatError if the URL is malformed, RemoteError or ConfigError if a credential cannot be read.
        """
        self.name = url.rstrip("/")
        self._store_dir = store_dir
        self._attempts = attempts
        self._authorization = authorization or netrc.find_authorization(check_url(url), os.environ)
        self._proxies = ProxyRules(os.environ)
        self._bulk_url: str | None = None
        self._heads = asyncio.Semaphore(_MAX_HEADS)
        tls = credentials.client_tls(os.environ) if url.startswith("https:") else True
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=20),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers={"User-Agent": f"harmonia/{__version__}", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def check(self) -> None:
        answer = await self._send("GET", "nix-cache-info")
        if answer.status in _MISSING:
            text = f"StoreDir: {self._store_dir}\n"
            await self._put("nix-cache-info", text.encode(), "text/x-nix-cache-info")
            return
        fields = cache_info.parse(answer.body)
        if fields.get("StoreDir", self._store_dir) != self._store_dir:
            what = f"it is for the store {excerpt(fields['StoreDir'])}, not for {self._store_dir}"
            raise TargetRefusedError(f"{self.name}: {what}")
        self._bulk_url = fields.get("GetNarInfosV1") or None

    async def missing(self, paths: Collection[StorePath]) -> set[StorePath]:
        there: set[StorePath] = set()
        asked = list(paths)
        for first in range(0, len(asked), _MAX_BULK_PATHS):
            batch = asked[first : first + _MAX_BULK_PATHS]
            there |= await (self._find_bulk(batch) if self._bulk_url else self._find_each(batch))
        return {*paths} - there

    async def keep(self, paths: Collection[StorePath]) -> set[StorePath]:
        return {*paths}  # the protocol has no request for this

    async def put_nar(self, url: str, body: Body) -> bool:
        if body.size >= _MIN_ASKED_BYTES:
            answer = await self._send("HEAD", url)
            # A store whose PUT is not atomic keeps the part of a NAR whose transfer broke off.
            # A Harmonia answers 0 for a NAR of its spool, which is complete.
            lengths = {None, body.size, 0} if self._bulk_url else {None, body.size}
            if answer.status not in _MISSING and answer.length in lengths:
                return False
        await self._put(url, body, "application/x-nix-nar")
        return True

    async def put_narinfo(self, path: StorePath, text: str) -> None:
        await self._put(f"{path.hash_part}.narinfo", text.encode(), narinfo.CONTENT_TYPE)

    async def _find_each(self, paths: Sequence[StorePath]) -> set[StorePath]:
        async def has(path: StorePath) -> bool:
            async with self._heads:
                return (await self._send("HEAD", f"{path.hash_part}.narinfo")).status not in _MISSING

        async with task_group() as group:
            tasks = {path: group.create_task(has(path)) for path in paths}
        return {path for path, task in tasks.items() if task.result()}

    async def _find_bulk(self, paths: Sequence[StorePath]) -> set[StorePath]:
        assert self._bulk_url is not None  # noqa: S101 (the caller checks it)
        body = "".join(f"{path.hash_part}\n" for path in paths).encode()
        try:
            answer = await self._send("POST", self._bulk_url, body, "text/plain")
            if answer.status in _MISSING:
                raise TargetRefusedError(f"{self.name}: status {answer.status}")
        except TargetRefusedError:
            self._bulk_url = None
            return await self._find_each(paths)
        lines = answer.body.decode(errors="replace").split("\n")
        names = {line.rpartition("/")[2].strip() for line in lines if line.startswith("StorePath:")}
        return {path for path in paths if path in names}

    async def _put(self, path: str, body: bytes | Body, content_type: str) -> None:
        answer = await self._send("PUT", path, body, content_type)
        if answer.status in _MISSING:
            raise self._refusal("PUT", path, answer)

    async def _send(
        self, method: str, path: str, body: bytes | Body | None = None, content_type: str | None = None
    ) -> _Answer:
        """Send a request, again after failures. Return the answer, whose status is one of success or in _MISSING."""
        for attempt in range(1, self._attempts + 1):
            try:
                return await self._attempt(method, path, body, content_type)
            except TargetUnavailableError as error:
                if attempt == self._attempts or error.retry_after > _MAX_DELAY_S:
                    raise
                delay = _FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311 (no secret)
                await asyncio.sleep(max(delay, error.retry_after))
        raise AssertionError  # the last attempt returns or raises

    async def _attempt(self, method: str, path: str, body: bytes | Body | None, content_type: str | None) -> _Answer:
        broken: list[Exception] = []
        try:
            async with (
                asyncio.timeout(_STALL_S + _CONNECT_S) as deadline,
                self._request(method, path, content_type, _Sent(body, deadline, broken)) as response,
            ):
                received = bytearray()
                async for chunk in response.content.iter_any():
                    _extend(deadline)
                    received += chunk
                    if len(received) > _MAX_ANSWER_BYTES:
                        raise ValueError("the response is too long")
                length = response.content_length if method == "HEAD" else None
                answer = _Answer(response.status, length, bytes(received))
        except _FAILURES as error:
            if broken:
                raise broken[0] from None
            raise TargetUnavailableError(f"{self.name}: {method} {path}: {_cause(error)}") from None
        status = answer.status
        if status in _SUCCESS or status in _MISSING:
            return answer
        if status in _UNAVAILABLE or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _PERMANENT):
            what = f"{self.name}: {method} {path}: status {status}{_phrase(answer)}"
            raise TargetUnavailableError(what, retry_after_s(response.headers))
        raise self._refusal(method, path, answer)

    def _request(
        self, method: str, path: str, content_type: str | None, sent: "_Sent"
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        url = f"{self.name}/{path}"
        headers = {"Content-Type": content_type} if content_type else {}
        if self._authorization:
            headers["Authorization"] = self._authorization
        if sent.size is not None:
            headers["Content-Length"] = str(sent.size)
        try:
            proxy = self._proxies.proxy_for(url)
        except FormatError as error:
            raise TargetRefusedError(f"{self.name}: {error}") from None
        return self._session.request(
            method,
            URL(url, encoded=True),
            data=None if sent.size is None else sent.chunks(),
            headers=headers,
            proxy=proxy.url if proxy else None,
            proxy_auth=aiohttp.BasicAuth(proxy.user, proxy.password, "utf-8") if proxy and proxy.user else None,
            allow_redirects=method != "PUT",  # a redirect of a PUT may lose its body
        )

    def _refusal(self, method: str, path: str, answer: _Answer) -> TargetError:
        remedy = ""
        if answer.status == HTTPStatus.UNAUTHORIZED or (answer.status == HTTPStatus.FORBIDDEN and not answer.body):
            host = urlsplit(self.name).hostname
            line = f"machine {host} login USER password TOKEN"
            remedy = f"; put credentials that allow it into the netrc file ($NETRC, or the setting watch.netrc): {line}"
        return TargetRefusedError(f"{self.name}: {method} {path}: status {answer.status}{_phrase(answer)}{remedy}")


def check_url(url: str) -> str:
    """Return the host of the URL of a binary cache.

    Raises FormatError if it is malformed, or has a user: the message of an error must not show a password.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:  # invalid brackets, port or host name
        host, parts = "", urlsplit("")
    if not host or parts.scheme not in ("http", "https"):
        raise FormatError(f"{excerpt(url)} is not a URL like https://cache.example.org/push")
    if "@" in parts.netloc:
        line = f"machine {host} login USER password PASSWORD"
        raise FormatError(f"user and password in the URL are not supported; put them into the file of $NETRC: {line}")
    if parts.query or parts.fragment:
        raise FormatError("parameters in the URL are not supported; sign with --key instead of ?secret-key=")
    return host


def _extend(deadline: asyncio.Timeout) -> None:
    if not deadline.expired():
        deadline.reschedule(asyncio.get_running_loop().time() + _STALL_S)


def _phrase(answer: _Answer) -> str:
    """Return the first line of a short text, which says why a request failed."""
    text = answer.body[:400].decode(errors="replace").strip()
    return "" if not text or "<" in text else f": {' '.join(text.splitlines()[0].split())}"


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
