"""`/nar/…`: the NAR of a store path, as it is on disk now.

Our narinfos name `/nar/<hash>-<narhash>.nar`, as those of nix-serve do. The Rust Harmonia's narinfos name
`/nar/<narhash>.nar?hash=<hash>`, those of older nix-serves `/nar/<hash>.nar`: clients cache both for 30 days.

A zstd file has the URL `/nar/<hash>-<narhash>-<encoding>.nar.zst`. Nix resumes a download without If-Range, perhaps at
another server or after a restart. Therefore the URL has all that determines the bytes, and a range is answered from
exactly that file, or with 404. If this server cannot produce the encoding, or if the URL has none (as in old versions),
the response is the whole NAR in our own encoding with `Accept-Ranges: none`, so that Nix does not resume it.

HTTP/1.0 has no chunked coding: a client can only detect a truncated body by a length. The length of a zstd file is
unknown until the NAR was compressed once. Until then, HTTP/1.0 gets a zstd file without compression.
"""

import asyncio
import re
from contextlib import closing
from dataclasses import replace
from functools import partial

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.cache.nar_compressor import CachedNar, CompressedNar
from harmonia.cache.zstd import Encoding
from harmonia.cache.zstd_stored import StoredNar, stored_size
from harmonia.metrics.outcome import Outcome
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import is_hash_part
from harmonia.ownership import closed_on_error
from harmonia.process import request_trace
from harmonia.server.context import ServerContext
from harmonia.server.http import outcome
from harmonia.server.http.response import (
    IMMUTABLE_NAR,
    PACKET_BYTES,
    UNNAMED,
    Body,
    Deferred,
    Encoded,
    Representation,
    generate_to_end,
    wants_part,
)
from harmonia.server.http.response_cache import AbsentError, StillValid
from harmonia.server.path_lookup import SignedPath
from harmonia.store.nar_layout import Layout
from harmonia.store.store_nar import StoreNar

_HASH_PART = f"(?P<hash_part>[{base32.ALPHABET}]{{32}})"
_NAR_HASH = f"(?P<nar_hash>[{base32.ALPHABET}]{{52}})"
_NAMES = [
    re.compile(rf"{_HASH_PART}-{_NAR_HASH}-(?P<encoding>zstd-[0-9a-z.-]+)\.nar(?P<compression>\.zst)"),
    *(
        re.compile(rf"{name}\.nar(?P<compression>\.zst)?")
        for name in (f"{_HASH_PART}-{_NAR_HASH}", _NAR_HASH, _HASH_PART)
    ),
]

_CONTENT_TYPE = "application/x-nix-nar"
_SMALL_NAR_BYTES = 512 * 1024
"""Size up to which a NAR is read and verified before its first byte is sent."""

_MAX_READ_NARS = 16
"""Number of small NARs that may wait in memory for their compression."""


def open_nar(context: ServerContext, request: Request, info: PathInfo) -> StoreNar:
    """Return the NAR of a path. The caller must close it: until then, the path is not garbage-collected."""
    root = context.store.real_path(info.path)
    return StoreNar(info, root, context.layouts, context.acquire_temp_root(info), context.client(request))


async def whole_layout(nar: StoreNar) -> Layout:
    """Wait for the complete layout of a NAR, and return it. The caller closes it.

    Raises OSError if the path cannot be read, StoreObjectError if the layout differs from the registered size.
    """
    with closed_on_error(nar.layout()) as layout:
        if (waiting := layout.wait_whole()) is not None:
            await asyncio.wrap_future(waiting)
        nar.check_layout(layout)
        return layout


def require_path(path: SignedPath | None) -> SignedPath:
    """Return a path that was looked up. Raises AbsentError if the lookup returned None."""
    if path is None:
        raise AbsentError
    return path


def require_info(path: SignedPath | None) -> PathInfo:
    """Return the info of a path that was looked up. Raises AbsentError if the lookup returned None."""
    return require_path(path).info


