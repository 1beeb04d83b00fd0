"""Responses without Sanic, for requests whose head resembles that of an earlier request.

Parsing a request, running its handler and building a response takes several times as long as sending it, and clients of
one kind send the same bytes. The keys have all fields, such as Accept-Encoding, so that the cache needs no HTTP rules
of its own. There are two ways:

- A request that repeats an earlier one gets the same response, if its resource confirms that it is still valid.
- A request for a narinfo that differs from an earlier one only in the hash part gets a response with the same head,
  with its own Cache-Control, ETag, Content-Length and Date. Likewise a request for the NAR of an upstream.
"""

import re
import time
from collections.abc import Callable, MutableMapping
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
from harmonia.nix.base32 import ALPHABET
from harmonia.server.http.sanic_adapter import date, reader_of

_MAX_SHORT_BYTES = 4 * 1024 * 1024  # for short responses, such as narinfos to conditional requests
_MAX_LONG_BYTES = 32 * 1024 * 1024  # for long responses, such as small NARs; they do not evict short ones
_LONG_BYTES = 16 * 1024  # length from which on a response is long
_MAX_BODY_BYTES = 256 * 1024  # the longer a response, the less time is saved for each byte of memory
_MAX_KINDS_BYTES = 1024 * 1024  # for the heads of kinds of requests; each client program has a few kinds

_TARGET = re.compile(
    rf"(?:(?:GET|HEAD) /([{ALPHABET}]{{32}})\.narinfo|GET /upstream/([a-z0-9.-]{{1,255}})) HTTP/1\.1\r\n".encode()
)
"""The request line for a narinfo, with its hash part, or for the NAR of an upstream, with its name."""
_HEAD = re.compile(
    rb'(.*?\r\ncache-control: )[^\r]*(\r\n.*etag: )"[^"]*"(\r\n(?:accept-ranges: bytes\r\n)?content-length: )[0-9]+'
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


class _Kind:
    """Requests with the same method and fields, and the heads of the responses to them."""

    def __init__(self, key: bytes, route: RouteCounters) -> None:
        """Create a kind that has the head `key`, from which the hash part or name was removed."""
        self._route = route
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
        elif status == HTTPStatus.NOT_FOUND:
            before, after = _around_date(head)
            self._response_404 = before, after + body, len(body)

    def response(self, content: Content, outcome: Outcome, began: float) -> list[bytes] | None:
        """Return and count the response with this content, or return None if its head is not known yet."""
        if content is not ABSENT:
            if self._head_of_200 is None:
                return None
            status, body = 200, content.body if self._is_get else b""
            sent, length = len(body), b"%d" % len(content.body)
            start, before_etag, before_length, before_date, after = self._head_of_200
            begin = b"%b%b%b" % (start, content.cache_control, before_etag)
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
        narinfo_now: ContentNow,
        nar_now: ContentNow,
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
        self._narinfo_now = narinfo_now
        self._nar_now = nar_now

    def response(self, head: bytes) -> list[bytes] | None:
        """Return the parts of the response to this request head, or None if Sanic has to answer. Count the request."""
        began = time.perf_counter()
        if target := _TARGET.match(head):
            try:  # takes half the time of `get`
                kind = self._kinds[_key(target)]
            except KeyError:
                pass
            else:
                if target[1]:
                    found = self._narinfo_now(target[1].decode(), forwarded=kind.is_forwarded)
                else:
                    found = self._nar_now(target[2].decode(), forwarded=kind.is_forwarded)
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
        if validity is None or has_body or not http.keep_alive or not validity[0]():
            return
        status = http.response.status
        body = b"" if request.method == "HEAD" else http.response.body or b""
        if len(body) > _MAX_BODY_BYTES:
            return
        response_head = sent[: len(sent) - len(body)]
        head = request.head + b"\r\n\r\n"
        is_conditional = any(name.startswith("if-") for name in request.headers)
        if (target := _TARGET.match(head)) and not is_conditional:
            key = _key(target)
            kind = self._kinds.get(key) or _Kind(key, validity[1])
            kind.learn(status, response_head, body)
            with suppress(ValueError):  # larger than the whole cache
                self._kinds[key] = kind
            return
        memory = len(head) + len(sent)
        served = getattr(request.ctx, "served", None)
        outcome = Outcome.MEMORY if status < HTTPStatus.MULTIPLE_CHOICES else Outcome.NONE
        cached = _CachedResponse(*_around_date(response_head), body, *validity, status, outcome, memory, served)
        with suppress(ValueError):  # larger than the whole cache
            (self._long if memory >= _LONG_BYTES else self._short)[head] = cached


def _key(target: re.Match[bytes]) -> bytes:
    """Return the head of a request without the hash part or name."""
    start, end = target.span(target.lastindex or 0)
    return target.string[:start] + target.string[end:]


def _around_date(head: bytes) -> tuple[bytes, bytes]:
    """Return the parts of the head of a response before and after the value of Date."""
    before, separator, after = head.partition(b"\r\ndate: ")
    return before + separator, after[len(date()) :]
