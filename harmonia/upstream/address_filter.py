"""How far an upstream reaches through us: not from outside into the network that we are in.

Who redirects us, or names another host in a narinfo, could otherwise have us ask what answers nobody but us. What
counts is the address that is connected to, whatever name led there.
"""

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp import AddrInfoType

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

    def here(self, address: AddrInfoType) -> socket.socket:
        """To the upstream itself: wherever the configuration says."""
        self._outside |= is_outside(address[4][0])
        return socket.socket(*address[:3])

    def elsewhere(self, address: AddrInfoType) -> socket.socket:
        """To where the upstream leads. InsideError where that is inside, and the upstream is not."""
        if self._outside and not is_outside(address[4][0]):
            raise InsideError("it leads from outside to an address inside")
        return socket.socket(*address[:3])


def is_outside(address: str) -> bool:
    """Whether it is an address of the Internet, and of no network in particular."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        nat64 = IPv4Address(ip.packed[-4:]) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not ip.is_multicast and not getattr(ip, "is_site_local", False)