async def get(context: ServerContext, request: Request, name: str) -> Representation:
    match = next(filter(None, (pattern.fullmatch(name) for pattern in _NAMES)), None)
    fields = match.groupdict() if match else {}
    hash_part = fields.get("hash_part", request.args.get("hash", ""))
    if not (match and is_hash_part(hash_part)):
        raise NotFound
    path = require_path(await context.paths.lookup_path(hash_part))
    info = path.info
    request.ctx.served = partial(context.note_served, info.path)
    still_valid: StillValid | None = partial(context.paths.is_current, path)
    if context.push is not None:
        context.push.renew(info.path)
        still_valid = None  # each request renews
    nar_hash = base32.encode(info.nar_hash)
    if fields.get("nar_hash", nar_hash) != nar_hash:
        raise NotFound
    if fields["compression"]:
        representation = await _file(context, request, info, fields.get("encoding"))
        return replace(representation, still_valid=still_valid)
    compressor = context.compressor
    own = compressor.encoder.encoding
    worthwhile = not compressor.encoder.saturated or compressor.files.known_file_info(info.nar_hash) is not None
    if not worthwhile:
        request_trace.log.debug("the threads that compress are busy: no content coding unless the client demands it")
    return Representation(
        content_type=_CONTENT_TYPE,
        body=_plain(context, info),
        cache_control=IMMUTABLE_NAR,
        etag=f'"{nar_hash}"',
        zstd=Encoded(own.name, _compressed(context, info, own)) if context.settings.enable_compression else None,
        worthwhile=worthwhile and info.nar_size > PACKET_BYTES,
        still_valid=still_valid if worthwhile else None,
    )


def _is_small(request: Request, info: PathInfo) -> bool:
    """Return True if a NAR is sent from memory: a small one, and all of it."""
    return info.nar_size <= _SMALL_NAR_BYTES and not wants_part(request)


def _plain(context: ServerContext, info: PathInfo) -> Deferred:
    """Return the plain NAR, which is opened when it is sent."""

    async def open_plain(request: Request) -> Body | bytes:
        outcome.decide(request, Outcome.STORE, "a plain NAR is read from the store")
        with closed_on_error(open_nar(context, request, info)) as nar:
            if _is_small(request, info):
                with closing(nar):
                    return await context.run_in_steps(context.client(request), nar.read_whole())
            if wants_part(request):
                (await whole_layout(nar)).close()
        return nar

    async def size(_: Request) -> int:
        return info.nar_size

    return Deferred(open_plain, size)


async def _file(context: ServerContext, request: Request, info: PathInfo, name: str | None) -> Representation:
    """Return the NAR as a zstd file in the encoding `name`.

    If `name` is None, or this server does not have and cannot produce that encoding, return it in our own encoding and
    not resumable. Raises NotFound if the name of the encoding is malformed.
    """
    compressor = context.compressor
    own = compressor.encoder.encoding
    encoding = own if name is None else Encoding.parse(name)
    if encoding is None:
        raise NotFound
    body: Body | Deferred = _compressed(context, info, encoding)
    determines_bytes = name is not None
    if not own.can_make(encoding):
        cached = await context.threads.run_open(partial(compressor.files.use_cached_file, info.nar_hash, encoding))
        determines_bytes = cached is not None
        if cached is None:
            request_trace.log.debug("cannot make the encoding %s, and it is not in the cache", encoding.name)
            encoding, body = own, _compressed(context, info, own)
        else:
            body = CachedNar(cached)
            outcome.decide(request, Outcome.DISK, "the cache has a complete file in the encoding %s", encoding.name)
            _note_saving(context, request, info)
    if request.version == "1.0" and not (
        wants_part(request) or _is_small(request, info) or isinstance(body, CachedNar)
    ):
        size = await context.threads.run_io(partial(compressor.files.file_size, info.nar_hash, encoding))
        if size is None:
            return _stored(context, info, encoding)
    return Representation(
        content_type=_CONTENT_TYPE,
        body=body,
        cache_control=IMMUTABLE_NAR if determines_bytes else UNNAMED,
        etag=f'"{base32.encode(info.nar_hash)}-{encoding.name}"',
        resumable=determines_bytes,
    )


