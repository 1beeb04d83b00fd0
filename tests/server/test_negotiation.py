"""Content negotiation: Accept-Encoding for everything that can be compressed, Accept for errors."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harmonia.nix.path_info import PathInfo
from harmonia.server.http.negotiation import NotAcceptable, prefers_html, prefers_zstd
from harmonia.store import file_reader, tree_reader
from harmonia.tools.store_builder import StoreBuilder
from support.running import Answer, Server, case, file_url, nar_url, read_answer, unpacked, wait_until

Start = Callable[..., Server]
Weights = list[tuple[str, str | None]]

OLD_NIX = "zstd, br, gzip, deflate, bzip2, xz"  # Nix 2.14 to 2.33
NEW_NIX = "deflate, gzip, br, zstd"  # Nix 2.34 and newer, and curl --compressed


def reference(header: Weights) -> str:
    """Return "zstd", "identity" or "406", following the sentences of RFC 9110 section 12.5.3 one by one."""
    named = {coding.lower(): float(weight or "1") for coding, weight in header}
    # "If the representation's content coding is one of the content codings listed in the Accept-Encoding field value,
    # then it is acceptable unless it is accompanied by a qvalue of 0." "*" "matches any available content coding not
    # explicitly listed in the field."
    zstd = named["zstd"] if "zstd" in named else named.get("*", 0)
    # "If the representation has no content coding, then it is acceptable by default unless specifically excluded by
    # the Accept-Encoding header field stating either "identity;q=0" or "*;q=0" without a more specific entry for
    # "identity"."
    excluded = named["identity"] == 0 if "identity" in named else named.get("*") == 0
    if excluded:
        return "zstd" if zstd else "406"
    if not zstd:
        return "identity"
    # "the acceptable content coding with the highest non-zero qvalue is preferred". Among equals, the server chooses.
    preferred = named.get("identity", named.get("*", 0))
    return "identity" if preferred > zstd else "zstd"


def chosen(header: str, *, worthwhile: bool = True) -> str:
    try:
        return "zstd" if prefers_zstd(header, worthwhile=worthwhile) else "identity"
    except NotAcceptable:
        return "406"


SPACE = st.sampled_from(["", "", " ", "\t", "  "])
QVALUE = st.sampled_from(["0", "0.", "0.0", "0.000", "0.001", "0.3", "0.30", "0.999", "1", "1.", "1.0", "1.000"])
CODING = st.sampled_from(["zstd", "ZSTD", "zStd", "identity", "Identity", "*", "gzip", "br", "x-zstd", "zstd2", "!#$%"])
MALFORMED = [
    *(
        "zstd;q=2",
        "zstd;q=1.5",
        "zstd;q=1.001",
        "zstd;q=-1",
        "zstd;q=",
        "zstd;q",
        "zstd;",
        "zstd;q=0.1234",
        "zstd;q=.5",
    ),
    *("zstd q=1", "zstd=1", "zstd;level=3", "zstd;q=1;q=1", "zstd;q =1", "zstd;q= 1", "zstd;q=x", "zstd;q=\u0661"),
    *("identity;q=x", "identity;q=00", "*;q=x", ";q=1", ";", '"zstd"', "zstd zstd", "z\u017ftd", ""),
]


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, Weights]:
    """Draw an Accept-Encoding field with malformed elements, and its valid elements."""
    weights: Weights = draw(
        st.lists(st.tuples(CODING, st.none() | QVALUE), max_size=5, unique_by=lambda each: each[0].lower())
    )
    elements = []
    for coding, qvalue in weights:
        weight = "" if qvalue is None else f"{draw(SPACE)};{draw(SPACE)}{draw(st.sampled_from('qQ'))}={qvalue}"
        elements += [
            f"{draw(SPACE)}{coding}{weight}{draw(SPACE)}",
            *draw(st.lists(st.sampled_from(MALFORMED), max_size=1)),
        ]
    return ",".join(elements), weights


@given(headers())
@example(("zstd;q=0,identity;q=0,*", [("zstd", "0"), ("identity", "0"), ("*", None)]))
def test_accept_encoding_is_interpreted_as_in_rfc_9110(header: tuple[str, Weights]) -> None:
    text, weights = header
    assert chosen(text) == reference(weights)
    # Small content is only compressed for clients that refuse everything else.
    without = [each for each in weights if each[0].lower() != "zstd"]
    refused = reference([*without, ("zstd", "0")]) == "406"
    assert chosen(text, worthwhile=False) == (reference(weights) if refused else "identity")


@given(st.text(max_size=50))
def test_arbitrary_accept_encoding_is_handled(header: str) -> None:
    assert chosen(header) in ("zstd", "identity", "406")


@dataclass(frozen=True)
class Served:
    server: Server
    path: PathInfo
    plain: bytes
    """The NAR of `path`."""
    listing: str
    tiny: PathInfo

    @property
    def nar(self) -> str:
        return nar_url(self.path)


def big(store: StoreBuilder, name: str = "big") -> tuple[PathInfo, bytes]:
    """Add a path with a listing large enough to compress; its NAR has several frames and exceeds socket buffers."""
    files = {f"file-{number}": os.urandom(1000) * 100 for number in range(100)}
    path = store.add(store.output_path(name), {**files, "random": os.urandom(2 << 20)})
    return path, b"".join(file_reader.read(tree_reader.dump(store.real_path(path.path))))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("negotiation")
    store = StoreBuilder(root / "store")
    path, plain = big(store)
    server = Server(root / "server", root / "store")
    server.start()
    served = Served(server, path, plain, f"/{path.path.hash_part}.ls", store.add_text("tiny", b"tiny" * 100))
    server.get(served.nar, accepting("zstd"))
    wait_until(lambda: "content-length" in server.head(served.nar, accepting("zstd")).headers)
    yield served
    server.stop()
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line]


def accepting(encodings: str | None, **others: str) -> dict[str, str]:
    named = {name.replace("_", "-"): value for name, value in others.items()}
    return named if encodings is None else {"Accept-Encoding": encodings, **named}


def coding(answer: Answer) -> str:
    """Return the encoding. The value `identity` is never sent, because older Nix aborts on it."""
    assert answer.headers.get("content-encoding", "zstd") == "zstd"
    assert answer.status in (200, 406)
    return "406" if answer.status == 406 else answer.headers.get("content-encoding", "identity")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, "identity"),  # Nix up to 2.13
        (OLD_NIX, "zstd"),
        (NEW_NIX, "zstd"),
        ("gzip, deflate, br, zstd", "zstd"),  # Firefox and Chromium
        ("gzip, deflate, br", "identity"),  # Safari
        ("gzip;q=1.0, deflate;q=0.6, identity;q=0.3", "identity"),  # Ruby
        ("identity", "identity"),  # Python, wget
        ("", "identity"),
        ("zstd", "zstd"),
        ("ZSTD;Q=0.001", "zstd"),
        ("zstd, identity", "zstd"),
        ("zstd;q=0.5, identity;q=0.6", "identity"),
        ("zstd;q=0.5, *", "identity"),
        ("zstd;q=0", "identity"),
        ("zstd;q=0.000, gzip", "identity"),
        ("*", "zstd"),
        ("gzip, *;q=0.1", "zstd"),
        ("*, zstd;q=0", "identity"),
        ("identity;q=0, zstd", "zstd"),
        ("identity;q=0, *", "zstd"),
        ("*;q=0, zstd;q=0.1", "zstd"),
        ("*;q=0, identity", "identity"),
        ("*;q=0", "406"),
        ("identity;q=0", "406"),
        ("identity;q=0, gzip", "406"),
        ("identity;q=0, zstd;q=0, gzip, *", "406"),
        ("zstd;q=x", "identity"),
        ("identity;q=x", "identity"),
        ("zstd/1.0; ;;,=", "identity"),
    ],
)
def test_response_has_the_negotiated_encoding(served: Served, header: str | None, expected: str) -> None:
    for url in (served.nar, served.listing):
        answer, head = (served.server.request(method, url, accepting(header)) for method in ("GET", "HEAD"))
        assert coding(answer) == expected
        assert (head.status, head.headers, head.body) == (answer.status, answer.headers, b"")
        if expected == "406":
            assert answer.headers["cache-control"] == "no-store"
            assert answer.text == "Not Acceptable\n"
            continue
        assert answer.headers["vary"] == "Accept-Encoding"
        plain = unpacked(answer.body) if expected == "zstd" else answer.body
        assert plain == (served.plain if url == served.nar else served.server.get(url).body)
        assert ("accept-ranges" in answer.headers) == (expected == "identity")


def test_several_accept_encoding_lines_are_one_list(served: Served) -> None:
    with served.server.connect() as connection:
        for second, expected in (("zstd", "zstd"), ("zstd;q=0", "identity"), ("identity;q=0", "406")):
            lines = [f"GET {served.nar} HTTP/1.1", "Host: x", "Accept-Encoding: gzip", f"accept-encoding: {second}"]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            assert coding(read_answer(connection)) == expected


def test_every_representation_has_its_own_etag(served: Served) -> None:
    """Otherwise a cache or a resumed download could mix two encodings."""
    urls = (served.nar, served.listing)
    answers = [(url, header, served.server.get(url, accepting(header))) for url in urls for header in (None, "zstd")]
    file = served.server.get(served.nar + ".zst")
    etags = [answer.headers["etag"] for _, _, answer in answers] + [file.headers["etag"]]
    assert len(set(etags)) == len(etags)
    assert all(etag[0] == etag[-1] == '"' for etag in etags)  # not weak
    for url, header, answer in answers:
        for etag in etags:
            again = served.server.get(url, accepting(header, If_None_Match=f'"other", {etag}'))
            assert again.status == (304 if etag == answer.headers["etag"] else 200)
            for name in ("etag", "cache-control", "vary"):
                assert again.headers[name] == answer.headers[name]
            assert again.status == 200 or again.body == b""


def test_head_equals_get_without_a_body(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """For responses of unknown length, Sanic would send Content-Length: 0."""
    server = start(store=tmp_path / "store")
    for version, suffix, accepted in product(("1.0", "1.1"), (".nar", ".nar.zst", ".ls"), (None, NEW_NIX)):
        path, _ = big(store, f"path-{version}{suffix}-{accepted is not None}")
        url = {".nar": nar_url(path), ".nar.zst": file_url(path), ".ls": f"/{path.path.hash_part}.ls"}[suffix]
        with case(version, suffix, accepted):
            check_head(server, url, version, suffix, accepted)


def check_head(server: Server, url: str, version: str, suffix: str, accepted: str | None) -> None:
    ask = partial(server.request, path=url, headers=accepting(accepted), version=version)
    head, get, cached = ask("HEAD"), ask("GET"), ask("GET")
    assert (head.status, head.body) == (get.status, b"")
    if version == "1.0" and suffix == ".nar.zst":
        # A cold NAR is sent uncompressed, because its compressed length is unknown.
        assert unpacked(cached.body) == unpacked(get.body)
    else:
        assert cached.body == get.body
    if version == "1.0":
        # HTTP/1.0 has no chunks, and a closed connection does not prove that the body is complete. HEAD, however,
        # compresses nothing to find the length.
        assert "transfer-encoding" not in head.headers.keys() | get.headers.keys()
        assert get.headers["content-length"] == str(len(get.body))
        assert {**head.headers, "content-length": str(len(get.body))} == get.headers
    else:
        assert head.headers == get.headers
        assert ("content-length" in get.headers) == ("transfer-encoding" not in get.headers)
    wait_until(lambda: ask("HEAD").headers == ask("GET").headers)


def test_connection_is_reusable_after_head_of_unknown_length(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path, plain = big(store)
    server = start(store=tmp_path / "store")
    with server.connect() as connection:
        for method in ("HEAD", "HEAD", "GET", "HEAD", "GET"):
            connection.sendall(f"{method} {nar_url(path)}.zst HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = read_answer(connection, method)
            assert answer.headers["connection"] == "keep-alive"
            assert unpacked(answer.body) == (plain if method == "GET" else b"")


def test_http_1_0_gets_the_uncompressed_body(served: Served) -> None:
    for url in (served.nar, served.listing):
        answer = served.server.request("GET", url, accepting(NEW_NIX), version="1.0")
        assert coding(answer) == "identity"
        assert answer.headers["content-length"] == str(len(answer.body))
        assert answer.headers["vary"] == "Accept-Encoding"


def test_http_1_0_that_refuses_identity_gets_406_or_a_known_length(served: Served) -> None:
    """The length of a compressed listing is unknown in advance, so no valid response is possible."""
    assert served.server.request("GET", served.listing, accepting("zstd, identity;q=0"), version="1.0").status == 406
    answer = served.server.request("GET", served.nar, accepting("zstd, identity;q=0"), version="1.0")
    assert answer.headers["content-length"] == str(len(answer.body))
    assert unpacked(answer.body) == served.plain


@pytest.mark.parametrize("header", [NEW_NIX, OLD_NIX, "zstd", "*"])
def test_range_is_never_compressed(served: Served, header: str) -> None:
    """Nix counts bytes of the uncompressed NAR, and repeats its Accept-Encoding when it resumes."""
    for url in (served.nar, served.listing):
        plain = served.server.get(url)
        part = served.server.get(url, accepting(header, Range="bytes=100-"))
        assert (part.status, part.body) == (206, plain.body[100:])
        assert part.headers["etag"] == plain.headers["etag"]
        assert part.headers["accept-ranges"] == "bytes"
        assert part.headers["vary"] == "Accept-Encoding"
        assert "content-encoding" not in part.headers
        encoded = served.server.head(url, accepting(header)).headers["etag"]
        whole = served.server.get(url, accepting(header, Range="bytes=100-", If_Range=encoded))
        assert (coding(whole), whole.body) == ("identity", plain.body)


def test_client_that_refuses_identity_gets_the_whole_instead_of_a_range(served: Served) -> None:
    answer = served.server.get(served.nar, accepting("zstd, identity;q=0", Range="bytes=100-"))
    assert coding(answer) == "zstd"
    assert unpacked(answer.body) == served.plain


def test_body_that_fits_a_packet_is_not_compressed(served: Served) -> None:
    for url in (nar_url(served.tiny), f"/{served.tiny.path.hash_part}.ls"):
        answer = served.server.get(url, accepting("zstd"))
        assert len(answer.body) < 1400
        assert coding(answer) == "identity"
        assert answer.headers["vary"] == "Accept-Encoding"
        insisting = served.server.get(url, accepting("zstd, identity;q=0"))
        assert coding(insisting) == "zstd"
        assert unpacked(insisting.body) == answer.body


def test_compressed_nars_are_not_compressed_again(served: Served) -> None:
    answer = served.server.get(served.nar + ".zst", accepting(NEW_NIX))
    assert coding(answer) == "identity"
    assert unpacked(answer.body) == served.plain
    assert "vary" not in answer.headers


def test_enable_compression_false_disables_all_compression(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path, plain = big(store)
    server = start(store=tmp_path / "store", settings="enable_compression = false")
    assert "\nCompression: none\n" in server.get(f"/{path.path.hash_part}.narinfo").text
    for url in (nar_url(path), f"/{path.path.hash_part}.ls"):
        answer = server.get(url, accepting("zstd, identity;q=0.1"))
        assert coding(answer) == "identity"
        assert "vary" not in answer.headers
    assert server.get(nar_url(path), accepting("zstd")).body == plain
    # Clients remember the URL for 30 days.
    assert unpacked(server.get(nar_url(path) + ".zst").body) == plain
    assert not (server.directory / "cache" / "nar").exists()


@pytest.mark.parametrize(
    ("header", "html"),
    [
        ("", False),
        ("*/*", False),
        ("text/html, application/xhtml+xml, image/jxr, */*", False),  # accepts both equally
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        (
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8,application/signed-exchange;v=b3;q=0.7",
            True,
        ),
        ("TEXT/HTML", True),
        ("text/html, text/plain", False),
        ("text/html;q=0.9, text/plain;q=0.8", True),
        ("text/plain, text/html;q=0.9", False),
        ("text/*, text/plain;q=0.5", True),
        ("text/html;q=0", False),
        ("image/avif,image/webp,image/*,*/*;q=0.8", False),
        ("application/json", False),
    ],
)
def test_html_is_sent_only_to_clients_that_prefer_it(header: str, *, html: bool) -> None:
    assert prefers_html(header) == html
