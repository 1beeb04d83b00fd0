"""HTTP client for diagnosis: returns responses as they were sent, with the whole body in memory.

Sends the credentials that netrc(5) has for the host, as Nix and curl do.
"""

import http.client
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from harmonia.config import credentials, netrc, value_types
from harmonia.config.proxy import Proxy, ProxyRules
from harmonia.config.settings import Settings
from harmonia.errors import FormatError, RemoteError

MAX_BODY_BYTES = 256 << 20
"""Longest body that is read."""
_TIMEOUT_S = 20.0  # for each step: connect, send, receive
_MAX_REDIRECTS = 5
_PIECE_BYTES = 1 << 18
_ASCII = "".join(map(chr, range(33, 127)))  # characters of a request target that need no quoting


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """Values by lower-case name."""
    body: bytes
    """The body as sent, still encoded."""
    certificate: Mapping[str, Any]
    """Certificate of the server, as a dictionary of `ssl`. Empty without TLS."""


class _Connection(http.client.HTTPConnection):
    """Connection to the host of a URL: direct, through a proxy, or to another address or unix socket."""

    def __init__(
        self, netloc: str, tls: ssl.SSLContext | None, place: tuple[str, int] | str | None, proxy: Proxy | None
    ) -> None:
        """Connect to `place` instead of `netloc` if it is given. Only one of `place` and `proxy` may be given."""
        self.default_port = http.client.HTTPS_PORT if tls else http.client.HTTP_PORT
        super().__init__(netloc, timeout=_TIMEOUT_S)
        self._name = self.host
        self._tls = tls
        self._place = place
        if proxy:
            port = self.port
            super().__init__(proxy.host, proxy.port, timeout=_TIMEOUT_S)
            if tls:
                self.set_tunnel(self._name, port, _proxy_headers(proxy))

    def connect(self) -> None:
        if isinstance(self._place, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._place)
        elif self._place:
            self.sock = socket.create_connection(self._place, self.timeout)
        else:
            super().connect()
        if self._tls:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


