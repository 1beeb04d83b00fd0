"""Forward proxies: which one a URL is asked through, by the rules of curl (`lib/url.c`, `lib/noproxy.c`), as by Nix."""

import base64
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Self
from urllib.parse import unquote, urlsplit

from harmonia.errors import FormatError
from harmonia.untrusted import integer

_DEFAULT_PORT = 1080  # curl's, of every proxy
_FORM = "give it as http://host:port or http://user:password@host:port"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that speaks HTTP, and CONNECT for https."""

    host: str
    port: int
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the proxy with that URL. Raises FormatError, which does not quote it: it may hold a password."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            raise FormatError(f"not the URL of a proxy; {_FORM}") from None
        if parts.scheme.startswith("socks"):
            raise FormatError(f"SOCKS proxies are not supported; name one that speaks HTTP: {_FORM}")
        if parts.scheme != "http":
            raise FormatError(f"only proxies that are asked over plain HTTP are supported; {_FORM}")
        if not parts.hostname:
            raise FormatError(f"no host; {_FORM}")
        user = None if parts.username is None else unquote(parts.username)
        if user and ":" in user:  # RFC 7617 section 2
            raise FormatError("the user of a proxy cannot have a colon in its name")
        return cls(parts.hostname, _DEFAULT_PORT if port is None else port, user, unquote(parts.password or ""))

    @property
    def url(self) -> str:
        """The URL without user and password."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def authorization(self) -> str | None:
        """The value of Proxy-Authorization, None without a user."""
        if self.user is None:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class ProxyRules:
    """Which proxy each URL is asked through, if any."""

    def __init__(self, environ: Mapping[str, str], setting: str | None = None) -> None:
        """`setting` is the proxy of all URLs, none of them if it is empty, whatever the environment says."""
        self._environ = environ
        self._setting = setting

    def proxy_for(self, url: str) -> Proxy | None:
        """Return the proxy for a URL, or None. Raises FormatError, with the variable's name, if it is not one."""
        if self._setting is not None:
            return Proxy.parse(self._setting) if self._setting else None
        parts = urlsplit(url)
        if is_excepted(parts.hostname or "", self._first("no_proxy", "NO_PROXY")[1]):
            return None
        # A CGI program has HTTP_PROXY from a client's header `Proxy` (https://httpoxy.org).
        upper = [] if parts.scheme == "http" else [f"{parts.scheme}_proxy".upper()]
        name, text = self._first(f"{parts.scheme}_proxy", *upper, "all_proxy", "ALL_PROXY")
        try:
            return Proxy.parse(text) if text else None
        except FormatError as error:
            raise FormatError(f"environment variable {name}: {error}") from None

    def _first(self, *names: str) -> tuple[str, str]:
        """Return the name and the value of the first variable that is not empty."""
        return next(((name, value) for name in names if (value := self._environ.get(name))), ("", ""))


def without_password(text: str) -> str:
    """Return the URL of a proxy as it may be shown."""
    before, at, after = text.rpartition("@")
    scheme, slashes, _ = before.rpartition("://")
    return f"{scheme}{slashes}(not shown)@{after}" if at else after


def is_excepted(host: str, no_proxy: str) -> bool:
    """Return whether `no_proxy` has a host: by its name, a domain that it is in, its IP address, or a network."""
    if no_proxy == "*":
        return True
    family = _family(host)
    name = host if family else host.removesuffix(".").lower()
    for part in re.split(r"[, \t]+", no_proxy):  # some releases of curl read no further than a blank without a comma
        if part and (_is_in_network(host, family, part) if family else _is_in_domain(name, part.lower())):
            return True
    return False


def _is_in_domain(name: str, domain: str) -> bool:
    domain = domain.removesuffix(".").removeprefix(".")
    return name == domain or name.endswith(f".{domain}")


def _is_in_network(host: str, family: int, network: str) -> bool:
    address, slash, prefix = network.partition("/")
    if _family(address) != family or (slash and not re.fullmatch(r"[0-9]{1,3}", prefix)):
        return False
    bits = integer(prefix or "0", 999) or ip_address(host).max_prefixlen  # curl takes /0 for a single address
    return bits <= ip_address(host).max_prefixlen and ip_address(host) in ip_network(f"{address}/{bits}", strict=False)


def _family(host: str) -> int:
    """Return the address family of an IP address in the form that inet_pton(3) takes, 0 for anything else."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return family
    return 0
