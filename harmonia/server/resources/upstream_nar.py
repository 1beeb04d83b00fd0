"""`/upstream/…`: NARs of upstreams, by content (`harmonia/upstream/nar_name.py`). For debug info, by place."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.cache.zstd_stored import stored_size
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics.outcome import Outcome
from harmonia.nix.base32 import ALPHABET
from harmonia.process import request_trace
from harmonia.process.thread_reader import Submit
from harmonia.server.http import outcome
from harmonia.server.http.response import IMMUTABLE_NAR, UNNAMED, Body, Deferred, Representation, wants_part
from harmonia.server.http.response_cache import Content
from harmonia.upstream.answer import Answer as RemoteAnswer
from harmonia.upstream.bodies import CachedBody, PassthroughBody
from harmonia.upstream.client import Client
from harmonia.upstream.fetch import NarFetcher, request_size
from harmonia.upstream.lookup import UpstreamPool
from harmonia.upstream.loop_guard import Via
from harmonia.upstream.nar_name import NarName
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.small_nars import SmallNar
from harmonia.upstream.transport import WHOLE, Part

_ID = f"[{ALPHABET}]{{16}}"
_DEBUG_NAR = re.compile(rf"(?:upstream/{_ID}/){{0,8}}nar/(?!\.)[0-9A-Za-z._+-]{{1,255}}")
"""NAR URLs that a debuginfo resource may have. It has no hash part, only the place of the NAR."""
_PLACE = re.compile(rf"(?P<upstream>{_ID})/(?P<place>.+)")
_TYPE = "application/x-nix-nar"


class Nars:
    def __init__(self, upstreams: UpstreamPool, fetcher: NarFetcher, submitter: Callable[[Request], Submit]) -> None:
        """Create the handler. `submitter` returns a function that runs functions in a thread for a request."""
        self._submitter = submitter
        self._upstreams = upstreams
        self._fetcher = fetcher

    async def get(self, request: Request, name: str, via: Via) -> Representation:
        if via.is_loop(self._upstreams.identity):
            raise NotFound
        if (match := _PLACE.fullmatch(name)) and is_debug_nar(match["place"]):
            for client in self._upstreams.clients:
                if client.id == match["upstream"]:
                    return self._debug_nar(client, match["place"], via)
        try:
            nar_name = NarName.parse(name)
        except FormatError:
            raise NotFound from None
        is_whole = request.method == "GET" and not wants_part(request)
        if is_whole and (small := await self._fetcher.take_small(nar_name.key)):
            self._note_other_path(small, nar_name, via)
            outcome.decide(request, Outcome.MEMORY, "the NAR was fetched ahead")
            still_valid = (lambda: True) if nar_name.determines_bytes else None
            return replace(_nar(nar_name, small.content), still_valid=still_valid)
        if cached := await self._fetcher.cached_nar(nar_name.key, self._submitter(request)):
            self._upstreams.keep_narinfo(nar_name.hash_part, via)
            outcome.decide(request, Outcome.DISK, "the cache has the complete NAR")
            return _nar(nar_name, cached)
        path = await self._upstreams.lookup_nar(nar_name, via)
        if path is None:
            raise NotFound
        if path.client.redirect is not None and path.name == nar_name:
            request_trace.log.debug("the client is sent to %s", path.client.base)
            return _redirect(path.client.redirect(request.method, path.url))
        return await self._remote_nar(request, path, via)

    def content_now(self, name: str) -> Content | None:
        """Return a NAR from memory, or None if only `get` can find it. Does not block."""
        try:
            nar_name = NarName.parse(name)
        except FormatError:
            return None
        small = self._fetcher.take_small_now(nar_name.key) if nar_name.determines_bytes else None
        if small is None:
            return None
        self._note_other_path(small, nar_name, Via())
        return Content(small.content, f'"{nar_name.key}"'.encode(), IMMUTABLE_NAR.encode())

    def _note_other_path(self, small: SmallNar, name: NarName, via: Via) -> None:
        """Keep the narinfo of the path in `name`, unless the NAR was fetched for that path."""
        if small.path.info.path.hash_part != name.hash_part:
            self._upstreams.keep_narinfo(name.hash_part, via)

    async def _remote_nar(self, request: Request, path: RemotePath, via: Via) -> Representation:
        needs_length = request.version == "1.0" and not wants_part(request)
        if needs_length and path.nar.compression == "zstd" and not await self._has_length(path, via):
            return self._stored_nar(path, via)

        async def open_nar(request: Request) -> Body:
            return await self._open_noted(request, path, via)

        async def size(_: Request) -> int | None:
            if path.file_size is not None:
                return path.file_size
            return await request_size(path, self._headers(path.client, via))

        return _nar(path.name, Deferred(open_nar, size))

    async def _has_length(self, path: RemotePath, via: Via) -> bool:
        """Return True if the upstream sends the length of a NAR."""
        with suppress(UpstreamError):  # to open the NAR fails, too, or finds another upstream
            return await request_size(path, self._headers(path.client, via)) is not None
        return False

    def _stored_nar(self, path: RemotePath, via: Via) -> Representation:
        """Return a zstd file of unknown length as one without compression, whose length is known.

        Both have the same URL. Therefore no cache may store it, and Nix must not resume it.
        """

        async def open_stored(request: Request) -> Body:
            opened = await self._open_noted(request, path, via)
            return self._fetcher.stored_body(opened, path, self._submitter(request))

        async def size(_: Request) -> int:
            return stored_size(path.info.nar_size)

        body = Deferred(open_stored, size)
        return Representation(content_type=_TYPE, body=body, cache_control=UNNAMED, resumable=False)

    async def _open_noted(self, request: Request, path: RemotePath, via: Via) -> CachedBody | PassthroughBody:
        """Open a NAR, and note whether it comes from the cache or from an upstream."""
        body = await self._open_nar(path, via, self._submitter(request))
        if isinstance(body, PassthroughBody):
            outcome.decide(request, Outcome.UPSTREAM, "passed through: the cache cannot keep it")
        elif body.is_complete:
            outcome.decide(request, Outcome.DISK, "the cache has the complete NAR")
        else:
            outcome.decide(request, Outcome.UPSTREAM, "the cache fetches it, for all who ask meanwhile")
        return body

    async def _open_nar(self, path: RemotePath, via: Via, submit: Submit) -> CachedBody | PassthroughBody:
        """Open a NAR from its upstream, or from the next upstream with the same file if that fails.

        Raises UpstreamError if all fail.
        """
        failed: list[Client] = []
        while True:
            try:
                return await self._fetcher.open_nar(path, self._headers(path.client, via), submit)
            except UpstreamError:
                self._upstreams.mark_failed(path)
                failed.append(path.client)
                other = await self._upstreams.lookup_nar(path.name, via, failed)
                if other is None or other.name != path.name:
                    raise
                path = other

    def _debug_nar(self, client: Client, place: str, via: Via) -> Representation:
        headers = self._headers(client, via)

        async def ask(part: Part, method: str = "GET") -> RemoteAnswer:
            return await client.request_nar(f"{client.base}/{place}", headers, method, part, anywhere=False)

        async def open_nar(request: Request) -> Body:
            outcome.decide(request, Outcome.UPSTREAM, "passed through: debug info has no hash to keep it by")
            return PassthroughBody(client, ask, await ask(WHOLE))

        async def size(_: Request) -> int | None:
            async with await ask(WHOLE, "HEAD") as response:
                return response.content_length

        return Representation(
            content_type=_TYPE, body=Deferred(open_nar, size), cache_control="no-cache, no-transform", resumable=False
        )

    def _headers(self, client: Client, via: Via) -> dict[str, str]:
        return via.headers(self._upstreams.identity, [client.identity])


def _redirect(url: str) -> Representation:
    """Return a redirect, which no cache may keep, because the signature in the URL expires."""
    return Representation(
        content_type=_TYPE,
        body=b"",
        cache_control=UNNAMED,
        status=HTTPStatus.TEMPORARY_REDIRECT,
        headers={"location": url},
    )


def _nar(name: NarName, body: bytes | Body | Deferred) -> Representation:
    if name.determines_bytes:
        return Representation(
            content_type=_TYPE,
            body=body,
            cache_control=IMMUTABLE_NAR,
            etag=f'"{name.key}"',
            headers={"accept-ranges": "bytes"},
        )
    return Representation(content_type=_TYPE, body=body, cache_control=UNNAMED, resumable=False)


def is_debug_nar(place: str) -> bool:
    return _DEBUG_NAR.fullmatch(place) is not None
