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
    """Who asked: the peer, or the last in X-Forwarded-For that no trusted proxy vouches to be a proxy itself.

    What is no IP address there names nobody: then it is the proxy that passed it on.
    """
    address = _peer(request)
    is_proxy = _is_proxy(address, trusted)
    for hop in reversed(",".join(request.headers.getall("x-forwarded-for", [])).split(",")):
        forwarded = _ip(hop)
        if not is_proxy or forwarded is None:
            break
        address = forwarded
        is_proxy = _is_proxy(address, trusted)
    return str(address or "unix")


def from_proxy(request: Request, trusted: Sequence[str]) -> bool:
    """Whether it was a trusted proxy that sent the request."""
    return _is_proxy(_peer(request), trusted)


def single_client(peername: object, trusted: Sequence[str]) -> str | None:
    """The address at the other end of a connection; None where that may be many: a proxy, or who uses a unix socket."""
    address = _ip(str(peername[0])) if isinstance(peername, tuple) else None
    return None if address is None or _is_proxy(address, trusted) else str(address)


def _peer(request: Request) -> _Ip | None:
    """None for a peer on a unix socket."""
    peer = sanic_adapter.connection_of(request)
    return _ip(peer.client_ip if peer else "")


def _is_proxy(address: _Ip | None, trusted: Sequence[str]) -> bool:
    if address is None:
        return "unix" in trusted
    return any(address in ipaddress.ip_network(network) for network in trusted if network != "unix")


def _ip(text: str) -> _Ip | None:
    try:
        ip = ipaddress.ip_address(text.strip().partition("%")[0])  # a zone is any text
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip  # an IPv4 peer on a dual-stack socket


def log(request: Request, status: int, sent: int, trusted: Sequence[str]) -> None:
    """Log a request with its status, the bytes of body sent, and the milliseconds from its head to now."""
    if not _log.isEnabledFor(logging.INFO):
        return
    milliseconds = (perf_counter() - (sanic_adapter.began_at(request) or perf_counter())) * 1000
    agent = request.headers.get("user-agent", "-")
    # What the client wrote is quoted, so that no byte of it can pass for a line of ours.
    _log.info(
        "%s %r %d %d %.1fms %r",
        client(request, trusted),
        f"{request.method} {sanic_adapter.reader_of(request).url}",
        status,
        sent,
        milliseconds,
        agent,
    )
