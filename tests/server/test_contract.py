"""Promises that hold for every resource, asked in every way: each route, method, Accept-Encoding and Range.

A route that is not in the table below fails. What each resource says is told by the test file of its own name.
"""

import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time
from urllib.parse import urljoin

import pytest
import zstandard

from harmonia.server.routes import METRICS_ROUTES, ROUTES
from support.contract import ROWS, Row, stock
from support.running import Answer, Server, Session, case, wait_until

METHODS = ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "QUERY"]
ENCODINGS = [
    None,
    "",
    "identity",
    "gzip, br",
    "ZSTD",
    "gzip, zstd;q=0.5",
    "zstd;q=0",
    "*",
    "zstd, identity;q=0",
    "*;q=0",
]
RANGES = [
    None,
    "bytes=0-0",
    "bytes=-1",
    "bytes=3-9999999999",
    "bytes=9999999999-",
    "bytes=0-0,2-3",
    "bytes=5-2",
    "x=1-2",
]
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def name(uri: str) -> str:
    """A pattern with nothing but an extension is known by that."""
    found = re.fullmatch(r"/(?:path/)?<hash_part:.*?\{32\}\)(?:\\\.(?P<extension>\w+))?>", uri)
    return (found["extension"] or "path") if found else uri


def test_every_route_is_in_the_table() -> None:
    assert [name(route.uri) for route in ROUTES + METRICS_ROUTES] == list(ROWS)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server, and the hashes of a path that it has."""
    directory = tmp_path_factory.mktemp("contract")
    hashes = stock(directory / "store")
    server = Server(directory / "server", directory / "store", "browse = true\nmax_query_rate = 0")
    server.start()
    compressed = "/nar/{hash}-{narhash}-{encoding}.nar.zst".format(**hashes)
    server.get(compressed)
    wait_until(lambda: "content-length" in server.head(compressed).headers)
    yield server, hashes
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


@pytest.fixture(params=[row for rows in ROWS.values() for row in rows], ids=lambda row: row.path)
def row(request: pytest.FixtureRequest, named: tuple[Server, dict[str, str]]) -> Row:
    asked: Row = request.param
    return asked._replace(path=asked.path.format(**named[1]))


@pytest.fixture
def client(named: tuple[Server, dict[str, str]]) -> Iterator[Session]:
    with Session(named[0]) as session:
        yield session


def decoded(answer: Answer) -> bytes:
    if answer.headers.get("content-encoding") is None:
        return answer.body
    return zstandard.ZstdDecompressor().stream_reader(answer.body, read_across_frames=True).read()


def check_error(answer: Answer) -> None:
    assert answer.text == f"{HTTPStatus(answer.status).phrase}\n"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["vary"] == "Accept"
    assert not {"etag", "content-encoding", "last-modified"} & answer.headers.keys()


def check_part(answer: Answer, wanted: str, whole: bytes) -> None:
    """A 206 or 416 to a range that has one part."""
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(len(whole) - int(last), 0)
    stop = min(int(last) + 1, len(whole)) if first and last else len(whole)
    if start >= len(whole):
        assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(whole)}")
        check_error(answer)
    else:
        assert (answer.status, answer.body) == (206, whole[start:stop])
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


def test_get_and_head(client: Session, row: Row) -> None:
    plain = client.get(row.path)
    assert plain.status == row.status
    for accepted in ENCODINGS:
        encoded = {} if accepted is None else {"Accept-Encoding": accepted}
        unranged = client.get(row.path, encoded)
        for wanted in RANGES:
            given = encoded if wanted is None else {**encoded, "Range": wanted}
            with case(given):
                answer, head = client.get(row.path, given), client.head(row.path, given)
                assert head.body == b""
                assert head.status == unranged.status
                if not row.live:
                    assert head.headers == unranged.headers
                if "transfer-encoding" not in answer.headers:
                    assert answer.headers["content-length"] == str(len(answer.body))
                check_answer(row, given, plain, answer)


def check_answer(row: Row, given: Mapping[str, str], plain: Answer, answer: Answer) -> None:
    accepted, wanted = given.get("Accept-Encoding", ""), given.get("Range", "")
    encoding = answer.headers.get("content-encoding")
    if row.status == 404:
        assert answer.status == 404
        check_error(answer)
        return
    if not row.named and re.fullmatch(r"bytes=\d*-\d*", wanted) and wanted != "bytes=5-2":
        assert answer.status == 404
        check_error(answer)
        return
    if row.negotiable and accepted == "*;q=0":
        assert answer.status == 406
        check_error(answer)
        return
    if answer.status != 416:
        assert answer.headers.get("vary") == ("Accept-Encoding" if row.negotiable else None)
    if encoding is not None:
        assert encoding == "zstd"
        assert row.negotiable
        assert answer.status == 200
        assert accepted in ("ZSTD", "gzip, zstd;q=0.5", "*", "zstd, identity;q=0")
        assert decoded(answer) == plain.body
        assert "accept-ranges" not in answer.headers
    elif row.ranges and re.fullmatch(r"bytes=\d*-\d*", wanted) and wanted != "bytes=5-2":
        assert answer.headers.get("accept-ranges", "bytes") == "bytes"
        check_part(answer, wanted, plain.body)
    else:
        assert answer.status == row.status
        assert row.live or answer.body == plain.body
    if row.negotiable and accepted == "zstd, identity;q=0":
        assert encoding == "zstd"


def test_etags(client: Session, row: Row) -> None:
    plain, encoded = client.get(row.path), client.get(row.path, {"Accept-Encoding": "zstd, identity;q=0"})
    if row.status != 200 or not row.etag:
        assert "etag" not in plain.headers
        return
    etags = [answer.headers["etag"] for answer in (plain, encoded)]
    assert all(re.fullmatch(r'"[!#-~]+"', etag) for etag in etags)
    assert (etags[0] != etags[1]) == row.negotiable
    for answer, accepted in ((plain, "identity"), (encoded, "zstd, identity;q=0")):
        etag = answer.headers["etag"]
        for condition in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            for method in ("GET", "HEAD"):
                same = client.request(method, row.path, {"If-None-Match": condition, "Accept-Encoding": accepted})
                assert (same.status, same.body) == (304, b"")
                for kept in ("etag", "cache-control", "vary"):
                    assert same.headers.get(kept) == answer.headers.get(kept)
                assert not {"content-type", "content-length", "content-encoding"} & same.headers.keys()
        assert client.get(row.path, {"If-None-Match": '"other"', "Accept-Encoding": accepted}).status == 200


def test_an_error_is_a_page_for_a_browser(client: Session, row: Row) -> None:
    wanted: dict[str, str]
    for wanted in ({}, {"Accept-Encoding": "*;q=0"}, {"Range": "bytes=9999999999-"}):
        for method in ("GET", "PUT"):
            with case(method, wanted):
                check_page(client, row, method, wanted)


def check_page(client: Session, row: Row, method: str, wanted: Mapping[str, str]) -> None:
    plain = client.request(method, row.path, wanted)
    answer = client.request(method, row.path, {**wanted, "Accept": BROWSER})
    assert answer.status == plain.status
    if plain.status < 400:
        assert row.live or answer == plain
        return
    check_error(plain)
    phrase = HTTPStatus(plain.status).phrase
    assert f"<title>{phrase}</title>" in answer.text
    assert f"<main><h1>{phrase}</h1><p>" in answer.text
    changed = {"content-type": "text/html; charset=utf-8", "content-length": str(len(answer.body))}
    theirs = {name: answer.headers[name] for name in ("content-security-policy", "x-content-type-options")}
    assert answer.headers == {**plain.headers, **changed, **theirs}
    [top] = re.findall(r'<header><a href="([./]+)">', answer.text)
    assert urljoin(row.path, top) == "/"
    if method == "GET" and "Range" not in wanted:
        head = client.head(row.path, {**wanted, "Accept": BROWSER})
        assert (head.status, head.headers, head.body) == (answer.status, answer.headers, b"")


def test_other_methods(client: Session, row: Row) -> None:
    for method in METHODS:
        with case(method):
            answer = client.request(method, row.path)
            assert answer.status == 405
            assert answer.headers["allow"] == "GET, HEAD"
            check_error(answer)


@pytest.mark.parametrize(
    "path", ["/none", "/nar", "/nar/", "/NIX-CACHE-INFO", "/{hash}.narinfo/", "/{hash}", "/%00", "/nar/a/b"]
)
def test_what_is_no_resource(client: Session, named: tuple[Server, dict[str, str]], path: str) -> None:
    for method in ("GET", *METHODS):
        answer = client.request(method, path.format(**named[1]))
        assert answer.status == 404
        check_error(answer)


@pytest.mark.parametrize("path", ["/version", "/none", "/{hash}.narinfo", "/nar/{hash}.nar", "/serve/{hash}"])
def test_every_answer_tells_when_it_was_made(named: tuple[Server, dict[str, str]], path: str) -> None:
    server, hashes = named
    for method in ("GET", "HEAD", "POST"):
        with server.connect() as connection:
            before = time()
            connection.sendall(f"{method} {path.format(**hashes)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = connection.recv(65536).partition(b"\r\n\r\n")[0] + b"\r\n"
        (date,) = re.findall(rb"\r\ndate: ([^\r]+)\r\n", head)
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", date.decode())
        assert before - 2 < parsedate_to_datetime(date.decode()).timestamp() <= time()
