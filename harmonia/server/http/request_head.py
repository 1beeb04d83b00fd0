"""The head of a request, held to RFC 9112.

Sanic forgives much, and a proxy forgives other things. Where the two see different requests in the same bytes, one
client can have its request answered to another (section 11.2, "request smuggling"). So nothing is forgiven that two
readers may take differently: it is refused, and nothing that follows on the connection is read as a request.
"""

import re
from http import HTTPMethod

from sanic.exceptions import BadRequest, PayloadTooLarge, SanicException
from sanic.http import Http as SanicHttp

_HOST = rb"(?:(?:[!$&'()*+,.0-9;=A-Z_a-z~-]|%[0-9A-Fa-f]{2})+|\[[0-9A-Za-z:.!$&'()*+,;=_~-]+\])(?::[0-9]{0,5})?"
_TARGET = rb'(?:/[!"$-~]*|(?i:https?)://' + _HOST + rb'(?:[/?][!"$-~]*)?|\*)'
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# No space before a colon, no line that goes on with the next, no line feed or other control character on its own.
_HEAD = re.compile(_TOKEN + b" " + _TARGET + rb" HTTP/1\.[0-9](?:\r\n" + _TOKEN + rb":[\t -~\x80-\xff]*)*")
_REQUEST_LINE = re.compile(b"(?P<method>" + _TOKEN + rb") [!-~]+ HTTP/(?P<major>[0-9])\.(?P<minor>[0-9])\r\n")
_CODINGS = re.compile(
    rb"\r\ntransfer-encoding:[ \t]*(" + _TOKEN + rb"(?:[ \t]*,[ \t]*" + _TOKEN + rb")*)[ \t]*(?=\r\n)", re.IGNORECASE
)
_ABSOLUTE = re.compile(r"[^:/?*]+://(?P<host>[^/?]+)")
_HOST_FIELD = re.compile(f"(?:{_HOST.decode()})?")
_LENGTH = re.compile("[0-9]{1,18}", re.ASCII)
_TLS = b"\x16"  # how a client begins that takes this port for one of HTTPS, and then waits (RFC 8446 section 5.1)

_WEBDAV = ("COPY", "LOCK", "MKCOL", "MOVE", "PROPFIND", "PROPPATCH", "REPORT", "SEARCH", "UNLOCK")
_METHODS = {*HTTPMethod, *_WEBDAV, "QUERY"}


class Http(SanicHttp):
    """Sanic's reader of one connection, for heads that all read alike.

    Nobody uploads. After a request with a body, which is answered, the connection ends.
    """

    async def http1_request_header(self) -> None:
        await self._skip_empty_lines()
        try:
            await self._read_head()
        finally:
            self.expecting_continue = False  # Sanic would send 100 right before any answer, which asks for no body
        self.head_only = self.request.method == "HEAD"  # Sanic takes `head` for the same
        self.upgrade_websocket = False  # it would lift the time limits
        headers = self.request.headers
        options = {option.strip(" \t").lower() for option in ",".join(headers.getall("connection", [])).split(",")}
        persistent = self.request.version != "1.0" or "keep-alive" in options
        self.keep_alive = persistent and "close" not in options and not self.request_bytes_left
        try:
            self._check_head()
        except SanicException:
            self.request_body = None  # whatever its length may be
            raise

    async def _skip_empty_lines(self) -> None:
        """Skip what some clients send after a body (RFC 9112 section 2.2)."""
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
        """Refuse a method and a version that we do not implement, before Sanic takes them for something else."""
        buffer = self.recv_buffer
        while b"\r\n" not in buffer and len(buffer) < self.HEADER_MAX_SIZE:
            await self._receive_more()
        line = _REQUEST_LINE.match(buffer)
        if line is None:
            return  # Sanic refuses it
        if line["major"] != b"1":
            raise SanicException(status_code=505)
        if line["method"] == b"CONNECT":  # it is for proxies, and has no target that Sanic could read
            raise SanicException(status_code=501)
        if line["minor"] not in b"01":
            buffer[line.start("minor") : line.end("minor")] = b"1"  # the highest that we know (RFC 9110 section 2.5)

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
        if absolute := _ABSOLUTE.match(self.url or ""):  # its host counts, and no other (RFC 9112 section 3.2.2)
            request.headers["host"] = absolute["host"]


def _status_of_malformed(head: bytes) -> int:
    """Return 400 for a head that Sanic refused, unless only its transfer coding is to blame (RFC 9112 section 6)."""
    codings = _CODINGS.findall(head + b"\r\n")
    if len(codings) != 1 or b"\r\ncontent-length:" in head.lower():
        return 400
    *others, last = (coding.strip(b" \t").lower() for coding in codings[0].split(b","))
    if last != b"chunked":
        return 400
    return 501 if others else 411
