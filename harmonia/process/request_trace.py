"""Log of the decisions about each request, at the level `debug`: one line each, with the request and its id.

The request is in a context variable, so that every coroutine and task of a request can log without knowing it.
"""

import logging
from contextvars import ContextVar
from typing import NamedTuple

log = logging.getLogger("harmonia.request")
"""The logger of decisions. Its messages get the current request as a prefix."""


class _Request(NamedTuple):
    id: str | None
    line: str


_current: ContextVar[_Request | None] = ContextVar("request", default=None)


def is_on() -> bool:
    """Return True if decisions are logged."""
    return log.isEnabledFor(logging.DEBUG)


def begin(request_id: str | None, line: str) -> None:
    """Let `line`, the method and URL of a request, and its id precede what this task and its children log."""
    _current.set(_Request(request_id, line))


class _Prefix(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        request = _current.get()
        if request is not None:
            message = record.getMessage()
            mark = "" if request.id is None else f"[{request.id}] "
            record.msg, record.args = "%s", (f"{mark}{request.line}: {message}",)
            record.request_id = request.id
        return True


log.addFilter(_Prefix())
