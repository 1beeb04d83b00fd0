"""Sanic applications, built from the table of routes."""

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any

from sanic import HTTPResponse, Request, Sanic
from sanic.config import Config

from harmonia.config.settings import Settings
from harmonia.metrics.outcome import Outcome
from harmonia.metrics.shared_counters import UNKNOWN, Metrics, RouteCounters
from harmonia.process import request_trace
from harmonia.server import error_response
from harmonia.server.context import Fallback, ServerContext
from harmonia.server.http import access_log, outcome, sanic_adapter
from harmonia.server.http.auth import Guard, limited
from harmonia.server.http.request_body import dropping
from harmonia.server.http.response import Handler, Representation, respond
from harmonia.server.http.response_cache import AbsentError, Content, Resources, ResponseCache
from harmonia.server.http.small_uploads import SmallUploads
from harmonia.server.resources import metrics, narinfo, push
from harmonia.server.routes import METRICS_ROUTES, PUSH_ROUTES, ROUTES, Route
from harmonia.upstream.refusals import Reason

_CONFIG: dict[str, Any] = {
    # Sanic's stall timer: Nix stops reading for minutes while it unpacks. Keepalive finds dead clients (sockets.py).
    "RESPONSE_TIMEOUT": 3600,
    "GRACEFUL_TCP_CLOSE_TIMEOUT": 3600,  # stall timer for the last bytes of a connection that closes
    "REQUEST_MAX_SIZE": 64 * 1024,  # of other routes than pushes, which read their bodies as streams
    "ACCESS_LOG": False,
    "MOTD": False,
}
_CLIENT_LEFT = 499
"""Status in log and metrics, as in nginx, if the client disconnected before the first byte of the response."""

_UPSTREAM_NAR = re.compile(rb"GET /upstream/([a-z0-9.-]{1,255})")


def create_metrics(settings: Settings) -> Metrics:
    """Create the shared counters of all workers. Call it before the fork."""
    names = [route.metric for route in routes(settings) + METRICS_ROUTES]
    upstreams = [*(upstream.url for upstream in settings.sources), *(["lan"] if settings.lan.public_keys else [])]
    totals = metrics.TOTALS + metrics.PUSH_TOTALS if settings.push.enable else metrics.TOTALS
    totals += metrics.WARM_TOTALS if settings.warm == "new" else ()
    totals += metrics.MIRROR_TOTALS if settings.mirror.write_served else ()
    return Metrics(names, totals, settings.processes, upstreams, list(Reason))


def routes(settings: Settings) -> tuple[Route, ...]:
    """Return the routes that the settings enable, without those for metrics."""
    return ROUTES + PUSH_ROUTES if settings.push.enable else ROUTES


def create_app(context: ServerContext, guard: Guard | None = None) -> "Sanic[Any, Any]":
    """Create the application of a worker. With a guard, requests need a token."""
    settings = context.settings
    if guard is not None:
        context.scopes = guard.scopes
    public = settings.metrics and settings.metrics_bind is None
    served = routes(settings)
    return _app("harmonia", context, served + METRICS_ROUTES if public else served, guard)


def create_metrics_app(context: ServerContext) -> "Sanic[Any, Any]":
    return _app("harmonia-metrics", context, METRICS_ROUTES, primary=False)


def _app(
    name: str, context: ServerContext, routes: Iterable[Route], guard: Guard | None = None, *, primary: bool = True
) -> "Sanic[Any, Any]":
    settings = context.settings
    config = _CONFIG | {
        "REQUEST_MAX_HEADER_SIZE": settings.max_header_size,
        "REQUEST_TIMEOUT": settings.header_timeout,
        "KEEP_ALIVE_TIMEOUT": settings.keep_alive_timeout,
    }
    app = Sanic(
        name,
        config=Config(config, env_prefix=None),
        configure_logging=False,
        request_class=sanic_adapter.AdaptedRequest,
    )
    app.ctx.identity = context.identity
    app.ctx.response_cache = ResponseCache(
        [
            narinfo.Narinfos(context).resources,
            Resources(_UPSTREAM_NAR, partial(_upstream_nar_now, context)),
            *push.resources(context),
        ]
    )
    app.ctx.small_uploads = SmallUploads(push.UPLOAD)
    app.ctx.loop_turns, app.ctx.client = context.loop_turns, context.client
    app.ctx.nginx_location = context.nginx_location
    sanic_adapter.prepare(app, primary=primary)
    for route in routes:
        handler = _handler(route, guard)
        strict = route.uri != "/"  # strict `/` makes Sanic fail for `//`; landing.py checks the path itself
        counters = context.metrics.own.routes[route.metric]
        app.add_route(
            _endpoint(context, handler, counters, route.outcome),
            route.uri,
            methods=route.methods,
            name=route.metric,
            stream="POST" in route.methods,
            strict_slashes=strict,
            error_format="text",  # of no use, because `failed` answers; Sanic would parse our source to guess one
        )
        if route.put is not None:
            put = push.receiving(guard.guarded(route.put, "push") if guard else route.put)
            name = f"put_{route.metric}"
            endpoint = _endpoint(context, put, counters, Outcome.NONE)
            app.add_route(endpoint, route.uri, ("PUT",), name=name, strict_slashes=True, stream=True)
    unknown = context.metrics.own.routes[UNKNOWN]

    def failed(request: Request, error: Exception) -> HTTPResponse | None:
        if request_trace.is_on():
            access_log.begin_trace(request)
        error = guard.error_to_send(request, error) if guard else error
        return _done(context, unknown, request, error_response.response(context, request, error))

    app.error_handler.add(Exception, failed)
    return app


