"""A forward proxy for HTTP and, by CONNECT, for https, which resolves only the names that a test sets."""

import base64
import http.client
import select
import socket
from urllib.parse import urlsplit

from support.running import PATIENCE_S
from support.serving import QuietHandler, ThreadServer


class _Handler(QuietHandler):
    wbufsize = -1
    server: "ProxyServer"

    def do_GET(self) -> None:  # noqa: N802 (name from http.server)
        if not self._is_allowed():
            return
        parts = urlsplit(self.path)
        place = self.server.places.get(parts.netloc)
        if place is None:
            self._answer(502, {}, b"")
            return
        connection = http.client.HTTPConnection(*place, timeout=PATIENCE_S)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        connection.request(self.command, f"{parts.path}?{parts.query}".rstrip("?"), headers=headers)
        answer = connection.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()

    do_HEAD = do_GET  # noqa: N815 (name from http.server)

    def do_CONNECT(self) -> None:  # noqa: N802 (name from http.server)
        self.close_connection = True
        if not self._is_allowed():
            return
        place = self.server.places.get(self.path)
        if place is None:
            self._answer(502, {}, b"")
            return
        with socket.create_connection(place) as other:
            self._answer(200, {}, b"")
            self.wfile.flush()
            pairs = {self.connection: other, other: self.connection}
            while True:
                for readable in select.select(list(pairs), [], [])[0]:
                    data = readable.recv(65536)
                    if not data:
                        return
                    pairs[readable].sendall(data)

    def _is_allowed(self) -> bool:
        self.server.asked.append(f"{self.command} {self.path}")
        expected = self.server.user_and_password
        if expected is None:
            return True
        given = self.headers.get("Proxy-Authorization", "")
        if given == "Basic " + base64.b64encode(expected.encode()).decode():
            return True
        self._answer(407, {"Proxy-Authenticate": "Basic"}, b"")
        return False

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in {"content-length", "transfer-encoding", "date", "server", "connection"}:
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else len(body)
        if self.command != "CONNECT":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class ProxyServer(ThreadServer):
    """`places` maps host and port to an address, `asked` lists the requests."""

    def __init__(self, user_and_password: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"
        self.user_and_password = user_and_password
        self.places: dict[str, tuple[str, int]] = {}
        self.asked: list[str] = []
