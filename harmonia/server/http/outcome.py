"""Cache outcome of a request, for metrics, access log and debug log."""

from http import HTTPStatus
from typing import cast

from sanic import Request

from harmonia.metrics.outcome import Outcome
from harmonia.process import request_trace


def decide(request: Request, outcome: Outcome, why: str, *arguments: object) -> None:
    """Note where the body of the response comes from, and log why. A later call replaces an earlier one."""
    request.ctx.outcome = outcome
    request_trace.log.debug(f"from %s: {why}", outcome, *arguments)


def of(request: Request, status: int, default: Outcome) -> Outcome:
    """Return the outcome of a request, `default` if none was noted, NONE without a body of the resource."""
    if status >= HTTPStatus.MULTIPLE_CHOICES:
        return Outcome.NONE
    return cast("Outcome", getattr(request.ctx, "outcome", default))
