"""Access log: one line for each request, to the logger `harmonia.access`."""

import ipaddress
import logging
from collections.abc import Sequence
from time import perf_counter

from sanic import Request

from harmonia.server.http import sanic_adapter

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

_log = logging.getLogger("harmonia.access")


def client(request: Request, trusted: Sequence[str]) -> str:
    """Return the address of the client, or "unix" for a peer on a Unix socket.

    The client is the peer. If the peer is a trusted proxy, the client is the last address in X-Forwarded-For that is
    not a trusted proxy. An entry that is not an IP address ends the search: then the client is the proxy before it.
    """
    address = _peer(request)
    is_proxy = _is_proxy(address, trusted)
    for hop in reversed(",".join(request.headers.getall("x-forwarded-for", [])).split(",")):
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


def _ip(text: str) -> _Ip | None:
    try:
        ip = ipaddress.ip_address(text.strip().partition("%")[0])  # a zone may be any text
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip  # an IPv4 peer on a dual-stack socket


def log(request: Request, status: int, sent: int, trusted: Sequence[str]) -> None:
    """Log a request: status, bytes of body sent, milliseconds since its head was read, and the name of its token."""
    if not _log.isEnabledFor(logging.INFO):
        return
    milliseconds = (perf_counter() - (sanic_adapter.began_at(request) or perf_counter())) * 1000
    agent = request.headers.get("user-agent", "-")
    # Text from the client is quoted, so that a client cannot forge log lines.
    token = getattr(request.ctx, "token", None)
    _log.info(
        "%s %r %d %d %.1fms %r%s",
        client(request, trusted),
        f"{request.method} {sanic_adapter.reader_of(request).url}",
        status,
        sent,
        milliseconds,
        agent,
        f" token={token.name}" if token is not None else "",
    )
