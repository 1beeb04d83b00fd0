"""Response cache, keyed by the exact request head. An entry is used only while its resource confirms that it is valid.

Reading a request, finding its resource and writing a response takes several times as long as sending it, and clients of
one kind send the very same bytes. The key has every field, such as Accept-Encoding or If-None-Match, so that nothing of
HTTP is decided twice.
"""

import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

from cachetools import FIFOCache
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.metrics.shared_counters import RouteCounters
from harmonia.server.http.sanic_adapter import date, reader_of

_MAX_BYTES = 8 * 1024 * 1024  # bytes: some 5,000 narinfos

StillValid = Callable[[], bool]
"""Returns, without blocking, whether the same response would be made now."""


class AbsentError(NotFound):
    """404 for a well-formed question to which the local store has no answer: an upstream may have one.

    `still_valid` returns True while the store still has none. Without it, the answer is not repeated from memory.
    """

    def __init__(self, still_valid: StillValid | None = None) -> None:
        super().__init__()
        self.still_valid = still_valid


@dataclass(frozen=True, slots=True)
class _CachedResponse:
    before: bytes
    """All bytes up to the date."""
    after: bytes
    still_valid: StillValid
    route: RouteCounters
    status: int
    sent: int
    memory_bytes: int
    """Bytes, with the head that it answers."""


class ResponseCache:
    """The responses of a worker, in at most `limit` bytes: the latest."""

    def __init__(self, limit: int = _MAX_BYTES) -> None:
        self._answers: MutableMapping[bytes, _CachedResponse] = FIFOCache(limit, getsizeof=attrgetter("memory_bytes"))

    def cached_response(self, head: bytes) -> bytes | None:
        """Return the response to a request of these bytes, and count it; None if it must be made."""
        began = time.perf_counter()
        answer = self._answers.get(head)
        if answer is None:
            return None
        if not answer.still_valid():
            del self._answers[head]
            return None
        answer.route.count(answer.status, answer.sent, time.perf_counter() - began, None)
        return b"%b%b%b" % (answer.before, date().encode(), answer.after)

    def remember(self, request: Request, sent: bytes) -> None:
        """Remember what was sent for a request, if its resource can tell whether that is `still_valid`."""
        told: tuple[StillValid, RouteCounters] | None = getattr(request.ctx, "still_valid", None)
        http = reader_of(request)
        # Bytes of a body would be taken for the next request.
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        if told is None or has_body or not http.keep_alive or not told[0]():
            return
        before, separator, after = sent.partition(b"\r\ndate: ")
        size = 0 if request.method == "HEAD" else len(http.response.body or b"")
        head = request.head + b"\r\n\r\n"
        memory = len(head) + len(sent)
        answer = _CachedResponse(before + separator, after[len(date()) :], *told, http.response.status, size, memory)
        with suppress(ValueError):  # it is larger than the whole cache
            self._answers[head] = answer
