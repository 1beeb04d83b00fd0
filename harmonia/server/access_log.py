"""The access log: one line for each request, to the logger `harmonia.access`."""

import ipaddress
import logging
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, cast

from sanic import HTTPResponse, Request

if TYPE_CHECKING:
    from sanic.http import Http

_log = logging.getLogger("harmonia.access")


def client(request: Request, trusted: Sequence[str]) -> str:
    """Who asked: the peer, or the last in X-Forwarded-For that no trusted proxy vouches to be a proxy itself.

    What is no IP address there names nobody: then it is the proxy that passed it on.
    """
    networks = [ipaddress.ip_network(network) for network in trusted if network != "unix"]
    peer = cast("Http", request.stream).protocol.conn_info
    address = _ip(peer.client_ip if peer else "")
    is_proxy = any(address in network for network in networks) if address else "unix" in trusted
    for hop in reversed(",".join(request.headers.getall("x-forwarded-for", [])).split(",")):
        forwarded = _ip(hop)
        if not is_proxy or forwarded is None:
            break
        address = forwarded
        is_proxy = any(address in network for network in networks)
    return str(address or "unix")


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(text.strip().partition("%")[0])  # a zone is any text
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip  # an IPv4 peer on a dual-stack socket


def log(request: Request, response: HTTPResponse | None, trusted: Sequence[str]) -> None:
    """Log a request with its status, the bytes of body sent, and the milliseconds from its head to now."""
    if not _log.isEnabledFor(logging.INFO):
        return
    stream = cast("Http", request.stream)
    answer = response or stream.response
    sent = getattr(request.ctx, "sent", 0 if request.method == "HEAD" else len(answer.body or b""))
    milliseconds = (perf_counter() - (stream.perft0 or perf_counter())) * 1000
    agent = request.headers.get("user-agent", "-")
    # What the client wrote is quoted, so that no byte of it can pass for a line of ours.
    _log.info(
        "%s %r %d %d %.1fms %r",
        client(request, trusted),
        f"{request.method} {stream.url}",
        answer.status,
        sent,
        milliseconds,
        agent,
    )
