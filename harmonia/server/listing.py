"""`/<hash>.ls`: what is in a store path's NAR and where, for nix-index, and for reading a single file by its range."""

import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Self

from sanic import Request

from harmonia.nix import base32, listing, nar
from harmonia.server.body import IMMUTABLE, Representation
from harmonia.server.cache import Cache
from harmonia.server.nar import Nar, found

_AT_ONCE = 256 * 1024  # bytes; of what is longer, so much is rendered before its first byte is sent
_KEPT = 16 * 1024 * 1024  # bytes of a listing whose length is asked for, and which is rendered again if it is longer


@dataclass(frozen=True, slots=True)
class Listing:
    """A NAR's listing, to be read once."""

    size: int | None
    """Not known of one that is still being rendered."""
    pieces: Iterable[bytes]

    @classmethod
    def begun(cls, nar: Nar) -> Self:
        """With its beginning rendered. StoreObjectError where that is all, and the NAR not as it was registered."""
        pieces = listing.render(nar.frames())
        text = bytearray()
        for piece in pieces:
            text += piece
            if len(text) >= _AT_ONCE:
                return cls(None, chain([bytes(text)], pieces))
        return cls(len(text), [bytes(text)])

    @classmethod
    def measured(cls, nar: Nar) -> Self:
        """With its size known at any rate."""
        text = bytearray()
        size = 0
        for piece in listing.render(nar.frames()):
            size += len(piece)
            if size <= _KEPT:
                text += piece
        return cls(size, [bytes(text)] if size <= _KEPT else listing.render(nar.frames()))

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        whole = (start, stop) == (0, self.size)
        return nar.read(self.pieces if whole else nar.window(self.pieces, start, sys.maxsize if stop is None else stop))


async def get(cache: Cache, request: Request, hash_part: str) -> Representation:
    info = found(await cache.path(hash_part))
    measured = "range" in request.headers or request.version == "1.0"
    render = Listing.measured if measured else Listing.begun
    body = await cache.read(lambda: render(Nar.of(cache, info)))
    etag = f'"{base32.encode(info.nar_hash)}-ls"'
    return Representation(
        content_type="application/json", body=body, cache_control=IMMUTABLE, etag=etag, zstd=cache.streamed(body)
    )
