"""`/<hash>.closure`: the narinfos of a path and of all paths that it refers to, directly or indirectly.

References come first, so the path itself is last. A path that the publish policy forbids is left out, and so is what
only this path refers to. With `?have=`, the closures of the paths with these hash parts are left out too: in a store, a
valid path has its whole closure, so a few hash parts name all that a client has. They have no effect if their closures
make more than MAX_BULK_PATHS paths, together with that of the path.
"""

import asyncio
import hashlib
import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain

import zstandard
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.cache import zstd
from harmonia.config.settings import MAX_BULK_PATHS
from harmonia.errors import RequestRefusedError
from harmonia.nix import narinfo
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.server.context import ServerContext
from harmonia.server.http.auth import check_bulk_rate
from harmonia.server.http.response import Deferred, Encoded, Representation
from harmonia.server.http.response_cache import AbsentError
from harmonia.server.path_lookup import SignedPath
from harmonia.server.resources.bulk_narinfo import BATCH_PATHS, render
from harmonia.store import queries
from harmonia.store.file_reader import ReadOnly

_MAX_HAVE = 64  # hash parts in `?have=`, which fit into every limit of a URL's length
_PIECE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Text(ReadOnly):
    """The text of a closure, which is in memory only in its compressed form."""

    packed: bytes
    size: int

    def read(self, start: int, stop: int | None) -> Generator[bytes]:
        stop = self.size if stop is None else stop
        position = 0
        with closing(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(self.packed))) as reader:
            while position < stop and (data := reader.read(_PIECE_BYTES)):
                if part := data[max(start - position, 0) : stop - position]:
                    yield part
                position += len(data)


async def get(context: ServerContext, request: Request, hash_part: str) -> Representation:
    """Return the closure of a published path. Raises NotFound if it has more than MAX_BULK_PATHS paths."""
    have = _have(request)
    check_bulk_rate(context, request, 1)
    root, *had = [await context.paths.lookup_path(each) for each in (hash_part, *have)]
    if root is None:
        raise AbsentError
    hash_parts = await _hash_parts(context, [root, *had])
    check_bulk_rate(context, request, min(len(hash_parts), MAX_BULK_PATHS) - 1)  # never more than the least rate
    if len(hash_parts) > MAX_BULK_PATHS and had:
        had = []
        hash_parts = await _hash_parts(context, [root])  # part of those that were counted
    if len(hash_parts) > MAX_BULK_PATHS:
        raise NotFound
    published: dict[str, SignedPath] = {}
    for number, each in enumerate(hash_parts):
        if path := await context.paths.lookup_usable_path(each):
            published[each] = path
        if number % BATCH_PATHS == 0:
            await asyncio.sleep(0)  # other requests take their turn
    paths = await context.threads.run_io(partial(references_first, root, had, published))
    return await _representation(context, paths)


async def _hash_parts(context: ServerContext, roots: Sequence[SignedPath | None]) -> frozenset[str]:
    """Return the hash parts of the closure of `roots`, or more than MAX_BULK_PATHS of them if it has more."""
    paths = [path.info.path for path in roots if path]
    return await context.threads.run_slow_db(lambda store: queries.closure_hash_parts(store, paths, MAX_BULK_PATHS + 1))


def references_first(
    root: SignedPath, had: Sequence[SignedPath | None], paths: Mapping[str, SignedPath]
) -> list[SignedPath]:
    """Return the closure of `root` without those of the paths in `had`, each path after its references.

    All within `paths`, which are named by hash part. Takes 0.2 s for 10,000 paths.
    """
    begun: set[str] = set()  # first those to leave out, then those of the closure, too
    waiting = [path.info.path.hash_part for path in had if path]
    while waiting:
        hash_part = waiting.pop()
        if hash_part in paths and hash_part not in begun:
            begun.add(hash_part)
            waiting += [each.hash_part for each in paths[hash_part].info.references]
    ordered: list[SignedPath] = []
    pending: list[tuple[SignedPath | None, Iterator[StorePath]]] = [(None, iter([root.info.path]))]
    while pending:
        path, references = pending[-1]
        for reference in references:
            hash_part = reference.hash_part
            if hash_part in paths and hash_part not in begun:
                begun.add(hash_part)
                pending.append((paths[hash_part], iter(paths[hash_part].info.references)))
                break
        else:
            pending.pop()
            if path is not None:
                ordered.append(path)
    return ordered


def _have(request: Request) -> Sequence[str]:
    """Return the hash parts in `?have=`. Raises RequestRefusedError if one is malformed, or if there are too many."""
    have = [
        each for each in chain.from_iterable(value.split(",") for value in request.args.getlist("have", [])) if each
    ]
    if len(have) > _MAX_HAVE or not all(map(is_hash_part, have)):
        raise RequestRefusedError(400, f"have is not a list of at most {_MAX_HAVE} hash parts, separated by commas")
    return have


async def _representation(context: ServerContext, paths: Sequence[SignedPath]) -> Representation:
    digest, packer = hashlib.blake2b(digest_size=15), zstd.Packer()
    for start in range(0, len(paths), BATCH_PATHS):
        text = "\n".join(await render(context, paths[start : start + BATCH_PATHS])).encode()
        text = b"\n" + text if start else text
        digest.update(text)
        packer.add(text)
        await asyncio.sleep(0)
    packed = packer.finish()

    async def open_plain(_: Request) -> _Text:
        return _Text(packed, packer.size)

    async def open_encoded(_: Request) -> bytes:
        return packed

    return Representation(
        content_type=narinfo.CONTENT_TYPE,
        body=Deferred(open_plain),
        cache_control=f"public, max-age={context.settings.narinfo_max_age}",
        etag=f'"{digest.hexdigest()}"',
        zstd=Encoded(zstd.STREAM, Deferred(open_encoded)) if context.settings.enable_compression else None,
    )
