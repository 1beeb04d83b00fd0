"""`/nar/…`: the NAR of a store path, as it is now on disk.

We hand out `/nar/<hash>-<narhash>.nar`, as nix-serve does. `/nar/<narhash>.nar?hash=<hash>` is what upstream Harmonia
hands out, and `/nar/<hash>.nar` what nix-serve once did: clients remember those for 30 days.

A zstd file of it is `/nar/<hash>-<narhash>-<encoding>.nar.zst`. Nix resumes a download without If-Range, perhaps at
another server or after a restart. Therefore the URL names all that determines the bytes, and a range of it is answered
from that very file, or with 404. If this server cannot make the encoding, or if the URL names none (as URLs once did),
the whole NAR comes in our own encoding, with `Accept-Ranges: none`, because of which Nix does not resume it.

HTTP/1.0 has no chunks: its client can only see that a body is incomplete if it knows the length before. The length of a
zstd file is unknown until it was once compressed. Until then, HTTP/1.0 gets a zstd file without compression.
"""

import asyncio
import re
from functools import partial

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.cache.nar_compressor import CompressedNar, KeptNar, StoredNar
from harmonia.cache.zstd import Encoding
from harmonia.cache.zstd_stored import stored_size
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import is_hash_part
from harmonia.ownership import closed_on_error
from harmonia.server.context import ServerContext
from harmonia.server.http.response import (
    IMMUTABLE_NAR,
    UNNAMED,
    Body,
    Deferred,
    Encoded,
    Representation,
    exhaust,
    wants_part,
)
from harmonia.server.http.response_cache import AbsentError
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


def open_nar(context: ServerContext, request: Request, info: PathInfo) -> StoreNar:
    """Return the NAR of a path, to be closed. It keeps the path from being collected until then."""
    root = context.store.real_path(info.path)
    return StoreNar(info, root, context.layouts, context.acquire_temp_root(info), context.client(request))


async def whole_layout(nar: StoreNar) -> Layout:
    """Return the layout, when it is whole. OSError, or StoreObjectError if it is not that of what was registered."""
    layout = nar.layout()
    if (waiting := layout.wait_whole()) is not None:
        await asyncio.wrap_future(waiting)
    nar.check_layout(layout)
    return layout


def found(path: SignedPath | None) -> PathInfo:
    """Return the info of a path that was looked up. Raises AbsentError if there is no such path."""
    if path is None:
        raise AbsentError
    return path.info


async def get(context: ServerContext, request: Request, name: str) -> Representation:
    match = next(filter(None, (pattern.fullmatch(name) for pattern in _NAMES)), None)
    named = match.groupdict() if match else {}
    hash_part = named.get("hash_part", request.args.get("hash", ""))
    if not (match and is_hash_part(hash_part)):
        raise NotFound
    info = found(await context.paths.lookup_path(hash_part))
    nar_hash = base32.encode(info.nar_hash)
    if named.get("nar_hash", nar_hash) != nar_hash:
        raise NotFound
    if named["compression"]:
        return await _file(context, request, info, named.get("encoding"))
    compressor = context.compressor
    own = compressor.encoder.encoding
    with closed_on_error(open_nar(context, request, info)) as body:
        if wants_part(request):
            await whole_layout(body)
    return Representation(
        content_type=_CONTENT_TYPE,
        body=body,
        cache_control=IMMUTABLE_NAR,
        etag=f'"{nar_hash}"',
        zstd=Encoded(own.name, _compressed(context, info, own)) if context.settings.enable_compression else None,
        worthwhile=not compressor.encoder.saturated or compressor.known_file_info(info.nar_hash) is not None,
    )


async def _file(context: ServerContext, request: Request, info: PathInfo, name: str | None) -> Representation:
    """Return the NAR as a zstd file in the encoding of that name, if any, or else in ours and not to be resumed."""
    compressor = context.compressor
    own = compressor.encoder.encoding
    encoding = own if name is None else Encoding.parse(name)
    if encoding is None:
        raise NotFound
    body: Body | Deferred = _compressed(context, info, encoding)
    names_bytes = name is not None
    if not own.can_make(encoding):
        kept = await context.threads.open(partial(compressor.use_cached_file, info.nar_hash, encoding))
        names_bytes = kept is not None
        if kept is None:
            encoding, body = own, _compressed(context, info, own)
        else:
            body = KeptNar(kept)
    if request.version == "1.0" and not wants_part(request) and not isinstance(body, KeptNar):
        size = await context.threads.run_io(partial(compressor.file_size, info.nar_hash, encoding))
        if size is None:
            return _stored(context, info, encoding)
    return Representation(
        content_type=_CONTENT_TYPE,
        body=body,
        cache_control=IMMUTABLE_NAR if names_bytes else UNNAMED,
        etag=f'"{base32.encode(info.nar_hash)}-{encoding.name}"',
        resumable=names_bytes,
    )


def _stored(context: ServerContext, info: PathInfo, encoding: Encoding) -> Representation:
    """Return the NAR as a zstd file without compression, and begin to compress it for the next request.

    It shares its URL with the compressed file. Therefore nobody may keep it, and Nix must not resume it.
    """

    async def open_stored(request: Request) -> Body:
        return await context.threads.open(
            lambda: StoredNar(context.compressor, open_nar(context, request, info), encoding)
        )

    async def size(_: Request) -> int:
        return stored_size(info.nar_size)

    body = Deferred(open_stored, size)
    return Representation(content_type=_CONTENT_TYPE, body=body, cache_control=UNNAMED, resumable=False)


def _compressed(context: ServerContext, info: PathInfo, encoding: Encoding) -> Deferred:
    """Return what opens the compressed NAR."""

    async def open_compressed(request: Request) -> Body:
        body = await context.threads.open(
            lambda: CompressedNar(context.compressor, open_nar(context, request, info), encoding)
        )
        with closed_on_error(body):
            if wants_part(request) and body.is_damaged:
                await exhaust(body, context.submitter(request))  # which fails, so that Nix goes on to its next cache
        return body

    async def size(_: Request) -> int | None:
        return await context.threads.run_io(partial(context.compressor.file_size, info.nar_hash, encoding))

    return Deferred(open_compressed, size)
