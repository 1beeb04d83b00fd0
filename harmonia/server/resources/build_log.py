"""`/log/<drv>`: build log of a derivation, for people and for `nix log`.

The name is a derivation with or without `.drv`, one of its outputs, or the hash part of one of them. A derivation that
was garbage-collected is not in the database, but the file name of its log begins with its hash part.

A log that is not here is one of an upstream, or else of the server that `log_redirect` names.
"""

from contextlib import suppress
from http import HTTPStatus
from urllib.parse import quote, unquote_to_bytes

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.server.context import ServerContext
from harmonia.server.http.response import IMMUTABLE, Body, Deferred, Representation, generate_to_end
from harmonia.server.http.response_cache import AbsentError
from harmonia.store import build_log
from harmonia.store.build_log import BuildLog


async def get(context: ServerContext, request: Request, name: str) -> Representation:
    try:
        return await get_local(context, request, name)
    except AbsentError:
        if context.upstreams is None and context.settings.log_redirect is None:
            raise
    if context.upstreams is not None:
        with suppress(NotFound):
            return await context.upstreams.get_log(request, name)
    return await _redirect(context, decoded(request, name))


async def _redirect(context: ServerContext, name: str) -> Representation:
    """Return a redirect to the log of a derivation at `log_redirect`.

    Raises NotFound without that setting. A hash part alone is not redirected either: only a name in our log directory
    may belong to it, which the publish policy may hide.
    """
    if context.settings.log_redirect is None or is_hash_part(name):
        raise NotFound
    derivation = await _derivation(context, name)
    return Representation(
        content_type="text/plain; charset=utf-8",
        body=b"",
        cache_control="no-cache",  # the log may appear here
        status=HTTPStatus.TEMPORARY_REDIRECT,
        headers={"location": f"{context.settings.log_redirect.rstrip('/')}/{quote(derivation)}"},
    )


async def get_local(context: ServerContext, request: Request, name: str) -> Representation:
    """Return a log of this server. Raises AbsentError if it has none."""
    try:
        derivation = await _derivation(context, decoded(request, name))
    except FormatError:
        raise NotFound from None
    log = await context.threads.run_io(lambda: _find_log(context, derivation))
    if log is None or not await context.paths.is_log_published(derivation):
        raise AbsentError

    async def open_log(_: Request) -> Body:
        return log

    async def size(request: Request) -> int | None:
        if request.version == "1.0":  # GET sends the length, and HEAD must send the same one
            await generate_to_end(log, context.submitter(request))
        return log.size

    return Representation(
        content_type="text/plain; charset=utf-8",
        body=log if log.size is not None else Deferred(open_log, size),
        cache_control=IMMUTABLE if log.finished else "no-cache",
        etag=f'"{log.version}"',
        zstd=context.streamed(log),
        headers={"x-content-type-options": "nosniff"},  # the text is not trusted, and is not a web page
    )


def _find_log(context: ServerContext, derivation: StorePath) -> BuildLog | None:
    """Return the log of a build on this machine, or else a log that was pushed, or None."""
    log = build_log.find_log(context.settings.logs, derivation)
    return log or (build_log.find_log(context.push.logs.directory, derivation) if context.push else None)


def decoded(request: Request, name: str) -> str:
    """Return the requested name. Nix does not encode a `?` in it, so the rest of the name arrives as the query."""
    _, mark, query = request.raw_url.partition(b"?")
    return unquote_to_bytes(name.encode() + mark + query).decode("ascii", "replace")


async def _derivation(context: ServerContext, name: str) -> StorePath:
    """Return the derivation that `name` stands for.

    Raises FormatError if the name is malformed, AbsentError if no path and no log has the hash part.
    """
    if is_hash_part(name):
        signed = await context.paths.lookup_usable_path(name)
        if signed is None:
            collected = await context.threads.run_io(lambda: build_log.derivation(context.settings.logs, name))
            if collected is None:
                raise AbsentError
            return collected
        path = signed.info.path
    else:
        path = StorePath(name)
    if path.is_derivation:
        return path
    signed = await context.paths.lookup_usable_path(path.hash_part)
    output = signed.info if signed and signed.info.path == path else None
    return (output and output.deriver) or StorePath(f"{path}.drv")
