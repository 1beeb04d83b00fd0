"""Upstreams: missing paths come from other caches, complete, verified and fetched once; no upstream can do harm."""

import gzip
import hashlib
import http.client
import json
import lzma
import os
import random
import re
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from harmonia.cache.disk_cache import DiskCache
from harmonia.config import tokens
from harmonia.nix import base32
from harmonia.nix.narinfo import NarFile
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream.nar_name import NarName
from support import upstream_server
from support.programs import needs
from support.running import (
    HARMONIA,
    NO_CACHE,
    PATIENCE_S,
    Answer,
    Server,
    case,
    lock_holders,
    open_files,
    patched,
    peak_bytes,
    unpacked,
    wait_until,
)
from support.small_disk import with_small_disk
from support.upstream_paths import KEY, PACK, Remote, entry, fields, make_path, narinfo_path
from support.upstream_server import UpstreamServer, chunked, cut, drip, hang, reset, status

Start = Callable[..., Server]

LONG_TIMEOUT = "upstream_timeout = 20.0"  # so that a busy machine causes no timeout
SHORT_TIMEOUT = "upstream_timeout = 0.5"
PROBING = patched("from harmonia.upstream import breaker; breaker.LONGEST_DELAY = 0.2")  # probes soon again
SLOW: dict[str, Any] = {"timeout": 600.0, "connect_timeout": 600.0}
"""An upstream whose requests end only by `upstream_timeout`: a client that waits longer fails its test."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UpstreamServer, Server]]:
    """Start an upstream, and a server with it, for all tests that need no other settings."""
    directory = tmp_path_factory.mktemp("shared-upstream")
    StoreBuilder(directory / "store").add_text("here", b"here\n")
    with UpstreamServer() as upstream:
        # A message of one test must not suppress that of the next.
        unbounded = patched("from harmonia.upstream import refusals; refusals._LOG_INTERVAL_S = 0.0")
        server = Server(
            directory / "server", directory / "store", f"{LONG_TIMEOUT}\n{entry(upstream)}", program=unbounded
        )
        server.start()
        yield upstream, server
        assert server.stop() == 0
        assert not [line for line in server.log if "Traceback" in line or "Unclosed" in line]


@pytest.fixture
def upstream(shared: tuple[UpstreamServer, Server]) -> UpstreamServer:
    shared[0].reset()
    return shared[0]


@pytest.fixture
def there(tmp_path: Path) -> Remote:
    return make_path(tmp_path / "elsewhere")


@pytest.fixture
def begin(start: Start, shared: tuple[UpstreamServer, Server], store: StoreBuilder, tmp_path: Path) -> Start:
    """Return a function that starts a server with upstreams, or returns the shared server if its settings suffice.

    It does not suffice for an upstream that misbehaves, because the effects would last into the next test.
    """

    def begin(*entries: str, settings: str = LONG_TIMEOUT, up: bool = True, **options: object) -> Server:
        plain = entries == (entry(shared[0]),) and up and (settings, options) == (LONG_TIMEOUT, {})
        if plain and not shared[0].behaviours:
            server = shared[1]
            server.log.clear()
        else:
            options.setdefault("store", tmp_path / "store")
            server = start(settings=f"{settings}\n" + "".join(entries), **options)
        if up:
            wait_until(lambda: all_up(server, len(entries)))
        return server

    store.add_text("here", b"here\n")
    return begin


def cached(server: Server, path: Remote) -> list[str]:
    directory = server.cache_dir / "nar"
    nar_hash = base32.encode(path.info.nar_hash)
    return [found.name for found in directory.iterdir() if nar_hash in found.name] if directory.is_dir() else []


def held(rest: Event) -> upstream_server.Behaviour:
    """Send half of the file, and the rest when the event is set."""

    def behave(handler: upstream_server.Handler) -> None:
        content = handler.server.files[handler.path]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        rest.wait(PATIENCE_S)
        handler.wfile.write(content[len(content) // 2 :])

    return behave


def evict(server: Server, path: Remote) -> None:
    """Remove the complete files of a NAR from the cache."""
    for name in cached(server, path):
        if not name.endswith(".growing"):
            (server.cache_dir / "nar" / name).unlink(missing_ok=True)


def is_kept(server: Server, path: Remote) -> bool:
    return bool(names := cached(server, path)) and not names[0].endswith(".growing")


# Hits


@pytest.mark.parametrize("compression", PACK)
def test_path_of_an_upstream_is_served_unchanged(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, compression: str
) -> None:
    path = make_path(tmp_path / "elsewhere", compression=compression)
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = begin(entry(upstream))
    served = server.get(narinfo_path(path))
    assert served.status == 200
    original = fields(Answer(200, {}, upstream.files[narinfo_path(path)]))
    url = fields(served)["URL"]
    assert fields(served) == original | {"URL": url}
    assert url.startswith("upstream/")
    assert server.head(narinfo_path(path)).headers == served.headers

    for _ in range(2):
        answer = server.get(f"/{url}")
        assert (answer.status, answer.body) == (200, path.file)
        assert answer.headers["content-length"] == str(len(path.file))
        assert answer.headers["accept-ranges"] == "bytes"
    assert server.head(f"/{url}").headers == answer.headers
    assert upstream.asked[f"GET /{path.nar.url}"] == 1
    part = server.get(f"/{url}", {"Range": "bytes=1000-1999"})
    assert (part.status, part.body) == (206, path.file[1000:2000])
    assert server.get(f"/{url}", {"If-None-Match": answer.headers["etag"]}).status == 304


@pytest.mark.parametrize("kept", [True, False])
def test_uncompressed_nar_has_its_nar_size_as_length(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, kept: bool
) -> None:
    """The upstream may send no other size, like nix-serve."""
    path = make_path(tmp_path / "elsewhere", compression="none")
    upstream.add(path.info, path.file, NarFile(path.nar.url, "none"), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream), settings=f"{LONG_TIMEOUT}\ncache_size = '{'1G' if kept else '1K'}'")
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    assert server.head(url).headers["content-length"] == str(len(path.file))
    assert upstream.asked[f"HEAD /{path.nar.url}"] == 0
    part = server.get(url, {"Range": "bytes=1000-1999"})
    assert (part.status, part.body) == (206, path.file[1000:2000])
    answer = server.get(url)
    assert (answer.body, answer.headers["content-length"]) == (path.file, str(len(path.file)))


def test_json_narinfo_of_an_upstream(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    text, answer = server.get(narinfo_path(there)), server.get(f"{narinfo_path(there)}?json")
    assert answer.headers["cache-control"] == text.headers["cache-control"]
    rendered = json.loads(answer.body)
    assert (rendered["path"], rendered["url"]) == (there.info.path, fields(text)["URL"])
    assert rendered["downloadSize"] == there.nar.file_size


def test_local_path_causes_no_request_to_upstreams(begin: Start, upstream: UpstreamServer, store: StoreBuilder) -> None:
    info = store.add_text("local", b"local\n")
    upstream.behaviours[r"narinfo|\.ls|nar"] = hang
    server = begin(entry(upstream), workers=1)
    for path in (f"/{info.path.hash_part}.narinfo", f"/{info.path.hash_part}.ls"):
        assert server.get(path).status == server.head(path).status == 200
    assert set(upstream.asked) == {"GET /nix-cache-info"}


def test_nar_url_works_after_a_restart_and_without_the_upstream(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream), workers=1)
    url = fields(server.get(narinfo_path(there)))["URL"]
    server.stop()
    again = begin(entry(upstream), cache_dir=server.cache_dir)
    assert again.get(f"/{url}").body == there.file
    wait_until(lambda: is_kept(again, there))
    again.stop()
    upstream.behaviours["."] = reset
    third = begin(entry(upstream), cache_dir=server.cache_dir, up=False)
    assert third.get(f"/{url}").body == there.file


def test_redirect_mode_names_the_url_of_the_upstream(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream, mode="redirect"))
    assert fields(server.get(narinfo_path(there)))["URL"] == f"{upstream.url}/{there.nar.url}"


@pytest.mark.parametrize("sign", [False, True])
def test_our_key_signs_if_sign_is_set(
    begin: Start, upstream: UpstreamServer, there: Remote, tmp_path: Path, *, sign: bool
) -> None:
    ours = SecretKey.generate("ours-1")
    (tmp_path / "key").write_text(ours.export())
    (tmp_path / "key").chmod(0o600)
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(
        entry(upstream, sign=sign) if sign else entry(upstream),
        settings=f"{LONG_TIMEOUT}\nsign_key_paths = ['{tmp_path}/key']",
    )
    text = server.get(narinfo_path(there)).text
    sigs = {line.removeprefix("Sig: ") for line in text.splitlines() if line.startswith("Sig: ")}
    fingerprint = there.info.fingerprint("/nix/store")
    assert sigs == {KEY.sign(fingerprint), *([ours.sign(fingerprint)] if sign else [])}
    page = server.get("/").text
    assert str(ours.public_key) in page
    assert (str(KEY.public_key) in page) is not sign


@pytest.mark.parametrize("keys", [(), (SecretKey.generate("upstream-1"),), (SecretKey.generate("other-1"),)])
def test_narinfo_without_a_known_signature_is_refused(
    begin: Start, upstream: UpstreamServer, there: Remote, keys: tuple[SecretKey, ...]
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=keys)
    server = begin(entry(upstream))
    assert server.get(narinfo_path(there)).status == server.head(narinfo_path(there)).status == 404
    server.wait_for_log("no signature by any of public_keys")
    assert upstream.asked[f"GET {narinfo_path(there)}"] == 1  # misses are cached, too


def test_without_public_keys_every_narinfo_is_accepted(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar)
    server = begin(entry(upstream, verify=False))
    assert server.get(narinfo_path(there)).status == 200


def test_narinfo_of_another_path_is_refused(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    other = "/" + "9" * 32 + ".narinfo"
    upstream.files[other] = upstream.files[narinfo_path(there)]
    server = begin(entry(upstream))
    assert server.get(other).status == 404
    server.wait_for_log("the narinfo is for another path")


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("file:///etc/passwd", 404),
        ("http://user:secret@127.0.0.1/x", 404),
        ("ftp://127.0.0.1/x", 404),
        ("http://[x/", 404),
        ("http://127.0.0.1:99999/", 404),
        ("../x", 200),
    ],
)
def test_nar_url_of_an_unsupported_kind_is_refused(
    begin: Start, upstream: UpstreamServer, there: Remote, url: str, status: int
) -> None:
    upstream.add(there.info, there.file, NarFile(url, "xz"), keys=(KEY,))
    assert begin(entry(upstream)).get(narinfo_path(there)).status == status


@pytest.mark.parametrize("verify", [False, True])
def test_nar_url_on_another_host_is_followed_only_if_signed(
    begin: Start, upstream: UpstreamServer, there: Remote, *, verify: bool
) -> None:
    with UpstreamServer() as other:
        other.files["/x"] = there.file
        upstream.add(there.info, there.file, NarFile(f"{other.url}/x", "xz", there.nar.file_hash), keys=(KEY,))
        server = begin(entry(upstream, verify=verify))
        answer = server.get(narinfo_path(there))
        assert answer.status == (200 if verify else 404)
        if verify:
            assert server.get("/" + fields(answer)["URL"]).body == there.file
            assert not any(name.lower() == "via" for headers in other.headers for name in headers)


@pytest.mark.parametrize(
    "name",
    ["nix-cache-info", "..%2fnix-cache-info", "x/../../secret", "nar/%2e%2e/secret", "http://h/", "nar/..", "nar/."],
)
def test_other_files_of_the_upstream_are_not_accessible(
    begin: Start, upstream: UpstreamServer, there: Remote, name: str
) -> None:
    upstream.files |= {"/secret": b"secret", "/nar/../secret": b"secret"}
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    base = fields(server.get(narinfo_path(there)))["URL"].rpartition("/")[0]
    before = sum(upstream.asked.values())
    assert server.get(f"/{base}/{name}").status == 404
    assert sum(upstream.asked.values()) == before


# Single flight


def test_hundred_clients_of_a_cold_nar_cause_one_fetch(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    path = make_path(tmp_path / "elsewhere", size=4 << 20, compression="zstd")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = begin(entry(upstream), workers=2)

    def fetch(_: int) -> bytes:
        return server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body

    with ThreadPoolExecutor(100) as threads:
        bodies = list(threads.map(fetch, range(100)))
    assert all(body == path.file for body in bodies)
    assert upstream.asked[f"GET /{path.nar.url}"] == 1
    # Once for each worker, and once more if one worker gets a NAR request whose narinfo the other worker sent.
    assert upstream.asked[f"GET {narinfo_path(path)}"] <= 4


def test_concurrent_lookups_cause_one_request(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))

    def slow(handler: upstream_server.Handler) -> None:
        time.sleep(0.3)
        handler.serve()

    upstream.behaviours["narinfo"] = slow
    server = begin(entry(upstream))
    with ThreadPoolExecutor(20) as threads:
        assert {answer.status for answer in threads.map(lambda _: server.get(narinfo_path(there)), range(20))} == {200}
    assert upstream.asked[f"GET {narinfo_path(there)}"] == 1


def test_hits_are_cached_for_an_hour_and_misses_for_30_s(
    begin: Start, upstream: UpstreamServer, there: Remote, tmp_path: Path
) -> None:
    later = tmp_path / "seconds"
    clock = f"""
