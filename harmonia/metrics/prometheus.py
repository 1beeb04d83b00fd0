"""The metrics in the text format of Prometheus. docs/reference/metrics.md tells what each is good for."""

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
    "cache_hits": "NARs found in the cache, whole or growing.",
    "cache_misses": "NARs that were not in the cache and that it could take.",
    "cache_fills": "NARs that were put into the cache.",
    "cache_filled_bytes": "Bytes of NARs that were put into the cache.",
    "cache_evictions": "NARs removed from the cache for others.",
    "cache_corrupt": "NARs removed from the cache because they were damaged.",
    "encoder_seconds": "Processor time spent on compression, in seconds.",
    "damaged_nars": "Times that a NAR to be compressed was not what was registered.",
}

_UPSTREAMS = {
    "hits": "Paths that an upstream had.",
    "misses": "Paths that an upstream did not have.",
    "failures": "Times that an upstream did not answer, or with an error.",
    "fetches": "NARs begun to be fetched into the cache.",
    "fetched_bytes": "Bytes of them.",
}


def render(metrics: Metrics, *, encoder_threads: int, cache_limit: int, cache_used: float) -> bytes:
    """The sums over all workers. The threads are those of each worker, and the cache is what all have in common."""
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
            "What serves.",
            value={"version": __version__, "python": platform.python_version()},
        )
        yield from self._requests()
        yield from self._workers()
        if self._upstream_rows:
            yield from self._upstreams()

    def _requests(self) -> Iterator[Metric]:
        routes = {name: [row.routes[name] for row in self._rows] for name in self._rows[0].routes}
        requests = CounterMetricFamily("harmonia_requests", "Requests answered.", labels=["route", "status"])
        sent = CounterMetricFamily("harmonia_sent_bytes", "Bytes of bodies sent, as encoded.", labels=["route"])
        broken = CounterMetricFamily("harmonia_broken_bodies", "Bodies broken off, by us.", labels=["route"])
        in_flight = GaugeMetricFamily("harmonia_requests_in_flight", "Requests being answered.", labels=["route"])
        head = HistogramMetricFamily(
            "harmonia_head_seconds", "From a request to the first byte of its answer.", labels=["route"]
        )
        body = HistogramMetricFamily(
            "harmonia_body_seconds", "From there to its last byte, of bodies sent in pieces.", labels=["route"]
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
            "Waiting for what the database has to say, where nothing was remembered.",
            *_histogram(row.database for row in self._rows),
        )
        for name, total in zip(self._totals, _sum(row.totals for row in self._rows), strict=True):
            yield CounterMetricFamily(f"harmonia_{name}", _TOTALS[name], total)
        yield GaugeMetricFamily(
            "harmonia_cache_limit_bytes", "How large the cache may become; 0 is none.", self._cache_limit
        )
        yield GaugeMetricFamily("harmonia_cache_used_bytes", "How much of it is in use.", self._cache_used)
        waiting = sum(row.waiting for row in self._rows)
        yield GaugeMetricFamily("harmonia_encoder_waiting", "Pieces being compressed, or waiting for it.", waiting)
        threads = self._encoder_threads * len(self._rows)
        yield GaugeMetricFamily("harmonia_encoder_threads", "Threads that compress.", threads)
        refused = sum(row.refused for row in self._rows)
        yield CounterMetricFamily("harmonia_refused_connections", "Connections beyond max_connections.", refused)
        restarts = sum(max(row.starts - 1, 0) for row in self._rows)
        yield CounterMetricFamily("harmonia_worker_restarts", "Workers that replaced one that had ended.", restarts)

    def _upstreams(self) -> Iterator[Metric]:
        totals = {url: _sum(row.cells for row in rows) for url, rows in self._upstream_rows.items()}
        up = GaugeMetricFamily("harmonia_upstream_up", "How many workers use the upstream.", labels=["upstream"])
        for url, total in totals.items():
            up.add_metric([url], total[0])
        yield up
        for index, name in enumerate(UpstreamCounters.names[1:], 1):
            family = CounterMetricFamily(f"harmonia_upstream_{name}", _UPSTREAMS[name], labels=["upstream"])
            for url, total in totals.items():
                family.add_metric([url], total[index])
            yield family
        refused = CounterMetricFamily(
            "harmonia_upstream_refused", "Answers of an upstream that were not taken.", labels=["upstream", "reason"]
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
