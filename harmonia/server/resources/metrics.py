"""`/metrics`: sums of the counters of all workers, in the Prometheus text format."""

import math
from dataclasses import astuple, fields

from sanic import Request

from harmonia.cache.disk_cache import Counters
from harmonia.push.receiver import Counters as PushCounters
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation

TOTALS = (*(f"cache_{counter.name}" for counter in fields(Counters)), "encoder_seconds", "damaged_nars")
PUSH_TOTALS = tuple(counter.name for counter in fields(PushCounters))
"""Names of the values that `sample` copies; those of `PUSH_TOTALS` only if pushes are enabled."""


def sample(context: ServerContext) -> None:
    """Copy the counters of the cache and the compressor into shared memory, where the other workers read them."""
    compressor = context.compressor
    counters = compressor.cache.counters if compressor.cache else Counters()
    pushed = astuple(context.push.counters) if context.push else ()
    context.metrics.own.sample(
        (*astuple(counters), compressor.encoder.seconds, compressor.damaged_nars, *pushed), compressor.encoder.waiting
    )


async def get(context: ServerContext, _: Request) -> Representation:
    sample(context)
    return Representation(
        content_type="text/plain; version=0.0.4; charset=utf-8",
        body=await context.threads.run_io(lambda: _render(context)),
        cache_control="no-store",
    )


def _render(context: ServerContext) -> bytes:
    from harmonia.metrics import prometheus  # noqa: PLC0415 (the import takes 0.1 s, only in workers that are scraped)

    compressor = context.compressor
    limit, used = 0, 0.0
    if compressor.cache is not None:
        limit = compressor.cache.limit
        try:
            used = compressor.cache.used()
        except OSError:  # logged when the cache is next written
            used = math.nan
    return prometheus.render(
        context.metrics, encoder_threads=compressor.encoder.threads, cache_limit=limit, cache_used=used
    )
