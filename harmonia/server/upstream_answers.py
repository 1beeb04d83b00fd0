"""The resources as other caches have them.

A NAR's URL tells its upstream, its path, its hashes and its compression, and no place on the upstream: where it is, the
upstream's narinfo tells, as often as need be. So nobody can have us fetch anything else, and the URL stays true as long
as the upstream has the path, or we have its NAR.
"""

import hashlib
import json
import re
from collections.abc import Generator
from urllib.parse import quote, unquote_to_bytes, urljoin

import aiohttp
from sanic import Request
from sanic.exceptions import NotFound

from harmonia import credentials
from harmonia.errors import FormatError, UpstreamError
from harmonia.nix import base32
from harmonia.nix.narinfo import NarFile, signatures
from harmonia.nix.store_path import HASH_PART_LENGTH, StorePath, is_hash_part
from harmonia.server import narinfo
from harmonia.server.body import IMMUTABLE, Body, Open, Representation, exhaust
from harmonia.server.cache import Cache
from harmonia.upstream.client import ASKED, HOPS, Client
from harmonia.upstream.fetch import Fetches, Kept, Passed, ranged
from harmonia.upstream.question import POSITIVE_TTL, Found, Hops, Upstreams

_DIGIT = f"[{base32.ALPHABET}]"
_NAR = re.compile(
    rf"(?P<hash_part>{_DIGIT}{{32}})-(?P<nar_hash>{_DIGIT}{{52}})(?:-{_DIGIT}{{52}})?\.nar\.(?P<compression>[a-z0-9]+)"
)
_DEBUG_NAR = re.compile(rf"(?:upstream/{_DIGIT}{{16}}/|nar/)(?!\.)[0-9A-Za-z._+-]{{1,255}}")
"""What a debuginfo file may lead to: it tells no hash part, but only a place."""
_REALISATION = re.compile(r"sha256:[0-9a-f]{64}![0-9A-Za-z+._?=-]{1,211}\.doi")
_OUTPUT = re.compile(r"[0-9A-Za-z+._?=-]{1,211}\.doi")
_BUILD_ID = re.compile(r"[0-9a-f]{40}")
_NAR_TYPE = "application/x-nix-nar"
_NO_SUCH_JSON = (ValueError, LookupError, TypeError, RecursionError)
"""What comes of text that is no JSON, or another one: it may also be nested deeper than Python reads."""


