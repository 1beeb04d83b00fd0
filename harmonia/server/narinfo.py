"""`/<hash>.narinfo`: what is known of a store path, signed, and where its NAR is."""

import hashlib

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.nix import base32, narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.server.body import Representation
from harmonia.server.cache import Cache


def nar_url(info: PathInfo) -> str:
    """Where the plain NAR is, below the cache's URL."""
    return f"nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar"


async def nar_file(cache: Cache, info: PathInfo) -> narinfo.NarFile:
    """Where a path's NAR is, below the cache's URL. Clients remember it for 30 days: it has to stay true that long."""
    url = nar_url(info)
    if not cache.offers_zstd:
        return narinfo.NarFile(url, "none", info.nar_hash, info.nar_size)
    file = cache.compressor.known(info.nar_hash)
    if file is None and not cache.compressor.is_unknown(info.nar_hash):
        file = await cache.read(lambda: cache.compressor.find(info.nar_hash))
    return narinfo.NarFile(url + ".zst", "zstd", file and file.sha256, file and file.size)


async def get(cache: Cache, _: Request, hash_part: str) -> Representation:
    path = await cache.path(hash_part)
    if path is None:
        raise NotFound
    text = narinfo.render(path.info, cache.store.store_dir, await nar_file(cache, path.info), path.sigs).encode()
    return Representation(
        content_type=narinfo.CONTENT_TYPE,
        body=text,
        cache_control=f"public, max-age={cache.settings.narinfo_max_age}",
        etag=f'"{hashlib.blake2b(text, digest_size=15).hexdigest()}"',
    )
