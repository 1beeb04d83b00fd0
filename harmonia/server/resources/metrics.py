"""`/metrics`: sums of the counters of all workers, in the Prometheus text format."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, fields

from sanic import Request

from harmonia.cache.disk_cache import Counters
from harmonia.cache.nar_compressor import Compressor
from harmonia.cache.warmer import State
from harmonia.push.receiver import Counters as PushCounters
from harmonia.server.context import ServerContext
from harmonia.server.http.response import Representation
from harmonia.upload.queue import Statistics
from harmonia.upload.queue_uploader import QueueUploader
from harmonia.upload.uploader import Uploader

TOTALS = (
    *(f"cache_{counter.name}" for counter in fields(Counters)),
    "encoder_seconds",
    "damaged_nars",
    "compression_saved_bytes",
    "events",
    "events_disconnected",
)
PUSH_TOTALS = tuple(counter.name for counter in fields(PushCounters))
"""Names of the values that `sample` copies; those of `PUSH_TOTALS` only if pushes are enabled."""


WARM_TOTALS = ("warmed_nars", "warm_no_room", "warm_failures")
"""Further names, only if the cache is warmed."""
MIRROR_TOTALS = ("mirror_written_paths", "mirror_failures", "mirror_written_bytes")
"""Further names, the last ones, only if served paths are written to the mirror."""


def sample(context: ServerContext) -> None:
    """Copy the counters of the cache and the compressor into shared memory, where the other workers read them."""
    _sample(context, context.compressor, astuple(context.push.counters) if context.push else ())


def sample_warmer(context: ServerContext, compressor: Compressor, counts: Mapping[State, int]) -> None:
    """Copy the counters of the process that warms the cache."""
    pushed = (0,) * len(PUSH_TOTALS) if context.push else ()
    states: tuple[State, ...] = ("compressed", "too large", "failed")
    warmed = (counts.get(state, 0) for state in states)
    _sample(context, compressor, (*pushed, *warmed))


def sample_mirror(context: ServerContext, uploads: QueueUploader, uploader: Uploader, queued: Statistics) -> None:
    """Copy the counters of the process that writes to the mirror."""
    others = (0,) * (len(context.metrics.totals) - len(MIRROR_TOTALS))
    own = context.metrics.own
    own.sample((*others, uploads.counts["uploaded"], uploads.counts["failed"], uploader.uploaded_bytes), 0)
    own.mirror_queued, own.mirror_failing = queued.items, queued.failing
    own.mirror_oldest = queued.oldest or 0
    own.mirror_up = uploads.target_answers


def _sample(context: ServerContext, compressor: Compressor, more: Iterable[int]) -> None:
    counters = compressor.cache.counters if compressor.cache else Counters()
    events = (context.events.recorder.recorded, context.events.disconnected)
    context.metrics.own.sample(
        (
            *astuple(counters),
            compressor.encoder.seconds,
            compressor.damaged_nars,
            context.compression_saved_bytes,
            *events,
            *more,
        ),
        compressor.encoder.waiting,
    )


async def get(context: ServerContext, _: Request) -> Representation:
    sample(context)
    paths, size = await context.store_size()
    return Representation(
        content_type="text/plain; version=0.0.4; charset=utf-8",
        body=await context.threads.run_io(lambda: _render(context, paths, size)),
        cache_control="no-store",
    )


def _render(context: ServerContext, store_paths: float, store_size: float) -> bytes:
    from harmonia.metrics import prometheus  # noqa: PLC0415 (the import takes 0.1 s, only in workers that are scraped)

    compressor = context.compressor
    limit, used, oldest = 0, 0.0, 0.0
    if compressor.cache is not None:
        limit = compressor.cache.limit
        try:
            used, oldest = compressor.cache.usage()
        except OSError:  # logged when the cache is next written
            used = oldest = math.nan
    keys = [key.name for key in context.keys]
    loaded = context.guard.loaded if context.guard is not None else ()
    tokens = [prometheus.TokenState(token.name, token.number, token.expires_at) for token in loaded]
    state = prometheus.State(compressor.encoder.threads, limit, used, oldest, store_paths, store_size, keys, tokens)
    return prometheus.render(context.metrics, state)