from pathlib import Path
from cachetools import TLRUCache
from harmonia.upstream import lookup_cache
def cache(*arguments, **options):
    return TLRUCache(*arguments, timer=lambda: float(Path({str(later)!r}).read_text()), **options)
lookup_cache.TLRUCache = cache
"""
    later.write_text("0")
    server = begin(entry(upstream), program=patched(clock))
    where = narinfo_path(there)
    assert server.get(where).status == 404
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    for seconds, expected in ((29, 404), (31, 200)):
        later.write_text(f"{seconds}")
        assert server.get(where).status == expected
    del upstream.files[where]
    for seconds, expected in ((3600, 200), (3632, 404)):
        later.write_text(f"{seconds}")
        assert server.get(where).status == expected
    assert upstream.asked[f"GET {where}"] == 3


def test_upstreams_work_without_a_cache_directory(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    url = fields(server.get(narinfo_path(there)))["URL"]
    answer = server.get(f"/{url}")
    assert (answer.status, answer.body) == (200, there.file)
    assert answer.headers["content-length"] == str(len(there.file))
    assert server.head(f"/{url}").headers == answer.headers
    for ranges in (True, False):
        upstream.ranges = ranges
        part = server.get(f"/{url}", {"Range": "bytes=1000-100999"})
        assert (part.status, part.body) == (206, there.file[1000:101000])


@pytest.mark.parametrize("compression", ["none", "xz"])
def test_wrong_nar_never_completes_without_a_cache_directory(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, compression: str
) -> None:
    path = make_path(tmp_path / "elsewhere", compression=compression)
    wrong = bytes(len(path.file))
    nar = replace(path.nar, file_hash=None) if compression == "none" else path.nar
    upstream.add(path.info, wrong, nar, keys=(KEY,))
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    assert aborted(server, "/" + fields(server.get(narinfo_path(path)))["URL"])


def test_nar_withdrawn_by_another_worker_breaks_off(
    begin: Start, upstream: UpstreamServer, there: Remote, tmp_path: Path
) -> None:
    """The test plays the other worker: it holds the writer lock of the file."""
    upstream.add(there.info, bytes(len(there.file)), there.nar, keys=(KEY,))
    server = begin(entry(upstream), cache_dir=tmp_path / "cache")
    url = fields(server.get(narinfo_path(there)))["URL"]
    opened = DiskCache(str(server.cache_dir / "nar")).open_file(NarName.parse(url.removeprefix("upstream/")).key)
    assert opened
    _, filler = opened
    assert filler
    with ThreadPoolExecutor(1) as threads:
        download = threads.submit(aborted, server, f"/{url}")
        wait_until(lambda: any(name.endswith(".growing") for name in open_files(server.workers[0])))
        filler.withdraw()
        assert download.result()


@pytest.mark.parametrize("file_hash", ["right", "stale", None])
def test_redirect_to_another_host_is_followed_for_whole_nars_but_not_for_ranges(
    begin: Start, upstream: UpstreamServer, there: Remote, file_hash: str | None
) -> None:
    """A range cannot be verified, so an upstream could make us fetch it from our own network."""
    hashes = {"right": there.nar.file_hash, "stale": bytes(32), None: None}
    upstream.add(there.info, there.file, replace(there.nar, file_hash=hashes[file_hash]), keys=(KEY,))
    with UpstreamServer() as other:
        other.files["/there"] = there.file
        upstream.behaviours["/nar/"] = status(302, Location=f"{other.url}/there")
        server = begin(entry(upstream), cache_dir=NO_CACHE)
        url = "/" + fields(server.get(narinfo_path(there)))["URL"]
        whole = server.get(url)
        assert (whole.status, whole.body) == (200, there.file)
        for part in ("bytes=1000-", "bytes=0-999"):
            assert server.get(url, {"Range": part}).status == 404
        other.files["/there"] = bytes(len(there.file))
        assert aborted(server, url)


def test_range_of_an_encoded_nar_is_not_fetched_from_another_host(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    """For encoded bytes, the whole NAR is requested instead, but only a range of it would be sent on."""

    def behave(handler: upstream_server.Handler) -> None:
        if "Range" in handler.headers:
            headers = {"Content-Range": "bytes 1000-1999/9999", "Content-Encoding": "gzip"}
            handler.answer(206, bytes(1000), headers)
        else:
            handler.answer(302, b"", {"Location": f"{other.url}/there"})

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    with UpstreamServer() as other:
        other.files["/there"] = there.file
        upstream.behaviours["/nar/"] = behave
        server = begin(entry(upstream), cache_dir=NO_CACHE)
        url = "/" + fields(server.get(narinfo_path(there)))["URL"]
        assert server.get(url).body == there.file
        assert server.get(url, {"Range": "bytes=1000-1999"}).status == 404


@pytest.mark.parametrize("cache_size", ["1G", "1K"])
def test_nar_in_an_unknown_compression_is_not_fetched(
    begin: Start, upstream: UpstreamServer, there: Remote, cache_size: str
) -> None:
    """With mode = "redirect", clients fetch it from the upstream. A made-up URL here gets 404."""
    nar = replace(there.nar, compression="lz4")
    upstream.add(there.info, there.file, nar, keys=(KEY,))
    server = begin(entry(upstream, mode="redirect"), settings=f"{LONG_TIMEOUT}\ncache_size = '{cache_size}'")
    assert fields(server.get(narinfo_path(there)))["URL"] == f"{upstream.url}/{nar.url}"
    hashes = (base32.encode(each) for each in (there.info.nar_hash, there.nar.file_hash or b""))
    name = f"{there.info.path.hash_part}-{'-'.join(hashes)}.nar"
    assert server.get(f"/upstream/{name}.lz4").status == 404
    assert not upstream.asked[f"GET /{nar.url}"]


def test_response_with_another_range_is_refused(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    def another(handler: upstream_server.Handler) -> None:
        content_range = {"Content-Range": f"bytes 0-9/{len(there.file)}"}
        handler.answer(206, there.file[:10], content_range if "Range" in handler.headers else {})

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    assert server.get(url).status == 200
    upstream.behaviours["/nar/"] = another
    assert aborted(server, url)
    upstream.behaviours["/nar/"] = lambda handler: another(handler) if "Range" in handler.headers else handler.serve()
    assert server.get(url, {"Range": "bytes=5-14"}).status == 404


def test_slow_client_slows_the_upstream_without_a_cache_directory(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    path = make_path(tmp_path / "elsewhere", size=32 << 20, compression="none")
    sent = 0

    def flood(handler: upstream_server.Handler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(path.file)))
        handler.end_headers()
        for start in range(0, len(path.file), 65536):
            handler.wfile.write(path.file[start : start + 65536])
            sent = start

    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = flood
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    url = fields(server.get(narinfo_path(path)))["URL"]
    with server.connect(receive_buffer=8192) as connection:
        connection.sendall(f"GET /{url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        connection.recv(100)
        before = -1
        while before != sent:
            before = sent
            time.sleep(0.5)
        assert sent < 24 << 20


def test_nar_larger_than_the_cache_is_sent_on_without_it(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    """Its size is unknown in advance, so the cache is full in the middle of the transfer."""
    path = make_path(tmp_path / "elsewhere", size=2 << 20)
    upstream.add(path.info, path.file, NarFile(path.nar.url, "xz"), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream), settings=f"{LONG_TIMEOUT}\ncache_size = '256K'")
    assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
    assert cached(server, path) == []


@pytest.mark.parametrize(("version", "headers"), [("1.0", {}), ("1.1", {"Range": "bytes=10-"})])
def test_nar_larger_than_the_cache_is_measured_for_requests_that_need_its_length(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, version: str, headers: dict[str, str]
) -> None:
    path = make_path(tmp_path / "elsewhere", size=2 << 20)
    upstream.add(path.info, path.file, replace(path.nar, file_size=None), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream), settings=f"{LONG_TIMEOUT}\ncache_size = '256K'")
    url = fields(server.get(narinfo_path(path)))["URL"]
    answer = server.request("GET", f"/{url}", headers, version=version)
    assert answer.body == path.file[10 if headers else 0 :]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_http_1_0_gets_a_zstd_nar_of_unknown_length_uncompressed_and_at_once(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, cache: bool
) -> None:
    path = make_path(tmp_path / "elsewhere", size=4 << 20, compression="zstd")
    received = Event()

    def hold_the_end(handler: upstream_server.Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        if handler.command == "GET":
            for part in (path.file[: 3 << 19], path.file[3 << 19 :]):
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                received.wait()
            handler.wfile.write(b"0\r\n\r\n")

    upstream.add(path.info, path.file, replace(path.nar, file_size=None), keys=(KEY,))
    upstream.behaviours["^/nar/"] = hold_the_end
    server = begin(entry(upstream), cache_dir=None if cache else NO_CACHE)
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    head = server.request("HEAD", url, version="1.0")
    with server.connect() as connection:
        connection.sendall(f"GET {url} HTTP/1.0\r\n\r\n".encode())
        with http.client.HTTPResponse(connection) as answer:
            answer.begin()
            begun = answer.read(1000)
            received.set()
            assert unpacked(begun + answer.read()) == path.content
    headers = {name.lower(): value for name, value in answer.getheaders() if name != "date"}
    assert headers == head.headers
    assert (headers["accept-ranges"], headers["cache-control"]) == ("none", "no-store, no-transform")
    assert server.get(url).body == path.file


def test_http_1_0_client_detects_a_zstd_nar_of_unknown_length_that_breaks_off(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    path = make_path(tmp_path / "elsewhere", size=4 << 20, compression="zstd")
    upstream.add(path.info, path.file[:-100], replace(path.nar, file_size=None), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream))
    assert aborted(server, "/" + fields(server.get(narinfo_path(path)))["URL"], version="1.0")


def test_nar_url_without_a_file_hash_is_not_resumable(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    """The upstream may compress the NAR again, and the new bytes may differ from the bytes that the client has."""
    path = make_path(tmp_path / "elsewhere")
    upstream.add(path.info, path.file, replace(path.nar, file_size=None, file_hash=None), keys=(KEY,))
    server = begin(entry(upstream))
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    for _ in range(2):  # during the fetch, and from the cache
        whole = server.get(url)
        assert (whole.status, whole.body) == (200, path.file)
        assert whole.headers["accept-ranges"] == "none"
        assert whole.headers["cache-control"] == "no-store, no-transform"
        assert server.get(url, {"Range": "bytes=10-"}).status == 404


def test_number_of_concurrent_fetches_is_bounded(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    paths = [make_path(tmp_path / f"elsewhere-{n}", size=2 << 20, compression="none") for n in range(6)]
    for path in paths:
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    rest = Event()
    upstream.behaviours["^/nar/"] = held(rest)
    two = patched("from harmonia.upstream import fetch; fetch._MAX_FETCHES = 2")
    server = begin(entry(upstream, **SLOW), workers=1, program=two)
    urls = [fields(server.get(narinfo_path(path)))["URL"] for path in paths]
    for url in urls:
        with server.connect() as connection:
            connection.sendall(f"GET /{url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    assert sum(bool(cached(server, path)) for path in paths) == 2
    rest.set()
    assert server.get(f"/{urls[0]}").body == paths[0].file  # joins the running fetch
    assert server.get(f"/{urls[-1]}").body == paths[-1].file


@pytest.mark.parametrize("name", ["x" * 8100, "\x01", f"harmonia-{'0' * 8000}"])
def test_malformed_via_of_an_upstream_does_not_affect_other_upstreams(
    begin: Start, start: Start, upstream: UpstreamServer, tmp_path: Path, name: str
) -> None:
    path = StoreBuilder(tmp_path / "other").add_text("other", b"other\n")
    other = start(store=tmp_path / "other")
    upstream.behaviours["."] = lambda handler: handler.answer(
        404 if "narinfo" in handler.path else 200,
        b"" if "narinfo" in handler.path else b"StoreDir: /nix/store\n",
        {"Via": f"1.1 {name}"},
    )
    server = begin(entry(other, verify=False), entry(upstream))
    for last in "0123":
        assert server.get(f"/{'0' * 31}{last}.narinfo").status == 404
    assert server.get(f"/{path.path.hash_part}.narinfo").status == 200


def test_killed_worker_breaks_only_its_own_downloads(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    path = make_path(tmp_path / "elsewhere", size=8 << 20, compression="none")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    rest = Event()
    upstream.behaviours["/nar/"] = held(rest)
    server = begin(entry(upstream, **SLOW), workers=2)
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]

    def fetch() -> bool:
        return not aborted(server, url)

    def reads_it(worker: int) -> bool:
        return any(os.path.basename(name) in cached(server, path) for name in open_files(worker))

    with ThreadPoolExecutor(60) as threads:
        downloads = []
        while not all(map(reads_it, server.workers)):
            downloads.append(threads.submit(fetch))
            time.sleep(0.03)
        [filler] = lock_holders(server.cache_dir / "nar" / cached(server, path)[0])
        upstream.behaviours.clear()
        os.kill(filler, signal.SIGKILL)
        rest.set()
        outcomes = [download.result() for download in downloads]
    assert True in outcomes  # those of the other worker
    assert server.get(url).body == path.file


def test_idle_connection_to_an_upstream_is_reused_or_replaced(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    """The connection is idle for longer than the timeout of a response."""
    server = begin(entry(upstream, timeout=2.0))
    for number in range(2):
        path = make_path(tmp_path / str(number))
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
        assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
        time.sleep((1 - number) * 2.5)


def test_nar_whose_fetch_ends_while_it_is_opened_has_a_length(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    wait_for_end = """
import sys, time
from harmonia.cache.disk_cache import DiskCache
open_file = DiskCache.open_file
def open_and_wait(self, key):
    opened = open_file(self, key)
    if opened[1] is None:
        print("opened a growing file", file=sys.stderr, flush=True)
        while (complete := self.find_file(key)) is None:
            time.sleep(0.01)
        complete.close()
        time.sleep(0.1)  # the fetch ends
    return opened
