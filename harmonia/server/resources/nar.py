"""`/nar/…`: the NAR of a store path, as it is now on disk.

We hand out `/nar/<hash>-<narhash>.nar`, as nix-serve does. `/nar/<narhash>.nar?hash=<hash>` is what upstream Harmonia
hands out, and `/nar/<hash>.nar` what nix-serve once did: clients remember those for 30 days.
"""

import os
import re
from collections.abc import Generator, Hashable, Iterator
from dataclasses import dataclass
from typing import Self

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.cache.nar_compressor import CompressedNar
from harmonia.errors import StoreObjectError
from harmonia.nix import base32, nar
from harmonia.nix.nar import Frame, OpenSlice
from harmonia.nix.nar_index import Layout, Layouts
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import is_hash_part
from harmonia.server.context import Cache
from harmonia.server.http.response import IMMUTABLE, Body, Encoded, Open, Representation, Unread, whole_if_need_be
from harmonia.server.http.response_cache import AbsentError
from harmonia.server.path_lookup import SignedPath
from harmonia.store.temp_roots import Hold

_HASH_PART = f"(?P<hash_part>[{base32.ALPHABET}]{{32}})"
_NAR_HASH = f"(?P<nar_hash>[{base32.ALPHABET}]{{52}})"
_NAMES = [
    re.compile(rf"{name}\.nar(?P<compression>\.zst)?") for name in (f"{_HASH_PART}-{_NAR_HASH}", _NAR_HASH, _HASH_PART)
]

_CONTENT_TYPE = "application/x-nix-nar"


@dataclass(frozen=True, slots=True)
class Nar:
    """The NAR of a valid path, which is as long as was registered if the store object is still what it was then."""

    info: PathInfo
    root: bytes
    layouts: Layouts
    hold: Hold | None = None
    """What keeps the path from being collected as long as this is read, or may be."""

    @classmethod
    def of(cls, cache: Cache, info: PathInfo) -> Self:
        return cls(info, cache.store.real_path(info.path), cache.layouts, cache.hold(info))

    def __str__(self) -> str:
        return os.fsdecode(self.root)

    @property
    def size(self) -> int:
        return self.info.nar_size

    @property
    def sha256(self) -> bytes:
        return self.info.nar_hash

    @property
    def key(self) -> Hashable:
        """What its layout is remembered by. The same path may come to be registered with other contents."""
        return self.info.path, self.info.nar_hash

    def layout(self) -> Layout:
        """What lies where in it. StoreObjectError where that does not make up the length registered."""
        layout = self.layouts.find(self.key, self.root)
        try:
            self._check(layout.size)
        except StoreObjectError:
            self.layouts.forget(self.key)
            raise
        return layout

    def _frames(self) -> Iterator[Frame]:
        """The frames of the whole, remembered for the part that may be wanted next.

        StoreObjectError at their end where they do not make up the length registered.
        """
        if remembered := self.layouts.get(self.key):
            self._check(remembered.size)
            yield from nar.frame(remembered.entries())
            return
        layout = Layout(self.root)
        yield from layout.record(nar.frame(nar.walk(self.root)))
        self._check(layout.size)
        self.layouts.add(self.key, layout)

    def read(self, start: int, stop: int | None) -> Generator[bytes | OpenSlice]:
        stop = self.size if stop is None else stop
        try:
            if (start, stop) == (0, self.size):
                yield from nar.chunks(nar.segments(self._frames()))
            else:
                yield from nar.chunks(self.layout().window(start, stop))
        except (OSError, StoreObjectError):
            self.layouts.forget(self.key)
            raise

    def _check(self, size: int) -> None:
        if size != self.size:
            raise StoreObjectError(f"{self} has a NAR of {size} bytes, but {self.size} were registered")


def found(path: SignedPath | None) -> PathInfo:
    """Return the info of a path that was looked up. Raises AbsentError if there is no such path."""
    if path is None:
        raise AbsentError
    return path.info


async def get(cache: Cache, request: Request, name: str) -> Representation:
    match = next(filter(None, (pattern.fullmatch(name) for pattern in _NAMES)), None)
    named = match.groupdict() if match else {}
    hash_part = named.get("hash_part", request.args.get("hash", ""))
    if not (match and is_hash_part(hash_part)):
        raise NotFound
    info = found(await cache.paths.find(hash_part))
    nar_hash = base32.encode(info.nar_hash)
    if named.get("nar_hash", nar_hash) != nar_hash:
        raise NotFound
    body = Nar.of(cache, info)
    if "range" in request.headers and request.method == "GET" and not named["compression"]:
        await cache.threads.read_once(
            body.key, body.layout
        )  # however many parts are asked for, one thread looks for it
    compressor = cache.compressor
    compressed = _compressed(cache, body)
    if named["compression"]:
        etag = f'"{nar_hash}-{compressor.frames.encoding.name}"'
        return Representation(content_type=_CONTENT_TYPE, body=compressed, cache_control=IMMUTABLE, etag=etag)
    return Representation(
        content_type=_CONTENT_TYPE,
        body=body,
        cache_control=IMMUTABLE,
        etag=f'"{nar_hash}"',
        zstd=Encoded(compressor.frames.encoding.name, compressed) if cache.settings.enable_compression else None,
        worthwhile=not compressor.frames.saturated or compressor.known(info.nar_hash) is not None,
    )


def _compressed(cache: Cache, nar: Nar) -> Open:
    """The compressed NAR, whole where the request cannot do without its length."""

    async def open_compressed(request: Request) -> Body:
        if request.method == "HEAD":
            known = await cache.threads.read(lambda: cache.compressor.find(nar.sha256))
            return Unread(known.size if known else None)
        body = await cache.threads.read(lambda: CompressedNar(cache.compressor, nar))
        return await whole_if_need_be(body, request, cache.threads.readers)

    return open_compressed
