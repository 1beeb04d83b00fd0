"""`/nar/….nar.zst`: compressed once, resumable, complete or visibly broken, whatever happens to the cache."""

import hashlib
import http.client
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import zstandard

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.running import (
    KNOWN_LENGTHS,
    NO_CACHE,
    Answer,
    Server,
    file_url,
    nar_url,
    open_files,
    patched,
    peak_bytes,
    unpacked,
    wait_until,
)
from support.small_disk import with_small_disk

Start = Callable[..., Server]

MEBIBYTE = 1 << 20
FIRST_FRAME_BYTES = 64 << 10
FRAMES = 4  # of the NAR of `big`
BROKEN = (http.client.IncompleteRead, ConnectionResetError)


def big(store: StoreBuilder, name: str = "big", contents: bytes = b"") -> PathInfo:
    """Add a path whose NAR has several frames of a megabyte each, compressed."""
    return store.add(store.output_path(name), {"file": contents or os.urandom(MEBIBYTE) * 17})


def dump(store: StoreBuilder, path: PathInfo) -> bytes:
    return b"".join(file_reader.read(tree_reader.dump(store.real_path(path.path))))


def cached(server: Server) -> list[Path]:
    """Return the complete files in the cache of the server."""
    return [path for path in (server.cache_dir / "nar").iterdir() if path.suffix != ".growing"]


def evict(server: Server) -> None:
    for path in (server.cache_dir / "nar").iterdir():
        path.unlink(missing_ok=True)  # the server gives a growing file its final name after the last byte of a download


def warm(server: Server, path: PathInfo) -> Answer:
    """Download the NAR, and wait until it is cached."""
    answer = server.get(file_url(path))
    wait_until(lambda: "content-length" in server.head(file_url(path)).headers and cached(server))
    return answer


def narinfo(server: Server, path: PathInfo) -> dict[str, str]:
    answer = server.get(f"/{path.path.hash_part}.narinfo")
    assert answer.status == 200
    return dict(line.split(": ", 1) for line in answer.text.splitlines())


def sha256(content: bytes) -> str:
    return f"sha256:{base32.encode(hashlib.sha256(content).digest())}"


def compressions(server: Server) -> list[int]:
    """Return the compressing process for each frame so far, of a server with a `Gate`."""
    matches = (re.fullmatch(r"compresses in (\d+)\n", line) for line in server.log)
    return [int(match[1]) for match in matches if match]


class Gate:
    """A program with one encoder thread that compresses only small first frames until the gate is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.program = patched(f"""
import os, time
import harmonia.cache.zstd

def compress(self, data, *, compress=harmonia.cache.zstd.Encoding.compress):
    os.write(2, b"compresses in %d\\n" % os.getpid())
    while len(data) > {FIRST_FRAME_BYTES} and not os.path.exists({str(path)!r}):
        time.sleep(0.01)
    return compress(self, data)

