"""`/<hash>.ls`: what is in a store path's NAR and where, for nix-index, and for reading a single file by its range.

nix-index wants the last byte of it after a second, and else asks anew some seconds later. So a listing is made to its
end even when who asked has gone, and then kept: a short one in memory, a long one in a file, as it is and compressed.
"""

import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from sanic import Request

from harmonia.cache import zstd
from harmonia.nix import base32, listing, nar
from harmonia.nix.path_info import PathInfo
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import hold_to_rate
from harmonia.server.http.response import IMMUTABLE, Body, Encoded, Representation, wants_part
from harmonia.server.made_once import MadeFile
from harmonia.server.resources.nar import found, open_nar, whole_layout
from harmonia.store import file_reader

Render = Callable[[], Iterator[bytes]]
"""Makes the pieces of a listing, anew at each call. For any thread."""

_SHORT_MAX_ENTRIES = 2000  # entries: a listing of no more is kept in memory, and has no rate


async def get(context: ServerContext, request: Request, hash_part: str) -> Representation:
    info = found(await context.paths.lookup_path(hash_part))
    archive = open_nar(context, request, info)
    layout = await whole_layout(archive)

    def render() -> Iterator[bytes]:
        return listing.render(layout.located())

    is_short = layout.entries <= _SHORT_MAX_ENTRIES
    return representation(info, *await (_short if is_short else long)(context, request, archive.key, render))


def representation(info: PathInfo, body: Body, encoded: Encoded | None) -> Representation:
    etag = f'"{base32.encode(info.nar_hash)}-ls"'
    return Representation(content_type="application/json", body=body, cache_control=IMMUTABLE, etag=etag, zstd=encoded)


async def _short(context: ServerContext, request: Request, key: str, render: Render) -> tuple[Body, Encoded | None]:
    text = await context.made.value(("listing", key), context.client(request), lambda: b"".join(render()), len)
    body = page.Text(text)
    return body, context.encoded(body)


async def long(context: ServerContext, request: Request, key: str, render: Render) -> tuple[Body, Encoded | None]:
    """Return the listing from a file, which is made once for each `key`; streamed if there can be no file."""
    hold_to_rate(context, request)
    plain = await context.made.file(f"{key}.ls", context.client(request), render)
    if plain is None:
        streamed = _Streamed(render)
        if wants_part(request) or request.version == "1.0":
            streamed = await context.threads.run_io(streamed.measured)
        return streamed, context.streamed(streamed)
    return plain, _encoded(context, key, plain) if context.settings.enable_compression else None


def _encoded(context: ServerContext, key: str, plain: MadeFile) -> Encoded:
    async def open_encoded(request: Request) -> Body:
        made = await context.made.file(
            f"{key}.ls.{zstd.STREAM}", context.client(request), lambda: filter(None, zstd.stream(plain.chunks()))
        )
        return _Compressed(plain) if made is None else made

    return Encoded(zstd.STREAM, open_encoded)


@dataclass(frozen=True, slots=True)
class _Compressed:
    """A kept listing that is compressed while it is sent, because no file can be."""

    plain: MadeFile
    size: None = None

    def read(self, start: int, stop: int | None) -> Generator[bytes | None]:  # noqa: ARG002 (never a part)
        return zstd.stream(self.plain.chunks())


@dataclass(frozen=True, slots=True)
class _Streamed:
    """A listing that is made while it is sent, because no file can be."""

    render: Render
    size: int | None = None

    def measured(self) -> "_Streamed":
        """The same, with its size known."""
        return _Streamed(self.render, sum(map(len, self.read(0, None))))

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        return file_reader.read(nar.window(self.render(), start, sys.maxsize if stop is None else stop))
