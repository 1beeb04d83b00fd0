"""Responses without Sanic, for requests whose head resembles that of an earlier request.

Parsing a request, running its handler and building a response takes several times as long as sending it, and clients of
one kind send the same bytes. The keys have all fields, such as Accept-Encoding, so that the cache needs no HTTP rules
of its own. There are two ways:

- A request that repeats an earlier one gets the same response, if its resource confirms that it is still valid.
- A request for a narinfo that differs from an earlier one only in the hash part gets a response with the same head,
  with its own Cache-Control, ETag, Content-Length and Date. Likewise a request for the NAR of an upstream, or for what
  a pusher looks for.

The head has the token, if there is one: it is checked again that the token is valid.
"""

import re
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from operator import attrgetter
from typing import Final, Protocol

from cachetools import FIFOCache, RRCache
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.metrics.outcome import Outcome
from harmonia.metrics.shared_counters import RouteCounters
from harmonia.server.http.sanic_adapter import date, reader_of

_MAX_SHORT_BYTES = 4 * 1024 * 1024  # for short responses, such as narinfos to conditional requests
_MAX_LONG_BYTES = 32 * 1024 * 1024  # for long responses, such as small NARs; they do not evict short ones
_LONG_BYTES = 16 * 1024  # length from which on a response is long
_MAX_BODY_BYTES = 256 * 1024  # the longer a response, the less time is saved for each byte of memory
_MAX_KINDS_BYTES = 1024 * 1024  # for the heads of kinds of requests; each client program has a few kinds

_HEAD = re.compile(
    rb'(.*?\r\ncache-control: )[^\r]*(\r\n.*etag: )"[^"]*"(\r\ncontent-length: )[0-9]+'
    rb"(\r\ndate: )[^\r]*(.*)",
    re.DOTALL,
)

StillValid = Callable[[], bool]
"""Returns, without blocking, whether the same request would get the same response now."""


class AbsentError(NotFound):
    """404 for a well-formed request for a resource that the local store does not have. An upstream may have it."""

    def __init__(self, still_valid: StillValid | None = None) -> None:
        """Create the error. `still_valid` returns True while the resource is missing; without it, 404 is not cached."""
        super().__init__()
        self.still_valid = still_valid


@dataclass(frozen=True, slots=True)
class Content:
    """A body in memory."""

    body: bytes
    etag: bytes
    cache_control: bytes


ABSENT: Final = Content(b"", b"", b"")
"""The result of a lookup of content that does not exist."""


class ContentNow(Protocol):
    def __call__(self, name: str, /, *, forwarded: bool) -> tuple[Content, Outcome] | None:
        """Return the narinfo of a hash part, or the NAR with a name, and its outcome. Does not block.

        Return ABSENT if it does not exist, None if only the handler can find out. `forwarded` is True if the request
        has a field Via.
        """


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources that differ only in a name, such as narinfos in the hash part."""

    request: re.Pattern[bytes]
    """The method and the target of requests for them. Its only group is the name."""
    content_now: ContentNow


def _always() -> bool:
    return True


class _Kind:
    """Requests with the same method and fields, and the heads of the responses to them."""

    def __init__(self, key: bytes, route: RouteCounters, readmit: StillValid) -> None:
        """Create a kind that has the head `key`, from which the hash part or name was removed."""
        self._route = route
        self.readmit = readmit
        self._is_private = False
        self._is_get = key.startswith(b"GET ")
        self.is_forwarded = b"\r\nvia:" in key.lower()
        self._head_of_200: tuple[bytes, ...] | None = None
        """The parts before Cache-Control, before ETag, before Content-Length, before Date, and after Date."""
        self._response_404: tuple[bytes, bytes, int] | None = None
        """The parts before and after Date, and the length of the body."""
        self._key_bytes = len(key)

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of the heads, and of the body of 404."""
        before, after, _ = self._response_404 or (b"", b"", 0)
        return 1024 + self._key_bytes + sum(map(len, (*(self._head_of_200 or ()), before, after)))

    def learn(self, status: int, head: bytes, body: bytes) -> None:
        """Remember the head of a response of the handler."""
        if status == HTTPStatus.OK and (parts := _HEAD.fullmatch(head)):
            self._head_of_200 = parts.groups()
            self._is_private = b"\r\ncache-control: private" in head
        elif status == HTTPStatus.NOT_FOUND:
            before, after = around_date(head)
            self._response_404 = before, after + body, len(body)

    def response(self, content: Content, outcome: Outcome, began: float) -> list[bytes] | None:
        """Return and count the response with this content, or return None if its head is not known yet."""
        if content is not ABSENT:
            if self._head_of_200 is None:
                return None
            status, body = 200, content.body if self._is_get else b""
            sent, length = len(body), b"%d" % len(content.body)
            start, before_etag, before_length, before_date, after = self._head_of_200
            cache_control = content.cache_control
            if self._is_private:
                cache_control = cache_control.replace(b"public", b"private")
            begin = b"%b%b%b" % (start, cache_control, before_etag)
            before = b"%b%b%b%b%b" % (begin, content.etag, before_length, length, before_date)
        else:
            if self._response_404 is None:
                return None
            status, body = 404, b""
            before, after, sent = self._response_404
        self._route.count(status, outcome, sent, time.perf_counter() - began, None)
        head = b"%b%b%b" % (before, date().encode(), after)
        return [head, body] if len(body) >= _LONG_BYTES else [head + body]


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
    outcome: Outcome
    memory_bytes: int
    """Bytes of the response and of the request head."""
    served: Callable[[int], None] | None
    """Callback after a body was sent, with its length, or None."""


