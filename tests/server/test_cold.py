"""A NAR that is not compressed yet is sent at once to every kind of request."""

import http.client
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import NamedTuple

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.tools.store_builder import StoreBuilder
from support.cutting_proxy import CuttingProxy
from support.held_compression import held_by
from support.nginx import nginx
from support.running import NO_CACHE, PATIENCE_S, Answer, Server, case, file_url, patched, unpacked, wait_until

Start = Callable[..., Server]

MIB = 1 << 20


def add_big(store: StoreBuilder, name: str = "big") -> tuple[PathInfo, bytes]:
    """Add a path with files of many sizes; its NAR has many blocks and two large frames."""
    small = {f"{number}": os.urandom(number) for number in range(300)}
    info = store.add(store.output_path(name), {**small, "large": os.urandom(8 * MIB), "other": bytes(2 * MIB + 1)})
    return info, b"".join(file_reader.read(tree_reader.dump(store.real_path(info.path))))


FIRST = MIB // 2
"""The maximum size of the first frame: the server holds frames of at least this size."""


@contextmanager
def begun(server: Server, path: str, byte_range: str | None = None, version: str = "1.1") -> Iterator[HTTPResponse]:
    """Send a request, and yield its response as soon as the head has arrived."""
    fields = f"Range: {byte_range}\r\n" if byte_range else ""
    with server.connect() as connection:
        connection.sendall(f"GET {path} HTTP/{version}\r\nHost: cache\r\nConnection: close\r\n{fields}\r\n".encode())
        with HTTPResponse(connection) as answer:
            answer.begin()
            yield answer


class Held(NamedTuple):
    """A download of a NAR of which only the first frame is compressed until `release` is called."""

    info: PathInfo
    plain: bytes
    server: Server
    answer: HTTPResponse
    release: Callable[[], None]


@contextmanager
def held_download(
    start: Start, store: StoreBuilder, directory: Path, wanted: str | None = None, version: str = "1.1"
) -> Iterator[Held]:
    info, plain = add_big(store)
    gate = directory / "held"
    server = start(store=directory / "store", program=held_by(gate, least=FIRST))
    with begun(server, file_url(info), wanted, version) as answer:
        yield Held(info, plain, server, answer, gate.unlink)


def fetched(url: str, path: str, method: str = "GET", **headers: str) -> Answer:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)) as connection:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as response:
            named = {name.lower(): value for name, value in response.getheaders() if name != "Date"}
            return Answer(response.status, named, response.read())


