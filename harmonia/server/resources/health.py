"""`/health`: 200 only where paths can really be served just now. `/version`: what serves them.

`/health?verbose` also tells which upstreams the worker that answers uses. None of them makes this server unhealthy.
Where tokens are asked for, it does not: load balancers have none.
"""

from sanic import Request

from harmonia import __version__
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation

_TEXT = "text/plain; charset=utf-8"


async def get(context: ServerContext, request: Request) -> Representation:
    await context.threads.run_db(context.store.check)
    verbose = "verbose" in request.get_args(keep_blank_values=True)
    private = context.settings.tokens_path is not None  # it asks for none itself
    more = context.upstreams.state() if verbose and context.upstreams and not private else ""
    return Representation(content_type=_TEXT, body=f"OK\n{more}".encode(), cache_control="no-store")


async def get_version(_: ServerContext, __: Request) -> Representation:
    return Representation(content_type=_TEXT, body=f"harmonia {__version__}\n".encode(), cache_control="no-cache")
