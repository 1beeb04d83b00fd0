"""What a running server does just now, from two snapshots of its metrics."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from harmonia.errors import RemoteError
from harmonia.tools.http_client import Client

_REFUSED = (401, 403)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The metrics at one moment."""

    at: float
    samples: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels."""
        wanted = set(labels.items())
        return sum(value for key, value in self.samples.get(name, {}).items() if wanted <= set(key))

    def values(self, name: str, label: str) -> list[str]:
        return sorted({dict(key)[label] for key in self.samples.get(name, {})})


def fetch_snapshot(client: Client) -> Snapshot:
    """Fetch the metrics of a server. Raises RemoteError if they are not those of a Harmonia."""
    try:
        answer = client.get("metrics")
    except RemoteError as error:
        raise RemoteError(f"{error}; see that the server runs, and that this is its URL") from None
    if answer.status in _REFUSED:
        remedy = "put a token with the scope metrics into /etc/nix/netrc, or name the server's metrics_bind"
        raise RemoteError(f"{client.url}/metrics answers {answer.status}; {remedy}")
    if answer.status != 200:  # noqa: PLR2004 (OK)
        what = f"{client.url}/metrics answers {answer.status}; name the server's metrics_bind, or set metrics = true"
        raise RemoteError(what)
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    try:
        for family in text_string_to_metric_families(answer.body.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    except ValueError:
        samples = {}
    if "harmonia_requests_in_flight" not in samples:
        raise RemoteError(f"{client.url}/metrics are not those of a Harmonia; name the URL of one")
    return Snapshot(time.monotonic(), samples)


@dataclass(frozen=True, slots=True)
class RouteActivity:
    """What happened at one kind of resource."""

    route: str
    requests: float
    """In all, like the bytes."""
    request_rate: float
    """For each second since the snapshot before."""
    sent: float
    sent_rate: float
    in_flight: float
    failed: float
    """Answers of 5xx."""


def route_activities(before: Snapshot, now: Snapshot) -> Iterator[RouteActivity]:
    """Yield the activity of each route, the most requested first."""
    seconds = max(now.at - before.at, 1e-9)
    found = []
    for route in now.values("harmonia_requests_in_flight", "route"):
        requests, sent = (
            now.total(name, route=route) for name in ("harmonia_requests_total", "harmonia_sent_bytes_total")
        )
        statuses = now.values("harmonia_requests_total", "status")
        failed = sum(now.total("harmonia_requests_total", route=route, status=it) for it in statuses if it[0] == "5")
        found.append(
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
    return iter(sorted(found, key=lambda activity: (-activity.requests, activity.route)))


def hit_ratio(snapshot: Snapshot) -> float | None:
    """Return the share of requested compressed NARs that were in the cache, or None if none was requested."""
    hits, misses = snapshot.total("harmonia_cache_hits_total"), snapshot.total("harmonia_cache_misses_total")
    return hits / (hits + misses) if hits + misses else None
