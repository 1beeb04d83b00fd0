"""What goes wrong, as a status: decided here and nowhere else. The log gets the detail, the client the phrase."""

import logging
from http import HTTPStatus

from sanic import HTTPResponse, Request
from sanic.exceptions import SanicException

from harmonia.errors import SHORTAGES, StoreObjectError, StoreUnavailableError, UpstreamError

_NO_THREAD = "can't start new thread"  # Python's words, where memory or tasks are short

_log = logging.getLogger("harmonia")


def response(request: Request, error: Exception) -> HTTPResponse:
    """The response that tells of `error`, which is logged where it is not the client's own affair."""
    headers = {"cache-control": "no-store"}
    match error:
        case SanicException():
            status = HTTPStatus(error.status_code)
            headers |= {name.lower(): str(value) for name, value in error.headers.items()}
            if "allow" in headers:  # Sanic's is in any order
                headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
        case StoreUnavailableError() | MemoryError():
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
    return HTTPResponse(f"{status.phrase}\n", status, headers, content_type="text/plain; charset=utf-8")
