"""Error responses: the only place that maps errors to HTTP status codes. Details go to the log, not to the client."""

import logging
import re
from http import HTTPStatus
from typing import cast

from sanic import HTTPResponse, Request
from sanic.exceptions import SanicException

from harmonia.errors import (
    SHORTAGES,
    CacheFileError,
    EventLogError,
    RequestRefusedError,
    StoreObjectError,
    StoreUnavailableError,
    UpstreamError,
)
from harmonia.nix.base32 import ALPHABET
from harmonia.nix.store_path import HASH_PART_LENGTH
from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.negotiation import prefers_html
from harmonia.server.http.response import Representation
from harmonia.server.http.sanic_adapter import field_value

_NO_THREAD = "can't start new thread"  # Python's message if memory or tasks are exhausted

_MAX_REFUSAL_CHARS = 800

_OF_PATH = re.compile(f"/([{ALPHABET}]{{{HASH_PART_LENGTH}}})(?:[.]narinfo|[.]ls)?$")  # also of /path and /serve

_EXPLANATIONS = {
    HTTPStatus.UNAUTHORIZED: "Sign in with a token: any user name, the token as password.",
    HTTPStatus.FORBIDDEN: "Your token is valid, but does not allow this page.",
    HTTPStatus.NOT_FOUND: "This path is not in the cache, or it may not be served.",
    HTTPStatus.TOO_MANY_REQUESTS: "Too many requests in a short time. Try again later.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The server failed because of a bug. Its log has the details.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Temporarily unavailable. Try again in a moment.",
}
"""Texts for people. Other statuses show Python's description of the status."""

_PUSH_REMEDIES = {
    HTTPStatus.UNAUTHORIZED: "no valid token; put one with the scope push into the netrc-file of your Nix",
    HTTPStatus.FORBIDDEN: "the token lacks the scope push; make another with `harmonia token NAME --scope push`",
    HTTPStatus.NOT_FOUND: "no such upload in a binary cache; push with `nix copy` or `harmonia push`",
    HTTPStatus.METHOD_NOT_ALLOWED: "no such method here; push with `nix copy` or `harmonia push`",
    HTTPStatus.LENGTH_REQUIRED: "send Content-Length; a proxy in front of the server must not remove it",
    HTTPStatus.TOO_MANY_REQUESTS: "too many requests or invalid tokens; push again after Retry-After",
}
"""Remedies for pushers, to whom Nix shows the text."""

_REFUSED = {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED}
"""Statuses from 500 that say that the request is wrong. Anyone could fill the log with them."""

_log = logging.getLogger("harmonia")


def response(context: ServerContext, request: Request, error: Exception) -> HTTPResponse:
    """Return the response for an error, as HTML or plain text. Logs the error, unless the client caused it."""
    headers = {"cache-control": "no-store", "vary": "Accept"}
    if isinstance(error, RequestRefusedError):  # `nix copy` shows up to 1 KiB of the text
        text = f"{' '.join(str(error).split())[:_MAX_REFUSAL_CHARS]}\n"
        return HTTPResponse(text, error.status, headers, content_type="text/plain; charset=utf-8")
    status = _status(error)
    if isinstance(error, SanicException):
        headers |= {name.lower(): str(value) for name, value in error.headers.items()}
        if "allow" in headers:  # Sanic's order varies
            headers["allow"] = ", ".join(sorted(headers["allow"].split(", ")))
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = "1"
    # Sanic raises errors of its own if the client disconnects during a response.
    disconnected = request.transport is None or request.transport.is_closing()
    is_ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _REFUSED
    if not isinstance(error, SanicException) or (is_ours and not disconnected):
        unexpected = error if status is HTTPStatus.INTERNAL_SERVER_ERROR else None
        cause = str(error) or type(error).__name__
        _log.error("%s %s: %d, %s", request.method, request.path, status, cause, exc_info=unexpected)
    if prefers_html(field_value(request, "accept")):
        html = _page(context, request, status)
        return HTTPResponse(cast("bytes", html.body), status, {**headers, **html.headers}, html.content_type)
    text = ": ".join(filter(None, (status.phrase, _push_remedy(context, request, status))))
    return HTTPResponse(f"{text}\n", status, headers, content_type="text/plain; charset=utf-8")


def _push_remedy(context: ServerContext, request: Request, status: HTTPStatus) -> str | None:
    """Return what a pusher should do, or None if the request is not one of a pusher, or there is nothing to say."""
    if not (context.settings.push.enable and request.path.startswith("/push/")):
        return None
    if status is HTTPStatus.NOT_FOUND and request.method != "PUT":  # Nix looks for what it may upload
        return None
    return _PUSH_REMEDIES.get(status)


def _status(error: Exception) -> HTTPStatus:
    match error:
        case SanicException():
            return HTTPStatus(error.status_code)
        case StoreUnavailableError() | CacheFileError() | EventLogError() | MemoryError():
            return HTTPStatus.SERVICE_UNAVAILABLE
        case OSError() if error.errno in SHORTAGES:
            return HTTPStatus.SERVICE_UNAVAILABLE
        case RuntimeError() if str(error) == _NO_THREAD:
            return HTTPStatus.SERVICE_UNAVAILABLE
        case OSError() | StoreObjectError() | UpstreamError():
            # A retry would fail again, and Nix asks the next cache only after a 404.
            return HTTPStatus.NOT_FOUND
        case _:
            return HTTPStatus.INTERNAL_SERVER_ERROR


def _page(context: ServerContext, request: Request, status: HTTPStatus) -> Representation:
    top = "../" * (request.path.count("/") - 1) or "./"
    document = page.begin(context, request, status.phrase, top)
    with document.main:
        document.h1(status.phrase)
        document.p(_EXPLANATIONS.get(status, f"{status.description}."))
        links = {"How to use this cache": top} if context.settings.landing else {}
        if context.may_browse(request):
            links["Search the store"] = f"{top}search"
            if status is HTTPStatus.NOT_FOUND and (asked := _OF_PATH.search(request.path)):
                links["Why?"] = f"{top}explain/{asked[1]}"
        if links:
            with document.nav(class_="actions", aria_label="Other pages"):
                for text, reference in links.items():
                    document.a(text, href=reference)
    return page.end(context, document)
