"""Strict parsing of request heads, by RFC 9112.

Sanic accepts many malformed requests, and a proxy accepts others. If the two read different requests from the same
bytes, one client can get the response for another client (section 11.2, "request smuggling"). Therefore, a head that
two parsers may read differently is refused, and no further request is read from the connection.
"""

import re
from http import HTTPMethod

from sanic.exceptions import BadRequest, PayloadTooLarge, SanicException
from sanic.http import Http as SanicHttp

_HOST = rb"(?:(?:[!$&'()*+,.0-9;=A-Z_a-z~-]|%[0-9A-Fa-f]{2})+|\[[0-9A-Za-z:.!$&'()*+,;=_~-]+\])(?::[0-9]{0,5})?"
_TARGET = rb'(?:/[!"$-~]*|(?i:https?)://' + _HOST + rb'(?:[/?][!"$-~]*)?|\*)'
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# Forbidden: a space before a colon, a folded line, a bare line feed, and any other control character.
_HEAD = re.compile(_TOKEN + b" " + _TARGET + rb" HTTP/1\.[0-9](?:\r\n" + _TOKEN + rb":[\t -~\x80-\xff]*)*")
_REQUEST_LINE = re.compile(b"(?P<method>" + _TOKEN + rb") [!-~]+ HTTP/(?P<major>[0-9])\.(?P<minor>[0-9])\r\n")
_CODINGS = re.compile(
    rb"\r\ntransfer-encoding:[ \t]*(" + _TOKEN + rb"(?:[ \t]*,[ \t]*" + _TOKEN + rb")*)[ \t]*(?=\r\n)", re.IGNORECASE
)
_ABSOLUTE = re.compile(r"[^:/?*]+://(?P<host>[^/?]+)")
_HOST_FIELD = re.compile(f"(?:{_HOST.decode()})?")
_LENGTH = re.compile("[0-9]{1,18}", re.ASCII)
_TLS = b"\x16"  # first byte of a TLS handshake (RFC 8446 section 5.1): the client expects HTTPS on this port

_WEBDAV = ("COPY", "LOCK", "MKCOL", "MOVE", "PROPFIND", "PROPPATCH", "REPORT", "SEARCH", "UNLOCK")
_METHODS = {*HTTPMethod, *_WEBDAV, "QUERY"}


class Http(SanicHttp):
    """Sanic's request reader for one connection, with strict parsing of heads.

    A request with a body is answered, then the connection closes, unless its handler accepts the body.
    """

    __slots__ = ("_is_persistent", "is_awaited")
    is_awaited: bool
    """True if the client waits for a response before it sends the body."""
    _is_persistent: bool

    def accept_body(self) -> None:
        """Let the handler read the body. A client that expects it gets 100 Continue (RFC 9110 section 10.1.1)."""
        self.expecting_continue, self.is_awaited = self.is_awaited, False
        self.keep_alive = self._is_persistent

    async def http1_request_header(self) -> None:
        await self._skip_empty_lines()
        try:
            await self._read_head()
        finally:
            self.is_awaited = self.expecting_continue
            self.expecting_continue = False  # otherwise, Sanic sends 100 before any response
        self.head_only = self.request.method == "HEAD"  # Sanic also accepts `head`
        self.upgrade_websocket = False  # an upgrade would remove the timeouts
        headers = self.request.headers
        options = {option.strip(" \t").lower() for option in ",".join(headers.getall("connection", [])).split(",")}
        persistent = self.request.version != "1.0" or "keep-alive" in options
        self._is_persistent = persistent and "close" not in options
        self.keep_alive = self._is_persistent and not self.request_bytes_left
        try:
            self._check_head()
        except SanicException:
            self.request_body = None  # do not read the body, whose length is not trusted
            raise

    async def _skip_empty_lines(self) -> None:
        """Skip empty lines, which some clients send after a body (RFC 9112 section 2.2)."""
        buffer = self.recv_buffer
        while buffer in (b"", b"\r") or buffer.startswith(b"\r\n"):
            if buffer.startswith(b"\r\n"):
                del buffer[:2]
            else:
                await self._receive_more()

    async def _read_head(self) -> None:
        buffer = self.recv_buffer
        if buffer.startswith(_TLS):
            raise BadRequest
        try:
            await self._read_request_line()
            await super().http1_request_header()  # type: ignore[no-untyped-call]
        except PayloadTooLarge:
            raise SanicException(status_code=431 if b"\r\n" in buffer[: self.HEADER_MAX_SIZE] else 414) from None
        except BadRequest:
            raise SanicException(status_code=_status_of_malformed(bytes(buffer.partition(b"\r\n\r\n")[0]))) from None

    async def _read_request_line(self) -> None:
        """Refuse methods and versions that we do not implement, before Sanic misreads them."""
        buffer = self.recv_buffer
        while b"\r\n" not in buffer and len(buffer) < self.HEADER_MAX_SIZE:
            await self._receive_more()
        line = _REQUEST_LINE.match(buffer)
        if line is None:
            return  # Sanic refuses this line
        if line["major"] != b"1":
            raise SanicException(status_code=505)
        if line["method"] == b"CONNECT":  # only for proxies; Sanic cannot parse its target
            raise SanicException(status_code=501)
        if line["minor"] not in b"01":
            buffer[line.start("minor") : line.end("minor")] = b"1"  # the highest we implement (RFC 9110 section 2.5)

    def _check_head(self) -> None:
        request = self.request
        hosts = request.headers.getall("host", [])
        if (
            not _HEAD.fullmatch(request.head)
            or len(hosts) > 1
            or not (hosts or request.version == "1.0")
            or not all(map(_HOST_FIELD.fullmatch, hosts))
            or not _LENGTH.fullmatch(request.headers.get("content-length", "0").rstrip(" \t"))
            or (self.url == "*" and request.method != "OPTIONS")
        ):
            raise BadRequest
        if request.method not in _METHODS:
            raise SanicException(status_code=501)
        if "transfer-encoding" in request.headers:
            raise SanicException(status_code=411)
        if absolute := _ABSOLUTE.match(self.url or ""):  # its host replaces the field Host (RFC 9112 section 3.2.2)
            request.headers["host"] = absolute["host"]


def _status_of_malformed(head: bytes) -> int:
    """Return the status for a head that Sanic refused.

    That is 411 or 501 if only the transfer coding is not supported (RFC 9112 section 6), otherwise 400.
    """
    codings = _CODINGS.findall(head + b"\r\n")
    if len(codings) != 1 or b"\r\ncontent-length:" in head.lower():
        return 400
    *others, last = (coding.strip(b" \t").lower() for coding in codings[0].split(b","))
    if last != b"chunked":
        return 400
    return 501 if others else 411
