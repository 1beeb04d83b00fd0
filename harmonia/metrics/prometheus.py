"""Metrics in the text format of Prometheus. docs/reference/metrics.md explains each of them."""

import platform
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from harmonia import __version__
from harmonia.metrics.shared_counters import BOUNDS, Histogram, Metrics, RouteCounters, UpstreamCounters

_TOTALS = {
    "cache_hits": "Requests for a NAR that was in the cache, complete or growing.",
    "cache_misses": "Requests for a NAR that was not in the cache, but fits.",
    "cache_fills": "NARs added to the cache.",
    "cache_filled_bytes": "Bytes of NARs added to the cache.",
    "cache_evictions": "NARs evicted from the cache to make room.",
    "cache_corrupt": "Damaged NARs removed from the cache.",
    "encoder_seconds": "CPU time of compression, in seconds.",
    "damaged_nars": "Compressions that failed because a NAR differed from its record in the database.",
    "pushed_paths": "Store paths imported from pushes.",
    "pushed_bytes": "Bytes of NARs received from pushes, as sent.",
    "push_refusals": "Uploads that were refused.",
    "push_found_after_miss": "Narinfos found within an hour after a 404 for the same path.",
}

_UPSTREAMS = {
    "hits": "Lookups of paths that the upstream had.",
    "misses": "Lookups of paths that the upstream did not have.",
    "failures": "Requests to the upstream that timed out or failed.",
    "fetches": "Fetches of NARs into the cache, from their start.",
    "fetched_bytes": "Bytes of NARs fetched into the cache.",
}


def render(metrics: Metrics, *, encoder_threads: int, cache_limit: int, cache_used: float) -> bytes:
    """Return the sums over all workers in the text format.

    `encoder_threads` is the number in each worker. `cache_limit` and `cache_used` are bytes of the shared cache.
    """
    return generate_latest(_Families(metrics, encoder_threads, cache_limit, cache_used))


class _Families(Collector):
    def __init__(self, metrics: Metrics, encoder_threads: int, cache_limit: int, cache_used: float) -> None:
        self._rows = metrics.rows
        self._totals = metrics.totals
        self._upstream_rows = metrics.upstreams
        self._reasons = metrics.reasons
        self._encoder_threads = encoder_threads
        self._cache_limit = cache_limit
        self._cache_used = cache_used

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "harmonia_build",
            "Server version.",
            value={"version": __version__, "python": platform.python_version()},
        )
        yield from self._requests()
        yield from self._workers()
        if self._upstream_rows:
            yield from self._upstreams()

    def _requests(self) -> Iterator[Metric]:
        routes = {name: [row.routes[name] for row in self._rows] for name in self._rows[0].routes}
        requests = CounterMetricFamily("harmonia_requests", "Responses.", labels=["route", "status"])
        sent = CounterMetricFamily(
            "harmonia_sent_bytes", "Bytes of response bodies, after content encoding.", labels=["route"]
        )
        broken = CounterMetricFamily(
            "harmonia_broken_bodies", "Response bodies that the server could not finish.", labels=["route"]
        )
        in_flight = GaugeMetricFamily("harmonia_requests_in_flight", "Requests in flight.", labels=["route"])
        head = HistogramMetricFamily(
            "harmonia_head_seconds", "Seconds from the request to the first byte of the response.", labels=["route"]
        )
        body = HistogramMetricFamily(
            "harmonia_body_seconds", "Seconds from first to last byte of streamed responses.", labels=["route"]
        )
        for name, rows in routes.items():
            for status, count in enumerate(_sum(route.statuses for route in rows)):
                if count:
                    requests.add_metric([name, str(status)], count)
            sent.add_metric([name], sum(route.sent for route in rows))
            broken.add_metric([name], sum(route.broken for route in rows))
            in_flight.add_metric([name], sum(route.in_flight for route in rows))
            head.add_metric([name], *_histogram(route.head for route in rows))
            if any(map(_is_streamed, rows)):
                body.add_metric([name], *_histogram(route.body for route in rows))
        yield from (requests, sent, broken, in_flight, head, body)

    def _workers(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(
            "harmonia_database_seconds",
            "Seconds of waiting for the database, without cached lookups.",
            *_histogram(row.database for row in self._rows),
        )
        for name, total in zip(self._totals, _sum(row.totals for row in self._rows), strict=True):
            yield CounterMetricFamily(f"harmonia_{name}", _TOTALS[name], total)
        yield GaugeMetricFamily(
            "harmonia_cache_limit_bytes", "Maximum size of the cache; 0 without a cache.", self._cache_limit
        )
        yield GaugeMetricFamily("harmonia_cache_used_bytes", "Size of the cache.", self._cache_used)
        waiting = sum(row.waiting for row in self._rows)
        yield GaugeMetricFamily("harmonia_encoder_waiting", "Pieces in compression, or waiting for a thread.", waiting)
        threads = self._encoder_threads * len(self._rows)
        yield GaugeMetricFamily("harmonia_encoder_threads", "Threads for compression.", threads)
        refused = sum(row.refused for row in self._rows)
        yield CounterMetricFamily("harmonia_refused_connections", "Connections refused because of a limit.", refused)
        restarts = sum(max(row.starts - 1, 0) for row in self._rows)
        yield CounterMetricFamily(
            "harmonia_worker_restarts", "Workers started to replace one that had ended.", restarts
        )

    def _upstreams(self) -> Iterator[Metric]:
        totals = {url: _sum(row.cells for row in rows) for url, rows in self._upstream_rows.items()}
        up = GaugeMetricFamily(
            "harmonia_upstream_up", "Workers that regard the upstream as available.", labels=["upstream"]
        )
        for url, total in totals.items():
            up.add_metric([url], total[0])
        yield up
        for index, name in enumerate(UpstreamCounters.names[1:], 1):
            family = CounterMetricFamily(f"harmonia_upstream_{name}", _UPSTREAMS[name], labels=["upstream"])
            for url, total in totals.items():
                family.add_metric([url], total[index])
            yield family
        refused = CounterMetricFamily(
            "harmonia_upstream_refused", "Responses of an upstream that were rejected.", labels=["upstream", "reason"]
        )
        for url, total in totals.items():
            for reason, count in zip(self._reasons, total[len(UpstreamCounters.names) :], strict=True):
                refused.add_metric([url, reason], count)
        yield refused


def _is_streamed(route: RouteCounters) -> bool:
    return any(route.body.cells)


def _sum(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _histogram(rows: Iterable[Histogram]) -> tuple[list[tuple[str, float]], float]:
    *counts, total = _sum(histogram.cells for histogram in rows)
    below = 0.0
    buckets = []
    for bound, count in zip((*BOUNDS, float("inf")), counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
    return buckets, total