def test_http_1_0_gets_a_cold_nar_uncompressed_and_at_once(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, plain = add_big(store)
    server = start(store=tmp_path / "store", program=held_by(tmp_path / "held"))
    with nginx(tmp_path / "nginx", f"location / {{ proxy_pass {server.url}; }}") as (url, _):
        head = fetched(url, file_url(info), "HEAD")
        cold = fetched(url, file_url(info))
        assert (cold.status, unpacked(cold.body)) == (200, plain)
        assert cold.headers["accept-ranges"] == "none"
        assert cold.headers["cache-control"] == "no-store, no-transform"
        assert "etag" not in cold.headers
        assert (head.status, head.headers) == (200, cold.headers)
        (tmp_path / "held").unlink()
        wait_until(
            lambda: "etag" in fetched(url, file_url(info), "HEAD").headers
        )  # compressed because of the first request
        warm = fetched(url, file_url(info))
        assert (warm.status, unpacked(warm.body)) == (200, plain)
        assert len(warm.body) < len(cold.body)
        assert warm.headers["accept-ranges"] == "bytes"
        part = fetched(url, file_url(info), Range="bytes=1000-")
        assert (part.status, part.body) == (206, warm.body[1000:])


def test_http_1_1_gets_a_cold_nar_compressed_and_resumable(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, plain = add_big(store)
    server = start(store=tmp_path / "store")
    answer = server.get(file_url(info))
    assert unpacked(answer.body) == plain
    assert len(answer.body) < len(plain) - MIB
    assert answer.headers["accept-ranges"] == "bytes"


def test_http_1_0_client_detects_an_interrupted_cold_nar(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, _ = add_big(store)
    server = start(store=tmp_path / "store", program=held_by(tmp_path / "held"))
    port = int(server.url.rpartition(":")[2])
    with (
        CuttingProxy(port, MIB, 5 * MIB) as network,
        nginx(tmp_path / "nginx", f"location / {{ proxy_pass {network.url}; }}") as (url, _),
        pytest.raises(http.client.IncompleteRead),
    ):
        fetched(url, file_url(info))
    (tmp_path / "held").unlink()


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_damaged_nar_breaks_off_before_its_last_block(
    start: Start, store: StoreBuilder, tmp_path: Path, *, cache: bool
) -> None:
    info, _ = add_big(store)
    damaged = Path(os.fsdecode(store.real_path(info.path)), "large")
    damaged.chmod(0o600)
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)
    server = start(store=tmp_path / "store", cache_dir=None if cache else NO_CACHE)
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        server.request("GET", file_url(info), version="1.0")
    assert server.wait_for_log("its NAR hash is")


def test_first_bytes_are_sent_before_a_large_frame_is_compressed(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    with held_download(start, store, tmp_path) as held:
        first = held.answer.read(1000)
        assert len(first) == 1000
        held.release()
        whole = first + held.answer.read()
    assert unpacked(whole) == held.plain


def test_resumed_download_continues_before_the_rest_is_compressed(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    """The length is unknown, so Content-Range has a last position beyond any file (RFC 8673)."""
    with held_download(start, store, tmp_path, "bytes=1000-") as held:
        answer = held.answer
        assert (answer.status, answer.headers["Content-Range"]) == (206, "bytes 1000-9007199254740991/*")
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["Cache-Control"] == "no-store, no-transform"
        assert answer.headers["Transfer-Encoding"] == "chunked"
        first = answer.read(1000)
        assert len(first) == 1000
        held.release()
        rest = first + answer.read()
    whole = held.server.get(file_url(held.info))
    assert rest == whole.body[1000:]
    known = held.server.get(file_url(held.info), {"Range": "bytes=1000-"})
    assert (known.status, known.body) == (206, rest)
    assert known.headers["content-range"] == f"bytes 1000-{len(whole.body) - 1}/{len(whole.body)}"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_range_within_the_compressed_part_does_not_wait(
    start: Start, store: StoreBuilder, tmp_path: Path, version: str
) -> None:
    with held_download(start, store, tmp_path, "bytes=100-199", version) as held:
        assert (held.answer.status, held.answer.headers["Content-Range"]) == (206, "bytes 100-199/*")
        assert held.answer.headers["Content-Length"] == "100"
        part = held.answer.read()
    held.release()
    assert part == held.server.get(file_url(held.info)).body[100:200]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_range_that_needs_the_length_waits_for_it(
    start: Start, store: StoreBuilder, tmp_path: Path, *, cache: bool
) -> None:
    slow = patched("from harmonia.server.http import response\nresponse._LENGTH_WAIT_S = 0.0")
    server = start(store=tmp_path / "store", cache_dir=None if cache else NO_CACHE, program=slow)
    for byte_range in ("bytes=999999999-", "bytes=999999999-1000000000", "bytes=-100", "bytes=100-999999999"):
        info, _ = add_big(store, byte_range.partition("=")[2])
        with case(byte_range):
            answer = server.get(file_url(info), {"Range": byte_range})
            whole = server.get(file_url(info)).body
            if byte_range.startswith("bytes=9"):
                assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(whole)}")
            else:
                part = whole[-100:] if byte_range == "bytes=-100" else whole[100:]
                assert (answer.status, answer.body) == (206, part)


def test_open_range_over_http_1_0_waits_for_the_length(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """Without a length, an HTTP/1.0 client cannot detect that the connection broke."""
    info, _ = add_big(store)
    server = start(store=tmp_path / "store")
    answer = server.request("GET", file_url(info), {"Range": "bytes=1000-"}, version="1.0")
    whole = server.get(file_url(info)).body
    assert (answer.status, answer.body) == (206, whole[1000:])
    assert answer.headers["content-range"] == f"bytes 1000-{len(whole) - 1}/{len(whole)}"


def test_open_range_over_http_1_0_that_waits_too_long_is_503_until_the_length_is_known(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    """A proxy that waits longer would answer 504, and leave the server out for a while."""
    info, _ = add_big(store)
    held = tmp_path / "held"
    impatient = "from harmonia.server.http import response\nresponse._HTTP_1_0_WAIT_S = 0.1"
    server = start(store=tmp_path / "store", program=held_by(held, least=FIRST, patch=impatient))
    early = server.request("GET", file_url(info), {"Range": "bytes=1000-"}, version="1.0")
    assert (early.status, early.headers["retry-after"]) == (503, "1")
    server.wait_for_log("503, the length of the body is not known yet")
    held.unlink()
    wait_until(lambda: "etag" in server.request("HEAD", file_url(info), version="1.0").headers)
    late = server.request("GET", file_url(info), {"Range": "bytes=1000-"}, version="1.0")
    assert (late.status, late.body) == (206, server.get(file_url(info)).body[1000:])


def test_first_frame_of_a_nar_does_not_wait_for_frames_of_other_nars(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    others = [add_big(store, f"other-{number}")[0] for number in range(3)]
    info, _ = add_big(store)
    held = tmp_path / "held"
    server = start(store=tmp_path / "store", program=held_by(held, least=FIRST))
    with ExitStack() as stack:
        for each in [*others, info]:
            answer = stack.enter_context(begun(server, file_url(each)))
            assert len(answer.read(1000)) == 1000
        held.unlink()
