"""`/<hash>.ls` of an upstream path whose NAR is cached: the listing is made from that NAR if no upstream has one."""

from collections.abc import Iterator
from contextlib import closing

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.cache.disk_cache import DiskCache
from harmonia.errors import CacheFileError, FormatError
from harmonia.nix import base32, nar, nar_parser
from harmonia.nix import listing as nix_listing
from harmonia.nix.decompress import decompressor
from harmonia.nix.nar import Entry
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.made_once import MadeFile
from harmonia.server.resources import listing
from harmonia.upstream.remote_path import RemotePath


async def get(context: ServerContext, request: Request, path: RemotePath) -> Representation:
    """Answer with the listing. Raises NotFound if the NAR is not in the cache any longer, or is damaged."""
    nars, name = context.compressor.cache, path.name
    if nars is None:
        raise NotFound

    async def make(memory_bytes: int) -> Representation:
        def render() -> Iterator[bytes]:
            return nix_listing.render(nar.located(_entries(nars, name.key, name.compression, memory_bytes)))

        body, encoded = await listing.long(context, request, base32.encode(path.info.nar_hash), render)
        return listing.representation(path.info, body, encoded)

    try:
        return await context.threads.with_enough_memory(make)
    except (CacheFileError, FormatError):  # evicted or damaged meanwhile
        raise NotFound from None


def _entries(nars: DiskCache, key: str, compression: str, memory_bytes: int) -> Iterator[Entry]:
    """Yield the entries of a cached NAR. Raises CacheFileError if it was evicted, FormatError if it is malformed."""
    file = nars.find_file(key)
    if file is None:
        raise CacheFileError("the NAR was evicted")
    with closing(MadeFile(file)) as nar_file:
        unpack = decompressor(compression, memory_bytes)
        content = (piece for data in nar_file.chunks() for piece in unpack.feed(data))
        yield from (part for part in nar_parser.parse(content) if isinstance(part, Entry))
