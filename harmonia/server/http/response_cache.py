"""Answers that are given again, to the byte, to who asks again in the same words, as long as they are true.

To read a request, find its resource and write a response takes several times as long as to send it. But clients of one
kind ask for the same path in the very same bytes. So an answer is remembered by the whole head that it answered, with
all that Accept-Encoding, If-None-Match or any other field had to say: nothing of HTTP is decided twice.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.metrics.shared_counters import RouteCounters
from harmonia.server.http.sanic_adapter import date, reader_of

_LIMIT = 8 * 1024 * 1024  # bytes: some 5,000 narinfos

Lasts = Callable[[], bool]
"""Tells, at once, whether what was said is still what would be said now."""


class AbsentError(NotFound):
    """404 for a well-formed question to which the local store has no answer: an upstream may have one.

    `lasts` returns True while the store still has none. Without it, the answer is not repeated from memory.
    """

    def __init__(self, lasts: Lasts | None = None) -> None:
        super().__init__()
        self.lasts = lasts


@dataclass(frozen=True, slots=True)
class _Answer:
    before: bytes
    """All bytes up to the date."""
    after: bytes
    lasts: Lasts
    route: RouteCounters
    status: int
    sent: int

    @property
    def memory(self) -> int:
        return len(self.before) + len(self.after)


class Repeats:
    """The answers of a worker, in at most `limit` bytes: those that came last."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._memory = 0
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()

    def find(self, head: bytes) -> bytes | None:
        """The answer to a request of these bytes, counted as given. None where it takes the long way."""
        began = time.perf_counter()
        answer = self._answers.get(head)
        if answer is None:
            return None
        if not answer.lasts():
            self._forget(head)
            return None
        answer.route.count(answer.status, answer.sent, time.perf_counter() - began, None)
        return b"%b%b%b" % (answer.before, date().encode(), answer.after)

    def remember(self, request: Request, sent: bytes) -> None:
        """Remember what was sent for a request, where its resource has told whether that `lasts`."""
        told: tuple[Lasts, RouteCounters] | None = getattr(request.ctx, "lasts", None)
        http = reader_of(request)
        # Bytes of a body would be taken for the next request.
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        if told is None or has_body or not http.keep_alive or not told[0]():
            return
        before, separator, after = sent.partition(b"\r\ndate: ")
        size = 0 if request.method == "HEAD" else len(http.response.body or b"")
        answer = _Answer(before + separator, after[len(date()) :], *told, http.response.status, size)
        head = request.head + b"\r\n\r\n"
        self._forget(head)
        self._answers[head] = answer
        self._memory += len(head) + answer.memory
        while self._memory > self._limit:
            self._forget(next(iter(self._answers)))

    def _forget(self, head: bytes) -> None:
        if answer := self._answers.pop(head, None):
            self._memory -= len(head) + answer.memory
