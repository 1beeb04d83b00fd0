"""The head of a request, held to RFC 9112.

Sanic forgives much, and a proxy forgives other things. Where the two see different requests in the same bytes, one
client can have its request answered to another (section 11.2, "request smuggling"). So nothing is forgiven that two
readers may take differently: it is refused, and nothing that follows on the connection is read as a request.
"""

import re

from sanic.exceptions import BadRequest, SanicException
from sanic.http import Http as SanicHttp

_AUTHORITY = rb"(?:[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_TARGET = rb'(?:/[!"$-~]*|(?i:https?)://' + _AUTHORITY + rb'(?:[/?][!"$-~]*)?|\*)'
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# No space before a colon, no line that goes on with the next, no line feed or other control character on its own.
_HEAD = re.compile(rb"[A-Z_-]{1,32} " + _TARGET + rb" HTTP/1\.[01](?:\r\n" + _TOKEN + rb":[\t -~\x80-\xff]*)*")
_HOST = re.compile(r"[!$%&'()*+,.0-9:;=A-Z\[\]_a-z~-]*")
_LENGTH = re.compile("[0-9]{1,18}", re.ASCII)
_TLS = b"\x16"  # how a client begins that takes this port for one of HTTPS, and then waits (RFC 8446 section 5.1)


class Http(SanicHttp):
    """Sanic's reader of one connection, for heads that all read alike.

    Nobody uploads. After a request with a body, which is answered, the connection ends.
    """

    async def http1_request_header(self) -> None:
        if self.recv_buffer.startswith(_TLS):
            raise BadRequest
        try:
            await super().http1_request_header()  # type: ignore[no-untyped-call]
        finally:
            self.expecting_continue = False  # Sanic would send 100 right before any answer, which asks for no body
        self.head_only = self.request.method == "HEAD"  # Sanic takes `head` for the same
        self.upgrade_websocket = False  # it would lift the time limits
        headers = self.request.headers
        if self.request_bytes_left or any(value.lower() == "close" for value in headers.getall("connection", [])):
            self.keep_alive = False
        try:
            hosts = headers.getall("host", [])
            if (
                not _HEAD.fullmatch(self.request.head)
                or len(hosts) > 1
                or not (hosts or self.request.version == "1.0")
                or not all(map(_HOST.fullmatch, hosts))
                or not _LENGTH.fullmatch(headers.get("content-length", "0").rstrip(" \t"))
            ):
                raise BadRequest
            if "transfer-encoding" in headers:
                raise SanicException(status_code=411)
        except SanicException:
            self.request_body = None  # whatever its length may be
            raise
