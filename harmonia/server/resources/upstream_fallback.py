"""Handlers for resources that only upstreams have.

Logs and listings are passed through as they arrive. `upstream_nar.py` handles NARs.
"""

import asyncio
import json
import os
import ssl
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urljoin

import msgspec
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.config import credentials
from harmonia.config.proxy import ProxyRules
from harmonia.config.tables.upstream import Upstream
from harmonia.errors import FormatError, UpstreamError
from harmonia.metrics.outcome import Outcome
from harmonia.mirror.connection import open_presigner
from harmonia.nix.narinfo import NarFile, render, signatures
from harmonia.nix.store_path import HASH_PART_LENGTH, StorePath, is_hash_part
from harmonia.server.context import ServerContext
from harmonia.server.http import outcome
from harmonia.server.http.response import IMMUTABLE, Representation
from harmonia.server.http.response_cache import Content
from harmonia.server.http.sanic_adapter import field_value
from harmonia.server.resources import build_log, build_trace, cached_listing, debuginfo, narinfo
from harmonia.server.resources.upstream_nar import Nars, is_debug_nar
from harmonia.store import explain
from harmonia.untrusted import excerpt
from harmonia.upstream.answer import Answer as RemoteAnswer
from harmonia.upstream.bodies import PassthroughBody
from harmonia.upstream.client import Client
from harmonia.upstream.fetch import NarFetcher
from harmonia.upstream.fetch_ahead import FetchAhead
from harmonia.upstream.lookup import Ask, UpstreamPool
from harmonia.upstream.lookup_cache import POSITIVE_TTL_S
from harmonia.upstream.loop_guard import VIA, Via
from harmonia.upstream.narinfo_cache import open_narinfo_cache
from harmonia.upstream.refusals import Reason
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.tasks import Tasks
from harmonia.upstream.transport import Part, Transport

if TYPE_CHECKING:
    from harmonia.metrics.shared_counters import SiblingCounters

_SIBLING_POLL_S = 0.5  # until the next look whether a new sibling has answered

_NO_SUCH_JSON = (ValueError, LookupError, TypeError, RecursionError)
"""Errors for malformed JSON, for JSON of another type, and for JSON nested deeper than Python's limit."""

_MAX_JSON_BYTES = 256 << 10
"""Size of a realisation with 1,500 dependent ones. JSON parsing holds the GIL, so it blocks the event loop."""

_T = TypeVar("_T")


