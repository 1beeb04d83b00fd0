"""`/<hash>.ls`: what is in a store path's NAR and where, for nix-index, and for reading a single file by its range.

nix-index wants the last byte of it after a second, and else asks anew some seconds later. So the layout is found to its
end even when who asked has gone, and then remembered.
"""

import sys
from collections.abc import Generator
from dataclasses import dataclass

from sanic import Request

from harmonia.nix import base32, listing, nar
from harmonia.nix.nar_index import Layout
from harmonia.server.context import Cache
from harmonia.server.http.response import IMMUTABLE, Representation
from harmonia.server.resources.nar import Nar, found

_SHORT = 2000  # entries; a listing of no more is rendered twice, to tell its length before


@dataclass(frozen=True, slots=True)
class Listing:
    layout: Layout
    size: int | None = None

    def measured(self) -> "Listing":
        """The same, with its size known."""
        return Listing(self.layout, sum(map(len, self.read(0, None))))

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        pieces = listing.render(self.layout.located())
        return nar.read(nar.window(pieces, start, sys.maxsize if stop is None else stop))


async def get(cache: Cache, request: Request, hash_part: str) -> Representation:
    info = found(await cache.paths.find(hash_part))
    archive = Nar.of(cache, info)
    body = Listing(await cache.threads.read_once(archive.key, archive.layout))
    if len(body.layout) <= _SHORT or "range" in request.headers or request.version == "1.0":
        body = await cache.threads.read(body.measured)
    etag = f'"{base32.encode(info.nar_hash)}-ls"'
    return Representation(
        content_type="application/json", body=body, cache_control=IMMUTABLE, etag=etag, zstd=cache.streamed(body)
    )
