"""What goes wrong, as a status: decided here and nowhere else. The log gets the detail, the client the phrase."""

import logging
from http import HTTPStatus
from typing import cast

from sanic import HTTPResponse, Request
from sanic.exceptions import SanicException

from harmonia.errors import SHORTAGES, CacheFileError, StoreObjectError, StoreUnavailableError, UpstreamError
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.negotiation import prefers_html
from harmonia.server.http.response import Representation

_NO_THREAD = "can't start new thread"  # Python's words, where memory or tasks are short

_EXPLAINED = {
    HTTPStatus.UNAUTHORIZED: "This cache is for those who have a token. It is the password, whatever the name.",
    HTTPStatus.FORBIDDEN: "The token is a right one, but not good for this.",
    HTTPStatus.NOT_FOUND: "This cache has nothing of that name, or cannot give it out.",
    HTTPStatus.TOO_MANY_REQUESTS: "That was more than one may ask in a short time. Try again in a while.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "This is a fault of the server. Its log says more.",
    HTTPStatus.SERVICE_UNAVAILABLE: "This cannot be told just now. Try again in a moment.",
}
"""In words for people. All others only get what Python has to say of them."""

_log = logging.getLogger("harmonia")


def response(context: ServerContext, request: Request, error: Exception) -> HTTPResponse:
    """The response that tells of `error`, which is logged where it is not the client's own affair."""
    headers = {"cache-control": "no-store", "vary": "Accept"}
    match error:
        case SanicException():
            status = HTTPStatus(error.status_code)
            headers |= {name.lower(): str(value) for name, value in error.headers.items()}
            if "allow" in headers:  # Sanic's is in any order
                headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
        case StoreUnavailableError() | CacheFileError() | MemoryError():
            status = HTTPStatus.SERVICE_UNAVAILABLE
        case OSError() if error.errno in SHORTAGES:
            status = HTTPStatus.SERVICE_UNAVAILABLE
        case RuntimeError() if str(error) == _NO_THREAD:
            status = HTTPStatus.SERVICE_UNAVAILABLE
        case OSError() | StoreObjectError() | UpstreamError():
            # Nothing that another try would mend, and Nix goes on to the next cache only after a 404.
            status = HTTPStatus.NOT_FOUND
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = "1"
    # Sanic makes errors of its own of a client that went away while it was answered.
    gone = request.transport is None or request.transport.is_closing()
    if not isinstance(error, SanicException) or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and not gone):
        unexpected = error if status is HTTPStatus.INTERNAL_SERVER_ERROR else None
        what = str(error) or type(error).__name__
        _log.error("%s %s: %d, %s", request.method, request.path, status, what, exc_info=unexpected)
    if prefers_html(",".join(request.headers.getall("accept", []))):
        shown = _page(context, request, status)
        return HTTPResponse(cast("bytes", shown.body), status, {**headers, **shown.headers}, shown.content_type)
    return HTTPResponse(f"{status.phrase}\n", status, headers, content_type="text/plain; charset=utf-8")


def _page(context: ServerContext, request: Request, status: HTTPStatus) -> Representation:
    document = page.begin(context, status.phrase, "../" * (request.path.count("/") - 1) or "./")
    with document.main:
        document.h1(status.phrase)
        document.p(_EXPLAINED.get(status, f"{status.description}."))
    return page.end(context, document)
