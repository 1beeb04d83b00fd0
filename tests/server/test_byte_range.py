"""Byte ranges of every NAR follow RFC 9110."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harmonia.server.http import byte_range
from harmonia.store import file_reader, tree_reader
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs
from support.running import PATIENCE_S, Server, read_answer, unpacked, wait_until
from support.shared_store import dump, info, url

Start = Callable[..., Server]


def reference(header: str, size: int) -> tuple[int, int] | str:
    """Implement RFC 9110 section 14 a second time: return the range, `whole` or `unsatisfiable`."""
    unit, equals, specs = header.strip(" \t").partition("=")
    parts = [spec.strip(" \t") for spec in specs.split(",") if spec.strip(" \t")]
    if not equals or unit.lower() != "bytes" or len(parts) != 1:
        return "whole"
    first, dash, last = parts[0].partition("-")
    if not dash or any(digit not in "0123456789" for digit in first + last) or first == last == "":
        return "whole"
    if first == "":
        suffix = int(last)
        return (max(size - suffix, 0), size) if suffix and size else "unsatisfiable"
    if last and int(last) < int(first):
        return "whole"
    if int(first) >= size:
        return "unsatisfiable"
    return int(first), min(int(last) + 1 if last else size, size)


def interpreted(header: str, size: int) -> tuple[int, int] | str:
    try:
        part = byte_range.requested(header, None, '"etag"')
        return "whole" if part is None else byte_range.bounds(part, size)
    except byte_range.UnsatisfiableError:
        return "unsatisfiable"


NUMBERS = st.one_of(st.integers(0, 300).map(str), st.sampled_from(["", "00", "007", str(2**63), str(2**64), "9" * 30]))
SPECS = st.builds("{}-{}".format, NUMBERS, NUMBERS)
HEADERS = st.one_of(
    st.builds("bytes={}".format, SPECS),
    st.builds("{}={}".format, st.sampled_from(["Bytes", "BYTES", "items", "", "bytes "]), SPECS),
    st.builds("bytes={}".format, st.lists(SPECS, max_size=3).map(" , ".join)),
    st.text("bytes=-,0123456789 \t+x", max_size=20),
)


@given(HEADERS, st.integers(0, 300))
@example(f"bytes={2**64}-{2**63}", 0)
@example("bytes=0-1,", 10)
@example("bytes=,0-1", 10)
@example("bytes=--1", 10)
@example("bytes=-0", 10)
@example("bytes=٣-", 10)
@example("bytes=0-" + "9" * 5000, 10)
@example("bytes=" + "0" * 5000 + "-", 10)
def test_range_header_is_interpreted_as_in_rfc_9110(header: str, size: int) -> None:
    if len(header) < 1000:
        assert interpreted(header, size) == reference(header, size)
    else:
        assert interpreted(header, size) == (0, size)


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-0",
        "bytes=5-9",
        "bytes=100-",
        "bytes=-1",
        "bytes=-100000000",
        "bytes=3-100000000",
        "BYTES=1-2",
        "bytes=99999999-",
        "bytes=-0",
        "bytes=2-1",
        "items=0-1",
        "bytes=a-b",
        "bytes=0-1,5-6",
        "bytes",
        "",
        "bytes=-",
    ],
)
def test_range_header_gets_206_416_or_200(server: Server, shared_store: StoreBuilder, header: str) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    whole = dump(shared_store, "tree")
    # The length of a compressed NAR is known, and sent, when it was compressed once: by this test or an earlier one.
    wait_until(lambda: "content-length" in server.get(nar_path, {"Accept-Encoding": "zstd"}).headers)
    answer = server.get(nar_path, {"Range": header, "Accept-Encoding": "zstd"})
    match reference(header, len(whole)):
        case "whole":
            assert answer.status == 200
            assert unpacked(answer.body) == whole
            assert answer.headers == server.get(nar_path, {"Accept-Encoding": "zstd"}).headers
            assert "content-range" not in answer.headers
        case "unsatisfiable":
            assert answer.status == 416
            assert answer.headers["content-range"] == f"bytes */{len(whole)}"
            assert answer.headers["cache-control"] == "no-store"
        case (int(start), int(stop)):
            assert (answer.status, answer.body) == (206, whole[start:stop])
            assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
            assert answer.headers["etag"] == server.head(nar_path).headers["etag"]
            assert answer.headers["accept-ranges"] == "bytes"
            assert "content-encoding" not in answer.headers
    for encoding in ("zstd", "identity"):  # HEAD ignores ranges (RFC 9110 section 14.2)
        whole_answer = server.get(nar_path, {"Accept-Encoding": encoding})
        head = server.head(nar_path, {"Range": header, "Accept-Encoding": encoding})
        assert (head.status, head.headers, head.body) == (200, whole_answer.headers, b"")


def test_nar_advertises_accept_ranges(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    assert server.get(nar_path).headers["accept-ranges"] == "bytes"


def test_if_range_with_another_etag_gets_the_whole(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    etag = server.head(nar_path).headers["etag"]
    assert server.get(nar_path, {"Range": "bytes=5-9", "If-Range": etag}).status == 206
    for other in ('"other"', f"W/{etag}", "Sun, 06 Nov 1994 08:49:37 GMT", "*", ""):
        assert server.get(nar_path, {"Range": "bytes=5-9", "If-Range": other}).status == 200


def test_if_none_match_takes_precedence_over_range(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    etag = server.head(nar_path).headers["etag"]
    assert server.get(nar_path, {"Range": "bytes=5-9", "If-None-Match": etag}).status == 304


def test_older_nar_urls_support_ranges(server: Server, shared_store: StoreBuilder) -> None:
    whole = dump(shared_store, "tree")
    answer = server.get(f"/nar/{info(shared_store, 'tree').path.hash_part}.nar", {"Range": "bytes=-100"})
    assert (answer.status, answer.body) == (206, whole[-100:])


@needs("curl")
def test_parallel_ranges_of_curl_make_the_whole(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add(store.output_path("tree"), {f"{n:04}": bytes([n % 251]) * (n * 7) for n in range(2000)})
    server = start(store=tmp_path / "store", workers=2)
    whole = dump(store, "tree")
    nar_path = server.url + url(server, info(store, "tree").path.hash_part)
    step = len(whole) // 16 + 1
    command = ["curl", "--silent", "--show-error", "--parallel", "--parallel-immediate"]
    for number in range(16):
        part = f"{number * step}-{(number + 1) * step - 1}"
        command += ["--fail", "--range", part, "--output", str(tmp_path / f"{number:02}"), nar_path, "--next"]
    subprocess.run(command[:-1], check=True, timeout=PATIENCE_S)
    assert b"".join((tmp_path / f"{number:02}").read_bytes() for number in range(16)) == whole


@pytest.mark.parametrize("first", ["nar", "listing"])
def test_range_opens_no_file_before_its_start(start: Start, store: StoreBuilder, tmp_path: Path, first: str) -> None:
    """Proved by a removed file: a walk would fail, but the layout is remembered."""
    tree = {name: name.encode() * 200_000 for name in "abc"}  # larger than a NAR that is sent in one piece
    path = store.add(store.output_path("tree"), tree)
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.path.hash_part)
    whole = b"".join(file_reader.read(tree_reader.dump(store.real_path(path.path))))
    assert server.get(nar_path if first == "nar" else f"/{path.path.hash_part}.ls").status == 200
    root = Path(store.real_path(path.path).decode())
    root.chmod(0o700)
    (root / "a").rename(tmp_path / "a")
    answer = server.get(nar_path, {"Range": "bytes=-600"})
    assert (answer.status, answer.body) == (206, whole[-600:])


def test_file_changed_on_disk_gets_404_and_is_served_again_once_restored(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    size = 300_000  # two such files are larger than a NAR that is kept in memory
    path = store.add(store.output_path("tree"), {"a": b"a" * size, "b": b"b" * size})
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.path.hash_part)
    whole = server.get(nar_path).body
    file = Path(store.real_path(path.path).decode()) / "b"
    file.chmod(0o600)
    file.write_bytes(b"b" * (size - 1))
    assert server.get(nar_path, {"Range": "bytes=-600"}).status == 404
    file.write_bytes(b"b" * size)
    assert server.get(nar_path, {"Range": "bytes=-600"}).body == whole[-600:]


def test_tail_of_a_huge_nar_is_served_without_reading_the_rest(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    """Measured in bytes read, not in time: the NAR has 100 GiB."""
    path = store.output_path("huge")
    store.add(path, {"a": b"", "z": b"last"})
    file = Path(store.real_path(path).decode()) / "a"
    file.chmod(0o600)
    with file.open("r+b") as handle:
        handle.truncate(100 << 30)
    whole = sum(map(len, tree_reader.dump(store.real_path(path))))
    with store.connect() as connection:
        connection.execute("update ValidPaths set narSize = ?", (whole,))
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.hash_part)

    def bytes_read() -> int:
        text = Path(f"/proc/{server.workers[0]}/io").read_text()
        return int(re.search(r"rchar: (\d+)", text)[1])  # type: ignore[index]

    before = bytes_read()
    answer = server.get(nar_path, {"Range": "bytes=-100"})
    assert (answer.status, len(answer.body)) == (206, 100)
    assert b"last" in answer.body
    assert bytes_read() - before < 1_000_000


def test_ranges_on_one_connection(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    whole = dump(shared_store, "tree")
    with server.connect() as connection:
        for first in (0, 7, 1000, len(whole) - 1):
            connection.sendall(f"GET {nar_path} HTTP/1.1\r\nHost: x\r\nRange: bytes={first}-\r\n\r\n".encode())
            assert read_answer(connection).body == whole[first:]


def test_range_in_the_middle_of_a_sparse_file(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("sparse"), {"zeros": Sparse(50_000_000)})
    server = start(store=tmp_path / "store")
    answer = server.get(url(server, path.path.hash_part), {"Range": "bytes=25000000-25000999"})
    assert (answer.status, answer.body) == (206, bytes(1000))
