"""`/<hash>.narinfo`: signed metadata of a store path, and the URL of its NAR. With `?json`, in JSON."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from sanic import Request

from harmonia.cache.zstd import Encoding
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.http.response_cache import AbsentError


def nar_url(info: PathInfo) -> str:
    """Return the URL of the plain NAR, relative to the cache's URL."""
    return f"nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar"


def file_url(info: PathInfo, encoding: Encoding) -> str:
    """Return the URL of the NAR as a zstd file, relative to the cache's URL."""
    return f"{nar_url(info).removesuffix('.nar')}-{encoding.name}.nar.zst"


async def get(context: ServerContext, request: Request, hash_part: str) -> Representation:
    path = await context.paths.lookup_path(hash_part)
    if context.push is not None:
        context.push.note_answer(hash_part, found=path is not None)
    if path is None:
        raise AbsentError(partial(context.paths.is_absent, hash_part))
    info, files = path.info, context.compressor.files
    if context.offers_zstd and not files.needs_no_lookup(info.nar_hash):
        await context.threads.run_short_io(lambda: files.find_file_info(info.nar_hash))
    compressed = files.known_file_info(info.nar_hash)
    nar, max_age = nar_file(context, info), context.settings.narinfo_max_age

    def still_valid() -> bool:
        needs_no_lookup = not context.offers_zstd or files.needs_no_lookup(info.nar_hash)
        return needs_no_lookup and files.known_file_info(info.nar_hash) == compressed and context.paths.is_current(path)

    return replace(representation(context, request, info, nar, path.sigs, max_age=max_age), still_valid=still_valid)


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