DiskCache.open_file = open_and_wait
"""
    is_open = Event()

    def wait(handler: upstream_server.Handler) -> None:
        is_open.wait()
        handler.serve()

    upstream.behaviours["nar/"] = wait
    server = begin(entry(upstream), program=patched(wait_for_end))
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(server.get, url)
        wait_until(lambda: upstream.asked[f"GET /{there.nar.url}"])
        second = threads.submit(server.get, url)
        server.wait_for_log("opened a growing file")
        is_open.set()
        assert first.result().body == second.result().body == there.file
    assert second.result().headers["content-length"] == str(len(there.file))


def test_two_paths_with_the_same_content_cause_one_fetch(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    alike = replace(there.info, path=StorePath("9" + there.info.path[1:]))
    for info in (there.info, alike):
        upstream.add(info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    for info in (there.info, alike):
        url = fields(server.get(f"/{info.path.hash_part}.narinfo"))["URL"]
        assert server.get(f"/{url}").body == there.file
    assert upstream.asked[f"GET /{there.nar.url}"] == 1


# Misbehaviour


def aborted(server: Server, url: str, version: str = "1.1") -> bool:
    """Return True if the response breaks off, or is an error: a body that fails early may do so before the head."""
    try:
        return server.request("GET", url, version=version).status != 200
    except (http.client.IncompleteRead, ConnectionError):
        return True


@pytest.mark.parametrize("compression", ["xz", "none"])
@pytest.mark.parametrize("with_hash", [True, False])
def test_wrong_bytes_never_complete_and_are_not_cached(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, compression: str, *, with_hash: bool
) -> None:
    path = make_path(tmp_path / "elsewhere", compression=compression)
    wrong = bytearray(path.file)
    wrong[len(wrong) // 2] ^= 1
    nar = path.nar if with_hash else NarFile(path.nar.url, compression)
    upstream.add(path.info, bytes(wrong), nar, keys=(KEY,))
    server = begin(entry(upstream))
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    assert aborted(server, url)
    wait_until(lambda: cached(server, path) == [])
    upstream.files[f"/{nar.url}"] = path.file
    assert server.get(url).body == path.file


def test_wrong_nar_with_a_matching_file_hash_is_removed(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """Only the NarHash is signed. The first client gets the wrong NAR and refuses it; no other client gets it."""
    evil = lzma.compress(bytes(len(there.content)))
    nar = NarFile("nar/evil.nar.xz", "xz", hashlib.sha256(evil).digest(), len(evil))
    upstream.add(there.info, evil, nar, keys=(KEY,))
    server = begin(entry(upstream))
    aborted(server, "/" + fields(server.get(narinfo_path(there)))["URL"])
    server.wait_for_log("the unpacked NAR has another NarHash")
    wait_until(lambda: cached(server, there) == [])


def test_nar_with_a_matching_file_hash_is_sent_before_it_is_verified(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    slow = (
        "import time; from harmonia.upstream import nar_verifier\n"
        "nar_verifier.check_content = lambda info, nar, file, memory: [time.sleep(0.5) for _ in file]"
    )
    path = make_path(tmp_path / "elsewhere", size=16 << 20, compression="zstd")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = begin(entry(upstream), program=patched(slow), workers=2)
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    for _ in range(3):
        assert server.get(url).body == path.file
    assert not is_kept(server, path)
    assert server.stop() == 0
    assert upstream.asked[f"GET /{path.nar.url}"] == 1


@pytest.mark.parametrize("compression", ["xz", "zstd", "gzip", "bzip2"])
def test_decompression_bomb_is_refused(begin: Start, upstream: UpstreamServer, there: Remote, compression: str) -> None:
    bomb = PACK[compression][1](bytes(16 << 20))
    upstream.add(there.info, bomb, NarFile("nar/bomb", compression), keys=(KEY,))
    server = begin(entry(upstream))
    assert aborted(server, "/" + fields(server.get(narinfo_path(there)))["URL"])
    server.wait_for_log("the unpacked NAR is longer than its NarSize")


STALE: list[dict[str, Any]] = [
    {"file_hash": bytes(32)},
    {"file_size": 1},
    {"file_size": 1 << 62},
    {"file_hash": bytes(32), "file_size": 100_000},
    {"file_size": 0},
    {"file_hash": None, "file_size": 5},
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_stale_file_hash_or_size_does_not_matter(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, kept: bool, workers: int
) -> None:
    """Only NarHash and NarSize are signed: caches that name files by NarHash may compress them again."""
    server = begin(
        entry(upstream), workers=workers, settings=f"{LONG_TIMEOUT}\ncache_size = '{'1G' if kept else '1K'}'"
    )
    for number, stale in enumerate(STALE):
        there = make_path(tmp_path / str(number))
        upstream.add(there.info, there.file, replace(there.nar, **stale), keys=(KEY,))
        with case(stale):
            check_stale(server, there, stale, workers)


def check_stale(server: Server, there: Remote, stale: dict[str, Any], workers: int) -> None:
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    head = server.head(url)
    assert (head.status, head.headers["content-length"]) == (200, str(len(there.file)))
    for _ in range(2 * workers):
        answer = server.get(url)
        assert (answer.status, answer.body) == (200, there.file)
        # A worker does not know the length of a file that another worker is fetching.
        assert answer.headers.get("content-length", str(len(there.file))) == str(len(there.file))
    part = server.get(url, {"Range": f"bytes=1000-{len(there.file) - 1}"})
    # Without a FileHash, the URL does not name exact bytes, so ranges get 404.
    determines_bytes = stale.get("file_hash", there.nar.file_hash) is not None
    assert (part.status, part.body) == ((206, there.file[1000:]) if determines_bytes else (404, b"Not Found\n"))
    assert server.get(url).body == there.file
    assert server.get(narinfo_path(there)).status == 200


def test_narinfo_describes_the_cached_file(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """Stale values are replaced, but the URL stays the same."""
    upstream.add(there.info, there.file, replace(there.nar, file_hash=bytes(32), file_size=7), keys=(KEY,))
    server = begin(entry(upstream), workers=2)
    before = fields(server.get(narinfo_path(there)))
    assert before["FileSize"] == "7"
    assert server.get(f"/{before['URL']}").body == there.file
    wait_until(lambda: is_kept(server, there))
    for _ in range(4):
        after = fields(server.get(narinfo_path(there)))
        assert after["URL"] == before["URL"]
        assert after["FileSize"] == str(len(there.file))
        assert after["FileHash"] == f"sha256:{base32.encode(hashlib.sha256(there.file).digest())}"


@pytest.mark.parametrize("fault", ["missing", "other content", "garbage"])
def test_narinfo_gets_404_after_its_nar_could_not_be_fetched(
    begin: Start, upstream: UpstreamServer, there: Remote, fault: str
) -> None:
    """All workers answer 404, so that clients use other caches, until the NAR is fetched."""
    file = {"missing": b"", "other content": lzma.compress(b"other"), "garbage": b"garbage"}[fault]
    upstream.add(there.info, file, replace(there.nar, file_hash=None), keys=(KEY,))
    if fault == "missing":
        del upstream.files[f"/{there.nar.url}"]
    server = begin(entry(upstream), workers=2)
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    assert aborted(server, url)
    wait_until(lambda: server.get(narinfo_path(there)).status == 404)
    assert {server.get(narinfo_path(there)).status for _ in range(10)} == {404}
    upstream.files[f"/{there.nar.url}"] = there.file
    assert server.get(url).body == there.file


def test_narinfo_of_another_upstream_is_used_after_one_lost_the_nar(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    with UpstreamServer() as mirror:
        upstream.add(there.info, there.file, there.nar, keys=(KEY,))
        gz = gzip.compress(there.content)
        mirror.add(there.info, gz, NarFile("nar/x.nar.gz", "gzip"), keys=(KEY,))
        del upstream.files[f"/{there.nar.url}"]
        server = begin(entry(upstream, priority=1), entry(mirror, priority=2))
        lost = "/" + fields(server.get(narinfo_path(there)))["URL"]
        assert server.get(lost).status == 404
        url = "/" + fields(server.get(narinfo_path(there)))["URL"]
        assert server.get(url).body == gz


@pytest.mark.parametrize("compression", ["lz4", "lzop", "compress"])
def test_narinfo_with_an_unknown_compression_is_refused(
    begin: Start, upstream: UpstreamServer, there: Remote, compression: str
) -> None:
    upstream.add(there.info, there.file, replace(there.nar, compression=compression), keys=(KEY,))
    server = begin(entry(upstream))
    assert server.get(narinfo_path(there)).status == 404
    server.wait_for_log(f"cannot verify NARs with the compression {compression}; .*mode = 'redirect'")
    redirecting = begin(entry(upstream, mode="redirect"))
    assert fields(redirecting.get(narinfo_path(there)))["Compression"] == compression


def encoded(*codings: str, name: str = "Content-Encoding") -> upstream_server.Behaviour:
    """Send the file in these content codings, as a static cache has stored it."""

    def behave(handler: upstream_server.Handler) -> None:
        body = handler.server.files[handler.path]
        for coding in codings:
            body = CODINGS[coding.lower()](body)
        handler.answer(200, body, {name: ", ".join(codings), "Accept-Ranges": "bytes"})

    return behave


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    **{name: pack for name, (_, pack) in PACK.items()},
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
}


@pytest.mark.parametrize("kept", [True, False])
def test_responses_in_every_content_coding_are_decoded(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, kept: bool
) -> None:
    server = begin(entry(upstream), settings=f"{LONG_TIMEOUT}\ncache_size = '{'1G' if kept else '1K'}'")
    for codings in (["br"], ["GZIP"], ["x-gzip"], ["deflate"], ["zstd"], ["xz"], ["gzip", "br"]):
        there = make_path(tmp_path / "-".join(codings))
        upstream.add(there.info, there.file, there.nar, keys=(KEY,))
        upstream.files[f"/{there.info.path.hash_part}.ls"] = b'{"version":1}'
        upstream.behaviours["^/(nar/.*|.*narinfo|.*ls)$"] = encoded(*codings)
        with case(codings):
            check_decoded(server, there)


def check_decoded(server: Server, there: Remote) -> None:
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    assert server.head(url).status == 200
    for _ in range(2):
        answer = server.get(url)
        assert (answer.status, answer.body) == (200, there.file)
        assert "content-encoding" not in answer.headers
    part = server.get(url, {"Range": "bytes=1000-1999"})
    assert (part.status, part.body) == (206, there.file[1000:2000])
    listing = server.get(f"/{there.info.path.hash_part}.ls")
    assert (listing.body, "content-encoding" in listing.headers) == (b'{"version":1}', False)


@pytest.mark.parametrize("status_", [201, 206, 226])
def test_status_that_nix_treats_like_200_is_accepted(
    begin: Start, upstream: UpstreamServer, there: Remote, status_: int
) -> None:
    def behave(handler: upstream_server.Handler) -> None:
        content = handler.server.files[handler.path]
        part = {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"} if status_ == 206 else {}
        handler.answer(status_, content, part)

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["narinfo|^/nar/"] = behave
    server = begin(entry(upstream))
    url = fields(server.get(narinfo_path(there)))["URL"]
    assert server.get(f"/{url}").body == there.file


@pytest.mark.parametrize("where", ["narinfo", "^/nar/"])
def test_unknown_content_coding_is_refused(begin: Start, upstream: UpstreamServer, there: Remote, where: str) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours[where] = lambda handler: handler.answer(
        200, handler.server.files[handler.path], {"Content-Encoding": "rot13"}
    )
    server = begin(entry(upstream))
    answer = server.get(narinfo_path(there))
    if answer.status == 200:
        assert server.get(f"/{fields(answer)['URL']}").status == 404
        server.wait_for_log("its Content-Encoding 'rot13' is unknown")
        answer = server.get(narinfo_path(there))
    assert answer.status == 404


def test_truncated_response_breaks_off(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["^/nar/"] = lambda handler: handler.answer(200, handler.server.files[handler.path][:-1])
    server = begin(entry(upstream))
    assert aborted(server, "/" + fields(server.get(narinfo_path(there)))["URL"])
    wait_until(lambda: cached(server, there) == [])


@pytest.mark.parametrize("status_", [404, 500, 503])
def test_missing_nar_gets_404(begin: Start, upstream: UpstreamServer, there: Remote, status_: int) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = status(status_)
    server = begin(entry(upstream))
    answer = server.get("/" + fields(server.get(narinfo_path(there)))["URL"])
    assert (answer.status, answer.headers["cache-control"]) == (404, "no-store")
    wait_until(lambda: cached(server, there) == [])


@pytest.mark.parametrize("fault", ["hang", "reset", "loop", "nowhere"])
def test_nar_that_cannot_be_fetched_gets_404(begin: Start, upstream: UpstreamServer, there: Remote, fault: str) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = FAULTS[fault]
    # Only timeouts of 1 s and 1 s + 1 s work; others, such as the defaults, never end.
    bounded = patched("import asyncio as a\nof = a.timeout\na.timeout = lambda s: of(s if s in (1, 2) else None)")
    server = begin(entry(upstream, timeout=1.0, connect_timeout=1.0), program=bounded)
    wait_until(lambda: server.get(narinfo_path(there)).status == 200)  # a busy machine may cause a timeout
    assert server.get("/" + fields(server.get(narinfo_path(there)))["URL"]).status == 404


def test_failed_fetch_after_the_client_left_is_not_an_error(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    left, failed = Event(), Event()

    def slow_reset(handler: upstream_server.Handler) -> None:
        left.wait(PATIENCE_S)
        reset(handler)
        failed.set()

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = slow_reset
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    url = fields(server.get(narinfo_path(there)))["URL"]
    with server.connect() as connection:
        connection.sendall(f"GET /{url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        wait_until(lambda: upstream.asked[f"GET /{there.nar.url}"] == 1)
    server.settle()
    left.set()
    assert failed.wait(PATIENCE_S)
    server.settle()
    assert server.stop() == 0
    assert not [line for line in server.log if "never retrieved" in line]


def test_slow_nar_is_served_if_it_does_not_stall(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    """It takes longer than the timeout in total, but no pause does."""
    path = make_path(tmp_path / "elsewhere", size=2000)
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = drip(len(path.file) // 16, 0.2)
    server = begin(entry(upstream, timeout=3.0))
    assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file


def test_slow_sync_to_disk_delays_no_client(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    paths = [make_path(tmp_path / str(n), size=64 << 10, compression="none" if n % 2 else "xz") for n in range(9)]
    for n, path in enumerate(paths):
        nar = replace(path.nar, file_hash=None) if n % 3 else path.nar
        upstream.add(path.info, path.file, nar, keys=(KEY,))
    synced = tmp_path / "synced"
    slow = patched(
        "import os, time\ndef fdatasync(_):\n"
        f"  while not os.path.exists({str(synced)!r}): time.sleep(0.01)\n"
        "os.fdatasync = fdatasync"
    )
    server = begin(entry(upstream), workers=1, program=slow)
    for path in paths:
        assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
    assert not any(is_kept(server, path) for path in paths)
    synced.touch()


@pytest.mark.root
def test_full_disk_stops_no_download_and_is_logged_once(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    path = make_path(tmp_path / "elsewhere", size=16 << 20, compression="none")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    cache_dir = tmp_path / "small"
    program = with_small_disk(cache_dir)
    server = begin(entry(upstream), settings=f"{LONG_TIMEOUT}\ncache_size = '1G'", cache_dir=cache_dir, program=program)
    for _ in range(2):
        assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
    assert len([line for line in server.log if "cannot write to the cache" in line]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_fetch_is_resumed(begin: Start, upstream: UpstreamServer, tmp_path: Path, seed: int) -> None:
    there = make_path(tmp_path / "elsewhere", size=4 << 20, compression="zstd")
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    at = [random.Random(seed).randrange(1, len(there.file) // 4) for _ in range(3)]
    upstream.behaviours["/nar/"] = cut(*at)
    server = begin(entry(upstream))
    assert server.get("/" + fields(server.get(narinfo_path(there)))["URL"]).body == there.file
    assert upstream.asked[f"GET /{there.nar.url}"] == 4
    ranges = [headers["Range"] for headers in upstream.headers if "Range" in headers]
    positions = [int(each.removeprefix("bytes=").removesuffix("-")) for each in ranges]
    reached = 0
    for sent, position in zip(at, positions, strict=True):
        assert 0 <= reached + sent - position <= 2 * 256 * 1024  # a buffer of the arrived bytes may not be read yet
        reached = position


def test_interrupted_fetch_without_ranges_breaks_the_download(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    upstream.ranges = False
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = cut(len(there.file) // 2)
    server = begin(entry(upstream))
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    assert aborted(server, url)
    assert server.get(url).body == there.file


FAULTS = {
    "hang": hang,
    "reset": reset,
    "500": status(500),
    "429": status(429, Retry_After="30"),
    "drip": drip(1, 0.2),
    "loop": lambda handler: handler.answer(302, b"", {"Location": handler.path}),
    "elsewhere": status(302, Location="http://127.0.0.1:1/"),
    "nowhere": status(302, Location="http://[x/"),
    "nonsense": status(200),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_miss_is_answered_within_the_timeout(begin: Start, upstream: UpstreamServer, there: Remote, fault: str) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["narinfo"] = FAULTS[fault]
    server = begin(entry(upstream, **SLOW), settings=SHORT_TIMEOUT)
    for method in ("GET", "HEAD"):
        answer = server.request(method, narinfo_path(there))
        assert (answer.status, answer.headers["cache-control"]) == (404, "no-store")


def test_dead_upstreams_delay_neither_start_nor_misses(begin: Start, store: StoreBuilder) -> None:
    here = store.add_text("more", b"more\n")
    dead = ["[[upstream]]\nurl = 'http://127.0.0.1:1'\n"]
    with UpstreamServer() as silent:
        silent.behaviours["."] = hang
        server = begin(*dead, entry(silent, **SLOW), settings=SHORT_TIMEOUT, up=False)
        for number in range(3):
            assert server.get(f"/{number:032}.narinfo").status == 404
        assert server.get(f"/{here.path.hash_part}.narinfo").status == 200
        assert server.get("/health").text == "OK\n"
        assert server.get("/health?verbose").text.count(": down\n") == 2


def test_failing_upstream_is_not_asked_until_it_works_again(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream), workers=1)
    upstream.behaviours["."] = status(500)
    for number in range(3):
        assert server.get(f"/{number:032}.narinfo").status == 404
    wait_until(lambda: "down" in server.get("/health?verbose").text)
    asked = sum(count for path, count in upstream.asked.items() if "narinfo" in path)
    assert server.get(narinfo_path(there)).status == 404
    assert sum(count for path, count in upstream.asked.items() if "narinfo" in path) == asked == 3
    assert re.search(r'harmonia_upstream_up\{upstream="[^"]+"\} 0.0', server.get("/metrics").text)
    upstream.behaviours.clear()
    wait_until(lambda: server.get(narinfo_path(there)).status == 200)
    metrics = server.get("/metrics").text
    assert re.search(r'harmonia_upstream_up\{upstream="[^"]+"\} 1.0', metrics)
    assert re.search(r'harmonia_upstream_hits_total\{upstream="[^"]+"\} 1.0', metrics)


def late(handler: upstream_server.Handler) -> None:
    time.sleep(0.8)
    handler.serve()


@pytest.mark.parametrize(
    ("what", "fault"),
    [("narinfo", hang), ("narinfo", late), ("narinfo", drip(1, 0.02)), ("/log/", hang), ("/log/", late)],
)
def test_slow_upstream_is_down_after_three_late_responses(
    begin: Start, upstream: UpstreamServer, what: str, fault: upstream_server.Behaviour
) -> None:
    names = [f"/{number:032}.narinfo" if what == "narinfo" else f"/log/{number:032}-x.drv" for number in range(4)]
    upstream.files |= dict.fromkeys(names, b"x" * 1000)
    server = begin(entry(upstream), settings=SHORT_TIMEOUT)
    upstream.behaviours = {what: fault, "cache-info": hang}
    with ThreadPoolExecutor(3) as threads:
        assert {answer.status for answer in threads.map(server.get, names[:3])} == {404}
    wait_until(lambda: ": down\n" in server.get("/health?verbose").text)
    server.wait_for_log("is down: late response; it is probed until it answers")
    assert server.get(names[3]).status == 404
    assert not upstream.asked[f"GET {names[3]}"]


def test_late_and_failed_response_counts_as_one_failure(begin: Start, upstream: UpstreamServer) -> None:
    gone = []
    answered = Event()

    def late_and_gone(handler: upstream_server.Handler) -> None:
        answered.wait(PATIENCE_S)
        reset(handler)
        gone.append(handler.path)

    # Long enough for a busy machine to send both requests to the upstream.
    server = begin(entry(upstream), settings="upstream_timeout = 2.0", workers=1)
    upstream.behaviours["narinfo"] = late_and_gone
    with ThreadPoolExecutor(2) as threads:
        assert [
            answer.status for answer in threads.map(server.get, [f"/{number:032}.narinfo" for number in (0, 1)])
        ] == [404, 404]
    answered.set()
    wait_until(lambda: len(gone) >= 2)  # the client may repeat a request on a new connection
    upstream.behaviours.clear()
    assert server.get(f"/{9:032}.narinfo").status == 404  # by then, the worker has seen both connections end
    assert re.search(r'harmonia_upstream_failures_total\{upstream="[^"]+"\} 2.0', server.get("/metrics").text)
    assert all_up(server, 1)


@pytest.mark.slow
def test_upstream_with_many_pending_requests_is_not_down(begin: Start, upstream: UpstreamServer) -> None:
    """Requests wait for a free connection, longer than the timeout of a response."""
    upstream.behaviours["narinfo"] = late
    one_at_a_time = patched("from harmonia.upstream import client; client._MAX_SMALL_REQUESTS = 1")
    server = begin(entry(upstream), settings="upstream_timeout = 2.0", program=one_at_a_time)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda number: server.get(f"/{number:032}.narinfo"), range(6)))
    wait_until(lambda: sum("narinfo" in path for path in list(upstream.asked)) == 6)
    assert all_up(server, 1)
    assert " is down: " not in "".join(server.log)


def test_long_small_responses_take_bounded_memory(begin: Start, upstream: UpstreamServer) -> None:
    questions = 40

    def pausing(handler: upstream_server.Handler) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + bytes(1_999_999))
        wait_until(lambda: sum("narinfo" in path for path in list(upstream.asked)) == questions)
        handler.wfile.write(b"\n")

    upstream.behaviours["narinfo"] = pausing
    server = begin(entry(upstream), workers=1)
    before = peak_bytes(server.workers[0])
    with ThreadPoolExecutor(questions) as threads:
        list(threads.map(lambda number: server.get(f"/{number:032}.narinfo"), range(questions)))
    refused = re.compile(r"harmonia_upstream_refused_total{.*malformed_narinfo.*} 40.0")
    wait_until(lambda: refused.search(server.get("/metrics").text))
    assert peak_bytes(server.workers[0]) - before < 40 << 20


def test_requests_of_clients_that_left_delay_no_other_request(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    def answer(handler: upstream_server.Handler) -> None:
        time.sleep(0.3)
        handler.serve()

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["narinfo"] = answer
    one_at_a_time = patched("from harmonia.upstream import client; client._MAX_SMALL_REQUESTS = 1")
    server = begin(entry(upstream, timeout=1.0), settings="upstream_timeout = 0.7", program=one_at_a_time)
    with ThreadPoolExecutor(40) as threads:
        list(threads.map(lambda number: server.get(f"/{number:032}.narinfo"), range(40)))
    wait_until(lambda: server.get(narinfo_path(there)).status == 200)
    assert sum("narinfo" in path for path in list(upstream.asked)) < 20
    assert " is down: " not in "".join(server.log)


def flip_a_bit(handler: upstream_server.Handler) -> None:
    content = bytearray(handler.server.files[handler.path])
    content[len(content) // 2] ^= 1
    handler.answer(200, bytes(content), {"Accept-Ranges": "bytes"})


def short(handler: upstream_server.Handler) -> None:
    handler.answer(200, handler.server.files[handler.path][:-1])


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_misbehaviour_of_an_upstream_leads_to_a_complete_wrong_nar(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, kept: bool
) -> None:
    chance = random.Random(1)

    def misbehave(handler: upstream_server.Handler) -> None:
        size = len(handler.server.files[handler.path])
        faults = [late, flip_a_bit, short, chunked, status(500), status(302, Location=handler.path)]
        chance.choice([*faults, *[cut(chance.randrange(1, size))] * 3, *[upstream_server.Handler.serve] * 6])(handler)

    paths = [make_path(tmp_path / str(n), size=20_000 << n, compression=name) for n, name in enumerate(PACK)]
    for path in paths:
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    cache_dir = tmp_path / "cache" if kept else NO_CACHE
    server = begin(entry(upstream, timeout=0.5), workers=2, cache_dir=cache_dir, program=PROBING)
    urls = ["/" + fields(server.get(narinfo_path(path)))["URL"] for path in paths]
    upstream.behaviours["^/nar/"] = misbehave
    end = time.monotonic() + 3
    arrived = Event()

    def arrives(which: int) -> bool:
        """Return True if the NAR arrives complete."""
        try:
            answer = server.get(urls[which])
        except (http.client.IncompleteRead, ConnectionError):
            return False
        assert answer.status == 404 or (answer.status == 200 and answer.body == paths[which].file)
        return answer.status == 200

    def ask(number: int) -> None:
        """Request the NAR again and again. Remove it from the cache each time."""
        which = number % len(paths)
        while (now := time.monotonic()) < end or (not arrived.is_set() and now < end + PATIENCE_S):
            evict(server, paths[which])
            if arrives(which):
                arrived.set()

    with ThreadPoolExecutor(2 * len(paths)) as threads:
        list(threads.map(ask, range(2 * len(paths))))
    assert arrived.is_set()
    upstream.behaviours.clear()
    for which in range(len(paths)):  # one success is enough: the breaker of the other worker may stay open for longer
        wait_until(partial(arrives, which))


def test_upstream_for_another_store_directory_is_not_used(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.files["/nix-cache-info"] = b"StoreDir: /gnu/store\n"
    server = begin(entry(upstream), up=False)
    server.wait_for_log("its store directory is '/gnu/store', not /nix/store")
    assert server.get(narinfo_path(there)).status == 404


# Several upstreams


def test_upstream_with_the_lowest_priority_is_asked_first(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    with UpstreamServer() as later:
        for each in (upstream, later):
            each.add(there.info, there.file, there.nar, keys=(KEY,))
        server = begin(entry(later, priority=2), entry(upstream, priority=1))
        server.get(narinfo_path(there))
        assert not any("narinfo" in path for path in later.asked)
        del upstream.files[narinfo_path(there)]
        other = "/" + "1" * 32 + ".narinfo"
        assert server.get(other).status == 404
        assert upstream.asked[f"GET {other}"] == later.asked[f"GET {other}"] == 1


def test_fastest_upstream_of_equal_priority_wins(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    with UpstreamServer() as slow:
        for each in (upstream, slow):
            each.add(there.info, there.file, there.nar, keys=(KEY,))
        slow.behaviours["narinfo"] = hang
        server = begin(entry(slow, **SLOW), entry(upstream), settings="upstream_timeout = 600.0")
        assert server.get(narinfo_path(there)).status == 200


@pytest.mark.slow
def test_slow_upstream_does_not_delay_the_next(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    with UpstreamServer() as slow:
        upstream.add(there.info, there.file, there.nar, keys=(KEY,))
        slow.behaviours["narinfo"] = hang
        server = begin(entry(slow, priority=1), entry(upstream, priority=2))
        assert server.get(narinfo_path(there)).status == 200


def test_nar_lost_by_one_upstream_is_fetched_from_another(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    with UpstreamServer() as mirror:
        for each in (upstream, mirror):
            each.add(there.info, there.file, there.nar, keys=(KEY,))
        server = begin(entry(upstream, priority=1), entry(mirror, priority=2))
        url = "/" + fields(server.get(narinfo_path(there)))["URL"]
        del upstream.files[f"/{there.nar.url}"]
        assert server.get(url).body == there.file
        assert mirror.asked[f"GET /{there.nar.url}"] == 1


def test_failed_fetch_leaves_no_file_open(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    def late_and_gone(handler: upstream_server.Handler) -> None:
        time.sleep(0.5)
        handler.answer(404, b"")

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours[r"^/nar/"] = late_and_gone
    server = begin(entry(upstream), workers=1)
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    with ThreadPoolExecutor(30) as threads:
        assert {answer.status for answer in threads.map(server.get, [url] * 30)} == {404}
    wait_until(lambda: not [name for name in open_files(server.workers[0]) if ".growing" in name])


def test_nar_url_is_independent_of_the_upstream(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """It works even if the upstream is removed from the settings: clients remember the URL for a month."""
    with UpstreamServer() as mirror:
        for each in (upstream, mirror):
            each.add(there.info, there.file, there.nar, keys=(KEY,))
        server = begin(entry(upstream), workers=1)
        url = "/" + fields(server.get(narinfo_path(there)))["URL"]
        assert server.get(url).body == there.file
        wait_until(lambda: is_kept(server, there))
        server.stop()
        again = begin(entry(mirror), cache_dir=server.cache_dir)
        assert again.get(url).body == there.file
        assert not mirror.asked[f"GET /{there.nar.url}"]
        assert "/" + fields(again.get(narinfo_path(there)))["URL"] == url
        elsewhere = begin(entry(mirror))
        assert elsewhere.get(url).body == there.file


def test_nar_without_a_file_hash_is_not_fetched_from_another_upstream(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    """The other file may have other bytes, which do not fit to a partial download."""
    with UpstreamServer() as mirror:
        for each in (upstream, mirror):
            each.add(there.info, there.file, NarFile(there.nar.url, "xz"), keys=(KEY,))
        server = begin(entry(upstream, priority=1), entry(mirror, priority=2))
        url = "/" + fields(server.get(narinfo_path(there)))["URL"]
        del upstream.files[f"/{there.nar.url}"]
        assert server.get(url).status == 404
        assert not mirror.asked[f"GET /{there.nar.url}"]


# Credentials


@pytest.mark.parametrize("kind", ["netrc", "credentials_file"])
def test_credentials_are_sent_only_to_the_upstream(
    begin: Start, upstream: UpstreamServer, there: Remote, tmp_path: Path, kind: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("machine 127.0.0.1 login me password sesame\n" if kind == "netrc" else "me:sesame\n")
    secret.chmod(0o600)
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    with UpstreamServer() as other:
        other.files["/there"] = there.file
        upstream.behaviours["/nar/"] = status(302, Location=f"{other.url}/there")
        server = begin(entry(upstream) + f"{kind} = '{secret}'\n")
        assert server.get("/" + fields(server.get(narinfo_path(there)))["URL"]).body == there.file
        assert {headers.get("Authorization") for headers in upstream.headers} == {"Basic bWU6c2VzYW1l"}
        assert {headers.get("Authorization") for headers in other.headers} == {None}
    server.stop()
    assert not [line for line in server.log if "sesame" in line or "bWU6c2VzYW1l" in line]


def test_headers_of_clients_are_not_forwarded(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    private = {
        "Authorization": "Bearer sesame",
        "Cookie": "sesame",
        "X-Forwarded-For": "sesame",
        "User-Agent": "sesame",
    }
    url = fields(server.get(narinfo_path(there), private))["URL"]
    for path in (f"/{url}", f"/{'1' * 32}.ls", f"/log/{'1' * 32}-x.drv"):
        server.get(path, private)
    assert len(upstream.headers) >= 4
    assert "sesame" not in str(upstream.headers)


def test_redirect_to_another_host_is_followed_for_nars_only(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    with UpstreamServer() as other:
        other.add(there.info, there.file, there.nar, keys=(KEY,))
        drv = "8" * 32 + "-there.drv"
        other.files[f"/log/{drv}"] = b"secret"
        # The NAR of a debuginfo response cannot be verified.
        debug = "ab" * 20
        upstream.files[f"/debuginfo/{debug}.debug"] = b'{"archive":"../nar/debug.nar","member":"m"}'
        other.files["/nar/debug.nar"] = b"secret"
        for path in (f"/log/{drv}", narinfo_path(there), "/nar/debug.nar"):
            upstream.behaviours[path] = status(302, Location=f"{other.url}{path}")
        server = begin(entry(upstream))
        assert server.get(f"/log/{drv}").status == server.get(narinfo_path(there)).status == 404
        archive = re.search(r'"\.\.(/upstream/[^"]+)"', server.get(f"/debuginfo/{debug}").text)
        assert archive
        assert server.get(archive[1]).status == server.head(archive[1]).status == 404
        assert not other.asked


def test_redirect_of_a_nar_from_a_public_to_a_private_address_is_refused(
    tmp_path: Path, begin: Start, upstream: UpstreamServer
) -> None:
    """127.0.0.1 is a private address, unless the patch says otherwise."""
    outside = patched(
        "from harmonia.upstream import address_filter as filter; filter.is_public = lambda host: host != '127.0.0.2'"
    )
    for command, inside, arrives in ((HARMONIA, True, True), (outside, False, True), (outside, True, False)):
        there = make_path(tmp_path / "redirected")
        with UpstreamServer("127.0.0.2" if inside else "127.0.0.1") as other:
            other.add(there.info, there.file, there.nar, keys=(KEY,))
            upstream.add(there.info, there.file, there.nar, keys=(KEY,))
            path = f"/{there.nar.url}"
            upstream.behaviours[path] = status(302, Location=f"{other.url}{path}")
            server = begin(entry(upstream), program=command)
            answer = server.get("/" + fields(server.get(narinfo_path(there)))["URL"])
            assert (answer.status, answer.body == there.file) == ((200, True) if arrives else (404, False))
            assert bool(other.asked) == arrives
            server.stop()
            assert any("leads to a private address" in line for line in server.log) != arrives


# Other resources


def test_logs_listings_and_realisations_come_from_upstreams(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    drv = "0" * 32 + "-there.drv"
    realisation = "sha256:" + "0" * 64 + "!out.doi"
    doi = b'{"outPath":"%s"}' % there.info.path.encode()
    listing = b'{"version":1,"root":{"type":"regular","size":0}}'
    log = b"built\n" * 100_000
    build_id = "ab" * 20
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.files |= {
        f"/log/{drv}": log,
        f"/{there.info.path.hash_part}.ls": listing,
        f"/realisations/{realisation}": doi,
        f"/build-trace-v2/{drv}/out.doi": doi,
        f"/debuginfo/{build_id}.debug": b'{"archive":"../nar/x.nar.xz","member":"m"}',
        "/nar/x.nar.xz": there.file,
    }
    server = begin(entry(upstream))
    for path, content in (
        (f"/log/{drv}", log),
        (f"/{there.info.path.hash_part}.ls", listing),
        (f"/realisations/{realisation}", doi),
        (f"/realisations/{realisation.replace('!', '%21')}", doi),
        (f"/build-trace-v2/{drv}/out.doi", doi),
    ):
        answer = server.get(path)
        assert (answer.status, answer.body) == (200, content), path
        assert server.head(path).headers == answer.headers
    assert server.get(f"/log/{drv}", {"Range": "bytes=6-11"}).body == b"built\n"
    found = server.get(f"/debuginfo/{build_id}")
    archive = re.search(r'"\.\./(upstream/[^"]+)"', found.text)
    assert archive
    assert server.get(f"/{archive[1]}").body == there.file
    for path in ("/log/" + "1" * 32 + "-none.drv", "/realisations/none", f"/debuginfo/{'0' * 40}", f"/{'0' * 32}.ls"):
        assert server.get(path).status == 404


@pytest.mark.parametrize("text", [b"[" * 100_000, b"no JSON", b"[]", b"{}", b'{"outPath":5,"archive":5,"member":5}'])
def test_malformed_json_of_an_upstream_gets_404(begin: Start, upstream: UpstreamServer, text: bytes) -> None:
    realisation, build_id = "sha256:" + "0" * 64 + "!out.doi", "ab" * 20
    upstream.files |= {f"/realisations/{realisation}": text, f"/debuginfo/{build_id}.debug": text}
    server = begin(entry(upstream))
    for path in (f"/realisations/{realisation}", f"/debuginfo/{build_id}"):
        assert server.get(path).status == 404
    assert not [line for line in server.log if "Traceback" in line]


def test_log_of_unknown_length_is_measured_for_requests_that_need_it(begin: Start, upstream: UpstreamServer) -> None:
    log = b"built\n" * 100_000
    where = "/log/" + "0" * 32 + "-there.drv"
    upstream.files[where] = log
    upstream.behaviours["/log/"] = chunked
    server = begin(entry(upstream))
    assert server.get(where).body == log
    old = server.request("GET", where, version="1.0")
    assert (old.body, old.headers["content-length"]) == (log, str(len(log)))
    assert server.get(where, {"Range": "bytes=6-11"}).body == b"built\n"


def test_debug_info_comes_through_a_chain_of_servers(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    build_id = "cd" * 20
    upstream.files |= {
        f"/debuginfo/{build_id}": b'{"archive":"../nar/y.nar.xz","member":"m"}',
        "/nar/y.nar.xz": there.file,
    }
    server = begin(entry(upstream))
    for _ in range(2):
        server = begin(entry(server))
    archive = re.search(r'"archive": "\.\.(/upstream/[^"]+)"', server.get(f"/debuginfo/{build_id}").text)
    assert archive
    assert server.get(archive[1]).body == there.file


@pytest.mark.parametrize("fault", ["hang", "reset", "500", "elsewhere"])
def test_requests_for_other_resources_end_by_the_timeout(begin: Start, upstream: UpstreamServer, fault: str) -> None:
    server = begin(entry(upstream, **SLOW), settings=SHORT_TIMEOUT)
    upstream.behaviours["."] = FAULTS[fault]
    drv = "0" * 32 + "-there.drv"
    for path in (f"/log/{drv}", f"/{'0' * 32}.ls", f"/build-trace-v2/{drv}/out.doi", f"/debuginfo/{'0' * 40}"):
        assert server.get(path).status == 404


# Several servers of Harmonia


def test_chain_of_three_servers(begin: Start, start: Start, tmp_path: Path) -> None:
    far = StoreBuilder(tmp_path / "far")
    info = far.add(far.output_path("far"), {"file": random.Random(1).randbytes(1 << 20)}, keys=[KEY])
    third = start(store=tmp_path / "far", settings="access_log = true")
    second = begin(entry(third))
    first = begin(entry(second))
    answer = first.get(f"/{info.path.hash_part}.narinfo")
    url = fields(answer)["URL"]
    for _ in range(2):
        body = first.get(f"/{url}").body
        content = unpacked(body) if "zst" in url else body
        assert hashlib.sha256(content).digest() == info.nar_hash
    third.stop()
    assert len([line for line in third.log if "GET /nar/" in line]) == 1


def test_private_upstream_gets_its_token(begin: Start, start: Start, tmp_path: Path) -> None:
    far = StoreBuilder(tmp_path / "far")
    info = far.add(far.output_path("far"), {"file": b"far"}, keys=[KEY])
    secret, token = tokens.new("site", ["read"])
    (tmp_path / "tokens").write_text(f"{token}\n")
    (tmp_path / "credentials").write_text(f"harmonia:{secret}\n")
    (tmp_path / "credentials").chmod(0o600)
    private = start(store=tmp_path / "far", settings=f"tokens_path = '{tmp_path}/tokens'")
    server = begin(entry(private, credentials_file=f"{tmp_path}/credentials"))
    answer = server.get(f"/{info.path.hash_part}.narinfo")
    assert server.get("/" + fields(answer)["URL"]).status == 200
    stranger = begin(entry(private), up=False)
    stranger.wait_for_log("cannot be used: status 401")
    assert stranger.get(f"/{info.path.hash_part}.narinfo").status == 404


def all_up(server: Server, count: int) -> bool:
    return server.get("/health?verbose").text.count(": up\n") == count


@pytest.mark.parametrize(("size", "upstreams"), [(2, 1), (3, 1), (3, 2), (4, 3)])
def test_requests_do_not_loop(
    start: Start, store: StoreBuilder, tmp_path: Path, new_port: Callable[[], int], size: int, upstreams: int
) -> None:
    """Each server has the next servers as upstreams: one in a ring, all others in a mesh."""
    store.add_text("here", b"here\n")
    far = StoreBuilder(tmp_path / "far")
    info = far.add(far.output_path("far"), {"file": b"far"}, keys=[KEY])
    ports = [new_port() for _ in range(size)]
    servers = []
    for number, port in enumerate(ports):
        others = [
            f"[[upstream]]\nurl = 'http://127.0.0.1:{ports[(number + each) % size]}'\ntimeout = 600.0\n"
            for each in range(1, upstreams + 1)
        ]
        where = tmp_path / ("far" if number == size - 1 else "store")
        settings = "access_log = true\nupstream_timeout = 600.0\n" + "".join(others)
        servers.append(start(store=where, bind=f"127.0.0.1:{port}", settings=settings, program=PROBING))
    for server in servers:
        wait_until(partial(all_up, server, upstreams))
    answer = servers[0].get(f"/{info.path.hash_part}.narinfo")
    assert answer.status == 200
    assert servers[0].get(f"/{'0' * 32}.narinfo").status == 404
    for server in servers:
        server.stop()
    asked = [line for server in servers for line in server.log if f"{'0' * 32}.narinfo" in line and "' 404 " in line]
    assert len(asked) == size


# TLS


@needs("openssl")
def test_upstream_with_an_untrusted_certificate_is_not_used(begin: Start, start: Start, tmp_path: Path) -> None:
    far = StoreBuilder(tmp_path / "far")
    info = far.add(far.output_path("far"), {"file": b"far"}, keys=[KEY])
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=cache -keyout key.pem"
    )
    command += " -out cert.pem -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "key.pem").chmod(0o600)
    tls = f"tls_cert_path = '{tmp_path}/cert.pem'\ntls_key_path = '{tmp_path}/key.pem'"
    secured = start(store=tmp_path / "far", settings=tls)
    trusting = begin(entry(secured, ca_file=f"{tmp_path}/cert.pem"))
    answer = trusting.get(f"/{info.path.hash_part}.narinfo")
    assert trusting.get("/" + fields(answer)["URL"]).status == 200
    careful = begin(entry(secured), up=False)
    careful.wait_for_log("cannot be used")
    assert careful.get(f"/{info.path.hash_part}.narinfo").status == 404
