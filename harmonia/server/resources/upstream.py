"""`/upstream/…`: NARs of upstreams. Also the fallback to upstreams for resources that the local store does not have."""

from collections.abc import Callable

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server.context import Fallback, ServerContext
from harmonia.server.http.response import Handler, Representation
from harmonia.server.http.response_cache import AbsentError


def with_fallback(local: Handler, select: Callable[[Fallback], Handler]) -> Handler:
    """Return a handler that asks the upstreams if the local store does not have the resource."""

    async def get(context: ServerContext, request: Request, **parameters: str) -> Representation:
        try:
            return await local(context, request, **parameters)
        except AbsentError:
            if context.upstreams is None:
                raise
        return await select(context.upstreams)(request, **parameters)

    return get


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
