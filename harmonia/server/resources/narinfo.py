"""`/<hash>.narinfo`: signed metadata of a store path, and the URL of its NAR. With `?json`, in JSON."""

import re
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic

from cachetools import FIFOCache
from sanic import Request

from harmonia.cache.compressed_files import CompressedFile
from harmonia.cache.zstd import Encoding
from harmonia.errors import StoreObjectError
from harmonia.metrics.outcome import Outcome
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.process import request_trace
from harmonia.server.context import ServerContext
from harmonia.server.http import outcome
from harmonia.server.http.response import Representation
from harmonia.server.http.response_cache import ABSENT, AbsentError, Content, Resources
from harmonia.server.path_lookup import SignedPath, Unknown

_RECHECK_S = 5.0  # until the next check whether another process has compressed a NAR
_MEMORY, _STORE = Outcome.MEMORY, Outcome.STORE  # an attribute of an enumeration takes longer than a global name
_ABSENT = (ABSENT, Outcome.NONE)
_REQUEST = re.compile(rf"(?:GET|HEAD) /([{base32.ALPHABET}]{{32}})\.narinfo".encode())
_MAX_BYTES = 8 * 1024 * 1024  # of narinfos in memory, some 8,000


def nar_url(info: PathInfo) -> str:
    """Return the URL of the plain NAR, relative to the cache's URL."""
    return f"nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar"


def file_url(info: PathInfo, encoding: Encoding) -> str:
    """Return the URL of the NAR as a zstd file, relative to the cache's URL."""
    return f"{nar_url(info).removesuffix('.nar')}-{encoding.name}.nar.zst"


async def get(context: ServerContext, request: Request, hash_part: str) -> Representation:
    remembered = context.paths.remembered(hash_part)
    path = await context.paths.lookup_path(hash_part)
    if context.push is not None:
        context.push.note_answer(hash_part, found=path is not None)
    if path is None:
        raise AbsentError(partial(context.paths.is_absent, hash_part))
    info, files = path.info, context.compressor.files
    if context.offers_zstd and files.known_file_info(info.nar_hash) is None:
        await context.threads.run_short_io(partial(files.find_file_info, info.nar_hash))
    compressed = files.known_file_info(info.nar_hash)
    if path is remembered:
        outcome.decide(request, Outcome.MEMORY, "its row in the database has not changed")
    else:
        outcome.decide(request, Outcome.STORE, "its row in the database was read")
    if context.offers_zstd:
        request_trace.log.debug("FileHash and FileSize %s", "known" if compressed else "unknown: never compressed here")
    nar, max_age = nar_file(context, info), context.settings.narinfo_max_age
    expires = monotonic() + _RECHECK_S

    def still_valid() -> bool:
        return _is_file_current(context, info, compressed, expires) and context.paths.is_current(path)

    return replace(representation(context, request, info, nar, path.sigs, max_age=max_age), still_valid=still_valid)


@dataclass(frozen=True, slots=True)
class _Rendered:
    content: Content
    path: SignedPath
    compressed: CompressedFile | None
    expires: float


class Narinfos:
    """Narinfos of a worker, for requests that are answered without Sanic."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._narinfos: MutableMapping[str, _Rendered] = FIFOCache(
            _MAX_BYTES, getsizeof=lambda it: len(it.content.body)
        )
        self.resources = Resources(_REQUEST, self.content_now)

    def content_now(self, hash_part: str, *, forwarded: bool = False) -> tuple[Content, Outcome] | None:
        """Return the narinfo of a path, or ABSENT, and its outcome, or None if only the handler can find out.

        Does not block. For a request that another Harmonia has `forwarded`, only the handler can ask upstreams.
        """
        context, paths = self._context, self._context.paths
        rows_read = paths.rows_read
        try:
            path = paths.lookup_now(hash_part)
        except StoreObjectError:
            return None
        if isinstance(path, Unknown):
            return None
        if context.push is not None:
            context.push.note_answer(hash_part, found=path is not None)
        if path is None:
            if context.upstreams is None:
                return _ABSENT
            planned = None if forwarded else context.upstreams.narinfo_now(hash_part)
            return None if planned is None else (planned, _MEMORY)
        cached: _Rendered | None
        try:
            cached = self._narinfos[hash_part]  # takes half the time of `get`
        except KeyError:
            cached = None
        if not (
            cached is not None
            and cached.path is path
            and _is_file_current(context, path.info, cached.compressed, cached.expires)
        ):
            cached = self._render_now(path)
        return None if cached is None else (cached.content, _MEMORY if paths.rows_read == rows_read else _STORE)

    def _render_now(self, path: SignedPath) -> _Rendered | None:
        """Return the narinfo and cache it, or return None if a thread has to look for the compressed file."""
        context, info, files = self._context, path.info, self._context.compressor.files
        if context.offers_zstd and files.known_file_info(info.nar_hash) is None:
            if not context.threads.loop_io.allowed:
                return None
            context.threads.loop_io.run(partial(files.find_file_info, info.nar_hash))
        compressed = files.known_file_info(info.nar_hash)
        content = content_of(context, info, nar_file(context, info), path.sigs, context.settings.narinfo_max_age)
        rendered = _Rendered(content, path, compressed, monotonic() + _RECHECK_S)
        with suppress(ValueError):  # larger than the whole cache
            self._narinfos[info.path.hash_part] = rendered
        return rendered


def content_of(context: ServerContext, info: PathInfo, nar: NarFile, sigs: Iterable[str], max_age: int) -> Content:
    """Return the narinfo that `representation` returns for a request without a query."""
    text = narinfo.render(info, context.settings.virtual_nix_store, nar, sigs).encode()
    narinfo_now = Representation.of_metadata(narinfo.CONTENT_TYPE, text, max_age)
    return Content(text, (narinfo_now.etag or "").encode(), narinfo_now.cache_control.encode())


def _is_file_current(context: ServerContext, info: PathInfo, compressed: CompressedFile | None, expires: float) -> bool:
    """Return True if `compressed` is still the compressed file of the path's NAR. If None, that `expires`."""
    if not context.offers_zstd:
        return True
    is_known = context.compressor.files.known_file_info(info.nar_hash) == compressed
    return is_known and (compressed is not None or monotonic() < expires)


def representation(
    context: ServerContext, request: Request, info: PathInfo, nar: NarFile, sigs: Iterable[str], *, max_age: int
) -> Representation:
    """Return the narinfo, or JSON if the query has `json`. Caches may keep it for `max_age` seconds."""
    store_dir, content_type = context.settings.virtual_nix_store, narinfo.CONTENT_TYPE
    if request.query_string and "json" in request.get_args(keep_blank_values=True):
        content_type = "application/json"
        text = narinfo.render_json(info, store_dir, nar, sigs)
    else:
        text = narinfo.render(info, store_dir, nar, sigs)
    return Representation.of_metadata(content_type, text.encode(), max_age)


def nar_file(context: ServerContext, info: PathInfo) -> NarFile:
    """Return URL, compression, and hash and size as far as remembered, of the NAR file.

    Nix caches the URL for 30 days: it must stay valid.
    """
    compressed = context.compressor.files.known_file_info(info.nar_hash)
    if not context.offers_zstd:
        return NarFile(nar_url(info), "none", info.nar_hash, info.nar_size)
    url = file_url(info, context.compressor.encoder.encoding)
    return NarFile(url, "zstd", compressed and compressed.sha256, compressed and compressed.size)
