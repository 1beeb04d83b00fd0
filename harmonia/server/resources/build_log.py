"""`/log/<drv>`: the build log of a derivation, for people and for `nix log`.

By the derivation's name, with or without `.drv`, by one of its outputs, or by the hash part of either. Of a derivation
that was collected, the store knows no hash part any longer, but the log's own name begins with it.
"""

from urllib.parse import unquote_to_bytes

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.server.context import ServerContext
from harmonia.server.http.response import IMMUTABLE, Representation
from harmonia.server.http.response_cache import AbsentError
from harmonia.store import build_log


async def get(context: ServerContext, request: Request, name: str) -> Representation:
    try:
        derivation = await _derivation(context, decoded(request, name))
    except FormatError:
        raise NotFound from None
    log = await context.threads.run_io(lambda: build_log.find_log(context.settings.logs, derivation))
    if log is None or not await context.paths.is_log_published(derivation):
        raise AbsentError

    return Representation(
        content_type="text/plain; charset=utf-8",
        body=log,
        cache_control=IMMUTABLE if log.finished else "no-cache",
        etag=f'"{log.version}"',
        zstd=context.streamed(log),
        headers={"x-content-type-options": "nosniff"},  # it is anybody's text, and no web page
    )


def decoded(request: Request, name: str) -> str:
    """The name asked for. It may hold a `?`, after which Nix sends its rest as a query."""
    _, mark, query = request.raw_url.partition(b"?")
    return unquote_to_bytes(name.encode() + mark + query).decode("ascii", "replace")


async def _derivation(context: ServerContext, name: str) -> StorePath:
    """The derivation that is meant. FormatError where `name` can mean none, AbsentError if nothing has its hash."""
    if is_hash_part(name):
        known = await context.paths.lookup_usable_path(name)
        if known is None:
            collected = await context.threads.run_io(lambda: build_log.derivation(context.settings.logs, name))
            if collected is None:
                raise AbsentError
            return collected
        path = known.info.path
    else:
        path = StorePath(name)
    if path.is_derivation:
        return path
    known = await context.paths.lookup_usable_path(path.hash_part)
    output = known.info if known and known.info.path == path else None
    return (output and output.deriver) or StorePath(f"{path}.drv")