class Answers:
    """What the resources answer where the store has nothing. To be made on the event loop that serves."""

    def __init__(self, cache: Cache) -> None:
        settings = cache.settings
        self._cache = cache
        clients = [
            Client(
                each,
                settings.virtual_nix_store,
                credentials.authorization(settings, number),
                credentials.upstream_tls(settings, number),
                cache.metrics.own_upstream(each.url),
                settings.upstream_timeout,
            )
            for number, each in enumerate(settings.upstream)
        ]
        self._fetches = Fetches(cache.compressor.cache)
        self._upstreams = Upstreams(clients, cache.identity, settings.virtual_nix_store, settings.upstream_timeout)
        self._upstreams.start()

    async def close(self) -> None:
        await self._fetches.close()
        await self._upstreams.close()

    def state(self) -> str:
        """A line for each upstream."""
        clients = self._upstreams.clients
        return "".join(f"upstream {client.base}: {'up' if client.breaker.closed else 'down'}\n" for client in clients)

    @property
    def _max_age(self) -> int:
        return min(self._cache.settings.narinfo_max_age, int(POSITIVE_TTL))

    async def narinfo_get(self, request: Request, hash_part: str) -> Representation:
        found = await self._find(request, hash_part)
        info, settings = found.info, found.client.settings
        url = found.url if settings.mode == "redirect" else f"upstream/{found.client.id}/{found.name}"
        nar = NarFile(url, found.nar.compression, found.nar.file_hash, found.nar.file_size)
        keys = self._cache.keys if settings.sign and found.verified else ()
        sigs = signatures(info, self._cache.settings.virtual_nix_store, keys)
        return narinfo.representation(self._cache, request, info, nar, sigs, max_age=self._max_age)

    async def nar_get(self, request: Request, upstream: str, name: str) -> Representation:
        client = self._upstreams.by_id.get(upstream)
        hops = _hops(request)
        if client is None or self._upstreams.closed_to(hops):
            raise NotFound
        match = _NAR.fullmatch(name)
        if match is None:
            return self._debug_nar(client, name, hops)
        key = _key(client, name)
        if file := await self._fetches.find(key):
            return _nar(key, Kept(file, None, None, None))
        headers = hops.headers(self._upstreams.identity, [client])
        found = await self._upstreams.find_at(client, match["hash_part"], hops)
        wanted = match["nar_hash"], match["compression"]
        if found is None or (base32.encode(found.info.nar_hash), found.nar.compression) != wanted:
            raise NotFound
        key = _key(client, found.name)  # it may have been compressed anew, into another file

        async def open_nar(request: Request) -> Body:
            if request.method == "HEAD":
                return _Unread(await self._nar_size(found, headers))
            try:
                body = await self._fetches.open(key, found, headers)
            except UpstreamError:
                self._upstreams.forget(found)
                raise
            return await self._sized(body, request)

        return _nar(key, open_nar)

    def _debug_nar(self, client: Client, name: str, hops: Hops) -> Representation:
        if not _DEBUG_NAR.fullmatch(name):
            raise NotFound
        url = f"{client.base}/{name}"
        headers = hops.headers(self._upstreams.identity, [client])

        async def ask(start: int, stop: int | None) -> aiohttp.ClientResponse:
            return _there(await client.nar(url, ranged(headers, start, stop)))

        async def open_nar(request: Request) -> Body:
            if request.method == "HEAD":
                async with _there(await client.nar(url, headers, "HEAD")) as response:
                    return _Unread(response.content_length)
            return await self._sized(await Passed(client, ask).begin(), request)

        return Representation(content_type=_NAR_TYPE, body=open_nar, cache_control="no-cache")

    async def _nar_size(self, found: Found, headers: dict[str, str]) -> int | None:
        if found.nar.file_size is not None:
            return found.nar.file_size
        async with _there(await found.client.nar(found.url, headers, "HEAD")) as response:
            return response.content_length

    async def _sized(self, body: Kept | Passed, request: Request) -> Body:
        """The body, whole where the request cannot do without its length."""
        if body.size is None and ("range" in request.headers or request.version == "1.0"):
            await exhaust(body, self._cache.readers)
        return body

    async def listing_get(self, request: Request, hash_part: str) -> Representation:
        return await self._passed(request, f"{hash_part}.ls", "application/json", IMMUTABLE)

    async def log_get(self, request: Request, name: str) -> Representation:
        _, mark, query = request.raw_url.partition(b"?")
        asked = unquote_to_bytes(name.encode() + mark + query).decode("ascii", "replace")
        try:
            path = (await self._find(request, asked)).info.path if is_hash_part(asked) else StorePath(asked)
            if not path.is_derivation:
                found = await self._upstreams.find(path.hash_part, _hops(request))
                deriver = found.info.deriver if found and found.info.path == path else None
                path = deriver or StorePath(f"{path}.drv")
        except FormatError:
            raise NotFound from None
        headers = {"x-content-type-options": "nosniff"}
        return await self._passed(request, f"log/{quote(path)}", "text/plain; charset=utf-8", "no-cache", headers)

    async def build_trace_get_realisation(self, request: Request, name: str) -> Representation:
        name = unquote_to_bytes(name).decode(errors="replace")
        if not _REALISATION.fullmatch(name):
            raise NotFound
        return await self._realisation(request, f"realisations/{quote(name, safe='!:')}")

    async def build_trace_get(self, request: Request, derivation: str, name: str) -> Representation:
        derivation, name = (unquote_to_bytes(text).decode(errors="replace") for text in (derivation, name))
        try:
            StorePath(derivation)
        except FormatError:
            raise NotFound from None
        if not _OUTPUT.fullmatch(name):
            raise NotFound
        return await self._realisation(request, f"build-trace-v2/{quote(derivation)}/{quote(name)}")

    async def _realisation(self, request: Request, path: str) -> Representation:
        async def ask(client: Client, headers: dict[str, str]) -> bytes | None:
            text = await client.ask_small(path, headers)
            if text is not None:
                try:
                    StorePath(json.loads(text)["outPath"])
                except (*_NO_SUCH_JSON, FormatError):
                    raise UpstreamError(f"{client.base}/{path} is no realisation") from None
            return text

        text = await self._upstreams.get(ask, _hops(request))
        if text is None:
            raise NotFound
        return self._small("application/json", text)

    async def debuginfo_get(self, request: Request, name: str) -> Representation:
        build_id = name.removesuffix(".debug")
        if not _BUILD_ID.fullmatch(build_id):
            raise NotFound

        async def ask(client: Client, headers: dict[str, str]) -> bytes | None:
            path = f"debuginfo/{build_id}.debug"
            text = await client.ask_small(path, headers) or await client.ask_small(f"debuginfo/{build_id}", headers)
            if text is None:
                return None
            try:
                said = json.loads(text)
                archive, member = urljoin(f"{client.base}/debuginfo/", said["archive"]), said["member"]
            except _NO_SUCH_JSON:
                raise UpstreamError(f"{client.base}/{path} is no debuginfo") from None
            if client.settings.mode == "proxy":
                relative = archive.removeprefix(f"{client.base}/")
                if not _DEBUG_NAR.fullmatch(relative):
                    return None
                archive = f"../upstream/{client.id}/{relative}"
            return json.dumps({"archive": archive, "member": member}).encode()

        text = await self._upstreams.get(ask, _hops(request))
        if text is None:
            raise NotFound
        return self._small("application/json", text)

    async def _find(self, request: Request, hash_part: str) -> Found:
        found = await self._upstreams.find(hash_part, _hops(request))
        if found is None:
            raise NotFound
        return found

    async def _passed(
        self, request: Request, path: str, content_type: str, cache_control: str, headers: dict[str, str] | None = None
    ) -> Representation:
        """Whatever the first upstream says there."""
        method = "HEAD" if request.method == "HEAD" else "GET"

        async def ask(
            client: Client, asked: dict[str, str]
        ) -> tuple[Client, dict[str, str], aiohttp.ClientResponse] | None:
            response = await client.ask(path, asked, method)
            return None if response is None else (client, asked, response)

        answer = await self._upstreams.get(ask, _hops(request), lambda answer: answer[2].close())
        if answer is None:
            raise NotFound
        client, asked, response = answer
        encoding = response.headers.get("Content-Encoding", "").lower()
        encoded = {} if encoding in {"", "identity", "none"} else {"content-encoding": encoding}
        if method == "HEAD":
            body: Body = _Unread(response.content_length)
            response.close()
        else:

            async def again(start: int, stop: int | None) -> aiohttp.ClientResponse:
                return _there(await client.ask(path, ranged(asked, start, stop)))

            body = await self._sized(Passed(client, again, response.content_length, response=response), request)
        return Representation(
            content_type=content_type, body=body, cache_control=cache_control, headers={**(headers or {}), **encoded}
        )

    def _small(self, content_type: str, text: bytes) -> Representation:
        return Representation(
            content_type=content_type,
            body=text,
            cache_control=f"public, max-age={self._max_age}",
            etag=f'"{hashlib.blake2b(text, digest_size=15).hexdigest()}"',
        )


def _hops(request: Request) -> Hops:
    return Hops.parse(*(",".join(request.headers.getall(name, [])) for name in (HOPS, ASKED)))


def _there(response: aiohttp.ClientResponse | None) -> aiohttp.ClientResponse:
    if response is None:
        raise NotFound
    return response


def _key(client: Client, name: str) -> str:
    """What a NAR is kept by. Paths of the same content have one in common."""
    return f"{client.id}-{name[HASH_PART_LENGTH + 1 :]}"


def _nar(key: str, body: Body | Open) -> Representation:
    return Representation(content_type=_NAR_TYPE, body=body, cache_control=IMMUTABLE, etag=f'"{key}"')


class _Unread:
    """What HEAD wants to know of a body."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        raise NotImplementedError
