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

from cachetools import FIFOCache, RRCache
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.metrics.shared_counters import RouteCounters
from harmonia.server.http.sanic_adapter import date, reader_of

_MAX_SHORT_BYTES = 8 * 1024 * 1024  # for short responses, some 5,000 narinfos
_MAX_LONG_BYTES = 32 * 1024 * 1024  # for long responses, such as small NARs; they do not evict short ones
_LONG_BYTES = 16 * 1024  # length from which on a response is long

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
    """The bytes of the head after Date."""
    body: bytes
    still_valid: StillValid
    route: RouteCounters
    status: int
    memory_bytes: int
    """Bytes of the response and of the request head."""
    served: Callable[[int], None] | None
    """Callback after a body was sent, with its length, or None."""


class ResponseCache:
    """Cached responses of a worker."""

    def __init__(self, short_limit: int = _MAX_SHORT_BYTES, long_limit: int = _MAX_LONG_BYTES) -> None:
        """Create a cache of at most so many bytes. The oldest short response, or a random long one, is evicted first.

        Why random: clients download closures in the same order. If a closure exceeds the limit, the oldest response
        is always the next one to be requested.
        """
        size = attrgetter("memory_bytes")
        self._short: MutableMapping[bytes, _CachedResponse] = FIFOCache(short_limit, getsizeof=size)
        self._long: MutableMapping[bytes, _CachedResponse] = RRCache(long_limit, getsizeof=size)

    def cached_response(self, head: bytes) -> list[bytes] | None:
        """Return the parts of the cached response to this request head, and count the request, or return None."""
        began = time.perf_counter()
        cached = self._short.get(head) or self._long.get(head)
        if cached is None:
            return None
        if not cached.still_valid():
            self._short.pop(head, None)
            self._long.pop(head, None)
            return None
        cached.route.count(cached.status, len(cached.body), time.perf_counter() - began, None)
        if cached.served is not None and cached.body:
            cached.served(len(cached.body))
        return [b"%b%b%b" % (cached.before, date().encode(), cached.after), cached.body]

    def remember(self, request: Request, sent: bytes) -> None:
        """Cache the bytes that were sent for a request, if its handler has set `still_valid`."""
        validity: tuple[StillValid, RouteCounters] | None = getattr(request.ctx, "still_valid", None)
        http = reader_of(request)
        # The cache matches heads only: the body of a later request would be read as the next request.
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        if validity is None or has_body or not http.keep_alive or not validity[0]():
            return
        body = b"" if request.method == "HEAD" else http.response.body or b""
        before, separator, after = sent[: len(sent) - len(body)].partition(b"\r\ndate: ")
        head = request.head + b"\r\n\r\n"
        memory = len(head) + len(sent)
        served = getattr(request.ctx, "served", None)
        cached = _CachedResponse(
            before + separator, after[len(date()) :], body, *validity, http.response.status, memory, served
        )
        with suppress(ValueError):  # larger than the whole cache
            (self._long if memory >= _LONG_BYTES else self._short)[head] = cached
