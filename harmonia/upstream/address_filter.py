"""How far an upstream reaches through us: not from outside into the network that we are in.

Who redirects us, or names another host in a narinfo, could otherwise have us ask what answers nobody but us. What
counts is the address that is connected to, whatever name led there.
"""

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp import AddrInfoType

_LOCAL_DOMAINS = ("localhost", "local", "internal", "home.arpa")
"""Names of no network but the one that a machine is in (RFC 6761, 6762, 8375, and ICANN for `internal`)."""
_NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052 section 2.1: the last four bytes are an IPv4 address."""


class InsideError(OSError):
    """An upstream outside leads to an address inside."""


class Reach:
    """Of one upstream. The methods make the sockets of aiohttp's connectors.

    It is inside as long as no address of its own was outside: whoever answers for its name there would only have to
    name, once, an address inside.
    """

    def __init__(self) -> None:
        self._outside = False
        self._judged = False  # for requests through a proxy

    def here(self, address: AddrInfoType) -> socket.socket:
        """To the upstream itself: wherever the configuration says."""
        self._outside |= is_outside(address[4][0])
        return socket.socket(*address[:3])

    def elsewhere(self, address: AddrInfoType) -> socket.socket:
        """To where the upstream leads. InsideError where that is inside, and the upstream is not."""
        if self._outside and not is_outside(address[4][0]):
            raise InsideError("it leads from outside to an address inside")
        return socket.socket(*address[:3])

    async def through_proxy(self, host: str, *, here: bool) -> None:
        """Judge a host that a proxy connects to, by its name and the addresses that we find for it.

        Nothing may be found behind a proxy. An upstream without an address counts as outside, unless its name is local.
        Raises InsideError like `elsewhere`, unless it is the upstream itself (`here`).
        """
        if here and self._judged:
            return
        found = await _addresses(host)
        if here:
            self._judged = True
            self._outside |= any(map(is_outside, found)) or not (found or is_local(host))
        elif self._outside and (is_local(host) or not all(map(is_outside, found))):
            raise InsideError("it leads from outside to an address inside")


async def _addresses(host: str) -> list[str]:
    """Return the addresses of a host as far as we find any."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]).partition("%")[0] for *_, address in found]


def is_local(host: str) -> bool:
    """Return whether a name means something else in each network."""
    name = host.lower().rstrip(".")
    is_address = ":" in name
    return not is_address and ("." not in name or f".{name}".endswith(tuple(f".{each}" for each in _LOCAL_DOMAINS)))


def is_outside(address: str) -> bool:
    """Whether it is an address of the Internet, and of no network in particular."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        nat64 = IPv4Address(ip.packed[-4:]) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not ip.is_multicast and not getattr(ip, "is_site_local", False)
