"""`/nar/…`: the NAR of a store path, as it is now on disk.

We hand out `/nar/<hash>-<narhash>.nar`, as nix-serve does. `/nar/<narhash>.nar?hash=<hash>` is what upstream Harmonia
hands out, and `/nar/<hash>.nar` what nix-serve once did: clients remember those for 30 days.
"""

import re
from collections.abc import Generator
from dataclasses import dataclass

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.nix import base32, nar
from harmonia.nix.store_path import is_hash_part
from harmonia.server.body import IMMUTABLE, Representation
from harmonia.server.cache import Cache

_HASH_PART = f"(?P<hash_part>[{base32.ALPHABET}]{{32}})"
_NAR_HASH = f"(?P<nar_hash>[{base32.ALPHABET}]{{52}})"
_NAMES = [re.compile(rf"{name}\.nar") for name in (f"{_HASH_PART}-{_NAR_HASH}", _NAR_HASH, _HASH_PART)]


@dataclass(frozen=True, slots=True)
class Nar:
    """The NAR of the store object at `path`, which is `size` bytes long if the object is still what was registered."""

    path: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self) -> Generator[bytes]:
        return nar.read(nar.dump(self.path))


def _asked(request: Request, name: str) -> tuple[str, str | None] | None:
    """The hash part, and the NAR hash where one is named, of any of the three URL shapes."""
    for pattern in _NAMES:
        if match := pattern.fullmatch(name):
            asked = match.groupdict()
            hash_part = asked.get("hash_part", request.args.get("hash", ""))
            return (hash_part, asked.get("nar_hash")) if is_hash_part(hash_part) else None
    return None


async def get(cache: Cache, request: Request, name: str) -> Representation:
    asked = _asked(request, name)
    path = await cache.path(asked[0]) if asked else None
    if asked is None or path is None:
        raise NotFound
    nar_hash = base32.encode(path.info.nar_hash)
    if asked[1] not in (None, nar_hash):
        raise NotFound
    return Representation(
        content_type="application/x-nix-nar",
        body=Nar(cache.store.real_path(path.info.path), path.info.nar_size),
        cache_control=IMMUTABLE,
        etag=f'"{nar_hash}"',
    )