harmonia.cache.zstd.Encoding.compress = compress
harmonia.cache.zstd._MAX_THREADS = 1
""")

    def open(self) -> None:
        self._path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@contextmanager
def begun(server: Server, url: str, **options: int) -> Iterator[http.client.HTTPResponse]:
    """Start a download, and yield the response as soon as its head has arrived."""
    with server.connect(60, **options) as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        with response:
            yield response


def rest(response: http.client.HTTPResponse) -> bytes | None:
    """Return the whole body, or None if it breaks off."""
    try:
        return response.read()
    except BROKEN:
        return None


def finish(downloads: Sequence[http.client.HTTPResponse], between: Callable[[], None]) -> list[bytes | None]:
    """Read all downloads at once; call `between` meanwhile."""
    with ThreadPoolExecutor(len(downloads)) as threads:
        bodies: list[Future[bytes | None]] = [threads.submit(rest, download) for download in downloads]
        between()
        return [body.result() for body in bodies]


# Responses.


def test_cold_and_cached_responses_are_identical(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    cold = warm(server, path)
    hot = server.get(file_url(path))
    for answer in (cold, hot):
        assert answer.status == 200
        assert unpacked(answer.body) == dump(store, path)
        assert answer.headers["content-type"] == "application/x-nix-nar"
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable, no-transform"
        assert answer.headers["accept-ranges"] == "bytes"
        assert "content-encoding" not in answer.headers
    assert cold.headers["transfer-encoding"] == "chunked"
    assert hot.headers["content-length"] == str(len(hot.body))
    assert cold.body == hot.body
    assert cold.headers["etag"] == hot.headers["etag"]


@pytest.mark.parametrize("is_warm", [True, False])
def test_compressed_nar_is_resumable_even_after_eviction(
    start: Start, store: StoreBuilder, tmp_path: Path, *, is_warm: bool
) -> None:
    """The bytes are identical each time."""
    path = big(store)
    server = start(store=tmp_path / "store", program=KNOWN_LENGTHS)
    whole = warm(server, path)
    size = len(whole.body)
    etag = whole.headers["etag"]
    for given, if_range, part in (
        ("bytes=0-99", None, slice(0, 100)),
        (f"bytes={size // 2}-", None, slice(size // 2, size)),
        ("bytes=-5", etag, slice(size - 5, size)),
        ("bytes=100-", '"another"', None),
        ("bytes=100-", f"W/{etag}", None),
        (f"bytes={size}-", None, slice(size, size)),
    ):
        if not is_warm:
            evict(server)
        headers = {"Range": given, "Accept-Encoding": "zstd"}
        answer = server.get(file_url(path), headers | ({"If-Range": if_range} if if_range else {}))
        if part is None:
            assert (answer.status, answer.body) == (200, whole.body)
        elif part.start == size:
            assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{size}")
        else:
            assert (answer.status, answer.body) == (206, whole.body[part])
            assert answer.headers["content-range"] == f"bytes {part.start}-{part.stop - 1}/{size}"
            assert answer.headers["accept-ranges"] == "bytes"
            assert answer.headers["etag"] == etag
            assert "content-encoding" not in answer.headers


def test_cold_range_is_served_by_a_server_that_never_sent_the_beginning(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    path = big(store)
    whole = warm(start(store=tmp_path / "store"), path).body
    answer = start(store=tmp_path / "store").get(file_url(path), {"Range": "bytes=2000000-"})
    assert (answer.status, answer.body) == (206, whole[2000000:])


def test_304_compresses_nothing(start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate) -> None:
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program)
    etag = server.head(file_url(path)).headers["etag"]
    answer = server.get(file_url(path), {"If-None-Match": etag})
    assert (answer.status, answer.headers["etag"], answer.body) == (304, etag, b"")
    assert compressions(server) == []


def test_head_compresses_nothing(start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate) -> None:
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program)
    for headers in ({}, {"Range": "bytes=100-"}):
        for version in ("1.0", "1.1"):
            answer = server.request("HEAD", file_url(path), headers, version=version)
            assert answer.status == 200
            assert ("content-length" in answer.headers) == (version == "1.0")  # the length of the uncompressed file
    assert server.head(nar_url(path), {"Accept-Encoding": "zstd"}).headers["content-encoding"] == "zstd"
    assert list((server.cache_dir / "nar").iterdir()) == []
    assert compressions(server) == []
    gate.open()
    size = len(warm(server, path).body)
    assert server.head(file_url(path)).headers["content-length"] == str(size)
    ranged = server.head(file_url(path), {"Range": "bytes=100-"})  # HEAD ignores ranges (RFC 9110 section 14.2)
    assert (ranged.status, ranged.headers["content-length"]) == (200, str(size))


def test_http_1_0_gets_a_content_length(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    answer = server.request("GET", file_url(path), version="1.0")
    assert answer.headers["content-length"] == str(len(answer.body))
    assert "transfer-encoding" not in answer.headers
    assert unpacked(answer.body) == dump(store, path)


def old_urls(path: PathInfo) -> list[str]:
    nar_hash, hash_part = base32.encode(path.nar_hash), path.path.hash_part
    return [f"{nar_url(path)}.zst", f"/nar/{nar_hash}.nar.zst?hash={hash_part}", f"/nar/{hash_part}.nar.zst"]


def check_not_resumable(server: Server, url: str, whole: Answer) -> None:
    """Check a URL that does not name the exact bytes: only a request with their ETag gets a range."""
    for method in ("GET", "HEAD"):
        answer = server.request(method, url)
        assert (answer.status, answer.body) == (200, whole.body if method == "GET" else b"")
        assert answer.headers["etag"] == whole.headers["etag"]
        assert answer.headers["accept-ranges"] == "none"
        assert answer.headers["cache-control"] == "no-store, no-transform"  # no HTTP cache may combine its ranges
    assert server.get(url, {"Range": "bytes=100-"}).status == 404
    assert server.head(url, {"Range": "bytes=100-"}).status == 200
    part = server.get(url, {"Range": "bytes=100-", "If-Range": whole.headers["etag"]})
    assert (part.status, part.body) == (206, whole.body[100:])
    another = server.get(url, {"Range": "bytes=100-", "If-Range": '"another"'})
    assert (another.status, another.body) == (200, whole.body)


def test_url_without_an_encoding_is_not_resumable(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    whole = warm(server, path)
    for url in old_urls(path):
        check_not_resumable(server, url, whole)


def has_length(server: Server, url: str) -> bool:
    return "content-length" in server.head(url).headers


LEVELS = {"3": "", "9": "zstd.level = 9", "window": "zstd.window_log = 24", "ldm": "zstd.long_distance_matching = true"}


@pytest.mark.parametrize("wanted", LEVELS)
def test_nar_in_the_encoding_of_another_server_is_made_and_resumable(
    start: Start, store: StoreBuilder, tmp_path: Path, wanted: str
) -> None:
    """Every server sends it whole and in ranges: before it is cached, after eviction, and after a restart."""
    path = big(store, contents=random.Random(1).randbytes(100_000) * 120)
    url = f"/{narinfo(start(store=tmp_path / 'store', settings=LEVELS[wanted]), path)['URL']}"
    bodies, etags = set(), set()
    for settings in LEVELS.values():
        server = start(store=tmp_path / "store", settings=settings)
        part = server.get(url, {"Range": "bytes=100-"})
        whole = server.get(url)
        assert (part.status, part.body) == (206, whole.body[100:])
        assert (whole.status, whole.headers["accept-ranges"]) == (200, "bytes")
        assert unpacked(whole.body) == dump(store, path)
        wait_until(partial(has_length, server, url))
        assert server.head(url).headers["content-length"] == str(len(whole.body))
        bodies.add(whole.body)
        etags.add(whole.headers["etag"])
    assert len(bodies) == len(etags) == 1
    # FileHash is only in the narinfo if it belongs to the file in its URL.
    other = narinfo(server, path)
    assert ("FileHash" in other) == (wanted == "ldm")


def test_url_differs_for_each_encoding(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    urls = {narinfo(start(store=tmp_path / "store", settings=each), path)["URL"] for each in LEVELS.values()}
    assert len(urls) == len(LEVELS)


@pytest.mark.parametrize("name", ["zstd-1.4.4-3-0", "zstd-{library}-3-27", "zstd-{library}-3-26-ldm"])
def test_nar_in_an_encoding_that_cannot_be_made_here_is_not_resumable(
    start: Start, store: StoreBuilder, tmp_path: Path, name: str
) -> None:
    """Another libzstd may make other bytes. A window of many megabytes needs more memory than clients may demand."""
    path = big(store)
    server = start(store=tmp_path / "store")
    whole = warm(server, path)
    name = name.format(library=".".join(map(str, zstandard.ZSTD_VERSION)))
    check_not_resumable(server, file_url(path, name), whole)
    assert [file.name for file in cached(server)] == [f"{base32.encode(path.nar_hash)}.{Encoding.of(Zstd()).name}"]


def test_nar_of_another_libzstd_is_resumable_while_it_is_cached(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    path = big(store)
    older = patched(
        "import harmonia.cache.zstd as zstd\nzstd._LIBRARY = '1.4.4'\n"
        "zstd.Encoding.__init__.__defaults__ = ('1.4.4', True)\n"
    )
    before = start(store=tmp_path / "store", program=older, settings="zstd.level = 9")
    url = f"/{narinfo(before, path)['URL']}"
    assert "-zstd-1.4.4-9-0" in url
    whole = before.get(url)
    wait_until(lambda: "content-length" in before.head(url).headers and cached(before))
    before.stop()
    server = start(store=tmp_path / "store", cache_dir=before.cache_dir)
    ours = warm(server, path)
    assert ours.body != whole.body
    assert (server.get(url).body, server.get(url).headers["etag"]) == (whole.body, whole.headers["etag"])
    assert server.head(url).headers["content-length"] == str(len(whole.body))
    part = server.get(url, {"Range": "bytes=100-"})
    assert (part.status, part.body) == (206, whole.body[100:])
    evict(server)
    check_not_resumable(server, url, ours)


def test_unknown_or_malformed_nar_url_gets_404(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    warm(server, path)
    hash_part, nar_hash = path.path.hash_part, base32.encode(path.nar_hash)
    for name in (
        f"{hash_part}-{'0' * 52}.nar.zst",
        f"{hash_part}-{'0' * 52}-{Encoding.of(Zstd()).name}.nar.zst",
        f"{hash_part}-{nar_hash}-{Encoding.of(Zstd()).name}.nar",
        f"{hash_part}-{nar_hash}-zstd-1.5-3-0.nar.zst",
        f"{hash_part}-{nar_hash}-zstd-1.5.7-03-0.nar.zst",
        f"{hash_part}-{nar_hash}-xz.nar.zst",
        f"{'0' * 32}-{nar_hash}.nar.zst",
        f"{nar_hash}.nar.zst",
        f"{nar_hash}.nar.zst?hash={'0' * 32}",
        f"{'0' * 32}.nar.zst",
        f"{hash_part}.nar.zst.zst",
        f"{hash_part}.nar.ZST",
        cached(server)[0].name,
    ):
        assert server.get(f"/nar/{name}").status == 404


def test_deleted_path_gets_404_even_if_cached(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    warm(server, path)
    store.delete(path.path)
    assert server.get(file_url(path)).status == server.head(file_url(path)).status == 404
    assert server.get(nar_url(path), {"Accept-Encoding": "zstd"}).status == 404


# Narinfos.


def test_narinfo_has_file_hash_and_size_once_compressed(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    before = narinfo(server, path)
    assert (before["URL"], before["Compression"]) == (file_url(path)[1:], "zstd")
    assert "FileHash" not in before
    assert "FileSize" not in before

    body = warm(server, path).body
    expected = before | {"FileHash": sha256(body), "FileSize": str(len(body))}
    assert narinfo(server, path) == expected
    restarted = start(store=tmp_path / "store", cache_dir=server.cache_dir)
    assert narinfo(restarted, path) == expected
    evict(server)
    assert narinfo(server, path) == narinfo(restarted, path) == expected
    assert narinfo(start(store=tmp_path / "store", cache_dir=server.cache_dir), path) == expected


def test_narinfo_has_file_hash_within_a_second_after_another_process_compressed(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    other = start(store=tmp_path / "store", cache_dir=server.cache_dir)
    assert "FileHash" not in narinfo(other, path)
    warm(server, path)
    wait_until(lambda: narinfo(other, path) == narinfo(server, path))


@pytest.mark.parametrize("wanted", ["auto", "zstd", "none"])
@pytest.mark.parametrize("writable", [True, False])
def test_nar_compression_setting_selects_the_offered_url(
    start: Start, store: StoreBuilder, tmp_path: Path, wanted: str, *, writable: bool
) -> None:
    path = big(store)
    server = start(
        store=tmp_path / "store",
        settings=f"nar_compression = '{wanted}'",
        workers=2,
        cache_dir=None if writable else NO_CACHE,
    )
    expected = narinfo(server, path)
    offered = "none" if wanted == "none" or (wanted == "auto" and not writable) else "zstd"
    assert expected["Compression"] == offered
    if offered == "none":
        assert expected["URL"] == nar_url(path)[1:]
        assert (expected["FileHash"], expected["FileSize"]) == (expected["NarHash"], expected["NarSize"])
    warnings = [line for line in server.log if re.search("cannot keep NARs: .*; make cache_dir writable", line)]
    assert len(warnings) == (not writable)
    # URLs of the other settings still work.
    for url, headers in ((file_url(path), {}), (nar_url(path), {"Accept-Encoding": "zstd"})):
        for _ in range(2):
            assert unpacked(server.get(url, headers).body) == dump(store, path)
    whole = server.get(file_url(path)).body
    assert server.get(file_url(path), {"Range": "bytes=2000000-"}).body == whole[2000000:]
    old = server.request("GET", file_url(path), version="1.0")
    assert old.headers["content-length"] == str(len(old.body))
    assert unpacked(old.body) == dump(store, path)
    assert (old.body == whole) == writable  # without a cache, it is the uncompressed file
    assert (server.directory / "cache").exists() == writable


# Concurrency.


def test_fifty_concurrent_clients_cause_one_compression(
    start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate
) -> None:
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program, workers=2)
    with ExitStack() as stack:
        downloads = [stack.enter_context(begun(server, file_url(path))) for _ in range(50)]
        bodies = finish(downloads, gate.open)
    assert set(bodies) == {bodies[0]}
    assert bodies[0]
    assert unpacked(bodies[0]) == dump(store, path)
    assert len(compressions(server)) == FRAMES
    wait_until(lambda: cached(server))
    # Clients that negotiate get the same bytes, from the same file.
    assert server.get(nar_url(path), {"Accept-Encoding": "zstd"}).body == bodies[0]
    assert len(compressions(server)) == FRAMES


def test_two_servers_with_one_cache_directory_compress_once(
    start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate
) -> None:
    path = big(store)
    cache_dir = tmp_path / "cache"
    one, other = (start(store=tmp_path / "store", program=gate.program, cache_dir=cache_dir) for _ in range(2))
    with begun(one, file_url(path)) as first, begun(other, file_url(path)) as second:
        bodies = finish([first, second], gate.open)
    assert bodies[0] == bodies[1]
    assert unpacked(bodies[0] or b"") == dump(store, path)
    assert len(compressions(one) + compressions(other)) == FRAMES
    wait_until(lambda: cached(one))
    assert len(cached(one)) == 1


def test_killed_filler_breaks_its_own_downloads_and_another_takes_over(
    start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate
) -> None:
    """Clients of the killed process see a broken transfer. All others get everything, from another process."""
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program, workers=2)
    with ExitStack() as stack:
        downloads: list[http.client.HTTPResponse] = []

        def have_both_workers_clients() -> bool:
            downloads.append(stack.enter_context(begun(server, file_url(path))))
            return all(any(name.endswith(".growing") for name in open_files(worker)) for worker in server.workers)

        wait_until(have_both_workers_clients)
        (killed,) = set(compressions(server))

        def kill() -> None:
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: set(compressions(server)) > {killed})
            gate.open()

        bodies = finish(downloads, kill)
    whole = server.get(file_url(path)).body
    assert unpacked(whole) == dump(store, path)
    assert set(bodies) == {None, whole}
    assert sum(process != killed for process in compressions(server)) == FRAMES
    wait_until(lambda: len(cached(server)) == 1)


def test_compression_continues_after_its_client_disconnects(
    start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate
) -> None:
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program)
    with begun(server, file_url(path)):
        pass
    server.settle()
    gate.open()
    wait_until(lambda: cached(server))
    assert unpacked(server.get(file_url(path)).body) == dump(store, path)
    assert len(compressions(server)) == FRAMES


@pytest.mark.parametrize("clients", [0, 2])
def test_compression_does_not_delay_shutdown(
    start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate, *, clients: int
) -> None:
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program, settings="shutdown_grace = 1")
    with ExitStack() as stack:
        with begun(server, file_url(path)):
            downloads = [stack.enter_context(begun(server, file_url(path))) for _ in range(clients)]
        server.settle()
        assert server.stop() == 0
        assert [rest(download) for download in downloads] == [None] * clients
    assert cached(server) == []


def test_narinfos_do_not_wait_for_busy_encoders(start: Start, store: StoreBuilder, gate: Gate, tmp_path: Path) -> None:
    big, small = store.add(store.output_path("big"), Sparse(64 * MEBIBYTE)), store.add_text("small", b"small")
    server = start(store=tmp_path / "store", program=gate.program)
    with begun(server, file_url(big)):
        server.wait_for_log("compresses in")
        for _ in range(20):
            assert server.get(f"/{small.path.hash_part}.narinfo").status == 200
        gate.open()


@pytest.mark.slow
def test_memory_of_many_cold_downloads_is_bounded(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """Each encoder thread may hold a few frames, and each download a few pieces of 512 KiB: not 20 times 64 MiB."""
    random = os.urandom(8 * MEBIBYTE)
    paths = [
        store.add(store.output_path(f"path-{number}"), {"a": random, "b": Sparse(56 * MEBIBYTE), "c": b"%d" % number})
        for number in range(20)
    ]
    server = start(store=tmp_path / "store")
    (worker,) = server.workers
    before = peak_bytes(worker)
    with ThreadPoolExecutor(len(paths)) as threads:
        answers = list(threads.map(lambda path: server.get(file_url(path)), paths))
    assert all(len(answer.body) > len(random) for answer in answers)
    assert peak_bytes(worker) - before < 256 * MEBIBYTE


# Faults.


@pytest.mark.parametrize("encoded", [True, False])
def test_nar_of_a_corrupt_store_object_breaks_off(
    start: Start, store: StoreBuilder, tmp_path: Path, *, encoded: bool
) -> None:
    """One byte differs from the registered content. Compressed NARs are verified because all bytes pass through us."""
    path = big(store)
    file = Path(os.fsdecode(store.real_path(path.path)), "file")
    file.chmod(0o600)
    with file.open("r+b") as contents:
        contents.seek(-1000, os.SEEK_END)
        contents.write(b"xx")
    server = start(store=tmp_path / "store")
    url, headers = (nar_url(path), {"Accept-Encoding": "zstd"}) if encoded else (file_url(path), {})
    for _ in range(2):
        with pytest.raises(BROKEN):
            server.get(url, headers)
        assert list((server.cache_dir / "nar").iterdir()) == []
    server.wait_for_log(rf"ERROR .*{path.path.hash_part}.*breaks off.*{base32.encode(path.nar_hash)} was registered")
    remedy = rf"ERROR {store.real_dir}/{path.path}: its NAR hash .* was registered; repair it"
    assert sum(bool(re.search(remedy, line)) for line in server.log) == 1
    assert "\nharmonia_damaged_nars_total 3.0\n" in server.get("/metrics").text  # once while caching
    assert server.get(file_url(path), {"Range": "bytes=100-"}).status == 404
    with pytest.raises(BROKEN):  # the head has a Content-Length already
        server.request("GET", file_url(path), version="1.0")
    assert list((server.cache_dir / "nar").iterdir()) == []
    assert "FileHash" not in narinfo(server, path)


def test_corrupt_store_object_of_one_frame_gets_404(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("small"), b"right")
    file = Path(os.fsdecode(store.real_path(path.path)))
    file.chmod(0o600)
    file.write_bytes(b"wrong")
    server = start(store=tmp_path / "store")
    assert server.get(file_url(path)).status == 404
    assert list((server.cache_dir / "nar").iterdir()) == []


def test_truncated_cache_entry_is_compressed_again(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    whole = warm(server, path).body
    for size in (0, 1, len(whole) // 2, len(whole)):
        (entry,) = cached(server)
        os.truncate(entry, size)
        assert server.get(file_url(path)).body == whole
        wait_until(lambda: cached(server) and cached(server)[0].stat().st_size > len(whole))
    assert sum("damaged" in line for line in server.log) == 4


def test_flipped_byte_in_a_cache_entry_is_detected(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store)
    server = start(store=tmp_path / "store")
    whole = warm(server, path).body
    (entry,) = cached(server)
    entry.chmod(0o600)
    with entry.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    server.get(file_url(path))  # the server verifies while it sends, so this download breaks
    server.wait_for_log("damaged")
    assert server.get(file_url(path)).body == whole


def test_cache_entry_truncated_during_a_download_breaks_it(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store, contents=os.urandom(24 * MEBIBYTE))
    server = start(store=tmp_path / "store")
    warm(server, path)
    with begun(server, file_url(path), receive_buffer=4096) as download:
        os.truncate(cached(server)[0], 18 * MEBIBYTE)
        assert rest(download) is None


def test_cache_entry_evicted_during_a_download_is_sent_whole(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = big(store, contents=os.urandom(24 * MEBIBYTE))
    server = start(store=tmp_path / "store")
    whole = warm(server, path).body
    with begun(server, file_url(path), receive_buffer=4096) as download:
        evict(server)
        assert download.read() == whole


def test_growing_cache_entry_removed_during_downloads_is_sent_whole(
    start: Start, store: StoreBuilder, tmp_path: Path, gate: Gate
) -> None:
    path = big(store)
    server = start(store=tmp_path / "store", program=gate.program)
    with begun(server, file_url(path)) as one, begun(server, file_url(path)) as other:
        evict(server)
        bodies = finish([one, other], gate.open)
    assert bodies[0] == bodies[1]
    assert unpacked(bodies[0] or b"") == dump(store, path)
    assert unpacked(server.get(file_url(path)).body) == dump(store, path)


def errors(server: Server) -> list[str]:
    return [line for line in server.log if "ERROR" in line]


def test_removed_cache_directory_stops_no_download_and_is_logged_once(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    path, other = big(store), big(store, "other")
    server = start(store=tmp_path / "store")
    warm(server, path)
    (server.cache_dir / "nar").rename(tmp_path / "away")
    for each in (path, other, other):
        assert unpacked(server.get(file_url(each)).body) == dump(store, each)
    assert len(errors(server)) == 1


def names_in_cache(server: Server) -> list[str]:
    return os.listdir(f"/proc/{server.process.pid}/root{server.cache_dir}/nar")


@pytest.mark.root
def test_full_disk_stops_no_download_and_is_logged_once(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """The disk becomes full during a download, which continues without the cache."""
    path, little = big(store, contents=os.urandom(MEBIBYTE) * 44), big(store, "little", os.urandom(MEBIBYTE))
    cache_dir = tmp_path / "small"
    server = start(store=tmp_path / "store", program=with_small_disk(cache_dir), cache_dir=cache_dir)
    server.get(file_url(little))
    wait_until(lambda: "content-length" in server.head(file_url(little)).headers)
    with ThreadPoolExecutor(5) as threads:
        bodies = {answer.body for answer in threads.map(lambda _: server.get(file_url(path)), range(5))}
    (body,) = bodies
    assert unpacked(body) == dump(store, path)
    assert len(errors(server)) == 1
    wait_until(lambda: not [name for name in names_in_cache(server) if name.endswith(".growing")])
    assert unpacked(server.get(file_url(little)).body) == dump(store, little)


@pytest.mark.root
def test_read_only_disk_stops_no_download_and_is_logged_once(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    kept, other = big(store, "kept", os.urandom(MEBIBYTE)), big(store)
    cache_dir = tmp_path / "small"
    # The index of debug info, open for writing, would keep the file system from becoming read-only.
    server = start(
        store=tmp_path / "store",
        settings="debug_info = false",
        program=with_small_disk(cache_dir),
        cache_dir=cache_dir,
    )
    server.get(file_url(kept))
    wait_until(lambda: "content-length" in server.head(file_url(kept)).headers)
    enter = ["nsenter", "--mount", f"--target={server.process.pid}"]
    # Refused until the server has closed what it wrote.
    wait_until(lambda: subprocess.run([*enter, "mount", "-o", "remount,ro", cache_dir], check=False).returncode == 0)
    for path in (kept, other, kept, other):
        answer = server.get(file_url(path))
        assert unpacked(answer.body) == dump(store, path)
        assert ("content-length" in answer.headers) == (path is kept)  # cached files can still be read
    assert len(errors(server)) == 1