class UpstreamHandlers:
    """Implementation of `context.Fallback`. Create it on the event loop that serves."""

    def __init__(self, context: ServerContext) -> None:
        settings = context.settings
        self._context = context
        clients = [self._client(number, each) for number, each in enumerate(settings.sources)]
        nars = context.compressor.cache
        narinfos = None if nars is None else open_narinfo_cache(settings, nars, clients, context.threads)
        self._narinfos = narinfos
        self._siblings: list[Client] = []
        self._siblings_up: set[SiblingCounters] = set()
        self._upstreams = UpstreamPool(
            clients, context.identity, settings.upstream_timeout, context.failed_nars, narinfos
        )
        self._upstreams.start()
        self._fetcher = NarFetcher(nars, narinfos, context.failed_nars, context.threads)
        self._tasks = Tasks()
        self._ahead = {client: self._fetch_ahead(client) for client in clients}
        self._nars = Nars(self._upstreams, self._fetcher, context.submitter)

    def _client(self, number: int, upstream: Upstream) -> Client:
        settings = self._context.settings
        counters = self._context.metrics.own_upstream(upstream.url)
        presign = None
        if upstream == settings.mirror.source and settings.mirror.is_read:
            presign = open_presigner(settings)
            own_keys = tuple(str(key.public_key) for key in self._context.keys)
            upstream = msgspec.structs.replace(upstream, public_keys=upstream.public_keys or own_keys)
        transport = Transport(
            upstream,
            credentials.authorization(settings, number),
            credentials.upstream_tls(settings, number),
            ProxyRules(os.environ, upstream.proxy),
            counters,
            presign,
        )
        redirect = presign if settings.mirror.redirect else None
        return Client(upstream, transport, counters, settings.virtual_nix_store, settings.upstream_timeout, redirect)

    def _fetch_ahead(self, client: Client) -> FetchAhead:
        def headers() -> dict[str, str]:
            return Via().headers(self._upstreams.identity, [client.identity])

        return FetchAhead(client, self._upstreams.plans[client], self._fetcher, self._tasks, headers)

    async def add_sibling(self, url: str) -> None:
        """Ask a sibling, too, as soon as it has answered a probe: no lookup waits for one that does not answer."""
        settings = self._context.settings
        upstream = Upstream(
            url=url, public_keys=settings.lan.public_keys, priority=settings.lan.priority, connect_timeout=0.5, proxy=""
        )
        without_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no certificates are trusted: siblings use plain HTTP
        counters = self._context.metrics.own_upstream("lan").shared(self._siblings_up)
        # Anyone in the network can announce a sibling, and its redirects must not reach services of this network.
        transport = Transport(upstream, None, without_tls, ProxyRules(os.environ, ""), counters, is_public=True)
        client = Client(upstream, transport, counters, settings.virtual_nix_store, settings.upstream_timeout)
        self._siblings.append(client)
        client.breaker.start(settings.upstream_timeout)
        while not client.breaker.closed:  # noqa: ASYNC110 (it probes by itself)
            await asyncio.sleep(_SIBLING_POLL_S)
        if self._narinfos is not None:
            self._narinfos.add_client(client)
        self._upstreams.add(client)
        self._ahead[client] = self._fetch_ahead(client)

    async def close(self) -> None:
        await self._tasks.stop()
        await self._fetcher.close()
        await self._upstreams.close()
        for client in self._siblings:  # also those that have never answered
            await client.close()

    def states(self) -> list[tuple[str, bool]]:
        """Return the name of the mirror's bucket and of each upstream, and whether it is up."""
        mirror = self._context.settings.mirror
        mirror_url = mirror.url if mirror.is_read else None
        states = []
        for client in self._upstreams.clients:
            kind = "sibling" if client in self._siblings else "mirror" if client.base == mirror_url else "upstream"
            states.append((f"{kind} {client.base}", client.breaker.closed))
        return states

    async def explain(self, request: Request, hash_part: str) -> list[explain.Reason]:
        answers = await self._upstreams.ask_each(hash_part, _via(request))
        return [_reason(client.base, answer) for client, answer in answers]

    @property
    def _max_age(self) -> int:
        return min(self._context.settings.narinfo_max_age, int(POSITIVE_TTL_S))

    async def get_narinfo(self, request: Request, hash_part: str) -> Representation:
        path = await self._lookup_path(request, hash_part)
        self._ahead[path.client].wanted(path)
        nar, sigs = self._described(path, await self._fetcher.file_info(path))
        answer = narinfo.representation(self._context, request, path.info, nar, sigs, max_age=self._max_age)
        if VIA in request.headers:
            return answer
        return replace(answer, still_valid=partial(self._is_current, hash_part, answer.etag))

    def narinfo_now(self, hash_part: str) -> Content | None:
        path = self._upstreams.find_planned(hash_part)
        file = None if path is None else self._fetcher.file_info_now(path)
        if path is None or file is None:
            return None
        self._ahead[path.client].wanted(path)
        return narinfo.content_of(self._context, path.info, *self._described(path, file), self._max_age)

    def _is_current(self, hash_part: str, etag: str | None) -> bool:
        """Return True if the narinfo of a path still has this ETag."""
        content = self.narinfo_now(hash_part) if self._context.paths.is_absent(hash_part) else None
        return content is not None and content.etag.decode() == etag

    async def narinfo_text(self, request: Request, hash_part: str) -> str | None:
        path = await self._upstreams.lookup_path(hash_part, _via(request))
        if path is None:
            return None
        nar, sigs = self._described(path, await self._fetcher.file_info(path))
        return render(path.info, self._context.settings.virtual_nix_store, nar, sigs)

    def _described(self, path: RemotePath, file: NarFile) -> tuple[NarFile, list[str]]:
        """Return the NAR file as our clients see it, and the signatures, for the narinfo of a path."""
        settings = path.client.settings
        url = path.url if settings.mode == "redirect" else f"upstream/{path.name}"
        nar = replace(file, url=url)
        keys = self._context.keys if settings.sign and path.verified else ()
        return nar, signatures(path.info, self._context.settings.virtual_nix_store, keys)

    async def get_nar(self, request: Request, name: str) -> Representation:
        self._note_requested(name)
        return await self._nars.get(request, name, _via(request))

    def nar_now(self, name: str) -> Content | None:
        content = self._nars.content_now(name)
        if content is not None:
            self._note_requested(name)
        return content

    def _note_requested(self, name: str) -> None:
        for ahead in self._ahead.values():
            ahead.requested(name[:HASH_PART_LENGTH])

    async def get_listing(self, request: Request, hash_part: str) -> Representation:
        try:
            return await self._passthrough(request, f"{hash_part}.ls", "application/json", IMMUTABLE)
        except NotFound:
            path = await self._upstreams.lookup_cached_path(hash_part)
            if path is None:
                raise
        return await cached_listing.get(self._context, request, path)

    async def get_log(self, request: Request, name: str) -> Representation:
        name = build_log.decoded(request, name)
        try:
            path = (await self._lookup_path(request, name)).info.path if is_hash_part(name) else StorePath(name)
            if not path.is_derivation:
                remote = await self._upstreams.lookup_path(path.hash_part, _via(request))
                deriver = remote.info.deriver if remote and remote.info.path == path else None
                path = deriver or StorePath(f"{path}.drv")
        except FormatError:
            raise NotFound from None
        headers = {"x-content-type-options": "nosniff"}
        return await self._passthrough(request, f"log/{quote(path)}", "text/plain; charset=utf-8", "no-cache", headers)

    async def get_realisation(self, request: Request, name: str) -> Representation:
        derivation_hash, output = build_trace.parse_realisation_id(name)
        return await self._realisation(request, f"realisations/{derivation_hash}!{quote(output)}.doi")

    async def get_build_trace(self, request: Request, derivation: str, name: str) -> Representation:
        drv, output = build_trace.parse_trace_key(derivation, name)
        return await self._realisation(request, f"build-trace-v2/{quote(drv)}/{quote(output)}.doi")

    async def _realisation(self, request: Request, path: str) -> Representation:
        async def ask(client: Client, headers: dict[str, str]) -> bytes | None:
            def check(text: bytes) -> bytes:
                _parse(client, path, text, lambda value: StorePath(value["outPath"]))
                return text

            return await client.request_small(path, headers, check, _MAX_JSON_BYTES)

        return await self._small_json(request, ask)

    async def _small_json(self, request: Request, ask: Ask[bytes]) -> Representation:
        """Return the first answer of the upstreams. Raises NotFound if there is none."""
        text = await self._upstreams.first_answer(ask, _via(request))
        if text is None:
            raise NotFound
        outcome.decide(request, Outcome.UPSTREAM, "only an upstream has it")
        return Representation.of_metadata("application/json", text, self._max_age)

    async def get_debuginfo(self, request: Request, name: str) -> Representation:
        build_id = debuginfo.parse_name(name)

        async def ask(client: Client, headers: dict[str, str]) -> bytes | None:
            here = f"{client.base}/debuginfo/"

            def parse(path: str, text: bytes) -> tuple[str, str] | None:
                if not text:
                    return None
                return _parse(client, path, text, lambda value: (urljoin(here, value["archive"]), value["member"]))

            for path in (f"debuginfo/{build_id}.debug", f"debuginfo/{build_id}"):
                if link := await client.request_small(path, headers, partial(parse, path), _MAX_JSON_BYTES):
                    archive, member = link
                    break
            else:
                return None
            if client.settings.mode == "proxy":
                relative = archive.removeprefix(f"{client.base}/")
                if not is_debug_nar(relative):
                    raise client.refusals.refuse(path, Reason.URL_ELSEWHERE, f"leads to {excerpt(archive)}")
                archive = f"../upstream/{client.id}/{relative}"
            return json.dumps({"archive": archive, "member": member}).encode()

        return await self._small_json(request, ask)

    async def _lookup_path(self, request: Request, hash_part: str) -> RemotePath:
        path, found = await self._upstreams.lookup_path_with_outcome(hash_part, _via(request))
        if path is None:
            raise NotFound
        outcome.decide(request, found, "the narinfo of %s", path.client.base)
        return path

    async def _passthrough(
        self, request: Request, path: str, content_type: str, cache_control: str, headers: dict[str, str] | None = None
    ) -> Representation:
        """Pass through the response of the first upstream that has the resource. Raises NotFound if none has it."""
        method = "HEAD" if request.method == "HEAD" else "GET"

        async def ask(
            client: Client, sent_headers: dict[str, str]
        ) -> tuple[Client, dict[str, str], RemoteAnswer] | None:
            response = await client.request(path, sent_headers, method)
            return None if response is None else (client, sent_headers, response)

        answer = await self._upstreams.first_answer(ask, _via(request), lambda answer: answer[2].close())
        if answer is None:
            raise NotFound
        client, sent_headers, response = answer
        outcome.decide(request, Outcome.UPSTREAM, "%s has it", client.base)

        async def again(part: Part) -> RemoteAnswer:
            return _present(await client.request(path, sent_headers, method, part))

        body = PassthroughBody(client, again, response)
        return Representation(content_type=content_type, body=body, cache_control=cache_control, headers=headers or {})


