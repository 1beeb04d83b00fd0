"""Metrics in the text format of Prometheus. docs/reference/metrics.md explains each of them."""

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from harmonia import __version__
from harmonia.metrics.outcome import Outcome
from harmonia.metrics.shared_counters import BOUNDS, MAX_TOKENS, Histogram, Metrics, OutcomeCounters, UpstreamCounters

_TOTALS = {
    "cache_hits": "Requests for a NAR that was in the cache, complete or growing.",
    "cache_misses": "Requests for a NAR that was not in the cache, but fits.",
    "cache_fills": "NARs added to the cache.",
    "cache_filled_bytes": "Bytes of NARs added to the cache.",
    "cache_evictions": "NARs evicted from the cache to make room.",
    "cache_corrupt": "Damaged NARs removed from the cache.",
    "encoder_seconds": "CPU time of compression, in seconds.",
    "damaged_nars": "Compressions that failed because a NAR differed from its record in the database.",
    "compression_saved_bytes": "NAR sizes less the bytes sent, of NARs that were sent whole and compressed.",
    "events": "Events recorded for clients of /events.",
    "events_disconnected": "Clients of /events that were disconnected because they did not read.",
    "warmed_nars": "NARs of new paths compressed before a client asked.",
    "warm_no_room": "NARs of new paths for which the cache had no room.",
    "warm_failures": "NARs of new paths that could not be compressed.",
    "mirror_written_paths": "Served store paths that the mirror's bucket has now.",
    "mirror_failures": "Failed attempts to write a served store path to the mirror's bucket.",
    "mirror_written_bytes": "Bytes of NARs written to the mirror's bucket.",
    "pushed_paths": "Store paths imported from pushes.",
    "pushed_bytes": "Bytes of NARs received from pushes, as sent.",
    "push_refusals": "Uploads that were refused.",
    "push_found_after_miss": "Narinfos found within an hour after a 404 for the same path.",
}

_COMBINE: dict[str, Callable[[Iterable[float]], float]] = {"process_start_time_seconds": min, "process_max_fds": max}
"""Functions that combine the metrics of several processes, for metrics that are not summed."""

_UPSTREAMS = {
    "hits": "Lookups of paths that the upstream had.",
    "misses": "Lookups of paths that the upstream did not have.",
    "failures": "Requests to the upstream that timed out or failed.",
    "fetches": "Fetches of NARs into the cache, from their start.",
    "fetched_bytes": "Bytes of NARs fetched into the cache.",
}


class TokenState(NamedTuple):
    """A token of the server."""

    name: str
    number: int
    """Its number in `TokenUses`."""
    expires_at: float
    """In seconds since 1970; infinity if it does not expire."""


@dataclass(frozen=True, slots=True)
class State:
    """State of the server at the time of a scrape."""

    encoder_threads: int
    """The number in each worker."""
    cache_limit: int
    """In bytes; 0 without a cache."""
    cache_used: float
    """In bytes."""
    cache_oldest_use: float
    """In seconds since 1970; 0 if the cache is empty."""
    store_paths: float
    """NaN if the database cannot be read, like the next."""
    store_size: float
    """Sum of the NAR sizes in bytes."""
    keys: Sequence[str]
    """Names of the signing keys."""
    tokens: Sequence[TokenState] = ()


def render(metrics: Metrics, state: State) -> bytes:
    """Return the sums over all workers in the text format."""
    return generate_latest(_Families(metrics, state))


