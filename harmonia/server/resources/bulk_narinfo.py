"""`/get-narinfos-v1`: the narinfos of many paths in one request (DeterminateSystems/nix-src#523).

A client sends the hash parts of the paths with POST, one a line. The response is their narinfos in the same order,
separated by empty lines. A path that is not in this cache is left out.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial

from sanic import Request

from harmonia.cache import zstd
from harmonia.config.settings import MAX_BULK_PATHS
from harmonia.errors import RequestRefusedError
from harmonia.nix import narinfo
from harmonia.nix.base32 import ALPHABET
from harmonia.nix.narinfo import NarFile
from harmonia.nix.store_path import HASH_PART_LENGTH
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import check_bulk_rate
from harmonia.server.http.request_body import read_small
from harmonia.server.http.response import Deferred, Encoded, Representation
from harmonia.server.path_lookup import SignedPath
from harmonia.server.resources.narinfo import nar_file, nar_url
from harmonia.untrusted import excerpt

_MAX_BODY_BYTES = MAX_BULK_PATHS * (HASH_PART_LENGTH + 2)
BATCH_PATHS = 32
"""Paths of one chunk: some 3 ms of the event loop if none is cached."""
_HTTP_1_0_MAX_BYTES = 64 << 20
"""Maximum length of a response to HTTP/1.0, which needs the length before the first byte."""

_HASH_PART = re.compile(f"[{ALPHABET}]{{{HASH_PART_LENGTH}}}")

Find = Callable[[Sequence[str]], Awaitable[list[str]]]
"""Returns the narinfos of the hash parts that are found."""


async def post(context: ServerContext, request: Request) -> Representation:
    """Return the narinfos of published paths, and of paths of upstreams."""
    return await _respond(context, request, partial(_find_published, context, request))


async def post_valid(context: ServerContext, request: Request) -> Representation:
    """Return the narinfos of valid paths, published or not, for pushes."""
    return await _respond(context, request, partial(_find_valid, context))


async def _find_published(context: ServerContext, request: Request, hash_parts: Sequence[str]) -> list[str]:
    paths = [await context.paths.lookup_usable_path(hash_part) for hash_part in hash_parts]
    if context.push is not None:
        for hash_part, path in zip(hash_parts, paths, strict=True):
            context.push.note_answer(hash_part, found=path is not None)
    upstreams = context.upstreams

    async def text(hash_part: str) -> str | None:
        return await upstreams.narinfo_text(request, hash_part) if upstreams else None

    missing = [hash_part for hash_part, path in zip(hash_parts, paths, strict=True) if path is None]
    remote = iter(await asyncio.gather(*map(text, missing)))
    local = iter(await render(context, [path for path in paths if path]))
    texts = [next(local if path else remote) for path in paths]
    return [text for text in texts if text]


async def render(context: ServerContext, paths: Sequence[SignedPath]) -> list[str]:
    """Return the narinfos of local paths, as in `/<hash>.narinfo`."""
    files, store_dir = context.compressor.files, context.settings.virtual_nix_store
    hashes = [path.info.nar_hash for path in paths if files.known_file_info(path.info.nar_hash) is None]
    if context.offers_zstd and hashes:
        await context.threads.run_io(lambda: [files.find_file_info(nar_hash) for nar_hash in hashes])
    return [narinfo.render(path.info, store_dir, nar_file(context, path.info), path.sigs) for path in paths]


async def _find_valid(context: ServerContext, hash_parts: Sequence[str]) -> list[str]:
    store = context.store
    infos = await context.threads.run_db(lambda: [store.usable_path_info(hash_part) for hash_part in hash_parts])
    return [
        narinfo.render(info, store.store_dir, NarFile(nar_url(info), "none", info.nar_hash, info.nar_size), info.sigs)
        for info in infos
        if info
    ]


class _Chunks:
    """A body whose chunks are generated once, while it is sent."""

    size: int | None = None

    def __init__(self, chunks: AsyncGenerator[bytes]) -> None:
        self._chunks = chunks

    def read(self, _start: int, _stop: int | None) -> AsyncGenerator[bytes]:
        return self._chunks

    def close(self) -> None:
        pass


async def _respond(context: ServerContext, request: Request, find: Find) -> Representation:
    hash_parts = _parse(await read_small(request, _MAX_BODY_BYTES))
    check_bulk_rate(context, request, len(hash_parts))

    async def open_encoded(_: Request) -> _Chunks:
        return _Chunks(zstd.stream_async(_generate(hash_parts, find)))

    async def open_plain(_: Request) -> _Chunks | bytes:
        chunks = _generate(hash_parts, find)
        return await _joined(chunks) if request.version == "1.0" else _Chunks(chunks)

    return Representation(
        content_type=narinfo.CONTENT_TYPE,
        body=Deferred(open_plain),
        cache_control="no-store",
        zstd=Encoded(zstd.STREAM, Deferred(open_encoded)) if context.settings.enable_compression else None,
        resumable=False,
    )


def _parse(body: bytes) -> list[str]:
    """Return the hash parts in the body, without repetitions. Raises RequestRefusedError if it has others lines."""
    lines = body.decode(errors="replace").split()
    if len(lines) > MAX_BULK_PATHS:
        what = f"the body has {len(lines)} lines; send at most {MAX_BULK_PATHS} hash parts in one request"
        raise RequestRefusedError(413, what)
    for line in lines:
        if not _HASH_PART.fullmatch(line):
            what = f"{excerpt(line)} is not the hash part of a store path; send one hash part of 32 letters a line"
            raise RequestRefusedError(400, what)
    return list(dict.fromkeys(lines))


async def _generate(hash_parts: Sequence[str], find: Find) -> AsyncGenerator[bytes]:
    separator = ""
    for start in range(0, len(hash_parts), BATCH_PATHS):
        if found := await find(hash_parts[start : start + BATCH_PATHS]):
            yield (separator + "\n".join(found)).encode()
            separator = "\n"
        await asyncio.sleep(0)  # other requests take their turn


async def _joined(chunks: AsyncGenerator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > _HTTP_1_0_MAX_BYTES:
            raise RequestRefusedError(413, "the response is too long for HTTP/1.0; use HTTP/1.1, or send fewer lines")
    return bytes(body)
