"""`/metrics`: what the workers have counted, all together, in the text format of Prometheus."""

import math
from dataclasses import astuple, fields
from time import perf_counter

from sanic import Request

from harmonia.cache.disk_cache import Counters
from harmonia.metrics.shared_counters import RouteCounters
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.server.http.sanic_adapter import began_at

TOTALS = (*(f"cache_{counter.name}" for counter in fields(Counters)), "encoder_seconds", "damaged_nars")
"""What `look` takes down."""


def count(route: RouteCounters, request: Request, status: int, sent: int) -> None:
    """Count a request that was answered with that many bytes of body."""
    now = perf_counter()
    began = began_at(request) or now
    head = getattr(request.ctx, "head_at", None)
    route.count(status, sent, (head or now) - began, now - head if head else None)
    if getattr(request.ctx, "broken", False):
        route.break_off()


def sample(context: ServerContext) -> None:
    """Take down what others count for themselves. Done every now and then, for the other workers to see."""
    compressor = context.compressor
    counters = compressor.cache.counters if compressor.cache else Counters()
    context.metrics.own.sample(
        (*astuple(counters), compressor.encoder.seconds, compressor.damaged_nars), compressor.encoder.waiting
    )


async def get(context: ServerContext, _: Request) -> Representation:
    sample(context)
    return Representation(
        content_type="text/plain; version=0.0.4; charset=utf-8",
        body=await context.threads.run_io(lambda: _render(context)),
        cache_control="no-store",
    )


def _render(context: ServerContext) -> bytes:
    from harmonia.metrics import prometheus  # noqa: PLC0415 (a tenth of a second, which only those spend who are asked)

    compressor = context.compressor
    limit, used = 0, 0.0
    if compressor.cache is not None:
        limit = compressor.cache.limit
        try:
            used = compressor.cache.used()
        except OSError:  # the log tells, when something is to be put into it
            used = math.nan
    return prometheus.render(
        context.metrics, encoder_threads=compressor.encoder.threads, cache_limit=limit, cache_used=used
    )
