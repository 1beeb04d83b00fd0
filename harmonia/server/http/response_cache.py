"""Response cache keyed by the exact request head. An entry is used only while its resource confirms that it is valid.

Parsing a request, running its handler and building a response takes several times as long as sending it, and clients of
one kind send the same bytes. The key has all fields, such as Accept-Encoding and If-None-Match, so that the cache needs
no HTTP rules of its own.
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

_MAX_BYTES = 8 * 1024 * 1024  # some 5,000 narinfos

StillValid = Callable[[], bool]
"""Returns, without blocking, whether the same request would get the same response now."""


class AbsentError(NotFound):
    """404 for a well-formed request for a resource that the local store does not have. An upstream may have it."""

    def __init__(self, still_valid: StillValid | None = None) -> None:
        """Create the error. `still_valid` returns True while the resource is missing; without it, 404 is not cached."""
        super().__init__()
        self.still_valid = still_valid


@dataclass(frozen=True, slots=True)
class _CachedResponse:
    before: bytes
    """All bytes before the value of Date."""
    after: bytes
    still_valid: StillValid
    route: RouteCounters
    status: int
    sent: int
    memory_bytes: int
    """Bytes of the response and of the request head."""


class ResponseCache:
    """Cached responses of a worker."""

    def __init__(self, limit: int = _MAX_BYTES) -> None:
        """Create a cache of at most `limit` bytes. The oldest entry is evicted first."""
        self._responses: MutableMapping[bytes, _CachedResponse] = FIFOCache(limit, getsizeof=attrgetter("memory_bytes"))

    def cached_response(self, head: bytes) -> bytes | None:
        """Return the cached response to a request with this head, and count the request. None if there is none."""
        began = time.perf_counter()
        cached = self._responses.get(head)
        if cached is None:
            return None
        if not cached.still_valid():
            del self._responses[head]
            return None
        cached.route.count(cached.status, cached.sent, time.perf_counter() - began, None)
        return b"%b%b%b" % (cached.before, date().encode(), cached.after)

    def remember(self, request: Request, sent: bytes) -> None:
        """Cache the bytes that were sent for a request, if its handler has set `still_valid`."""
        validity: tuple[StillValid, RouteCounters] | None = getattr(request.ctx, "still_valid", None)
        http = reader_of(request)
        # The cache matches heads only: the body of a later request would be read as the next request.
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        if validity is None or has_body or not http.keep_alive or not validity[0]():
            return
        before, separator, after = sent.partition(b"\r\ndate: ")
        size = 0 if request.method == "HEAD" else len(http.response.body or b"")
        head = request.head + b"\r\n\r\n"
        memory = len(head) + len(sent)
        status = http.response.status
        cached = _CachedResponse(before + separator, after[len(date()) :], *validity, status, size, memory)
        with suppress(ValueError):  # larger than the whole cache
            self._responses[head] = cached
