"""What is counted: numbers in memory that all processes share, a row of them for each worker, so that any can tell all.

The memory is made before the fork. A row belongs to a worker's place, not to its process: who replaces a dead worker
goes on counting where that one stopped. Only the event loop of its worker writes to a row: nothing needs a lock.
"""

import mmap
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from threading import Lock

BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Seconds, the upper ends of a histogram's buckets: from a path that is remembered to the largest of downloads."""

STATUSES = 600
UNKNOWN = "unknown"
"""The route of a request for something that nobody ever has, or in another method than its own, or that is no HTTP."""

_CELL_BYTES = 8  # bytes: they are doubles, written at once


class Histogram:
    size = len(BOUNDS) + 2

    def __init__(self, cells: "memoryview[float]") -> None:
        self.cells = cells
        """How many lie in each bucket and beyond the last, then their sum."""

    def observe(self, seconds: float) -> None:
        self.cells[bisect_left(BOUNDS, seconds)] += 1
        self.cells[-1] += seconds


class RouteCounters:
    """What is counted of the requests for one kind of resource."""

    size = STATUSES + 2 * Histogram.size + 3

    def __init__(self, cells: "memoryview[float]") -> None:
        self.statuses, head, body, self._rest = _cut(cells, STATUSES, Histogram.size, Histogram.size, 3)
        self.head = Histogram(head)
        """Until there is a status, and the first byte to send."""
        self.body = Histogram(body)
        """From then on, until the last byte is on its way."""

    @property
    def sent(self) -> float:
        return self._rest[0]

    @property
    def in_flight(self) -> float:
        return self._rest[1]

    @property
    def broken(self) -> float:
        """Bodies that we could not finish, for no fault of the client's."""
        return self._rest[2]

    def begin(self) -> None:
        self._rest[1] += 1

    def end(self) -> None:
        self._rest[1] -= 1

    def forget(self) -> None:
        """Nothing is in flight any more: the process that did it is gone."""
        self._rest[1] = 0

    def break_off(self) -> None:
        self._rest[2] += 1

    def count(self, status: int, sent: int, head: float, body: float | None) -> None:
        """An answer with that many bytes of body; `body` are its seconds where it was sent piece by piece."""
        self.statuses[status] += 1
        self._rest[0] += sent
        self.head.observe(head)
        if body is not None:
            self.body.observe(body)


class WorkerCounters:
    def __init__(self, cells: "memoryview[float]", routes: Sequence[str], totals: Sequence[str]) -> None:
        *each, database, self.totals, self._rest = _cut(cells, *_sizes(routes, totals))
        self.routes = dict(zip(routes, map(RouteCounters, each), strict=True))
        self.database = Histogram(database)
        self._before = list(self.totals)

    @property
    def starts(self) -> float:
        return self._rest[0]

    @property
    def waiting(self) -> float:
        """Pieces that wait to be compressed."""
        return self._rest[1]

    @property
    def refused(self) -> float:
        """Connections beyond `max_connections`."""
        return self._rest[2]

    def refuse(self) -> None:
        self._rest[2] += 1

    def adopt_slot(self) -> None:
        """Go on where the process that had it before has stopped."""
        self._before = list(self.totals)
        self._rest[0] += 1
        self._rest[1] = 0
        for route in self.routes.values():
            route.forget()

    def sample(self, totals: Iterable[float], waiting: float) -> None:
        """Take down what others have counted since their process began."""
        for index, total in enumerate(totals):
            self.totals[index] = self._before[index] + total
        self._rest[1] = waiting


class UpstreamCounters:
    """What a worker has seen of another cache."""

    names = ("up", "hits", "misses", "failures", "fetches", "fetched_bytes")

    def __init__(self, cells: "memoryview[float]", reasons: Sequence[str]) -> None:
        """`reasons` are those for which answers are refused."""
        self.cells = cells
        self._reasons = reasons
        self._lock = Lock()  # the bytes come in threads

    def add(self, name: str, count: float = 1) -> None:
        with self._lock:
            self.cells[self.names.index(name)] += count

    def refuse(self, reason: str) -> None:
        with self._lock:
            self.cells[len(self.names) + self._reasons.index(reason)] += 1

    def set_up(self, up: bool) -> None:  # noqa: FBT001 (it is the value)
        self.cells[0] = up


class Metrics:
    """The rows of all workers. `own` is that of this process, when it has taken one."""

    def __init__(
        self,
        routes: Sequence[str],
        totals: Sequence[str],
        workers: int,
        upstreams: Sequence[str] = (),
        reasons: Sequence[str] = (),
    ) -> None:
        """`totals` are the names of what others count, which a row takes down now and then.

        `reasons` are those for which answers of the upstreams are refused.
        """
        routes = (*routes, UNKNOWN)
        size = sum(_sizes(routes, totals))
        self.totals = totals
        cells = memoryview(mmap.mmap(-1, workers * size * _CELL_BYTES)).cast("d")
        self.rows = [WorkerCounters(row, routes, totals) for row in _cut(cells, *[size] * workers)]
        self.own = self.rows[0]
        self._place = 0
        self.reasons = reasons
        self.upstreams = {url: _upstream(workers, reasons) for url in upstreams}
        """By their URLs, for each worker."""

    def adopt_slot(self, place: int) -> None:
        self.own = self.rows[place]
        self.own.adopt_slot()
        self._place = place
        for workers in self.upstreams.values():
            workers[place].set_up(False)

    def own_upstream(self, url: str) -> UpstreamCounters:
        return self.upstreams[url][self._place]


def _upstream(workers: int, reasons: Sequence[str]) -> list[UpstreamCounters]:
    width = len(UpstreamCounters.names) + len(reasons)
    cells = memoryview(mmap.mmap(-1, workers * width * _CELL_BYTES)).cast("d")
    return [UpstreamCounters(row, reasons) for row in _cut(cells, *[width] * workers)]


def _sizes(routes: Sequence[str], totals: Sequence[str]) -> list[int]:
    return [*[RouteCounters.size] * len(routes), Histogram.size, len(totals), 3]


def _cut(cells: "memoryview[float]", *sizes: int) -> "list[memoryview[float]]":
    pieces = []
    for size in sizes:
        pieces.append(cells[:size])
        cells = cells[size:]
    return pieces
