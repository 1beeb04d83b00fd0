"""Access log and metrics name where the body of each response came from, and what that saved."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harmonia.cache.zstd import Encoding
from harmonia.config.tables.zstd import Zstd
from harmonia.tools.store_builder import StoreBuilder
from support.build_logs import add_log
from support.held_compression import held_by
from support.running import NO_CACHE, Server, Session, file_url, nar_url, unpacked, wait_until
from support.upstream_paths import KEY, Remote, entry, fields, make_path, narinfo_path
from support.upstream_server import UpstreamServer

Start = Callable[..., Server]

LOGGED = "access_log = true\nlog_format = 'json'\ndebug_info = false"
"""Settings with which no response is repeated from memory, because each is logged."""


def logged(server: Server, path: str) -> list[dict[str, Any]]:
    """Return the entries of the access log for a URL, without its query."""
    events = [json.loads(line) for line in list(server.log)]
    return [event for event in events if event.get("url", "").partition("?")[0] == path]


def outcomes(server: Server, path: str, count: int) -> list[str]:
    """Return the outcomes of so many requests for a URL."""
    wait_until(lambda: len(logged(server, path)) >= count)
    return [event["outcome"] for event in logged(server, path)]


def asked(server: Server, path: str, count: int) -> list[str]:
    """Ask so many times for a URL. Return all outcomes so far."""
    before = len(logged(server, path))
    for _ in range(count):
        assert server.get(path).status == 200
    return outcomes(server, path, before + count)


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_nar_comes_from_the_store_the_compressor_or_the_disk(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    small = store.add_text("small", b"small\n")
    big = store.add(store.output_path("big"), os.urandom(2 << 20))
    server = start(store=tmp_path / "store", settings=LOGGED)
    assert asked(server, nar_url(big), 2) == ["store", "store"]
    assert asked(server, nar_url(small), 2) == ["store", "store"]
    assert asked(server, file_url(small), 2) == ["compressed", "memory"]
    assert asked(server, file_url(big), 1) == ["compressed"]
    wait_until(lambda: metric(server, "harmonia_cache_fills_total") == 1)
    assert asked(server, file_url(big), 1) == ["compressed", "disk"]
    assert server.get(file_url(big), {"Range": "bytes=100-"}).status == 206
    assert outcomes(server, file_url(big), 3)[2:] == ["disk"]  # logged after its last byte
    assert server.head(file_url(big)).status == 200
    assert server.get(file_url(big), {"If-None-Match": "*"}).status == 304
    assert outcomes(server, file_url(big), 5) == ["compressed", "disk", "disk", "none", "none"]


def test_nar_is_compressed_for_each_request_without_a_cache(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    big = store.add(store.output_path("big"), os.urandom(2 << 20))
    server = start(store=tmp_path / "store", settings=LOGGED, cache_dir=NO_CACHE)
    assert asked(server, file_url(big), 2) == ["compressed", "compressed"]


def test_http_1_0_client_gets_a_nar_that_was_never_compressed_from_the_store(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    big = store.add(store.output_path("big"), os.urandom(2 << 20))
    server = start(store=tmp_path / "store", settings=LOGGED)
    assert server.request("GET", file_url(big), version="1.0").status == 200
    assert outcomes(server, file_url(big), 1) == ["store"]


def test_cached_file_in_another_encoding_comes_from_the_disk(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    big = store.add(store.output_path("big"), os.urandom(2 << 20))
    other = Encoding.of(Zstd()).name.replace("1.5", "9.9")
    assert other != Encoding.of(Zstd()).name
    server = start(store=tmp_path / "store", settings=LOGGED)
    server.get(file_url(big))
    wait_until(lambda: metric(server, "harmonia_cache_fills_total") == 1)
    [file] = (server.cache_dir / "nar").iterdir()
    file.rename(file.with_name(file.name.replace(Encoding.of(Zstd()).name, other)))
    assert asked(server, file_url(big, other), 1) == ["disk"]


def test_narinfo_comes_from_the_store_and_then_from_memory(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add_text("text", b"")
    server = start(store=tmp_path / "store", settings=LOGGED)
    url = f"/{info.path.hash_part}.narinfo"
    assert asked(server, url, 2) == ["store", "memory"]
    store.add_text("more", b"")  # the database has changed, but not the row of the path
    assert asked(server, url, 1)[-1] == "memory"
    with store.connect() as database:
        database.execute("update ValidPaths set sigs = 'a:b' where path like '%-text'")
    assert asked(server, url, 1)[-1] == "store"
    absent = f"/{'0' * 32}.narinfo"
    assert server.get(absent).status == 404
    assert outcomes(server, absent, 1) == ["none"]


def test_listing_comes_from_the_store_and_then_from_memory_or_disk(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    short = store.add(store.output_path("short"), {b"a": b""})
    long = store.add(store.output_path("long"), {b"%04d" % number: b"" for number in range(2001)})
    server = start(store=tmp_path / "store", settings=LOGGED)
    assert asked(server, f"/{short.path.hash_part}.ls", 2) == ["store", "memory"]
    assert asked(server, f"/{long.path.hash_part}.ls", 2) == ["store", "disk"]


def test_files_logs_and_closures_come_from_the_store(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation, output = store.add_derivation("built", "/bin/sh")
    info = store.add(output, b"built\n", deriver=derivation.path)
    add_log(store, derivation.path, b"log\n")
    server = start(store=tmp_path / "store", settings=LOGGED)
    for path in (
        f"/serve/{info.path.hash_part}",
        f"/log/{derivation.path}",
        f"/{info.path.hash_part}.closure",
    ):
        assert asked(server, path, 1) == ["store"]
    assert asked(server, "/", 1) == ["none"]


def test_repeated_response_comes_from_memory(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    small = store.add_text("small", b"small\n")
    server = start(store=tmp_path / "store", settings="debug_info = false")
    with Session(server) as session:
        size = {len(session.get(nar_url(small)).body) for _ in range(4)}
    labels = 'outcome="memory",route="nar"'
    assert metric(server, f"harmonia_head_seconds_count{{{labels}}}") == 3
    assert metric(server, f"harmonia_sent_bytes_total{{{labels}}}") == 3 * size.pop()
    assert metric(server, 'harmonia_head_seconds_count{outcome="store",route="nar"}') == 1


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return make_path(tmp_path / "remote")


def test_path_of_an_upstream_comes_from_it_and_then_from_memory_or_disk(
    start: Start, store: StoreBuilder, remote: Remote, tmp_path: Path
) -> None:
    store.add_text("here", b"here")
    with UpstreamServer() as upstream:
        upstream.add(remote.info, remote.file, remote.nar, (KEY,))
        settings = f"{LOGGED}\nupstream_timeout = 20.0\n{entry(upstream)}"
        server = start(store=tmp_path / "store", settings=settings)
        assert asked(server, narinfo_path(remote), 2) == ["upstream", "memory"]
        nar = f"/{fields(server.get(f'{narinfo_path(remote)}?url'))['URL']}"
        assert asked(server, nar, 1) == ["upstream"]
        wait_until(lambda: metric(server, "harmonia_cache_fills_total") >= 1)
        assert asked(server, nar, 1) == ["upstream", "disk"]
        wait_until(lambda: list((server.cache_dir / "narinfo").iterdir()))
        server.stop()
    server.log.clear()
    server.start()
    assert asked(server, narinfo_path(remote), 1) == ["disk"]
    assert asked(server, nar, 1) == ["disk"]


def test_client_that_leaves_before_the_first_byte_is_logged_with_499(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    big = store.add(store.output_path("big"), os.urandom(2 << 20))
    held = tmp_path / "held"
    server = start(store=tmp_path / "store", settings=LOGGED, program=held_by(held))
    with server.connect() as connection:
        connection.sendall(f"GET {file_url(big)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        wait_until(lambda: metric(server, 'harmonia_requests_in_flight{route="nar"}') == 1)
    wait_until(lambda: logged(server, file_url(big)))
    [event] = logged(server, file_url(big))
    assert (event["status"], event["sent"], event["client_left"], event["outcome"]) == (499, 0, True, "none")
    assert metric(server, 'harmonia_requests_total{route="nar",status="499"}') == 1
    held.unlink()


def test_bytes_that_compression_saves_are_counted_for_whole_nars(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    big = store.add(store.output_path("big"), b"compressible" * 200_000)
    small = store.add_text("small", b"compressible" * 10_000)
    noise = store.add(store.output_path("noise"), os.urandom(2 << 20))
    server = start(store=tmp_path / "store")
    saved = 0
    for url, headers in (
        (file_url(big), {}),  # compressed now
        (file_url(big), {}),  # from the disk, once it is there
        (nar_url(big), {"Accept-Encoding": "zstd"}),
    ):
        body = server.get(url, headers).body
        assert len(unpacked(body)) == big.nar_size
        saved += big.nar_size - len(body)
    with Session(server) as session:
        for _ in range(3):  # the second and third from memory
            saved += small.nar_size - len(session.get(file_url(small)).body)
    # These save nothing that is counted: a plain NAR, a part, no body, and a file that is larger than the NAR.
    server.get(nar_url(big))
    server.get(file_url(big), {"Range": "bytes=1-"})
    server.head(file_url(big))
    assert len(server.get(file_url(noise)).body) > noise.nar_size
    name = "harmonia_compression_saved_bytes_total"
    wait_until(lambda: metric(server, name) >= saved)  # counted after the last byte
    assert metric(server, name) == saved


def test_download_that_breaks_off_saves_nothing(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    noise = store.add(store.output_path("noise"), os.urandom(20 << 20) + bytes(1 << 20))
    server = start(store=tmp_path / "store")
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(f"GET {file_url(noise)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
    wait_until(lambda: metric(server, 'harmonia_requests_in_flight{route="nar"}') == 0)
    assert metric(server, "harmonia_compression_saved_bytes_total") == 0
