"""Access log: one line for each request, to the logger `harmonia.access`."""

import ipaddress
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter

from sanic import Request

from harmonia.metrics.outcome import Outcome
from harmonia.process import request_trace
from harmonia.server.http import sanic_adapter

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

_REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)

_log = logging.getLogger("harmonia.access")


def client(request: Request, trusted: Sequence[str]) -> str:
    """Return the address of the client, or "unix" for a peer on a Unix socket.

    The client is the peer. If the peer is a trusted proxy, the client is the last address in X-Forwarded-For that is
    not a trusted proxy. An entry that is not an IP address ends the search: then the client is the proxy before it.
    """
    address = _peer(request)
    is_proxy = _is_proxy(address, trusted)
    for hop in reversed(sanic_adapter.field_value(request, "x-forwarded-for").split(",")):
        if not is_proxy or (forwarded := _ip(hop)) is None:
            break
        address = forwarded
        is_proxy = _is_proxy(address, trusted)
    return str(address or "unix")


def from_proxy(request: Request, trusted: Sequence[str]) -> bool:
    """Return True if the peer of the request's connection is a trusted proxy."""
    return _is_proxy(_peer(request), trusted)


def single_client(peername: object, trusted: Sequence[str]) -> str | None:
    """Return the address of a connection's peer, or None if it may stand for many clients.

    That is a trusted proxy, or a peer on a Unix socket.
    """
    address = _ip(str(peername[0])) if isinstance(peername, tuple) else None
    return None if address is None or _is_proxy(address, trusted) else str(address)


def _peer(request: Request) -> _Ip | None:
    """Return the address of the peer, or None for a Unix socket."""
    peer = sanic_adapter.connection_of(request)
    return _ip(peer.client_ip if peer else "")


def _is_proxy(address: _Ip | None, trusted: Sequence[str]) -> bool:
    if address is None:
        return "unix" in trusted
    return any(address in ipaddress.ip_network(network) for network in trusted if network != "unix")


@lru_cache(256)  # to parse an address takes 20 µs
def _ip(text: str) -> _Ip | None:
    try:
        ip = ipaddress.ip_address(text.strip().partition("%")[0])  # a zone may be any text
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip  # an IPv4 peer on a dual-stack socket


def request_id(request: Request) -> str | None:
    """Return X-Request-ID, which a proxy may set, or None if it is missing, malformed or longer than 128 characters."""
    value = request.headers.get("x-request-id", "")
    return value if _REQUEST_ID.fullmatch(value) else None


def begin_trace(request: Request) -> None:
    """Let the debug log name this request from now on."""
    request_trace.begin(request_id(request), f"{request.method} {sanic_adapter.reader_of(request).url}")


def log(request: Request, route: str, status: int, outcome: Outcome, sent: int, trusted: Sequence[str]) -> None:
    """Log a request: status, outcome, bytes of body sent, seconds since its head was read, and what else is known.

    `route` is its label in the metrics.
    """
    if not _log.isEnabledFor(logging.INFO):
        return
    now = perf_counter()
    began = sanic_adapter.began_at(request) or now
    first_byte_at = getattr(request.ctx, "head_at", None)
    token = getattr(request.ctx, "token", None)
    fields = {
        "client": client(request, trusted),
        "method": request.method,
        "url": sanic_adapter.reader_of(request).url,
        "route": route,
        "status": status,
        "outcome": str(outcome),
        "sent": sent,
        "seconds": round(now - began, 6),
        "first_byte_seconds": round((first_byte_at or now) - began, 6),
        "agent": request.headers.get("user-agent", "-"),
    }
    if token is not None:
        fields["token"] = token.name
    if (sent_id := request_id(request)) is not None:
        fields["request_id"] = sent_id
    if getattr(request.ctx, "left", False):
        fields["client_left"] = True
    # Text from the client is quoted, so that a client cannot forge log lines.
    _log.info(
        "%s %r %d %d %.1fms %r route=%s outcome=%s first_byte=%.1fms%s%s%s",
        fields["client"],
        f"{fields['method']} {fields['url']}",
        status,
        sent,
        1000 * (now - began),
        fields["agent"],
        route,
        outcome,
        1000 * ((first_byte_at or now) - began),
        "" if token is None else f" token={token.name}",
        "" if sent_id is None else f" request_id={sent_id}",
        " client_left" if "client_left" in fields else "",
        extra={"fields": fields},
    )
