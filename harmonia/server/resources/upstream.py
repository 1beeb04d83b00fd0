"""What is not in the store, from other caches. And `/upstream/…`, where their NARs are to be had."""

from collections.abc import Awaitable, Callable
from functools import wraps

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server.context import Cache
from harmonia.server.http.response import Representation

Handler = Callable[..., Awaitable[Representation]]


def or_upstream(local: Handler) -> Handler:
    """The same resource, for which the upstreams are asked where the store has none."""
    name = f"{local.__module__.rpartition('.')[2]}_{local.__name__}"

    @wraps(local)
    async def get(cache: Cache, request: Request, **parameters: str) -> Representation:
        try:
            return await local(cache, request, **parameters)
        except NotFound:
            if cache.upstreams is None:
                raise
        remote: Handler = getattr(cache.upstreams, name)
        return await remote(request, **parameters)

    return get


async def get(cache: Cache, request: Request, name: str) -> Representation:
    if cache.upstreams is None:
        raise NotFound
    return await cache.upstreams.nars.get(request, name)


async def start(cache: Cache) -> None:
    if cache.settings.upstream:
        from harmonia.server.resources.upstream_answers import Answers  # noqa: PLC0415 (half a second, for those who need it)

        cache.upstreams = Answers(cache)


async def stop(cache: Cache) -> None:
    if cache.upstreams is not None:
        await cache.upstreams.close()
