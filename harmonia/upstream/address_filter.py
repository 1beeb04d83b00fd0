"""SSRF protection: a public upstream must not make us connect to private addresses.

It could otherwise redirect us, or name another host in a narinfo, to reach services that answer nobody but us. The
address that is connected to counts, whatever name led there.
"""

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp import AddrInfoType

_LOCAL_DOMAINS = ("localhost", "local", "internal", "home.arpa")
"""Names of no network but the one that a machine is in (RFC 6761, 6762, 8375, and ICANN for `internal`)."""
_NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052 section 2.1: the last four bytes are an IPv4 address."""


class PrivateAddressError(OSError):
    """A public upstream leads to a private address."""


class AddressFilter:
    """Address filter of one upstream. The methods make the sockets of aiohttp's connectors.

    An upstream is public from the first of its own addresses that is public: its DNS could otherwise name a private
    address once, and reach all others by redirects.
    """

    def __init__(self) -> None:
        self._is_public = False
        self._judged = False  # for requests through a proxy

    def connect_direct(self, address: AddrInfoType) -> socket.socket:
        """Make a socket for a connection to the upstream itself. Any address is allowed."""
        self._is_public |= is_public(address[4][0])
        return socket.socket(*address[:3])

    def connect_redirected(self, address: AddrInfoType) -> socket.socket:
        """Make a socket for a connection to another host. Raises PrivateAddressError if only that host is private."""
        if self._is_public and not is_public(address[4][0]):
            raise PrivateAddressError("a public upstream leads to a private address")
        return socket.socket(*address[:3])

    async def through_proxy(self, host: str, *, here: bool) -> None:
        """Judge a host that a proxy connects to, by its name and the addresses that we find for it.

        Nothing may be found behind a proxy. An upstream without an address counts as outside, unless its name is local.
        Raises PrivateAddressError like `connect_redirected`, unless it is the upstream itself (`here`).
        """
        if here and self._judged:
            return
        found = await _addresses(host)
        if here:
            self._judged = True
            self._is_public |= any(map(is_public, found)) or not (found or is_local(host))
        elif self._is_public and (is_local(host) or not all(map(is_public, found))):
            raise PrivateAddressError("a public upstream leads to a private address")


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


def is_public(address: str) -> bool:
    """Return whether an address belongs to the Internet, not to a private network."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        nat64 = IPv4Address(ip.packed[-4:]) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not ip.is_multicast and not getattr(ip, "is_site_local", False)
