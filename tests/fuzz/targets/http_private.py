"""Requests to a server with tokens: without a token, no response contains anything about the store."""

import tempfile
from functools import cache
from pathlib import Path

from fuzz.targets import http
from harmonia.config.tokens import new

WORDS = [*http.WORDS, b"Authorization: Bearer ", b"harmonia_", b"Cookie: ", b"Proxy-Authorization: ", b"dTpw"]


@cache
def _server() -> http.FuzzedServer:
    tokens = Path(tempfile.mkdtemp(), "tokens")
    tokens.write_text(str(new("nobody", ["read", "browse", "metrics"])[1]))
    return http.FuzzedServer(f"tokens_path = '{tokens}'\nmax_failed_auth_rate = 0\n")


def check(data: bytes) -> bool:
    """Count plain HTTP as accepted, even if it is answered with 401."""
    server = _server()
    statuses, received = server.answers(data)
    assert not [status for status in statuses if status not in {200, 400, 401, 411, 413, 414, 417, 431, 501, 505}]
    assert not [name for name in (*server.names.values(), b"StoreDir", b"harmonia_requests") if name in received]
    return statuses[0] in {200, 401} if statuses else False
