"""RFC 9112, HTTP/1.1: the requirements of sections 2, 3, 6, 7 and 9 on an origin server, on a real socket.

Each row has the section, its requirement, the bytes of the request, and the expected statuses.
A last request, which closes the connection, follows each row, and shows if the connection stays open.
"""

import re
from typing import NamedTuple

import pytest

from support.raw_http import Seen, exchange
from support.running import Server

LAST = b"GET /health HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n"


def get(*fields: str, target: str = "/version", version: str = "1.1", host: str = "Host: cache\r\n") -> bytes:
    lines = "".join(f"{field}\r\n" for field in fields)
    return f"GET {target} HTTP/{version}\r\n{host}{lines}\r\n".encode("latin-1")


class Clause(NamedTuple):
    section: str
    requirement: str
    sent: bytes
    statuses: list[int]
    goes_on: bool = False


OK = [200]
CLAUSES = [
    Clause("2.2", "SHOULD ignore an empty line before the request line", b"\r\n" + get(), OK, goes_on=True),
    Clause("2.2", "several empty lines are ignored, too", b"\r\n\r\n\r\n" + get(), OK, goes_on=True),
    Clause(
        "2.2", "an empty line after a request comes before the next", get() + b"\r\n" + get(), [200, 200], goes_on=True
    ),
    Clause("2.2", "MUST NOT take a bare CR for the end of a line", get("X: a\rY: b"), [400]),
    Clause("2.2", "MAY take a LF for the end of a line: not taken", b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n", [400]),
    Clause("2.2", "space before the first field: MUST reject or ignore", get(host=" X: y\r\nHost: cache\r\n"), [400]),
    Clause("2.2", "SHOULD answer 400 to a malformed request line", b"nonsense\r\n\r\n", [400]),
    Clause("2.3", "a version is case-sensitive", get().replace(b"HTTP", b"http"), [400]),
    Clause("2.3", "a version has one digit, a dot, one digit", get(version="1.10"), [400]),
    Clause("2.3", "HTTP/1.0 is answered, and its connection ends", get(version="1.0"), OK),
    Clause("2.3", "a higher minor version is taken for the highest known", get(version="1.2"), OK, goes_on=True),
    Clause("2.3", "HTTP/1.9 is taken for the highest known", get(version="1.9"), OK, goes_on=True),
    Clause("2.3", "505 for another major version", get(version="2.0"), [505]),
    Clause("2.3", "505 for an older major version", get(version="0.9"), [505]),
    Clause("2.3", "505 for the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    Clause("3", "SHOULD answer 400 to an invalid request line", b"GET  /version HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    Clause("3", "a target has no space", get(target="/a b"), [400]),
    Clause("3", "a request line needs a version", b"GET /version\r\nHost: x\r\n\r\n", [400]),
    Clause("3", "SHOULD support a line of 8,000 octets", get(target="/version?" + "x" * 7976), OK, goes_on=True),
    Clause("3", "MUST answer 414 to a target longer than it reads", get(target="/version?" + "x" * 20_000), [414]),
    Clause("3.1", "a method is case-sensitive: SHOULD answer 501", get().replace(b"GET", b"get"), [501]),
    Clause("3.1", "SHOULD answer 501 to a method that is not implemented", get().replace(b"GET", b"BREW"), [501]),
    Clause("3.1", "SHOULD answer 501 to a method longer than any", get().replace(b"GET", b"X" * 100), [501]),
    Clause("3.1", "a method is a token", get().replace(b"GET", b"G(T"), [400]),
    Clause("3.2", "MUST answer 400 to HTTP/1.1 without Host", get(host=""), [400]),
    Clause("3.2", "HTTP/1.0 has no Host", get(version="1.0", host=""), OK),
    Clause("3.2", "MUST answer 400 to two Hosts", get("Host: cache"), [400]),
    Clause("3.2", "MUST answer 400 to an invalid Host: a path", get(host="Host: a/b\r\n"), [400]),
    Clause("3.2", "an invalid Host: a user", get(host="Host: user@cache\r\n"), [400]),
    Clause("3.2", "an invalid Host: a port of letters", get(host="Host: cache:http\r\n"), [400]),
    Clause("3.2", "an invalid Host: half an escape", get(host="Host: cache%2\r\n"), [400]),
    Clause("3.2", "a Host may be empty", get(host="Host:\r\n"), OK, goes_on=True),
    Clause("3.2", "a Host may be an IPv6 address", get(host="Host: [::1]:5000\r\n"), OK, goes_on=True),
    Clause("3.2.1", "origin-form, with a query", get(target="/version?x=y&z"), OK, goes_on=True),
    Clause("3.2.2", "MUST accept absolute-form", get(target="http://cache/version"), OK, goes_on=True),
    Clause("3.2.2", "a scheme is case-insensitive", get(target="HTTP://cache:80/version"), OK, goes_on=True),
    Clause("3.2.2", "absolute-form has a Host, too", get(target="http://cache/version", host=""), [400]),
    Clause("3.2.2", "an absolute URL without a host is invalid", get(target="http:///version"), [400]),
    Clause(
        "3.2.2",
        "a user in an absolute URL is an error (RFC 9110 4.2.4)",
        get(target="http://user@cache/version"),
        [400],
    ),
    Clause("3.2.2", "another scheme is not served here", get(target="ftp://cache/version"), [400]),
    Clause("3.2.3", "authority-form is for CONNECT", get(target="cache:80"), [400]),
    Clause("3.2.3", "CONNECT is not implemented", b"CONNECT cache:80 HTTP/1.1\r\nHost: cache:80\r\n\r\n", [501]),
    Clause("3.2.4", "asterisk-form is for OPTIONS", get(target="*"), [400]),
    Clause("3.2.4", "OPTIONS * is not allowed", get(target="*").replace(b"GET", b"OPTIONS"), [405], True),
    Clause("5", "no space before a colon: MUST answer 400", get("X : y"), [400]),
    Clause("5.1", "spaces around a value are left out", get("Connection:  \tclose\t "), OK),
    Clause("5.2", "a folded line: MUST reject or replace", get("X: y", " z"), [400]),
    Clause("6.1", "both lengths: MAY reject", get("Content-Length: 0", "Transfer-Encoding: chunked"), [400]),
    Clause("6.1", "SHOULD answer 501 to an unknown coding", get("Transfer-Encoding: x, chunked"), [501]),
    Clause("6.1", "MUST answer 400 if chunked is not the last", get("Transfer-Encoding: chunked, gzip"), [400]),
    Clause("6.3", "MAY answer 411 to a body without its length", get("Transfer-Encoding: chunked"), [411]),
    Clause("6.3", "a coding is case-insensitive", get("Transfer-Encoding: Chunked"), [411]),
    Clause("6.3", "MUST answer 400 to an invalid Content-Length", get("Content-Length: 1x"), [400]),
    Clause("6.3", "two different Content-Lengths are invalid", get("Content-Length: 1", "Content-Length: 2"), [400]),
    Clause("6.3", "a request without either has no body", get(), OK, goes_on=True),
    Clause("9.3", "HTTP/1.1 is persistent", get("Connection: TE", "TE: trailers"), OK, goes_on=True),
    Clause("9.3", "close in a list", get("Connection: TE, close"), OK),
    Clause("9.3", "close in upper case and in a second field", get("Connection: TE", "Connection: Close"), OK),
    Clause("9.3", "HTTP/1.0 is not persistent", get(version="1.0"), OK),
    Clause(
        "9.3", "HTTP/1.0 with keep-alive is persistent", get("Connection: Keep-Alive", version="1.0"), OK, goes_on=True
    ),
    Clause(
        "9.3",
        "HTTP/1.0 with keep-alive in a list is persistent",
        get("Connection: keep-alive, X", version="1.0"),
        OK,
        goes_on=True,
    ),
    Clause("9.3.2", "requests in a row are answered in order", get() + get(), [200, 200], goes_on=True),
    Clause("RFC 6585 5", "431 if all fields are too long", get(*[f"X-{n}: {'y' * 1000}" for n in range(20)]), [431]),
    Clause("RFC 6585 5", "431 if one field is too long", get("X: " + "y" * 20_000), [431]),
]


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: f"{clause.section}: {clause.requirement}")
def test_requirement_is_met(server: Server, clause: Clause) -> None:
    seen = exchange(server.url, clause.sent + LAST)
    assert [answer.status for answer in seen] == [*clause.statuses, *([200] if clause.goes_on else [])]
    assert [answer.closes for answer in seen] == [*([False] * (len(seen) - 1)), True]
    if clause.goes_on:
        assert seen[-1] == Seen(200, "OK\n", closes=True)


def test_host_of_an_absolute_target_takes_precedence(server: Server) -> None:
    """RFC 9112 section 3.2.2: MUST ignore the Host field in this case."""
    (page,) = exchange(server.url, get("Connection: close", target="http://named.example/"))
    assert "http://named.example" in page.body
    assert "http://cache" not in page.body


def test_absolute_target_without_a_path_is_the_root(server: Server) -> None:
    """RFC 9112 section 3.2.1."""
    (with_slash,) = exchange(server.url, get("Connection: close", target="http://cache/"))
    (without,) = exchange(server.url, get("Connection: close", target="http://cache"))
    assert without == with_slash


@pytest.mark.parametrize(
    "target",
    ["//nix-cache-info", "///nix-cache-info", "http://cache//nix-cache-info", "/%6eix%2Dcache-info"],
)
def test_equivalent_spellings_of_a_path_get_the_same_response(server: Server, target: str) -> None:
    """Nix 2.8 requests `//nix-cache-info` if its URL ends in a slash. Needless escapes are equivalent (RFC 3986)."""
    assert server.get(target) == server.get("/nix-cache-info")


def test_405_lists_the_allowed_methods(server: Server) -> None:
    for target in ("*", "/version"):
        answer = server.request("OPTIONS", target)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_every_row_names_a_covered_section() -> None:
    assert all(re.fullmatch(r"[235-9](\.\d){0,2}|RFC 6585 5", clause.section) for clause in CLAUSES)
