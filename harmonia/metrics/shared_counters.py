"""Counters in memory that all processes share, so that any worker can report the sums of all.

The memory is mapped before the fork. Each worker has a row of counters. A row belongs to the worker's slot, not to its
process: a worker that replaces a dead one continues its counts. Only the event loop of its worker writes to a row, so
it needs no lock.
"""

import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from threading import Lock

from harmonia.metrics.outcome import Outcome

BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of a histogram's buckets in seconds: from the lookup of a cached path to the largest download."""

STATUSES = 600
UNKNOWN = "unknown"
"""The route of requests for an unknown URL or with a wrong method, and of malformed requests."""

MAX_TOKENS = 500
"""The number of tokens that metrics name: each has two time series."""

_CELL_BYTES = 8  # a double, which is written atomically


class Histogram:
    """A histogram of durations."""

    size = len(BOUNDS) + 2

    def __init__(self, cells: "memoryview[float]") -> None:
        self.cells = cells
        """The number of durations in each bucket, the number above the last bound, and the sum in seconds."""

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self.cells[bisect_left(BOUNDS, seconds)] += 1
        self.cells[-1] += seconds


class OutcomeCounters:
    """The counters of the requests for one kind of resource that had the same outcome."""

    size = 2 * Histogram.size + 1

    def __init__(self, cells: "memoryview[float]") -> None:
        head, body, sent = _cut(cells, Histogram.size, Histogram.size, 1)
        self.head = Histogram(head)
        """Seconds from the request to the first byte of the response."""
        self.body = Histogram(body)
        """Seconds from the first to the last byte, only of streamed responses."""
        self.sent = sent
        """The bytes of response bodies, in one cell."""


class RouteCounters:
    """The counters of the requests for one kind of resource."""

    size = STATUSES + len(Outcome) * OutcomeCounters.size + 2

    def __init__(self, name: str, cells: "memoryview[float]") -> None:
        self.name = name
        """The value of the label `route`."""
        self.statuses, *outcomes, self._rest = _cut(cells, STATUSES, *[OutcomeCounters.size] * len(Outcome), 2)
        self.outcomes = [OutcomeCounters(each) for each in outcomes]
        """The counters of each Outcome, by its value."""

    @property
    def in_flight(self) -> float:
        """Return the number of requests in flight."""
        return self._rest[0]

    @property
    def broken(self) -> float:
        """Return the number of response bodies that the server could not finish, without disconnects of clients."""
        return self._rest[1]

    def begin(self) -> None:
        """Count a request in flight."""
        self._rest[0] += 1

    def end(self) -> None:
        """Count one request in flight less."""
        self._rest[0] -= 1

    def forget(self) -> None:
        """Set the number of requests in flight to 0, because the process that handled them has ended."""
        self._rest[0] = 0

    def break_off(self) -> None:
        """Count a response body that the server could not finish."""
        self._rest[1] += 1

    def count(self, status: int, outcome: Outcome, sent: int, head: float, body: float | None) -> None:
        """Count a response with `sent` bytes of body.

        `head` and `body` are durations in seconds; `body` is None for a response that was not streamed.
        """
        self.statuses[status] += 1
        counters = self.outcomes[outcome]
        counters.sent[0] += sent
        counters.head.observe(head)
        if body is not None:
            counters.body.observe(body)


def _cell(index: int, meaning: str) -> property:
    """Return a property for one cell of `_rest`."""

    def get(self: "WorkerCounters") -> float:
        return self._rest[index]

    def set_(self: "WorkerCounters", value: float) -> None:
        self._rest[index] = value

    return property(get, set_, doc=meaning)


class WorkerCounters:
    """The row of counters of a worker's slot."""

    starts = _cell(0, "The number of processes that had this slot.")
    waiting = _cell(1, "The number of pieces in compression or waiting for it.")
    refused = _cell(2, "The number of connections that were refused because of a limit.")
    pid = _cell(3, "The process that has this slot, or 0.")
    loaded_at = _cell(4, "The time of the last successful start or reload, in seconds since 1970.")
    reload_failed = _cell(5, "1 if the last reload failed, otherwise 0.")
    certificate_expires_at = _cell(6, "The end of the TLS certificate, in seconds since 1970; 0 if it is not valid.")
    mirror_queued = _cell(7, "The number of store paths that wait to be written to the mirror.")
    mirror_failing = _cell(8, "The number of these that failed at least once.")
    mirror_oldest = _cell(9, "The time since when the first of them waits, in seconds since 1970, or 0.")
    mirror_up = _cell(10, "1 if the mirror's bucket took uploads when last tried, and its queue works, otherwise 0.")
    cells = 11

    def __init__(self, cells: "memoryview[float]", routes: Sequence[str], totals: Sequence[str]) -> None:
        *each, database, uses, self.totals, self._rest = _cut(cells, *_sizes(routes, totals))
        self.token_uses = TokenUses(uses)
        self.routes = dict(zip(routes, map(RouteCounters, routes, each), strict=True))
        self.database = Histogram(database)
        self._before = list(self.totals)

    def refuse(self) -> None:
        """Count a refused connection."""
        self.refused += 1

    def adopt_slot(self) -> None:
        """Continue the counts of the process that had this slot before."""
        self._before = list(self.totals)
        self.starts += 1
        self.waiting = 0
        self.pid = os.getpid()
        self.reload_failed = 0
        for route in self.routes.values():
            route.forget()

    def sample(self, totals: Iterable[float], waiting: float) -> None:
        """Store the totals of other objects, counted since the start of this process, and the waiting pieces."""
        for index, total in enumerate(totals):
            self.totals[index] = self._before[index] + total
        self.waiting = waiting


