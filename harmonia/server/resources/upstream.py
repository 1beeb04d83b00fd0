"""`/upstream/…`: NARs of upstreams. Also the fallback to upstreams for resources that the local store does not have."""

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation


async def get(context: ServerContext, request: Request, name: str) -> Representation:
    if context.upstreams is None:
        raise NotFound
    return await context.upstreams.get_nar(request, name)


async def start(context: ServerContext) -> None:
    if context.settings.upstream:
        from harmonia.server.resources.upstream_fallback import Answers  # noqa: PLC0415 (the import takes 0.5 s)

        context.upstreams = Answers(context)


async def stop(context: ServerContext) -> None:
    if context.upstreams is not None:
        await context.upstreams.close()
