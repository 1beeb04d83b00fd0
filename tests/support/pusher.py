"""Pushes as raw HTTP: the requests of `nix copy --to`, and requests that Nix would never send."""

import hashlib
import http.client
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import urlsplit

from harmonia.nix import base32, nar, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from support.running import PATIENCE_S, Answer, Server

STORE_DIR = "/nix/store"


@dataclass(frozen=True)
class Pushed:
    """A path to push, with its narinfo and the body of its NAR."""

    info: PathInfo
    body: bytes
    compression: str = "none"

    @classmethod
    def make(
        cls, name: str, content: bytes, key: SecretKey | None = None, references: tuple[StorePath, ...] = ()
    ) -> "Pushed":
        """Make a file with an input-addressed store path, which depends on name and content."""
        body = file_nar(content)
        hash_part = base32.encode(hashlib.sha256(name.encode() + content).digest()[:20])
        info = PathInfo(StorePath(f"{hash_part}-{name}"), hashlib.sha256(body).digest(), len(body), references)
        return cls(signed(info, key) if key else info, body)

    @property
    def file_hash(self) -> str:
        return base32.encode(hashlib.sha256(self.body).digest())

    @property
    def nar_url(self) -> str:
        return f"nar/{self.file_hash}.nar"

    @property
    def narinfo(self) -> bytes:
        file = NarFile(self.nar_url, self.compression, hashlib.sha256(self.body).digest(), len(self.body))
        return narinfo.render(self.info, STORE_DIR, file, self.info.sigs).encode()


def file_nar(content: bytes) -> bytes:
    return nar.encode(b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")")


def signed(info: PathInfo, key: SecretKey) -> PathInfo:
    return replace(info, sigs=(key.sign(info.fingerprint(STORE_DIR)),))


class Pusher:
    """Sends requests with a token, each on its own connection, except in `connected`."""

    def __init__(self, server: Server, token: str) -> None:
        self._address = urlsplit(server.url).netloc
        self._headers = {"Authorization": f"Bearer {token}"}
        self._connection: http.client.HTTPConnection | None = None

    @contextmanager
    def connected(self) -> Iterator[Self]:
        """Send all requests on one connection, which the server must keep open."""
        with closing(http.client.HTTPConnection(self._address, timeout=PATIENCE_S)) as connection:
            connection.connect()
            connection.auto_open = 0
            self._connection = connection
            yield self
            self._connection = None

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        headers = {**self._headers, **(headers or {})}
        if self._connection is not None:
            return _answer(self._connection, method, path, body, headers)
        with closing(http.client.HTTPConnection(self._address, timeout=PATIENCE_S)) as connection:
            return _answer(connection, method, path, body, headers)

    def head(self, method: str, path: str, size: int, *fields: str) -> bytes:
        """Return the head of a request, for `raw`."""
        lines = [f"{method} /push/{path} HTTP/1.1", "Host: cache", f"Content-Length: {size}"]
        lines += [f"{name}: {value}" for name, value in self._headers.items()]
        return "\r\n".join([*lines, *fields, "", ""]).encode()

    @contextmanager
    def raw(self) -> Iterator[socket.socket]:
        """Open a connection, and close it at the end, even after an incomplete request."""
        host, port = self._address.split(":")
        with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
            yield connection

    def send(self, method: str, path: str, body: bytes, size: int) -> None:
        """Send a request whose head announces `size` bytes, and disconnect without reading the response."""
        with self.raw() as connection:
            connection.sendall(self.head(method, path, size) + body)

    def put_nar(self, path: Pushed) -> Answer:
        return self.request("PUT", path.nar_url, path.body)

    def put_narinfo(self, path: Pushed) -> Answer:
        return self.request("PUT", f"{path.info.path.hash_part}.narinfo", path.narinfo)

    def push(self, path: Pushed) -> Answer:
        """Send NAR and narinfo; return the last response."""
        answer = self.put_nar(path)
        return self.put_narinfo(path) if answer.status == 200 else answer


def _answer(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> Answer:
    connection.request(method, f"/push/{path}", body, headers)
    response = connection.getresponse()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
