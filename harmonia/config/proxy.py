"""Choice of the forward proxy for a URL, by the rules of curl (`lib/url.c`, `lib/noproxy.c`), which Nix follows."""

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

_DEFAULT_PORT = 1080  # as in curl, for every kind of proxy
_FORM = "give it as http://host:port or http://user:password@host:port"


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. URLs with https use its method CONNECT."""

    host: str
    port: int
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the proxy with the URL `text`.

        Raises FormatError if the URL is malformed or not supported. The message does not quote the URL, which may
        contain a password.
        """
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            raise FormatError(f"not the URL of a proxy; {_FORM}") from None
        if parts.scheme.startswith("socks"):
            raise FormatError(f"SOCKS proxies are not supported; use an HTTP proxy: {_FORM}")
        if parts.scheme != "http":
            raise FormatError(f"only connections to a proxy over plain HTTP are supported; {_FORM}")
        if not parts.hostname:
            raise FormatError(f"no host; {_FORM}")
        user = None if parts.username is None else unquote(parts.username)
        if user and ":" in user:  # RFC 7617 section 2
            raise FormatError("the user name of a proxy cannot contain a colon; use another user")
        return cls(parts.hostname, _DEFAULT_PORT if port is None else port, user, unquote(parts.password or ""))

    @property
    def url(self) -> str:
        """Return the URL without user and password."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def authorization(self) -> str | None:
        """Return the value of Proxy-Authorization, or None without a user."""
        if self.user is None:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class ProxyRules:
    """Rules that choose the proxy for each URL."""

    def __init__(self, environ: Mapping[str, str], setting: str | None = None) -> None:
        """Use the proxy `setting` for all URLs, no proxy if `setting` is empty, or `environ` if `setting` is None."""
        self._environ = environ
        self._setting = setting

    def proxy_for(self, url: str) -> Proxy | None:
        """Return the proxy for a URL, or None for a direct connection.

        Raises FormatError if the proxy's URL is malformed or not supported. The message names the variable, if the URL
        comes from the environment.
        """
        if self._setting is not None:
            return Proxy.parse(self._setting) if self._setting else None
        parts = urlsplit(url)
        if is_excepted(parts.hostname or "", self._first("no_proxy", "NO_PROXY")[1]):
            return None
        # HTTP_PROXY is ignored: in a CGI program, the client sets it by the header `Proxy` (https://httpoxy.org).
        upper = [] if parts.scheme == "http" else [f"{parts.scheme}_proxy".upper()]
        name, text = self._first(f"{parts.scheme}_proxy", *upper, "all_proxy", "ALL_PROXY")
        try:
            return Proxy.parse(text) if text else None
        except FormatError as error:
            raise FormatError(f"environment variable {name}: {error}") from None

    def _first(self, *names: str) -> tuple[str, str]:
        """Return the name and the value of the first non-empty variable, or two empty strings."""
        return next(((name, value) for name in names if (value := self._environ.get(name))), ("", ""))


def without_password(text: str) -> str:
    """Return the URL of a proxy with user and password replaced by `(not shown)`."""
    before, at, after = text.rpartition("@")
    scheme, slashes, _ = before.rpartition("://")
    return f"{scheme}{slashes}(not shown)@{after}" if at else after


def is_excepted(host: str, no_proxy: str) -> bool:
    """Return True if `no_proxy` lists a host, by its name, a parent domain, its IP address or a network around it."""
    if no_proxy == "*":
        return True
    family = _family(host)
    name = host if family else host.removesuffix(".").lower()
    for part in re.split(r"[, \t]+", no_proxy):  # some releases of curl stop at a blank without a comma
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
    bits = integer(prefix or "0", 999) or ip_address(host).max_prefixlen  # curl treats /0 as a single address
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
