"""`/upstream/…`: NARs of other caches. And the fallback to other caches for what the local store does not have."""

from collections.abc import Callable

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server.context import Cache, Fallback
from harmonia.server.http.response import Handler, Representation
from harmonia.server.http.response_cache import AbsentError


def with_fallback(local: Handler, select: Callable[[Fallback], Handler]) -> Handler:
    """Return a handler that asks the upstreams if the local store does not have the resource."""

    async def get(cache: Cache, request: Request, **parameters: str) -> Representation:
        try:
            return await local(cache, request, **parameters)
        except AbsentError:
            if cache.upstreams is None:
                raise
        return await select(cache.upstreams)(request, **parameters)

    return get


async def get(cache: Cache, request: Request, name: str) -> Representation:
    if cache.upstreams is None:
        raise NotFound
    return await cache.upstreams.get_nar(request, name)


async def start(cache: Cache) -> None:
    if cache.settings.upstream:
        from harmonia.server.resources.upstream_answers import Answers  # noqa: PLC0415 (half a second to load)

        cache.upstreams = Answers(cache)


async def stop(cache: Cache) -> None:
    if cache.upstreams is not None:
        await cache.upstreams.close()
