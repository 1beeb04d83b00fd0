"""`/health`: 200 only if the store can be read now. `/version`: the version of the server.

`/health?verbose` also shows the state of the mirror's bucket and of each upstream in the worker that answers. If one of
them fails, this server is still healthy. On a server with tokens, the state is not shown, because `/health` itself
needs no token.
"""

from collections.abc import Iterator

from sanic import Request

from harmonia import __version__
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation

_TEXT = "text/plain; charset=utf-8"


async def get(context: ServerContext, request: Request) -> Representation:
    await context.threads.run_db(context.store.check)
    verbose = "verbose" in request.get_args(keep_blank_values=True)
    private = context.settings.tokens_path is not None  # but /health needs no token
    lines = ["OK", *(_states(context) if verbose and not private else ()), ""]
    return Representation(content_type=_TEXT, body="\n".join(lines).encode(), cache_control="no-store")


def _states(context: ServerContext) -> Iterator[str]:
    for name, is_up in context.upstreams.states() if context.upstreams else ():
        yield f"{name}: {'up' if is_up else 'down'}"
    if context.served_paths is not None:
        rows = context.metrics.rows
        queued, failing = sum(row.mirror_queued for row in rows), sum(row.mirror_failing for row in rows)
        up = "up" if any(row.mirror_up for row in rows) else "down"
        yield f"mirror writes: {up}, {queued:.0f} paths queued, {failing:.0f} of them failing"


async def get_version(_: ServerContext, __: Request) -> Representation:
    return Representation(content_type=_TEXT, body=f"harmonia {__version__}\n".encode(), cache_control="no-cache")
