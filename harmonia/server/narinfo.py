"""`/<hash>.narinfo`: what is known of a store path, signed, and where its NAR is."""

import hashlib

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.compression import CompressedFile
from harmonia.nix import base32, narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.server.body import Representation
from harmonia.server.cache import Cache


def nar_url(info: PathInfo) -> str:
    """Where the plain NAR is, below the cache's URL."""
    return f"nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar"


async def get(cache: Cache, _: Request, hash_part: str) -> Representation:
    path = await cache.path(hash_part)
    if path is None:
        raise NotFound
    info, compressor = path.info, cache.compressor
    if cache.offers_zstd and not compressor.is_certain(info.nar_hash):
        await cache.read(lambda: compressor.find(info.nar_hash))
    compressed = compressor.known(info.nar_hash)
    text = narinfo.render(info, cache.store.store_dir, _nar_file(cache, info, compressed), path.sigs).encode()

    def lasts() -> bool:
        is_certain = not cache.offers_zstd or compressor.is_certain(info.nar_hash)
        return is_certain and compressor.known(info.nar_hash) == compressed and cache.is_current(path)

    return Representation(
        content_type=narinfo.CONTENT_TYPE,
        body=text,
        cache_control=f"public, max-age={cache.settings.narinfo_max_age}",
        etag=f'"{hashlib.blake2b(text, digest_size=15).hexdigest()}"',
        lasts=lasts,
    )


def _nar_file(cache: Cache, info: PathInfo, compressed: CompressedFile | None) -> narinfo.NarFile:
    """Where a path's NAR is, below the cache's URL. Clients remember it for 30 days: it has to stay true that long."""
    url = nar_url(info)
    if not cache.offers_zstd:
        return narinfo.NarFile(url, "none", info.nar_hash, info.nar_size)
    return narinfo.NarFile(url + ".zst", "zstd", compressed and compressed.sha256, compressed and compressed.size)
