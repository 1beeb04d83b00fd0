"""`/<hash>.ls`: what is in a store path's NAR and where, for nix-index, and for reading a single file by its range."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Self

from sanic import Request

from harmonia.nix import base32, listing, nar
from harmonia.server.body import IMMUTABLE, Representation
from harmonia.server.cache import Cache
from harmonia.server.nar import Nar, found

_KEPT = 16 * 1024 * 1024  # bytes; a listing up to this size is rendered only once


@dataclass(frozen=True, slots=True)
class Listing:
    """A NAR's listing. Its length is known once it was rendered; a large one is rendered again when it is read."""

    nar: Nar
    size: int
    text: bytes | None
    sha256: None = None

    @classmethod
    def of(cls, nar: Nar) -> Self:
        """StoreObjectError where the NAR is not as it was registered."""
        pieces: list[bytes] = []
        size = 0
        for piece in listing.render(nar.frames()):
            size += len(piece)
            if size <= _KEPT:
                pieces.append(piece)
        return cls(nar, size, b"".join(pieces) if size <= _KEPT else None)

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        pieces = listing.render(self.nar.frames()) if self.text is None else [self.text]
        return nar.read(nar.window(pieces, start, self.size if stop is None else stop))


async def get(cache: Cache, _: Request, hash_part: str) -> Representation:
    info = found(await cache.path(hash_part))
    body = await cache.read(lambda: Listing.of(Nar.of(cache, info)))
    etag = f'"{base32.encode(info.nar_hash)}-ls"'
    return Representation(
        content_type="application/json", body=body, cache_control=IMMUTABLE, etag=etag, zstd=cache.encoded(body)
    )