def _upstream_nar_now(context: ServerContext, name: str, *, forwarded: bool) -> tuple[Content, Outcome] | None:
    content = None if forwarded or context.upstreams is None else context.upstreams.nar_now(name)
    return None if content is None else (content, Outcome.MEMORY)


def _handler(route: Route, guard: Guard | None) -> Handler:
    """Return the handler of a route with the checks of its row: first the token, then the rate limit."""
    handler = _with_fallback(route.handler, route.fallback) if route.fallback else route.handler
    if route.rate_limited:
        handler = limited(handler)
    if guard is not None and route.scope is not None:
        handler = guard.guarded(handler, route.scope)
    return dropping(handler, lambda _, error: error) if "POST" in route.methods else handler


def _with_fallback(local: Handler, select: Callable[[Fallback], Handler]) -> Handler:
    """Return a handler that asks the upstreams if the local store does not have the resource."""

    async def get(context: ServerContext, request: Request, **parameters: str) -> Representation:
        try:
            return await local(context, request, **parameters)
        except AbsentError:
            if context.upstreams is None:
                raise
        request_trace.log.debug("the local store does not have it: asking upstreams")
        return await select(context.upstreams)(request, **parameters)

    return get


def _endpoint(
    context: ServerContext, handler: Handler, route: RouteCounters, default: Outcome
) -> Callable[..., Coroutine[Any, Any, HTTPResponse | None]]:
    """Return the function that Sanic calls for a route. `default` is the outcome if the handler notes none."""
    is_traced = request_trace.is_on()
    is_each_logged = is_traced or context.settings.access_log

    async def endpoint(request: Request, **parameters: str) -> HTTPResponse | None:
        if is_traced:
            access_log.begin_trace(request)
            request_trace.log.debug("route %s, client %s", route.name, context.client(request))
        await context.loop_turns.start(partial(context.client, request))
        route.begin()
        try:
            representation = await handler(context, request, **parameters)
            response = await respond(request, representation, context.submitter(request))
            still_valid, store = representation.still_valid, representation.store
        except Exception as error:  # noqa: BLE001 (error_response.py gives each a status)
            response = error_response.response(context, request, error)
            still_valid, store = error.still_valid if isinstance(error, AbsentError) else None, None
        except asyncio.CancelledError:  # the client has disconnected, or the worker stops
            request.ctx.left = True
            gone = None if request.responded else HTTPResponse(status=_CLIENT_LEFT)
            _done(context, route, request, gone, default)
            raise
        finally:
            route.end()
        is_in_memory = response is not None and not hasattr(request.ctx, "sent")  # otherwise, nginx sends the body
        if is_in_memory and not is_each_logged:
            if still_valid is not None:
                request.ctx.still_valid = still_valid, route
            if store is not None:
                request.ctx.store = store, route
        return _done(context, route, request, response, default)

    return endpoint


def _done(
    context: ServerContext,
    route: RouteCounters,
    request: Request,
    response: HTTPResponse | None,
    default: Outcome = Outcome.NONE,
) -> HTTPResponse | None:
    """Count and log a request, and return its response. `response` is None if it was streamed already.

    `default` is the outcome if none was noted.
    """
    final = response or sanic_adapter.response_of(request)
    sent = getattr(request.ctx, "sent", 0 if request.method == "HEAD" else len(final.body or b""))
    found = outcome.of(request, final.status, default)
    _count(route, request, final.status, found, sent)
    served = getattr(request.ctx, "served", None)
    if served is not None and sent and final.status < HTTPStatus.MULTIPLE_CHOICES:
        served(sent, complete=not (hasattr(request.ctx, "left") or hasattr(request.ctx, "broken")))
    request_trace.log.debug("status %d, %d bytes sent, outcome %s", final.status, sent, found)
    access_log.log(request, route.name, final.status, found, sent, context.settings.trusted_proxies)
    return response


def _count(route: RouteCounters, request: Request, status: int, outcome: Outcome, sent: int) -> None:
    """Count a request with its status, its outcome, the bytes of body sent, and its times."""
    now = perf_counter()
    began = sanic_adapter.began_at(request) or now
    head = getattr(request.ctx, "head_at", None)
    route.count(status, outcome, sent, (head or now) - began, now - head if head else None)
    if getattr(request.ctx, "broken", False):
        route.break_off()