class ResponseCache:
    """Cached responses of a worker."""

    def __init__(
        self,
        resources: Sequence[Resources],
        short_limit: int = _MAX_SHORT_BYTES,
        long_limit: int = _MAX_LONG_BYTES,
    ) -> None:
        """Create a cache of at most so many bytes. The oldest short response, or a random long one, is evicted first.

        Why random: clients download closures in the same order. If a closure exceeds the limit, the oldest response
        is always the next one to be requested.
        """
        size = attrgetter("memory_bytes")
        self._short: MutableMapping[bytes, _CachedResponse] = FIFOCache(short_limit, getsizeof=size)
        self._long: MutableMapping[bytes, _CachedResponse] = RRCache(long_limit, getsizeof=size)
        self._kinds: MutableMapping[bytes, _Kind] = FIFOCache(_MAX_KINDS_BYTES, getsizeof=size)
        self._resources = [
            (re.compile(rb"(?:%b) HTTP/1\.1\r\n" % each.request.pattern), each.content_now) for each in resources
        ]

    def response(self, head: bytes) -> list[bytes] | None:
        """Return the parts of the response to this request head, or None if Sanic has to answer. Count the request."""
        began = time.perf_counter()
        if named := self._named(head):
            key, name, content_now = named
            try:  # takes half the time of `get`
                kind = self._kinds[key]
            except KeyError:
                pass
            else:
                found = content_now(name, forwarded=kind.is_forwarded) if kind.readmit() else None
                return None if found is None else kind.response(*found, began)
        cached = self._short.get(head) or self._long.get(head)
        if cached is None:
            return None
        if not cached.still_valid():
            self._short.pop(head, None)
            self._long.pop(head, None)
            return None
        cached.route.count(cached.status, cached.outcome, len(cached.body), time.perf_counter() - began, None)
        if cached.served is not None and cached.body:
            cached.served(len(cached.body))
        return [b"%b%b%b" % (cached.before, date().encode(), cached.after), cached.body]

    def remember(self, request: Request, sent: bytes) -> None:
        """Learn from the bytes that were sent for a request, if its handler has set `still_valid`."""
        validity: tuple[StillValid, RouteCounters] | None = getattr(request.ctx, "still_valid", None)
        http = reader_of(request)
        # The cache matches heads only: the body of a later request would be read as the next request.
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        if validity is None or has_body or not http.keep_alive:
            return
        unchanged, route = validity
        readmit: StillValid = getattr(request.ctx, "readmit", _always)

        def still_valid() -> bool:
            return readmit() and unchanged()

        if not still_valid():
            return
        status = http.response.status
        body = b"" if request.method == "HEAD" else http.response.body or b""
        if len(body) > _MAX_BODY_BYTES:
            return
        response_head = sent[: len(sent) - len(body)]
        head = request.head + b"\r\n\r\n"
        is_conditional = any(name.startswith("if-") for name in request.headers)
        if (named := self._named(head)) and not is_conditional:
            key, *_ = named
            kind = self._kinds.get(key)
            if kind is None or not kind.readmit():
                kind = _Kind(key, route, readmit)
            kind.learn(status, response_head, body)
            with suppress(ValueError):  # larger than the whole cache
                self._kinds[key] = kind
            return
        memory = len(head) + len(sent)
        served = getattr(request.ctx, "served", None)
        outcome = Outcome.MEMORY if status < HTTPStatus.MULTIPLE_CHOICES else Outcome.NONE
        cached = _CachedResponse(*around_date(response_head), body, still_valid, route, status, outcome, memory, served)
        with suppress(ValueError):  # larger than the whole cache
            (self._long if memory >= _LONG_BYTES else self._short)[head] = cached

    def _named(self, head: bytes) -> tuple[bytes, str, ContentNow] | None:
        """Return a request head without the hash part or name, that name, and the function that finds its content."""
        for request, content_now in self._resources:
            if match := request.match(head):
                return head[: match.start(1)] + head[match.end(1) :], match[1].decode(), content_now
        return None


def around_date(head: bytes) -> tuple[bytes, bytes]:
    """Return the parts of the head of a response before and after the value of Date."""
    before, separator, after = head.partition(b"\r\ndate: ")
    return before + separator, after[len(date()) :]
