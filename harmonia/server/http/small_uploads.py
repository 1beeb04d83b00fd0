"""Small uploads without Sanic, for requests whose head resembles that of an earlier one (see `response_cache`).

An upload differs from an earlier one of its kind only in the name of the resource, the length of the body, and the
body. Only a success is answered here. After anything else, Sanic gets the request, as if it had just arrived: to store
an upload twice must do no harm.
"""

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus

from cachetools import FIFOCache
from sanic import Request

from harmonia.metrics.outcome import Outcome
from harmonia.metrics.shared_counters import RouteCounters
from harmonia.server.http.response_cache import StillValid, around_date
from harmonia.server.http.sanic_adapter import Upload, date, reader_of

MAX_BODY_BYTES = 256 * 1024
"""Length up to which a body is received whole."""

_MAX_KINDS = 256
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,6})(?=\r\n)", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue(?=\r\n)", re.IGNORECASE)

Store = Callable[[str, bytes | bytearray], Awaitable[Callable[[], object]]]
"""Stores the body of an upload under the name of its resource. After any error, Sanic has to handle the upload.

Returns a function that counts the upload: if storing took long, Sanic has stored it again, and counts it.
"""


@dataclass(frozen=True, slots=True)
class _Kind:
    store: Store
    readmit: StillValid
    route: RouteCounters
    before: bytes
    """The head of the response before the value of Date."""
    after: bytes


@dataclass(slots=True)
class SmallUpload(Upload):
    """An upload whose body is arriving, or is being stored."""

    is_awaited: bool
    _kind: _Kind
    _name: str
    _head: bytes
    left: int
    rest: bytes = b""
    _body: bytearray = field(default_factory=bytearray)
    _began: float = field(default_factory=time.perf_counter)
    _count: Callable[[], object] | None = None

    def receive(self, data: bytes) -> None:
        if self.left:  # otherwise, a thread may be reading the body, whose length must not change
            self._body += data[: self.left]
        self.rest += data[self.left :]
        self.left = max(0, self.left - len(data))

    @property
    def received(self) -> bytes:
        return b"".join((_EXPECT.sub(b"", self._head), self._body, self.rest))

    async def store(self) -> None:
        self._kind.route.begin()
        try:
            self._count = await self._kind.store(self._name, self._body)
        finally:
            self._kind.route.end()

    def response(self) -> bytes:
        if self._count is not None:
            self._count()
        self._kind.route.count(HTTPStatus.OK, Outcome.NONE, 0, time.perf_counter() - self._began, None)
        return b"%b%b%b" % (self._kind.before, date().encode(), self._kind.after)


class SmallUploads:
    """The kinds of small uploads of a worker."""

    def __init__(self, target: re.Pattern[bytes]) -> None:
        """Accept uploads to `target`. The only group that matches is the name of the resource."""
        self._request_line = re.compile(rb"PUT (?:%b) HTTP/1\.1\r\n" % target.pattern)
        self._kinds: MutableMapping[bytes, _Kind] = FIFOCache(_MAX_KINDS)

    def begin(self, data: bytes) -> SmallUpload | None:
        """Return the upload that begins with these bytes, a PUT, or None if Sanic has to receive it."""
        if (end := data.find(_END)) < 0:
            return None
        end += len(_END)
        key, name, size = self._parts(data[:end]) or (b"", "", 0)
        kind = self._kinds.get(key)
        if kind is None or not kind.readmit() or not 0 < size <= MAX_BODY_BYTES:
            return None
        upload = SmallUpload(_EXPECT.search(data, 0, end) is not None, kind, name, data[:end], size)
        upload.receive(data[end:])
        return upload

    def remember(self, request: Request, sent: bytes) -> None:
        """Learn from the response to an upload, if its handler can store similar ones."""
        found: tuple[Store, RouteCounters] | None = getattr(request.ctx, "store", None)
        if found is None or reader_of(request).response.status != HTTPStatus.OK or not reader_of(request).keep_alive:
            return
        if parts := self._parts(request.head + _END):
            self._kinds[parts[0]] = _Kind(found[0], request.ctx.readmit, found[1], *around_date(sent))

    def _parts(self, head: bytes) -> tuple[bytes, str, int] | None:
        """Return a head without name and length, the name, and the length. Return None for other requests."""
        line, length = self._request_line.match(head), _LENGTH.search(head)
        if line is None or length is None:
            return None
        name = line.span(line.lastindex or 0)
        key = head[: name[0]] + head[name[1] : length.start(1)] + head[length.end(1) :]
        return key, head[slice(*name)].decode(), int(length[1])
