"""Rules for every resource in every kind of request: each route, method, Accept-Encoding and Range.

Every route must be in the table. The test file of each resource checks the content of its responses.
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
from support.event_client import follow
from support.running import KNOWN_LENGTHS, Answer, Server, Session, case, wait_until

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
CROSSED = (None, "gzip, zstd;q=0.5", "zstd, identity;q=0", "*;q=0")
"""Encodings, one for each outcome of the negotiation, that come with every range. The others come with one range."""
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def name(uri: str) -> str:
    """Return the name of a pattern in the table: the extension or the directory of a hash part, or the pattern."""
    found = re.fullmatch(
        r"/(?:(?P<directory>\w+)/)?<(?:hash_part|before):.*?\{32\}\)(?:\\\.(?P<extension>\w+))?>.*", uri
    )
    return (found["extension"] or found["directory"]) if found else uri


def test_every_route_is_in_the_table() -> None:
    uris = [route.uri for route in ROUTES + METRICS_ROUTES if route.methods == ("GET", "HEAD")]
    assert [name(uri) for uri in uris] == list(ROWS)


def test_resource_for_post_allows_only_post(client: Session) -> None:
    posted = [route.uri for route in ROUTES if "POST" in route.methods]
    assert posted == ["/get-narinfos-v1"]
    for method in ("GET", "HEAD", *METHODS[1:]):
        response = client.request(method, posted[0])
        assert (response.status, response.headers["allow"]) == (405, "POST")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    """Start a server, and yield it with the hashes of a path."""
    directory = tmp_path_factory.mktemp("contract")
    hashes = stock(directory / "store")
    settings = "browse = true\nmax_query_rate = 0"
    server = Server(directory / "server", directory / "store", settings, program=KNOWN_LENGTHS)
    server.start()
    compressed = "/nar/{hash}-{narhash}-{encoding}.nar.zst".format(**hashes)
    server.get(compressed)
    wait_until(lambda: "content-length" in server.head(compressed).headers)
    yield server, hashes
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


ALL_ROWS = [row for rows in ROWS.values() for row in rows]


@pytest.fixture(params=[row for row in ALL_ROWS if not row.endless], ids=lambda row: row.path)
def row(request: pytest.FixtureRequest, named: tuple[Server, dict[str, str]]) -> Row:
    parameter: Row = request.param
    return parameter._replace(path=parameter.path.format(**named[1]))


@pytest.fixture
def client(named: tuple[Server, dict[str, str]]) -> Iterator[Session]:
    with Session(named[0]) as session:
        yield session


def decoded(response: Answer) -> bytes:
    if response.headers.get("content-encoding") is None:
        return response.body
    return zstandard.ZstdDecompressor().stream_reader(response.body, read_across_frames=True).read()


def check_error(response: Answer) -> None:
    assert response.text == f"{HTTPStatus(response.status).phrase}\n"
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["vary"] == "Accept"
    assert not {"etag", "content-encoding", "last-modified"} & response.headers.keys()


def check_part(response: Answer, wanted: str, whole: bytes) -> None:
    """Check a 206 or 416 for a Range with one range."""
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(len(whole) - int(last), 0)
    stop = min(int(last) + 1, len(whole)) if first and last else len(whole)
    if start >= len(whole):
        assert (response.status, response.headers["content-range"]) == (416, f"bytes */{len(whole)}")
        check_error(response)
    else:
        assert (response.status, response.body) == (206, whole[start:stop])
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


def test_get_and_head_in_every_encoding_and_range(client: Session, row: Row) -> None:
    plain = client.get(row.path)
    assert plain.status == row.status
    for accepted in ENCODINGS:
        encoded = {} if accepted is None else {"Accept-Encoding": accepted}
        unranged = client.get(row.path, encoded)
        crossed = accepted in CROSSED and not row.live  # the metrics take 20 ms each time
        for wanted in RANGES if crossed or accepted is None else RANGES[:2]:
            given = encoded if wanted is None else {**encoded, "Range": wanted}
            with case(given):
                response, head = client.get(row.path, given), client.head(row.path, given)
                assert head.body == b""
                assert head.status == unranged.status
                if not row.live:
                    assert head.headers == unranged.headers
                if "transfer-encoding" not in response.headers:
                    assert response.headers["content-length"] == str(len(response.body))
                check_response(row, given, plain, response)


def check_response(row: Row, given: Mapping[str, str], plain: Answer, response: Answer) -> None:
    accepted, wanted = given.get("Accept-Encoding", ""), given.get("Range", "")
    encoding = response.headers.get("content-encoding")
    if row.status >= 400:
        assert response.status == row.status
        check_error(response)
        return
    if not row.named and re.fullmatch(r"bytes=\d*-\d*", wanted) and wanted != "bytes=5-2":
        assert response.status == 404
        check_error(response)
        return
    if row.negotiable and accepted == "*;q=0":
        assert response.status == 406
        check_error(response)
        return
    if response.status != 416:
        assert response.headers.get("vary") == ("Accept-Encoding" if row.negotiable else None)
    if encoding is not None:
        assert encoding == "zstd"
        assert row.negotiable
        assert response.status == 200
        assert accepted in ("ZSTD", "gzip, zstd;q=0.5", "*", "zstd, identity;q=0")
        assert decoded(response) == plain.body
        assert "accept-ranges" not in response.headers
    elif row.ranges and re.fullmatch(r"bytes=\d*-\d*", wanted) and wanted != "bytes=5-2":
        assert response.headers.get("accept-ranges", "bytes") == "bytes"
        check_part(response, wanted, plain.body)
    else:
        assert response.status == row.status
        assert row.live or response.body == plain.body
    if row.negotiable and accepted == "zstd, identity;q=0":
        assert encoding == "zstd"


def test_every_encoding_has_its_own_strong_etag(client: Session, row: Row) -> None:
    plain, encoded = client.get(row.path), client.get(row.path, {"Accept-Encoding": "zstd, identity;q=0"})
    if row.status != 200 or not row.etag:
        assert "etag" not in plain.headers
        return
    etags = [response.headers["etag"] for response in (plain, encoded)]
    assert all(re.fullmatch(r'"[!#-~]+"', etag) for etag in etags)
    assert (etags[0] != etags[1]) == row.negotiable
    for response, accepted in ((plain, "identity"), (encoded, "zstd, identity;q=0")):
        etag = response.headers["etag"]
        for condition in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            for method in ("GET", "HEAD"):
                same = client.request(method, row.path, {"If-None-Match": condition, "Accept-Encoding": accepted})
                assert (same.status, same.body) == (304, b"")
                for field in ("etag", "cache-control", "vary"):
                    assert same.headers.get(field) == response.headers.get(field)
                assert not {"content-type", "content-length", "content-encoding"} & same.headers.keys()
        assert client.get(row.path, {"If-None-Match": '"other"', "Accept-Encoding": accepted}).status == 200


def test_error_is_an_html_page_for_browsers(client: Session, row: Row) -> None:
    wanted: dict[str, str]
    for wanted in ({}, {"Accept-Encoding": "*;q=0"}, {"Range": "bytes=9999999999-"}):
        for method in ("GET", "PUT"):
            with case(method, wanted):
                check_page(client, row, method, wanted)


def check_page(client: Session, row: Row, method: str, wanted: Mapping[str, str]) -> None:
    plain = client.request(method, row.path, wanted)
    response = client.request(method, row.path, {**wanted, "Accept": BROWSER})
    assert response.status == plain.status
    if plain.status < 400:
        assert row.live or row.has_page or response == plain
        return
    check_error(plain)
    phrase = HTTPStatus(plain.status).phrase
    assert f"<title>{phrase} · " in response.text
    assert f"<main><h1>{phrase}</h1><p>" in response.text
    changed = {"content-type": "text/html; charset=utf-8", "content-length": str(len(response.body))}
    theirs = {name: response.headers[name] for name in ("content-security-policy", "x-content-type-options")}
    assert response.headers == {**plain.headers, **changed, **theirs}
    [top] = re.findall(r'<header><a href="([./]+)" class=brand>', response.text)
    assert urljoin(row.path, top) == "/"
    if method == "GET" and "Range" not in wanted:
        head = client.head(row.path, {**wanted, "Accept": BROWSER})
        assert (head.status, head.headers, head.body) == (response.status, response.headers, b"")


def test_other_methods_get_405(client: Session, row: Row) -> None:
    for method in METHODS:
        with case(method):
            response = client.request(method, row.path)
            assert response.status == 405
            assert response.headers["allow"] == "GET, HEAD"
            check_error(response)


@pytest.mark.parametrize("row", [row for row in ALL_ROWS if row.endless], ids=lambda row: row.path)
def test_endless_response_obeys_the_rules_of_all(
    client: Session, named: tuple[Server, dict[str, str]], row: Row
) -> None:
    for accepted in ENCODINGS:
        for wanted in (None, "x=1-2", "bytes=5-2", "bytes=0-0", "bytes=-1"):
            fields = {"Accept-Encoding": accepted, "Range": wanted}
            given = {field: value for field, value in fields.items() if value is not None}
            with case(given), follow(named[0], headers=given, path=row.path) as stream:
                response, head = stream.response, client.head(row.path, given)
                assert head.status == 200
                assert response.status == (404 if wanted in ("bytes=0-0", "bytes=-1") else 200)
                if response.status == 200:
                    theirs = {field.lower(): value for field, value in response.getheaders()}
                    assert {**head.headers, "date": theirs["date"]} == theirs
                    assert not {"content-length", "content-encoding", "etag", "vary"} & theirs.keys()
    test_other_methods_get_405(client, row)


@pytest.mark.parametrize(
    "path", ["/none", "/nar", "/nar/", "/NIX-CACHE-INFO", "/{hash}.narinfo/", "/{hash}", "/%00", "/nar/a/b"]
)
def test_unknown_path_gets_404(client: Session, named: tuple[Server, dict[str, str]], path: str) -> None:
    for method in ("GET", *METHODS):
        response = client.request(method, path.format(**named[1]))
        assert response.status == 404
        check_error(response)


@pytest.mark.parametrize("path", ["/version", "/none", "/{hash}.narinfo", "/nar/{hash}.nar", "/serve/{hash}"])
def test_every_response_has_a_date(named: tuple[Server, dict[str, str]], path: str) -> None:
    server, hashes = named
    for method in ("GET", "HEAD", "POST"):
        with server.connect() as connection:
            before = time()
            connection.sendall(f"{method} {path.format(**hashes)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = connection.recv(65536).partition(b"\r\n\r\n")[0] + b"\r\n"
        (date,) = re.findall(rb"\r\ndate: ([^\r]+)\r\n", head)
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", date.decode())
        assert before - 2 < parsedate_to_datetime(date.decode()).timestamp() <= time()