def _parse(client: Client, path: str, text: bytes, extract: Callable[[Any], _T]) -> _T:
    """Return `extract` of a JSON response. Raises UpstreamMismatchError if it is malformed or `extract` fails."""
    try:
        return extract(json.loads(text))
    except (*_NO_SUCH_JSON, FormatError):
        raise client.refusals.refuse(path, Reason.MALFORMED_JSON, "not the JSON of this resource") from None


def _present(response: RemoteAnswer | None) -> RemoteAnswer:
    if response is None:
        raise NotFound
    return response


def _reason(base: str, answer: RemotePath | UpstreamError | None) -> explain.Reason:
    """Return what an upstream answers for a path, in words."""
    if isinstance(answer, UpstreamError):
        cause = str(answer).removeprefix(f"{base}: ")
        return explain.Reason(explain.Code.UPSTREAM_LACKS, f"the upstream {base} gives no usable answer: {cause}")
    if answer is None:
        return explain.Reason(explain.Code.UPSTREAM_LACKS, f"the upstream {base} does not have it")
    signers = ", ".join(dict.fromkeys(sig.partition(":")[0] for sig in answer.info.sigs)) or "nobody"
    return explain.Reason(explain.Code.UPSTREAM_HAS, f"the upstream {base} has it, signed by {signers}")


def _via(request: Request) -> Via:
    return Via.parse(field_value(request, VIA))
