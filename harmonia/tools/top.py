"""Current load of a running server, computed from two snapshots of its metrics."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from harmonia.errors import RemoteError
from harmonia.tools.http_client import Client

_REFUSED = (401, 403)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Metrics at one moment."""

    at: float
    """Seconds on the monotonic clock."""
    samples: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the metric's samples that have these labels."""
        required = set(labels.items())
        return sum(value for key, value in self.samples.get(name, {}).items() if required <= set(key))

    def values(self, name: str, label: str) -> list[str]:
        """Return the values of a label of the metric, sorted."""
        return sorted({dict(key)[label] for key in self.samples.get(name, {})})


def fetch_snapshot(client: Client) -> Snapshot:
    """Fetch the metrics. Raises RemoteError if the server does not serve those of Harmonia."""
    try:
        answer = client.get("metrics")
    except RemoteError as error:
        raise RemoteError(f"{error}; check that the server runs and that the URL is right") from None
    if answer.status in _REFUSED:
        remedy = "put a token with the scope metrics into /etc/nix/netrc, or use the address of metrics_bind"
        raise RemoteError(f"{client.url}/metrics returns {answer.status}; {remedy}")
    if answer.status != 200:  # noqa: PLR2004 (OK)
        what = f"{client.url}/metrics returns {answer.status}; use the address of metrics_bind, or set metrics = true"
        raise RemoteError(what)
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    try:
        for family in text_string_to_metric_families(answer.body.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    except ValueError:
        samples = {}
    if "harmonia_requests_in_flight" not in samples:
        raise RemoteError(f"{client.url}/metrics has no metrics of Harmonia; use the URL of a Harmonia server")
    return Snapshot(time.monotonic(), samples)


@dataclass(frozen=True, slots=True)
class RouteActivity:
    """Counters of one route."""

    route: str
    requests: float
    """Number since the start of the server."""
    request_rate: float
    """Requests per second since the previous snapshot."""
    sent: float
    """Bytes since the start of the server."""
    sent_rate: float
    """Bytes per second since the previous snapshot."""
    in_flight: float
    failed: float
    """Number of responses with a status of 5xx."""


def route_activities(before: Snapshot, now: Snapshot) -> Iterator[RouteActivity]:
    """Return the counters of each route, the busiest first."""
    seconds = max(now.at - before.at, 1e-9)
    activities = []
    for route in now.values("harmonia_requests_in_flight", "route"):
        requests, sent = (
            now.total(name, route=route) for name in ("harmonia_requests_total", "harmonia_sent_bytes_total")
        )
        statuses = now.values("harmonia_requests_total", "status")
        failed = sum(
            now.total("harmonia_requests_total", route=route, status=status) for status in statuses if status[0] == "5"
        )
        activities.append(
            RouteActivity(
                route,
                requests,
                max(requests - before.total("harmonia_requests_total", route=route), 0) / seconds,
                sent,
                max(sent - before.total("harmonia_sent_bytes_total", route=route), 0) / seconds,
                now.total("harmonia_requests_in_flight", route=route),
                failed,
            )
        )
    return iter(sorted(activities, key=lambda activity: (-activity.requests, activity.route)))


def hit_ratio(snapshot: Snapshot) -> float | None:
    """Return the hit ratio of the cache of compressed NARs, or None if it was not used yet."""
    hits, misses = snapshot.total("harmonia_cache_hits_total"), snapshot.total("harmonia_cache_misses_total")
    return hits / (hits + misses) if hits + misses else None