class _Families(Collector):
    def __init__(self, metrics: Metrics, state: State) -> None:
        self._state = state
        self._rows = metrics.rows
        self._totals = metrics.totals
        self._upstream_rows = metrics.upstreams
        self._reasons = metrics.reasons

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "harmonia_build",
            "Server version.",
            value={"version": __version__, "python": platform.python_version()},
        )
        yield from self._requests()
        yield from self._workers()
        yield from self._server()
        if "mirror_written_paths" in self._totals:
            yield from self._mirror()
        yield from _processes({os.getppid(), *(int(row.pid) for row in self._rows if row.pid)})
        if self._state.tokens:
            yield from self._tokens()
        if self._upstream_rows:
            yield from self._upstreams()

    def _requests(self) -> Iterator[Metric]:
        routes = {name: [row.routes[name] for row in self._rows] for name in self._rows[0].routes}
        requests = CounterMetricFamily("harmonia_requests", "Responses.", labels=["route", "status"])
        by_outcome = ["route", "outcome"]
        sent = CounterMetricFamily(
            "harmonia_sent_bytes", "Bytes of response bodies, after content encoding.", labels=by_outcome
        )
        broken = CounterMetricFamily(
            "harmonia_broken_bodies", "Response bodies that the server could not finish.", labels=["route"]
        )
        in_flight = GaugeMetricFamily("harmonia_requests_in_flight", "Requests in flight.", labels=["route"])
        head = HistogramMetricFamily(
            "harmonia_head_seconds", "Seconds from the request to the first byte of the response.", labels=by_outcome
        )
        body = HistogramMetricFamily(
            "harmonia_body_seconds", "Seconds from first to last byte of streamed responses.", labels=by_outcome
        )
        for name, rows in routes.items():
            for status, count in enumerate(_sum(route.statuses for route in rows)):
                if count:
                    requests.add_metric([name, str(status)], count)
            broken.add_metric([name], sum(route.broken for route in rows))
            in_flight.add_metric([name], sum(route.in_flight for route in rows))
            for outcome in Outcome:
                counters = [route.outcomes[outcome] for route in rows]
                labels = [name, str(outcome)]
                sent.add_metric(labels, sum(each.sent[0] for each in counters))
                if any(any(each.head.cells) for each in counters):  # otherwise, there would be 6 series for each bucket
                    head.add_metric(labels, *_histogram(each.head for each in counters))
                if any(map(_is_streamed, counters)):
                    body.add_metric(labels, *_histogram(each.body for each in counters))
        yield from (requests, sent, broken, in_flight, head, body)

    def _mirror(self) -> Iterator[Metric]:
        queued, failing, oldest, is_up = (
            sum(getattr(row, f"mirror_{name}") for row in self._rows) for name in ("queued", "failing", "oldest", "up")
        )
        yield GaugeMetricFamily("harmonia_mirror_queued_paths", "Paths that wait to be written.", queued)
        yield GaugeMetricFamily("harmonia_mirror_failing_paths", "Queued paths that failed at least once.", failing)
        age = max(time.time() - oldest, 0) if oldest else 0.0
        yield GaugeMetricFamily("harmonia_mirror_oldest_seconds", "Age of the oldest queued path.", age)
        yield GaugeMetricFamily(
            "harmonia_mirror_write_up", "1 if the bucket and its queue take paths, otherwise 0.", is_up
        )

    def _workers(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(
            "harmonia_database_seconds",
            "Seconds of waiting for the database, without cached lookups.",
            *_histogram(row.database for row in self._rows),
        )
        for name, total in zip(self._totals, _sum(row.totals for row in self._rows), strict=True):
            yield CounterMetricFamily(f"harmonia_{name}", _TOTALS[name], total)
        yield GaugeMetricFamily(
            "harmonia_cache_limit_bytes", "Maximum size of the cache; 0 without a cache.", self._state.cache_limit
        )
        yield GaugeMetricFamily("harmonia_cache_used_bytes", "Size of the cache.", self._state.cache_used)
        waiting = sum(row.waiting for row in self._rows)
        yield GaugeMetricFamily("harmonia_encoder_waiting", "Pieces in compression, or waiting for a thread.", waiting)
        threads = self._state.encoder_threads * len(self._rows)
        yield GaugeMetricFamily("harmonia_encoder_threads", "Threads for compression.", threads)
        refused = sum(row.refused for row in self._rows)
        yield CounterMetricFamily("harmonia_refused_connections", "Connections refused because of a limit.", refused)
        restarts = sum(max(row.starts - 1, 0) for row in self._rows)
        yield CounterMetricFamily(
            "harmonia_worker_restarts", "Workers started to replace one that had ended.", restarts
        )

    def _server(self) -> Iterator[Metric]:
        state, rows = self._state, self._rows
        yield GaugeMetricFamily(
            "harmonia_cache_oldest_use_timestamp_seconds",
            "Least recent use of a NAR in the cache, in seconds since 1970; 0 if the cache is empty.",
            state.cache_oldest_use,
        )
        yield GaugeMetricFamily("harmonia_store_paths", "Valid paths of the store.", state.store_paths)
        yield GaugeMetricFamily("harmonia_store_nar_bytes", "Sum of the NAR sizes of the store.", state.store_size)
        keys = GaugeMetricFamily("harmonia_signing_key", "Signing keys; always 1.", labels=["name"])
        for name in state.keys:
            keys.add_metric([name], 1)
        yield keys
        yield GaugeMetricFamily(
            "harmonia_last_reload_successful",
            "1 if the last reload of tokens and certificate succeeded in all workers.",
            float(not any(row.reload_failed for row in rows)),
        )
        yield GaugeMetricFamily(
            "harmonia_last_reload_success_timestamp_seconds",
            "Last start or successful reload of the worker for which it is longest ago, in seconds since 1970.",
            min((row.loaded_at for row in rows if row.loaded_at), default=0),
        )
        if any(row.certificate_expires_at for row in rows):
            yield GaugeMetricFamily(
                "harmonia_certificate_expiry_timestamp_seconds",
                "End of the TLS certificate, in seconds since 1970; 0 if it is not valid.",
                min(row.certificate_expires_at for row in rows if row.loaded_at),
            )

    def _tokens(self) -> Iterator[Metric]:
        uses = [row.token_uses.by_number() for row in self._rows]
        last_use = GaugeMetricFamily(
            "harmonia_token_last_use_timestamp_seconds",
            "Last use of a token, in seconds since 1970; 0 if there was none since the start.",
            labels=["name"],
        )
        expiry = GaugeMetricFamily(
            "harmonia_token_expiry_timestamp_seconds", "End of a token, in seconds since 1970.", labels=["name"]
        )
        for token in self._state.tokens[:MAX_TOKENS]:
            last_use.add_metric([token.name], max(each.get(token.number, 0) for each in uses))
            if token.expires_at != math.inf:
                expiry.add_metric([token.name], token.expires_at)
        yield from (last_use, expiry)

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


def _processes(pids: Iterable[int]) -> Iterator[Metric]:
    """Yield the usual metrics of processes, as sums over our processes: the start of the oldest, and the limit of one.

    A process that has ended is left out.
    """
    families: dict[str, Metric] = {}
    for pid in sorted(pids):
        for family in _process(pid):
            if (total := families.setdefault(family.name, family)) is not family:
                [ours], [other] = total.samples, family.samples
                combine = _COMBINE.get(family.name, sum)
                total.samples = [ours._replace(value=combine((ours.value, other.value)))]
    yield from families.values()


def _process(pid: int) -> Iterable[Metric]:
    collector: Collector = ProcessCollector(pid=lambda: pid, registry=None)
    return collector.collect()


def _is_streamed(counters: OutcomeCounters) -> bool:
    return any(counters.body.cells)


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
