"""`/health`: 200 only if the store can be read now. `/version`: the version of the server.

`/health?verbose` also shows the state of the mirror's bucket and of each upstream in the worker that answers. If one of
them fails, this server is still healthy. On a server with tokens, the state is not shown, because `/health` itself
needs no token.
"""

from sanic import Request

from harmonia import __version__
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation

_TEXT = "text/plain; charset=utf-8"


async def get(context: ServerContext, request: Request) -> Representation:
    await context.threads.run_db(context.store.check)
    verbose = "verbose" in request.get_args(keep_blank_values=True)
    private = context.settings.tokens_path is not None  # but /health needs no token
    more = context.upstreams.state() if verbose and context.upstreams and not private else ""
    return Representation(content_type=_TEXT, body=f"OK\n{more}".encode(), cache_control="no-store")


async def get_version(_: ServerContext, __: Request) -> Representation:
    return Representation(content_type=_TEXT, body=f"harmonia {__version__}\n".encode(), cache_control="no-cache")
