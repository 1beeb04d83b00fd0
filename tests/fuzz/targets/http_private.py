"""Requests to a server that asks for tokens: whatever they are, who has none learns nothing of the store."""

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
    """Taken is what is plain HTTP, though it is refused."""
    server = _server()
    statuses, received = server.answers(data)
    assert not [status for status in statuses if status not in {200, 400, 401, 411, 413, 414, 417, 431, 501, 505}]
    assert not [told for told in (*server.names.values(), b"StoreDir", b"harmonia_requests") if told in received]
    return statuses[0] in {200, 401} if statuses else False
