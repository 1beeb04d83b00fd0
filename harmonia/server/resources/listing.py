"""`/<hash>.ls`: NAR listing with the files and their offsets, for nix-index and for clients that read single files.

nix-index gives up after a second, and retries some seconds later. Therefore a listing is completed even if the client
disconnects, and then cached: a short one in memory, a long one in two files, plain and compressed.
"""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from sanic import Request

from harmonia.cache import zstd
from harmonia.metrics.outcome import Outcome
from harmonia.nix import base32, listing, nar
from harmonia.nix.path_info import PathInfo
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import outcome
from harmonia.server.http.auth import check_rate
from harmonia.server.http.response import IMMUTABLE, Body, Deferred, Encoded, Representation, wants_part
from harmonia.server.made_once import MadeFile
from harmonia.server.resources.nar import open_nar, require_info, whole_layout
from harmonia.store import file_reader
from harmonia.store.file_reader import ReadOnly

Render = Callable[[], Iterator[bytes]]
"""Returns the pieces of a listing, generated again at each call. May run in any thread."""

_SHORT_MAX_ENTRIES = 2000  # up to which a listing is cached in memory, and `max_query_rate` does not apply


async def get(context: ServerContext, request: Request, hash_part: str) -> Representation:
    info = require_info(await context.paths.lookup_path(hash_part))
    with closing(open_nar(context, request, info)) as archive, closing(await whole_layout(archive)) as whole:
        is_short = whole.entries <= _SHORT_MAX_ENTRIES

    def render() -> Iterator[bytes]:
        with closing(archive.layout()) as layout:
            if (waiting := layout.wait_whole()) is not None:  # it was evicted meanwhile
                waiting.result()
            yield from listing.render(layout.located())

    return representation(info, *await (_short if is_short else long)(context, request, archive.key, render))


def representation(info: PathInfo, body: Body, encoded: Encoded | None) -> Representation:
    etag = f'"{base32.encode(info.nar_hash)}-ls"'
    return Representation(content_type="application/json", body=body, cache_control=IMMUTABLE, etag=etag, zstd=encoded)


async def _short(context: ServerContext, request: Request, key: str, render: Render) -> tuple[Body, Encoded | None]:
    if ("listing", key) in context.made:
        outcome.decide(request, Outcome.MEMORY, "the listing was made before")
    else:
        outcome.decide(request, Outcome.STORE, "the listing is made of the files")
    text = await context.made.value(("listing", key), context.client(request), lambda: b"".join(render()), len)
    body = page.Text(text)
    return body, context.encoded(body)


async def long(context: ServerContext, request: Request, key: str, render: Render) -> tuple[Body, Encoded | None]:
    """Return the listing from a file, which is written once for each `key`, or streamed if the disk is not writable.

    Raises 429 if the client exceeds `max_query_rate`.
    """
    check_rate(context, request)
    plain = await context.made.file(f"{key}.ls", context.client(request), render)
    if plain is None:
        streamed = _Streamed(render)
        if wants_part(request) or request.version == "1.0":
            streamed = await context.threads.run_io(streamed.measured)
        outcome.decide(request, Outcome.STORE, "the listing cannot be kept in a file now")
        return streamed, context.streamed(streamed)
    if plain.is_new:
        outcome.decide(request, Outcome.STORE, "the listing was made of the files, and kept in a file")
    else:
        outcome.decide(request, Outcome.DISK, "the listing was in a file")
    return plain, _encoded(context, key, plain) if context.settings.enable_compression else None


def _encoded(context: ServerContext, key: str, plain: MadeFile) -> Encoded:
    def compress() -> Iterator[bytes]:
        with closing(context.made.open_file(f"{key}.ls")) as own:  # `plain` may be closed: its client may disconnect
            yield from filter(None, zstd.stream(own.chunks()))

    async def open_encoded(request: Request) -> Body:
        made = await context.made.file(f"{key}.ls.{zstd.STREAM}", context.client(request), compress)
        return _Compressed(plain) if made is None else made

    return Encoded(zstd.STREAM, Deferred(open_encoded))


@dataclass(frozen=True, slots=True)
class _Compressed(ReadOnly):
    """A cached listing that is compressed while it is sent, because no compressed file can be written."""

    plain: MadeFile
    size: None = None

    def read(self, start: int, stop: int | None) -> Generator[bytes]:  # noqa: ARG002 (never a part)
        return zstd.stream(self.plain.chunks())


@dataclass(frozen=True, slots=True)
class _Streamed(ReadOnly):
    """A listing that is generated while it is sent, because no file can be written."""

    render: Render
    size: int | None = None

    def measured(self) -> "_Streamed":
        """Return the same listing with its size. Blocks: generates the whole listing."""
        return _Streamed(self.render, sum(map(len, self.read(0, None))))

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        return file_reader.read(nar.window(self.render(), start, sys.maxsize if stop is None else stop))
