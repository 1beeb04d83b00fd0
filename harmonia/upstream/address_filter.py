"""SSRF protection: a public upstream must not make us connect to private addresses.

Otherwise, an upstream could redirect us, or name another host in a narinfo, to reach services of our own network. The
filter checks the IP address of each connection, not the host name.
"""

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp import AddrInfoType

_LOCAL_DOMAINS = ("localhost", "local", "internal", "home.arpa")
"""Top-level domains that each network defines for itself (RFC 6761, 6762, 8375, and ICANN for `internal`)."""
_NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052 section 2.1: the last four bytes are an IPv4 address."""


class PrivateAddressError(OSError):
    """A public upstream leads to a private address."""


class AddressFilter:
    """Address filter of one upstream. Two of its methods are socket factories for aiohttp's connectors.

    An upstream counts as public as soon as one of its own addresses is public, and from then on. Otherwise, its DNS
    could name a private address once, and then reach all other private addresses by redirects.
    """

    def __init__(self, *, is_public: bool = False) -> None:
        """Create a filter. With `is_public`, the upstream counts as public whatever its address is."""
        self._is_public = is_public
        self._judged = False  # for requests through a proxy

    def connect_direct(self, address: AddrInfoType) -> socket.socket:
        """Open a socket for a connection to the upstream itself. Any address is allowed."""
        self._is_public |= is_public(address[4][0])
        return socket.socket(*address[:3])

    def connect_redirected(self, address: AddrInfoType) -> socket.socket:
        """Open a socket for a connection to another host.

        Raises PrivateAddressError if the upstream is public and the address of the other host is private.
        """
        if self._is_public and not is_public(address[4][0]):
            raise PrivateAddressError("a public upstream leads to a private address")
        return socket.socket(*address[:3])

    async def through_proxy(self, host: str, *, here: bool) -> None:
        """Check a host that a proxy connects to, by its name and the addresses that our own DNS has for it.

        If `here`, the host is the upstream itself: it is allowed, and decides whether the upstream counts as public.
        Behind a proxy, DNS may know no address: then the upstream counts as public, unless its name is local.
        If not `here`, raises PrivateAddressError like `connect_redirected`.
        """
        if here and self._judged:
            return
        addresses = await _addresses(host)
        if here:
            self._judged = True
            self._is_public |= any(map(is_public, addresses)) or not (addresses or is_local(host))
        elif self._is_public and (is_local(host) or not all(map(is_public, addresses))):
            raise PrivateAddressError("a public upstream leads to a private address")


async def _addresses(host: str) -> list[str]:
    """Return the addresses of a host, or an empty list if DNS knows none."""
    try:
        records = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]).partition("%")[0] for *_, address in records]


def is_local(host: str) -> bool:
    """Return True if a host name is local: each network gives it its own meaning."""
    name = host.lower().rstrip(".")
    is_address = ":" in name
    return not is_address and ("." not in name or f".{name}".endswith(tuple(f".{each}" for each in _LOCAL_DOMAINS)))


def is_public(address: str) -> bool:
    """Return True if an address belongs to the Internet, not to a private network."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        nat64 = IPv4Address(ip.packed[-4:]) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not ip.is_multicast and not getattr(ip, "is_site_local", False)