class Client:
    """Client of the server at `url`: http://, https://, unix:/path/of/socket, or a short form (see `_completed`)."""

    def __init__(
        self,
        url: str,
        host: str | None = None,
        *,
        direct: bool = False,
        find_authorization: Callable[[str], str | None] = lambda host: netrc.find_authorization(host, os.environ),
    ) -> None:
        """Prepare requests to `url`. Does not connect.

        `host` is the public name of the server if `url` has another one: certificate and netrc have the public name.
        Unless `direct`, requests go through the proxy of the environment, as with curl. `find_authorization` returns
        the value of Authorization for a host; the default is that of the user's netrc file. Raises FormatError if `url`
        is malformed. Raises RemoteError if the netrc file is malformed.
        """
        self.url = self._base = _completed(url).rstrip("/")
        self.is_direct = direct or self.url.startswith("unix:")
        self._proxies = ProxyRules({} if self.is_direct else os.environ)
        self._place: tuple[str, int] | str | None = None
        try:
            parts = urlsplit(self.url)
            name, port = parts.hostname, parts.port
            (name or "").encode("idna")
        except ValueError:  # invalid brackets, port or host name
            name = None
        if self.url.startswith("unix:") and self.url != "unix:":
            self._base, self._place = f"http://{_in_url(host or 'localhost')}", self.url.removeprefix("unix:")
        elif not name or parts.scheme not in ("http", "https"):
            raise FormatError(f"{url!r} is not a URL like http://localhost:5000 or unix:/run/harmonia/socket")
        elif "@" in parts.netloc:  # the message must not show a password in the URL
            line = f"machine {name} login USER password PASSWORD"
            raise FormatError(
                f"user and password in the URL are not supported; put them into the file of $NETRC: {line}"
            )
        elif host and port:
            self._base, self._place = f"{parts.scheme}://{_in_url(host)}:{port}", (name, port)
        authorization = find_authorization(self.host)
        self._own_headers = {"Authorization": authorization} if authorization else {}

    @property
    def host(self) -> str:
        """Host name of the server, as certificate and netrc have it."""
        return urlsplit(self._base).hostname or ""

    @property
    def has_credentials(self) -> bool:
        """True if the netrc file has credentials for the server."""
        return bool(self._own_headers)

    @classmethod
    def of(cls, settings: Settings, key: str = "bind") -> "Client":
        """Return a client of the local server with these settings. Raises RemoteError if they have no fixed address."""
        address = settings.address("metrics_bind" if key == "metrics_bind" else "bind")
        name = urlsplit(settings.base_url).hostname if settings.base_url else None
        if isinstance(address, str):
            return cls(f"unix:{address}", name)
        if address is None or address[1] == 0:
            raise RemoteError(f"{key} has no fixed port; give the URL of the server")
        host = "localhost" if address[0] in ("::", "0.0.0.0") else address[0]  # noqa: S104 (compared, not bound)
        scheme = "https" if settings.tls_cert_path and key == "bind" else "http"
        return cls(f"{scheme}://{_in_url(host)}:{address[1]}", name, direct=True)

    def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET", stop: int | None = None
    ) -> Answer:
        """Send one request on a new connection. Return the response, with at most `stop` bytes of the body.

        The default of Accept-Encoding is identity. Follows redirects. Raises RemoteError if there is no complete
        response. Raises ConfigError if the trusted certificates cannot be read.
        """
        url = _joined(self._base + "/", path)
        for _ in range(_MAX_REDIRECTS):
            answer = self._ask(method, url, {"Accept-Encoding": "identity", **(headers or {})}, stop)
            location = answer.headers.get("location")
            if not 300 < answer.status < 400 or answer.status == 304 or not location:  # noqa: PLR2004 (RFC 9110)
                return answer
            url = _joined(url, location)
        raise RemoteError(f"{url}: redirected more than {_MAX_REDIRECTS} times")

    def _ask(self, method: str, url: str, headers: Mapping[str, str], stop: int | None) -> Answer:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise RemoteError(f"{url} is not an HTTP URL")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = quote(target, safe=_ASCII, errors="surrogateescape")
        is_ours = _origin(url) == _origin(self._base)
        tls = credentials.client_tls(os.environ) if parts.scheme == "https" else None
        try:
            proxy = self._proxies.proxy_for(url)
            connection = _Connection(parts.netloc, tls, self._place if is_ours else None, proxy)
        except (http.client.InvalidURL, FormatError) as error:
            raise RemoteError(f"{url}: {error}") from None
        own = dict(self._own_headers) if is_ours else {}
        if proxy and parts.scheme == "http":
            target = f"http://{parts.netloc}{target}"
            own |= _proxy_headers(proxy)
        certificate: Mapping[str, Any] = {}
        try:
            connection.connect()
            if isinstance(connection.sock, ssl.SSLSocket):
                certificate = connection.sock.getpeercert() or {}
            connection.request(method, target, headers={"Connection": "close", **own, **headers})
            response = connection.getresponse()
            body = bytearray()
            while len(body) < (MAX_BODY_BYTES if stop is None else stop) and (piece := response.read1(_PIECE_BYTES)):
                body += piece
            complete = stop is not None or response.length in (None, 0)
        except ssl.SSLCertVerificationError as error:
            raise RemoteError(f"{self.url}: its certificate is not trusted: {error.verify_message}") from None
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
        ) as error:  # ValueError: invalid characters in the URL or host
            through = f" (through the proxy {proxy.url})" if proxy else ""
            raise RemoteError(f"{self.url}: {_why(error)}{through}") from None
        finally:
            connection.close()
        if not complete and method != "HEAD":
            raise RemoteError(f"{url}: the body ends early, after {len(body)} bytes")
        names = {name.lower() for name in response.headers}
        # Fields of the same name are joined by commas (RFC 9110 section 5.3).
        joined = {name: ", ".join(response.headers.get_all(name, [])) for name in names}
        return Answer(response.status, joined, bytes(body[:stop]), certificate)


def _completed(url: str) -> str:
    """Return the URL that a short form stands for: a port, `host:port`, a host, or the path of a socket.

    A host name without a port, and any port that ends in 443, means HTTPS; everything else means HTTP. Other text is
    returned unchanged.
    """
    if url.startswith("/") and os.path.exists(url) and stat.S_ISSOCK(os.stat(url).st_mode):
        return f"unix:{url}"
    authority, slash, path = url.partition("/")
    try:
        address = value_types.address(authority, default_port=0)
    except FormatError:
        return url
    if isinstance(address, str):
        return url
    host, port = ("localhost" if address[0] == "::" else address[0]), address[1]
    is_name = host != "localhost" and not re.fullmatch(r"[0-9.]+|.*:.*", host)
    scheme = "https" if f"{port}".endswith("443") or (is_name and not port) else "http"
    return f"{scheme}://{_in_url(host)}{f':{port}' if port else ''}{slash}{path}"


def _proxy_headers(proxy: Proxy) -> dict[str, str]:
    return {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _joined(base: str, url: str) -> str:
    """Resolve a relative URL by RFC 3986, as Nix does since 2.32."""
    try:
        return urljoin(base, url)
    except ValueError as error:
        raise RemoteError(f"{url!r} is not a URL: {error}") from None


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
