"""Siblings: binary caches in the local network, found and announced by DNS-SD (RFC 6763) over multicast DNS (RFC 6762).

A service of the type `_nix_binary_cache._tcp` is a binary cache at the root of an HTTP server, as for nix-cache-beacon.
Anyone in the network can announce one. So only addresses in a network of this machine count, and paths of siblings need
a signature by one of `lan.public_keys`. Only IPv4, because link-local addresses of IPv6 need the name of an interface.
"""

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv4Interface

import ifaddr
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from harmonia.upstream.tasks import Tasks

_TYPE = "_nix_binary_cache._tcp.local."
_IDENTITY = "id"
"""Key of the TXT record of a Harmonia: its pseudonym, so that it does not find itself."""
_MAX_SIBLINGS = 16
_MAX_RESOLVING = 32  # services at once, because anyone can announce any number
_MAX_LABEL_CHARS = 63  # RFC 1035 section 2.3.4
_RESOLVE_MS = 3000

_log = logging.getLogger("harmonia")

Found = Callable[[str], Awaitable[None]]
"""Called with the URL of each new sibling."""


class Siblings:
    """Announcement of this server, and search for others, on one event loop."""

    def __init__(self, identity: str) -> None:
        """Create it without sockets. `identity` is the pseudonym of this server."""
        self._identity = identity
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._tasks = Tasks()
        self._urls: set[str] = set()
        self._resolving: set[str] = set()

    def start(self, announced: tuple[Sequence[str], int] | None, found: Found | None) -> None:
        """Announce the addresses and the port in `announced`, and call `found` for each sibling, if they are given.

        Does not wait. If the network does not allow multicast, this is logged, and the server works without siblings.
        """
        self._tasks.spawn(self._run(announced, found))

    async def _run(self, announced: tuple[Sequence[str], int] | None, found: Found | None) -> None:
        try:
            self._zeroconf = AsyncZeroconf(ip_version=IPVersion.V4Only)
            if announced is not None:
                service = self._service(*announced)  # not strict: the type is longer than RFC 6335 allows
                await self._zeroconf.async_register_service(service, allow_name_change=True, strict=False)
        except (OSError, RuntimeError, ZeroconfError) as error:
            _log.warning("lan: cannot use multicast DNS: %s; no sibling is found or finds this server", error)
            return
        if found is not None:
            handler = partial(self.changed, found)
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, _TYPE, handlers=[handler])

    def changed(
        self, found: Found, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Resolve a service that is new or has changed, unless it is being resolved, or too many others are."""
        is_removed = state_change is ServiceStateChange.Removed
        if not is_removed and name not in self._resolving and len(self._resolving) < _MAX_RESOLVING:
            self._resolving.add(name)
            self._tasks.spawn(self._add(zeroconf, service_type, name, found))

    async def close(self) -> None:
        """Withdraw the announcement, and close the sockets."""
        await self._tasks.stop()
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            await self._zeroconf.async_close()

    def _service(self, addresses: Sequence[str], port: int) -> AsyncServiceInfo:
        instance = f"harmonia-{port}-{socket.gethostname().partition('.')[0]}"[:_MAX_LABEL_CHARS]
        return AsyncServiceInfo(
            _TYPE,
            f"{instance}.{_TYPE}",
            port=port,
            properties={_IDENTITY: self._identity},
            server=f"{self._identity}.local.",
            parsed_addresses=list(addresses),
        )

    async def _add(self, zeroconf: Zeroconf, service_type: str, name: str, found: Found) -> None:
        """Resolve a service, and report its URL if that is new and there are not too many siblings."""
        try:
            url = await self._resolve(zeroconf, service_type, name)
        finally:
            self._resolving.discard(name)
        if url is None or url in self._urls or len(self._urls) >= _MAX_SIBLINGS:
            return
        self._urls.add(url)
        _log.info("lan: found %s", url)
        if len(self._urls) == _MAX_SIBLINGS:
            _log.warning("lan: there are %d siblings; no more are asked until the next start", _MAX_SIBLINGS)
        await found(url)

    async def _resolve(self, zeroconf: Zeroconf, service_type: str, name: str) -> str | None:
        """Return the URL of a service, or None if it is this server, or not in a network of this machine."""
        service = AsyncServiceInfo(service_type, name)
        if not await service.async_request(zeroconf, _RESOLVE_MS) or not service.port:
            return None
        if service.properties.get(_IDENTITY.encode()) == self._identity.encode():
            return None
        address = find_neighbour(service.parsed_addresses(IPVersion.V4Only))
        return None if address is None else f"http://{address}:{service.port}"


def addresses_of(listening: Sequence[socket.socket]) -> tuple[list[str], int] | None:
    """Return the IPv4 addresses and the port at which neighbours reach the listening sockets, or None, which is logged.

    If several sockets have other ports, the first one counts.
    """
    for each in listening:
        if each.family in {socket.AF_INET, socket.AF_INET6}:
            host, port = each.getsockname()[:2]
            addresses = [str(own.ip) for own in own_addresses() if host in {str(own.ip), "0.0.0.0", "::"}]  # noqa: S104 (binds nothing)
            if addresses:
                return addresses, port
    _log.warning("lan.announce: no neighbour can reach the address in `bind`; nothing is announced")
    return None


def own_addresses() -> list[IPv4Interface]:
    """Return the IPv4 addresses of this machine, with their networks, without those of the loopback interface."""
    addresses = [ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    found = [IPv4Interface(f"{ip.ip}/{ip.network_prefix}") for ip in addresses]
    return [each for each in found if not each.is_loopback]


def find_neighbour(addresses: Sequence[str]) -> str | None:
    """Return the first IPv4 address that is in a network of this machine and not a loopback address, or None."""
    networks = [each.network for each in own_addresses()]  # once: it takes a system call, and anyone sends addresses
    return next((each for each in addresses if any(IPv4Address(each) in network for network in networks)), None)