class TokenUses:
    """The last use of each token in one worker. Not thread-safe."""

    size = 2 * MAX_TOKENS

    def __init__(self, cells: "memoryview[float]") -> None:
        self._numbers, self._times = _cut(cells, MAX_TOKENS, MAX_TOKENS)
        self._places: dict[int, int] = {}

    def record(self, number: int, now: float) -> None:
        """Store `now` as the last use of the token with this number (`Token.number`).

        The token whose last use is longest ago makes room, if necessary.
        """
        place = self._places.get(number)
        if place is None:
            self._places = {int(taken): index for index, taken in enumerate(self._numbers) if taken}
            place = self._places.get(number)
        if place is None:
            place = min(range(MAX_TOKENS), key=self._times.__getitem__)
            self._places.pop(int(self._numbers[place]), None)
            self._places[number] = place
            self._numbers[place] = number
        self._times[place] = now

    def by_number(self) -> dict[int, float]:
        """Return the last uses in seconds since 1970."""
        return {int(number): time for number, time in zip(self._numbers, self._times, strict=True) if number}


class UpstreamCounters:
    """The counters of one worker for one upstream."""

    names = ("up", "hits", "misses", "failures", "fetches", "fetched_bytes")

    def __init__(self, cells: "memoryview[float]", reasons: Sequence[str], lock: "Lock | None" = None) -> None:
        """Use `cells` for the counters `names`, then one for each reason to reject a response."""
        self.cells = cells
        self._reasons = reasons
        self._lock = lock or Lock()  # several threads count bytes

    def shared(self, members_up: "set[SiblingCounters]") -> "SiblingCounters":
        """Return counters in the same row for one of several upstreams, which all get the same set."""
        return SiblingCounters(self.cells, self._reasons, self._lock, members_up)

    def add(self, name: str, count: float = 1) -> None:
        """Add to the counter `name`."""
        with self._lock:
            self.cells[self.names.index(name)] += count

    def refuse(self, reason: str) -> None:
        """Count a rejected response."""
        with self._lock:
            self.cells[len(self.names) + self._reasons.index(reason)] += 1

    def set_up(self, up: bool) -> None:  # noqa: FBT001 (the argument is the new value)
        """Set whether this worker regards the upstream as available."""
        self.cells[0] = up


class SiblingCounters(UpstreamCounters):
    """The counters of one of several upstreams that share a row, which is up while any of them is."""

    def __init__(
        self, cells: "memoryview[float]", reasons: Sequence[str], lock: "Lock", members_up: "set[SiblingCounters]"
    ) -> None:
        super().__init__(cells, reasons, lock)
        self._members_up = members_up

    def set_up(self, up: bool) -> None:  # noqa: FBT001 (as in the base)
        (self._members_up.add if up else self._members_up.discard)(self)
        super().set_up(bool(self._members_up))


class Metrics:
    """The counters of all workers. After `adopt_slot`, `own` is the row of this process."""

    def __init__(
        self,
        routes: Sequence[str],
        totals: Sequence[str],
        workers: int,
        upstreams: Sequence[str] = (),
        reasons: Sequence[str] = (),
    ) -> None:
        """Map memory for `workers` rows.

        `totals` are the names of counters that other objects hold, and that `WorkerCounters.sample` copies to a row.
        `upstreams` are URLs. `reasons` are the reasons to reject a response of an upstream.
        """
        self.started = time.time()
        """The time of the server's start, in seconds since 1970."""
        routes = (*routes, UNKNOWN)
        size = sum(_sizes(routes, totals))
        self.totals = totals
        cells = memoryview(mmap.mmap(-1, workers * size * _CELL_BYTES)).cast("d")
        self.rows = [WorkerCounters(row, routes, totals) for row in _cut(cells, *[size] * workers)]
        self.own = self.rows[0]
        self._slot = 0
        self.reasons = reasons
        self.upstreams = {url: _upstream(workers, reasons) for url in upstreams}
        """By URL, the counters of each worker."""

    def responses(self) -> tuple[float, bool]:
        """Return the number of responses of all workers, and whether a request is in flight."""
        routes = [route for row in self.rows for route in row.routes.values()]
        heads = [outcome.head for route in routes for outcome in route.outcomes]
        return sum(sum(head.cells[:-1]) for head in heads), any(route.in_flight for route in routes)

    def adopt_slot(self, slot: int) -> None:
        """Make the row with index `slot` the row of this process."""
        self.own = self.rows[slot]
        self.own.adopt_slot()
        self._slot = slot
        for workers in self.upstreams.values():
            workers[slot].set_up(False)

    def own_upstream(self, url: str) -> UpstreamCounters:
        """Return this process's counters for an upstream."""
        return self.upstreams[url][self._slot]


def _upstream(workers: int, reasons: Sequence[str]) -> list[UpstreamCounters]:
    width = len(UpstreamCounters.names) + len(reasons)
    cells = memoryview(mmap.mmap(-1, workers * width * _CELL_BYTES)).cast("d")
    return [UpstreamCounters(row, reasons) for row in _cut(cells, *[width] * workers)]


def _sizes(routes: Sequence[str], totals: Sequence[str]) -> list[int]:
    return [*[RouteCounters.size] * len(routes), Histogram.size, TokenUses.size, len(totals), WorkerCounters.cells]


def _cut(cells: "memoryview[float]", *sizes: int) -> "list[memoryview[float]]":
    pieces = []
    for size in sizes:
        pieces.append(cells[:size])
        cells = cells[size:]
    return pieces
