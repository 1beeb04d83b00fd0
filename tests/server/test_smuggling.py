"""Request smuggling: bytes that two parsers could read as different requests never get another client's response.

Ambiguous requests are rejected, and nothing after them is read. h11 and nginx serve as the other parsers.
"""

import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonia import __version__
from harmonia.tools.store_builder import StoreBuilder
from support.nginx import nginx
from support.raw_http import exchange, raw_response
from support.running import Server, wait_until

NEXT = b"GET /nix-cache-info HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n"
"""The request that an attacker smuggles, or that a proxy sends for another client."""
_numbers = count()
REFUSALS = {400, 408, 411, 413, 414, 417, 431, 501, 505}
BODIES = {"/version": f"harmonia {__version__}\n", "/health": "OK\n", "/nix-cache-info": "StoreDir: "}


def request(line: str = "GET /version HTTP/1.1", *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, "Host: cache", *headers, "", ""]).encode("latin-1") + body


CHUNKED = b"4\r\nWiki\r\n0\r\n\r\n"

REJECTED = {
    "both framing headers": (request("POST /version HTTP/1.1", "Content-Length: 4", "Transfer-Encoding: chunked"), 400),
    "both framing headers in reverse order": (
        request("POST /version HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 4"),
        400,
    ),
    "chunked": (request("PUT /version HTTP/1.1", "Transfer-Encoding: chunked", body=CHUNKED), 411),
    "chunked GET": (request("GET /version HTTP/1.1", "Transfer-Encoding: chunked", body=CHUNKED), 411),
    "chunked 1.0": (request("GET /version HTTP/1.0", "Transfer-Encoding: chunked", "Connection: keep-alive"), 411),
    "bad chunks": (request("PUT /version HTTP/1.1", "Transfer-Encoding: chunked", body=b"0x4\r\nWikiXX0\r\n\r\n"), 411),
    "no chunks": (request("PUT /version HTTP/1.1", "Transfer-Encoding: chunked", body=b"\r\n"), 411),
    "trailers": (request("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=b"0\r\nContent-Length: 9\r\n\r\n"), 411),
    **{
        f"Transfer-Encoding: {value!r}": (request("PUT /version HTTP/1.1", f"Transfer-Encoding: {value}"), status)
        for value, status in {
            "": 400,
            "identity": 400,
            "Chunked": 411,
            "xchunked": 400,
            "gzip, chunked": 501,
            "chunked ": 411,
            "chunked\x0b": 400,
            "\x0bchunked": 400,
            '"chunked"': 400,
        }.items()
    },
    **{
        f"Content-Length: {value!r}": (request("PUT /version HTTP/1.1", f"Content-Length: {value}"), 400)
        for value in ["", "+4", "-4", "4,4", "4;4", "0x4", "4_0", "4 4", "4.0", "\xb2", "\x0b4", "4\x0c", "9" * 30]
    },
    "digits of another script": (
        request("PUT / HTTP/1.1").replace(b"cache", b"cache\r\nContent-Length: \xd9\xa4"),
        400,
    ),
    "two lengths": (request("PUT /version HTTP/1.1", "Content-Length: 4", "Content-Length: 5"), 400),
    "twice the same length": (request("PUT /version HTTP/1.1", "Content-Length: 4", "Content-Length: 4"), 400),
    "a space before the colon": (request("PUT /version HTTP/1.1", "Content-Length : 68"), 400),
    "a tab before the colon": (request("PUT /version HTTP/1.1", "Transfer-Encoding\t: chunked"), 400),
    "a folded line": (request("GET /version HTTP/1.1", "X: y", " Content-Length: 68"), 400),
    "a folded line with no colon": (request("GET /version HTTP/1.1", "X: y", "\tz"), 400),
    "a line that begins with a colon": (request("GET /version HTTP/1.1", ": y"), 400),
    "a space before the first line": (request("GET /version HTTP/1.1").replace(b"\r\nHost", b"\r\n Host"), 400),
    "a line feed alone": (request("GET /version HTTP/1.1", "X: y\nContent-Length: 68"), 400),
    "only line feeds": (b"GET /version HTTP/1.1\nHost: cache\n\n", 400),
    "a carriage return alone": (request("GET /version HTTP/1.1", "X: y\rContent-Length: 68"), 400),
    "a carriage return before the end": (request("GET /version HTTP/1.1", "X: y\r"), 400),
    "a NUL": (request("GET /version HTTP/1.1", "X: y\0z"), 400),
    "a NUL in a name": (request("GET /version HTTP/1.1", "Content-\0Length: 68"), 400),
    "a name with a letter of another script": (request("GET /version HTTP/1.1", "Content-L\xebngth: 68"), 400),
    "no Host": (b"GET /version HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (request("GET /version HTTP/1.1", "Host: other"), 400),
    "an invalid Host": (request().replace(b"Host: cache", b"Host: a/b"), 400),
    "a Host with a space": (request().replace(b"Host: cache", b"Host: a b"), 400),
    "HTTP/0.9": (b"GET /version\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "two spaces": (request("GET  /version HTTP/1.1"), 400),
    "a tab": (request("GET\t/version HTTP/1.1"), 400),
    "a space in the target": (request("GET /version x HTTP/1.1"), 400),
    "another scheme": (request("GET ftp://other HTTP/1.1"), 400),
    "no authority": (request("GET http:///version HTTP/1.1"), 400),
    "a name and a password": (request("GET http://a:b@other/version HTTP/1.1"), 400),
    "a relative target": (request("GET version HTTP/1.1"), 400),
    "a fragment": (request("GET /version#x HTTP/1.1"), 400),
    "a lower-case method": (request("get /version HTTP/1.1"), 501),
    "a lower-case HEAD": (request("head /version HTTP/1.1"), 501),
    "a head too long": (request("GET /version HTTP/1.1", *["X: " + "y" * 1000] * 20), 431),
}


@pytest.mark.parametrize("attack", REJECTED)
def test_ambiguous_request_is_rejected_and_closes_the_connection(server: Server, attack: str) -> None:
    payload, status = REJECTED[attack]
    (seen,) = exchange(server.url, payload + NEXT * 3)
    assert seen == (status, seen.body, True)
    assert re.fullmatch("[A-Z][A-Za-z ]+\n", seen.body)


def test_rejected_requests_are_no_errors_in_the_log(start: Callable[..., Server], tmp_path: Path) -> None:
    """Anyone could fill the log with them."""
    StoreBuilder(tmp_path / "store").add_text("path", b"")
    server = start(store=tmp_path / "store")
    for payload, status in REJECTED.values():
        assert exchange(server.url, payload + NEXT)[0].status == status
    assert server.stop() == 0
    assert not [line for line in server.log if "ERROR" in line]


ACCEPTED = {
    "pipelining": (request() + request("GET /health HTTP/1.1"), [200, 200], True),
    "absolute-form": (request("GET http://other/version HTTP/1.1"), [200], True),
    "absolute-form without a path": (request("GET http://other HTTP/1.1"), [200], True),
    "absolute-form with a query alone": (request("GET HTTPS://[::1]:80?x HTTP/1.1"), [200], True),
    "asterisk-form": (request("OPTIONS * HTTP/1.1"), [405], True),
    "CONNECT": (request("CONNECT other:443 HTTP/1.1"), [501], False),
    "HTTP/1.2": (request("GET /version HTTP/1.2"), [200], True),
    "an empty line first": (b"\r\n" + request(), [200], True),
    "an upgrade to HTTP/2": (
        request("GET /version HTTP/1.1", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"),
        [200],
        True,
    ),
    "an upgrade to a web socket": (request("GET /version HTTP/1.1", "Upgrade: websocket"), [200], True),
    "a body of no bytes": (request("GET /version HTTP/1.1", "Content-Length: 0"), [200], True),
    "a close among others": (request("GET / HTTP/1.1", "Connection: close", "Connection: keep-alive"), [200], False),
    "a GET with a body": (request("GET /version HTTP/1.1", f"Content-Length: {len(NEXT)}", body=NEXT), [200], False),
    "a PUT": (request("PUT /version HTTP/1.1", "Content-Length: 4", body=b"Wiki"), [405], False),
    "a PUT that waits": (
        request("PUT /version HTTP/1.1", "Content-Length: 4", "Expect: 100-continue", body=b"Wiki"),
        [405],
        False,
    ),
    "an unknown expectation": (request("PUT / HTTP/1.1", "Content-Length: 4", "Expect: x", body=b"Wiki"), [417], False),
    "HTTP/1.0": (request("GET /version HTTP/1.0"), [200], False),
    "HTTP/1.0 with keep-alive": (b"GET /version HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [200], True),
    "spaces around a value": (request("GET /version HTTP/1.1", "X: \t y \t"), [200], True),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_unambiguous_request_is_answered_and_its_body_is_not_a_request(server: Server, name: str) -> None:
    payload, statuses, goes_on = ACCEPTED[name]
    seen = exchange(server.url, payload + NEXT)
    assert [answer.status for answer in seen] == [*statuses, *([200] if goes_on else [])]
    assert [answer.closes for answer in seen] == [*([False] * (len(seen) - 1)), True]
    if goes_on:
        assert seen[-1].body.startswith("StoreDir: ")


# Random requests from parts that parsers disagree about.
LINES = [
    "GET /version HTTP/1.1",
    "GET /health HTTP/1.1",
    "PUT /version HTTP/1.1",
    "POST /health HTTP/1.1",
]  # without HTTP/1.0, because h11 does not keep its connections alive
FIELDS = [
    *("Content-Length: 4", "content-length:4", "Content-Length: 04", "Content-Length: +4", "Content-Length : 4"),
    *("Content-Length: 4, 4", "Content-Length: 0", "Content-Length: 62", "Content-Length: 4\x0b", " Content-Length: 4"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: Chunked", "Transfer-Encoding: identity"),
    *("Transfer-Encoding : chunked", "Transfer-Encoding:\tchunked", "X: y\nTransfer-Encoding: chunked"),
    *("X: y\rContent-Length: 4", "X: y\r\n z", "X:", "X", "Connection: close", "Connection: keep-alive", "Host: other"),
    *("Expect: 100-continue", "Upgrade: h2c", "Upgrade: websocket", "X: \xff", "X: \0"),
]
SENT = [
    b"",
    b"",
    b"Wiki",
    CHUNKED,
    b"4;x\r\nWiki\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"\r\n",
    b"0\r\nX: y\r\n\r\n",
    b"\n",
]

requests = st.builds(
    lambda line, fields, body: request(line, *fields, body=body),
    st.sampled_from(LINES),
    st.lists(st.sampled_from(FIELDS), max_size=3),
    st.sampled_from(SENT),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a few requests on one connection, with a few changed bytes, and a last request that closes it."""
    payload = b"".join(draw(st.lists(requests, min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(payload) - 1))
        payload = (
            payload[:at] + draw(st.sampled_from([b"", b"\r", b"\n", b" ", b":", b"\0", b"\t"])) + payload[at + 1 :]
        )
    return payload + NEXT * 3


def h11_reads(payload: bytes) -> list[tuple[str, str]]:
    """Return the requests that h11 reads until the connection ends."""
    found: list[tuple[str, str]] = []
    try:
        while payload := payload.lstrip(b"\r\n") if payload.startswith(b"\r\n") else payload:
            connection = h11.Connection(
                h11.SERVER
            )  # a new connection for each request, because h11 does not skip the empty line before a request
            connection.receive_data(payload)
            event = connection.next_event()
            if not isinstance(event, h11.Request):
                return found
            found.append((event.method.decode(), event.target.decode()))
            while not isinstance(event, h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    return found
                event = connection.next_event()
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE:
                return found
            payload = connection.trailing_data[0]
    except h11.ProtocolError:
        pass
    return found


def expected(method: str, target: str) -> tuple[int, str]:
    """Return the status and the beginning of the body."""
    if target not in BODIES:
        return 404, "Not Found"
    return (200, BODIES[target][:9]) if method == "GET" else (405, "Method No")


@given(mutated())
@settings(max_examples=250)
def test_server_reads_no_request_that_h11_does_not(server: Server, payload: bytes) -> None:
    *before, last = exchange(server.url, payload)
    assert last.closes
    assert not any(answer.closes for answer in before)
    answered = before if last.status in REFUSALS else [*before, last]
    theirs = [expected(*request) for request in h11_reads(payload)]
    assert [(answer.status, answer.body[:9]) for answer in answered] == theirs[: len(answered)], payload


@pytest.fixture(scope="module")
def behind(shared_store: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, Path]]:
    """Start a server behind nginx, which shares one connection for all its clients, and streams request bodies."""
    directory = tmp_path_factory.mktemp("behind")
    store = Path(shared_store.real_dir).parents[1]  # type: ignore[attr-defined]
    server = Server(directory / "server", store, "access_log = true")
    server.start()
    address = server.url.removeprefix("http://")
    proxied = """
        access_log {0} seen; proxy_pass http://cache; proxy_http_version 1.1; proxy_request_buffering off;
        proxy_set_header Connection "";
    """
    log = directory / "nginx/seen.log"
    try:
        with nginx(
            directory / "nginx",
            f"location / {{ {proxied.format(log)} }}",
            f"log_format seen '$request_method $request_uri $upstream_status';"
            f"upstream cache {{ server {address}; keepalive 1; }}",
        ) as (url, _):
            yield server, url, log
    finally:
        server.stop()
    assert not [line for line in server.log if "Traceback" in line]


def logged_requests(server: Server) -> list[str]:
    """Return the logged requests with their statuses, without malformed ones."""
    found = (re.search(r"'([A-Z]+ \S+)' ([0-9]{3}) ", line) for line in list(server.log))
    return [f"{match[1]} {match[2]}" for match in found if match and "/version?settled" not in match[1]]


def test_attack_through_nginx_never_changes_the_next_clients_response(behind: tuple[Server, str, Path]) -> None:
    """After each attack, another client sends a request through nginx, which may use the same connection."""
    _, url, _ = behind
    payloads = [payload for payload, _ in REJECTED.values()] + [payload for payload, _, _ in ACCEPTED.values()]
    for payload in payloads:
        raw_response(url, payload + NEXT * 3)
        for path, body in BODIES.items():
            (seen,) = exchange(url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert (seen.status, seen.body[:9]) == (200, body[:9]), payload


@given(mutated())
@settings(max_examples=100)
def test_server_logs_the_same_requests_as_nginx(behind: tuple[Server, str, Path], payload: bytes) -> None:
    server, url, log = behind
    mine, theirs = len(logged_requests(server)), len(log.read_text().splitlines()) if log.exists() else 0
    raw_response(url, payload)
    last = f"/nix-cache-info?{next(_numbers)}"  # both log a request after its response
    raw_response(url, NEXT.replace(b"/nix-cache-info", last.encode()))

    def settled() -> bool:
        lines = log.read_text().splitlines()[theirs:]
        passed = [line for line in lines if not line.endswith(" -")]
        return passed != [] and passed[-1] == f"GET {last} 200" and logged_requests(server)[mine:] == passed

    wait_until(settled)