def _stored(context: ServerContext, info: PathInfo, encoding: Encoding) -> Representation:
    """Return the NAR as a zstd file without compression, and begin to compress the NAR for the next request.

    The file has the same URL as the compressed one. Therefore no cache may store it, and Nix must not resume it.
    """

    async def open_stored(request: Request) -> Body:
        outcome.decide(request, Outcome.STORE, "HTTP/1.0 needs a length: raw blocks, as the NAR was never compressed")
        return await context.threads.run_open(
            lambda: StoredNar(context.compressor, open_nar(context, request, info), encoding)
        )

    async def size(_: Request) -> int:
        return stored_size(info.nar_size)

    body = Deferred(open_stored, size)
    return Representation(content_type=_CONTENT_TYPE, body=body, cache_control=UNNAMED, resumable=False)


def _compressed(context: ServerContext, info: PathInfo, encoding: Encoding) -> Deferred:
    """Return the compressed NAR, which is opened when it is sent."""
    compressor = context.compressor

    async def open_compressed(request: Request) -> Body | bytes:
        _note_saving(context, request, info)
        if _is_small(request, info):
            is_own = encoding == compressor.encoder.encoding
            if is_own and (compressed := compressor.small_in_memory(info.nar_hash)) is not None:
                outcome.decide(request, Outcome.MEMORY, "the small NAR was compressed before")
                return compressed
            cached = await context.threads.run_short_io(partial(compressor.files.read_file, info.nar_hash, encoding))
            if cached is not None:
                outcome.decide(request, Outcome.DISK, "the cache has the small NAR in a complete file")
                return cached
            if is_own:
                outcome.decide(request, Outcome.COMPRESSED, "the cache does not have the small NAR")
                return await context.small_nars.run(info.nar_hash, partial(_compress_small, context, request, info))
        body = await context.threads.run_open(
            lambda: CompressedNar(context.compressor, open_nar(context, request, info), encoding)
        )
        if body.was_complete:
            outcome.decide(request, Outcome.DISK, "the cache has a complete file")
        elif body.is_in_cache:
            outcome.decide(request, Outcome.COMPRESSED, "the file in the cache grows while it is sent")
        else:
            why = "without the cache: it is not writable, or too many NARs are compressed, or this one was damaged"
            outcome.decide(request, Outcome.COMPRESSED, why)
        with closed_on_error(body):
            if wants_part(request) and body.is_damaged:
                await generate_to_end(body, context.submitter(request))  # fails, so that Nix asks its next cache
        return body

    async def size(_: Request) -> int | None:
        return await context.threads.run_io(partial(context.compressor.files.file_size, info.nar_hash, encoding))

    return Deferred(open_compressed, size)


async def _compress_small(context: ServerContext, request: Request, info: PathInfo) -> bytes:
    """Return a small NAR compressed, and add it to the cache."""
    client, compressor = context.client(request), context.compressor
    with closing(open_nar(context, request, info)) as nar:
        content: bytes | None = None  # the thread that compresses it reads it
        if len(context.small_nars) <= _MAX_READ_NARS:
            content = await context.run_in_steps(client, compressor.read_small(nar))
        compressing = compressor.small_nars.submit(client, compressor.compress_small, nar, content)
        del content
        return await asyncio.wrap_future(compressing)


def _note_saving(context: ServerContext, request: Request, info: PathInfo) -> None:
    """Count the bytes that compression saves if the whole NAR is sent compressed."""

    def served(sent: int, *, complete: bool = True) -> None:
        context.note_served(info.path, sent, complete=complete)
        if complete:
            context.compression_saved_bytes += max(info.nar_size - sent, 0)

    if not wants_part(request):
        request.ctx.served = served
