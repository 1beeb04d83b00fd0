"""What is not in the store comes from other caches: whole, checked, once; and none of them ever does any harm."""

import gzip
import hashlib
import http.client
import json
import lzma
import os
import random
import re
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from support.running import HARMONIA, NO_CACHE, Answer, Server, open_files, patched, peak_bytes, unpacked, wait_until
from support.upstream_paths import KEY, PACK, Remote, entry, fields, make_path, narinfo_path
from support.upstream_server import UpstreamServer, chunked, cut, drip, hang, reset, status

Start = Callable[..., Server]

PATIENT = "upstream_timeout = 20.0"  # so that a busy machine makes nothing a miss
IMPATIENT = "upstream_timeout = 0.5"
PROBING = patched("from harmonia.upstream import breaker; breaker.LONGEST_DELAY = 0.2")  # those that are not there yet
SLOW: dict[str, Any] = {"timeout": 600.0, "connect_timeout": 600.0}
"""An upstream whose questions end by nothing but `upstream_timeout`: a client that waits for them fails its test."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UpstreamServer, Server]]:
    """An upstream, and a server that has it, for all tests that want no more."""
    directory = tmp_path_factory.mktemp("shared-upstream")
    StoreBuilder(directory / "store").add_text("here", b"here\n")
    with UpstreamServer() as upstream:
        # What one test has logged, the next one may wait for.
        unbounded = patched("from harmonia.upstream import refusals; refusals._LOG_INTERVAL_S = 0.0")
        server = Server(directory / "server", directory / "store", f"{PATIENT}\n{entry(upstream)}", program=unbounded)
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
    """A server with these upstreams, of a store that has something else; the one that is shared where that will do.

    It does not for an upstream that misbehaves: what becomes of that would come to pass in the next test.
    """

    def begin(*entries: str, settings: str = PATIENT, up: bool = True, **options: object) -> Server:
        plain = entries == (entry(shared[0]),) and up and (settings, options) == (PATIENT, {})
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


def is_kept(server: Server, path: Remote) -> bool:
    return bool(names := cached(server, path)) and not names[0].endswith(".growing")


# What is there


@pytest.mark.parametrize("compression", PACK)
def test_a_path_comes_as_the_upstream_has_it(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, compression: str
) -> None:
    path = make_path(tmp_path / "elsewhere", compression=compression)
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = begin(entry(upstream))
    said = server.get(narinfo_path(path))
    assert said.status == 200
    told = fields(Answer(200, {}, upstream.files[narinfo_path(path)]))
    url = fields(said)["URL"]
    assert fields(said) == told | {"URL": url}
    assert url.startswith("upstream/")
    assert server.head(narinfo_path(path)).headers == said.headers

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
def test_what_is_not_compressed_has_the_size_of_its_nar(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, kept: bool
) -> None:
    """Also where the upstream tells of no size but that, as nix-serve does."""
    path = make_path(tmp_path / "elsewhere", compression="none")
    upstream.add(path.info, path.file, NarFile(path.nar.url, "none"), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream), settings=f"{PATIENT}\ncache_size = '{'1G' if kept else '1K'}'")
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    assert server.head(url).headers["content-length"] == str(len(path.file))
    assert upstream.asked[f"HEAD /{path.nar.url}"] == 0
    part = server.get(url, {"Range": "bytes=1000-1999"})
    assert (part.status, part.body) == (206, path.file[1000:2000])
    answer = server.get(url)
    assert (answer.body, answer.headers["content-length"]) == (path.file, str(len(path.file)))


def test_json_too(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    text, answer = server.get(narinfo_path(there)), server.get(f"{narinfo_path(there)}?json")
    assert answer.headers["cache-control"] == text.headers["cache-control"]
    told = json.loads(answer.body)
    assert (told["path"], told["url"]) == (there.info.path, fields(text)["URL"])
    assert told["downloadSize"] == there.nar.file_size


def test_a_local_path_asks_nobody(begin: Start, upstream: UpstreamServer, store: StoreBuilder) -> None:
    info = store.add_text("local", b"local\n")
    upstream.behaviours[r"narinfo|\.ls|nar"] = hang
    server = begin(entry(upstream), workers=1)
    for path in (f"/{info.path.hash_part}.narinfo", f"/{info.path.hash_part}.ls"):
        assert server.get(path).status == server.head(path).status == 200
    assert set(upstream.asked) == {"GET /nix-cache-info"}


def test_the_url_holds_after_a_restart_and_without_the_upstream(
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


def test_in_redirect_mode_the_url_leads_to_the_upstream(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream, mode="redirect"))
    assert fields(server.get(narinfo_path(there)))["URL"] == f"{upstream.url}/{there.nar.url}"


@pytest.mark.parametrize("sign", [False, True])
def test_our_key_is_added_where_that_is_wanted(
    begin: Start, upstream: UpstreamServer, there: Remote, tmp_path: Path, *, sign: bool
) -> None:
    ours = SecretKey.generate("ours-1")
    (tmp_path / "key").write_text(ours.export())
    (tmp_path / "key").chmod(0o600)
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(
        entry(upstream, sign=sign) if sign else entry(upstream),
        settings=f"{PATIENT}\nsign_key_paths = ['{tmp_path}/key']",
    )
    text = server.get(narinfo_path(there)).text
    sigs = {line.removeprefix("Sig: ") for line in text.splitlines() if line.startswith("Sig: ")}
    fingerprint = there.info.fingerprint("/nix/store")
    assert sigs == {KEY.sign(fingerprint), *([ours.sign(fingerprint)] if sign else [])}
    page = server.get("/").text
    assert str(ours.public_key) in page
    assert (str(KEY.public_key) in page) is not sign


@pytest.mark.parametrize("keys", [(), (SecretKey.generate("upstream-1"),), (SecretKey.generate("other-1"),)])
def test_what_is_not_signed_by_a_known_key_is_not_passed_on(
    begin: Start, upstream: UpstreamServer, there: Remote, keys: tuple[SecretKey, ...]
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=keys)
    server = begin(entry(upstream))
    assert server.get(narinfo_path(there)).status == server.head(narinfo_path(there)).status == 404
    server.wait_for_log("no signature by any of public_keys")
    assert upstream.asked[f"GET {narinfo_path(there)}"] == 1  # a no is remembered, too


def test_without_public_keys_all_is_passed_on(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar)
    server = begin(entry(upstream, verify=False))
    assert server.get(narinfo_path(there)).status == 200


def test_a_narinfo_of_another_path_is_none(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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
def test_a_url_of_another_kind_is_not_followed(
    begin: Start, upstream: UpstreamServer, there: Remote, url: str, status: int
) -> None:
    upstream.add(there.info, there.file, NarFile(url, "xz"), keys=(KEY,))
    assert begin(entry(upstream)).get(narinfo_path(there)).status == status


@pytest.mark.parametrize("verify", [False, True])
def test_only_what_is_signed_leads_to_another_host(
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
def test_nothing_else_of_the_upstream_can_be_had(
    begin: Start, upstream: UpstreamServer, there: Remote, name: str
) -> None:
    upstream.files |= {"/secret": b"secret", "/nar/../secret": b"secret"}
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    base = fields(server.get(narinfo_path(there)))["URL"].rpartition("/")[0]
    before = sum(upstream.asked.values())
    assert server.get(f"/{base}/{name}").status == 404
    assert sum(upstream.asked.values()) == before


# One question, one fetch


def test_a_hundred_clients_of_a_cold_nar_are_one_fetch(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    path = make_path(tmp_path / "elsewhere", size=4 << 20, compression="zstd")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = begin(entry(upstream), workers=2)

    def fetch(_: int) -> bytes:
        return server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body

    with ThreadPoolExecutor(100) as threads:
        bodies = list(threads.map(fetch, range(100)))
    assert all(body == path.file for body in bodies)
    assert upstream.asked[f"GET /{path.nar.url}"] == 1
    # Once for each worker, and once more for a NAR whose narinfo the other worker gave.
    assert upstream.asked[f"GET {narinfo_path(path)}"] <= 4


def test_concurrent_questions_are_one(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))

    def slow(handler: upstream_server.Handler) -> None:
        time.sleep(0.3)
        handler.serve()

    upstream.behaviours["narinfo"] = slow
    server = begin(entry(upstream))
    with ThreadPoolExecutor(20) as threads:
        assert {answer.status for answer in threads.map(lambda _: server.get(narinfo_path(there)), range(20))} == {200}
    assert upstream.asked[f"GET {narinfo_path(there)}"] == 1


def test_answers_are_remembered_for_a_while(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    brief = "from harmonia.upstream import lookup\nlookup._NEGATIVE_TTL_S = lookup.POSITIVE_TTL_S = 1.0"
    server = begin(entry(upstream), program=patched(brief))
    where = narinfo_path(there)
    assert server.get(where).status == 404
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    assert server.get(where).status == 404
    wait_until(lambda: server.get(where).status == 200)
    del upstream.files[where]
    assert server.get(where).status == 200
    wait_until(lambda: server.get(where).status == 404)
    assert upstream.asked[f"GET {where}"] == 3


def test_the_cache_is_not_needed(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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
def test_a_wrong_nar_never_ends_even_without_the_cache(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, compression: str
) -> None:
    path = make_path(tmp_path / "elsewhere", compression=compression)
    wrong = bytes(len(path.file))
    nar = replace(path.nar, file_hash=None) if compression == "none" else path.nar
    upstream.add(path.info, wrong, nar, keys=(KEY,))
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    assert aborted(server, "/" + fields(server.get(narinfo_path(path)))["URL"])


def test_what_another_worker_took_back_is_not_passed_on_unchecked(
    begin: Start, upstream: UpstreamServer, there: Remote, tmp_path: Path
) -> None:
    """The other worker is ourselves here, with the right to fill the file."""
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
def test_a_whole_nar_comes_from_another_host_and_a_part_that_nothing_can_check_does_not(
    begin: Start, upstream: UpstreamServer, there: Remote, file_hash: str | None
) -> None:
    """An upstream could have us fetch a part from our own network. A whole NAR is checked by its NarHash."""
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


def test_a_part_of_an_encoded_nar_comes_from_no_other_host(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    """A part of encoded bytes is of no use, so the whole is asked for: but only a part of it is passed on."""

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
def test_a_nar_that_nothing_can_check_is_not_fetched(
    begin: Start, upstream: UpstreamServer, there: Remote, cache_size: str
) -> None:
    """With mode = "redirect", clients fetch it from the upstream. A name that they make up for it here is 404."""
    nar = replace(there.nar, compression="lz4")
    upstream.add(there.info, there.file, nar, keys=(KEY,))
    server = begin(entry(upstream, mode="redirect"), settings=f"{PATIENT}\ncache_size = '{cache_size}'")
    assert fields(server.get(narinfo_path(there)))["URL"] == f"{upstream.url}/{nar.url}"
    hashes = (base32.encode(each) for each in (there.info.nar_hash, there.nar.file_hash or b""))
    name = f"{there.info.path.hash_part}-{'-'.join(hashes)}.nar"
    assert server.get(f"/upstream/{name}.lz4").status == 404
    assert not upstream.asked[f"GET /{nar.url}"]


def test_a_part_that_nobody_asked_for_is_not_passed_on(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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


def test_a_slow_client_slows_the_upstream_where_nothing_is_kept(
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


def test_what_is_too_large_to_keep_goes_on_without_the_cache(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    """In its midst: nobody said before how large it is."""
    path = make_path(tmp_path / "elsewhere", size=2 << 20)
    upstream.add(path.info, path.file, NarFile(path.nar.url, "xz"), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream), settings=f"{PATIENT}\ncache_size = '256K'")
    assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
    assert cached(server, path) == []


@pytest.mark.parametrize(("version", "headers"), [("1.0", {}), ("1.1", {"Range": "bytes=10-"})])
def test_what_is_too_large_to_keep_is_measured_for_who_must_know_its_length(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, version: str, headers: dict[str, str]
) -> None:
    path = make_path(tmp_path / "elsewhere", size=2 << 20)
    upstream.add(path.info, path.file, replace(path.nar, file_size=None), keys=(KEY,))
    upstream.behaviours["^/nar/"] = chunked
    server = begin(entry(upstream), settings=f"{PATIENT}\ncache_size = '256K'")
    url = fields(server.get(narinfo_path(path)))["URL"]
    answer = server.request("GET", f"/{url}", headers, version=version)
    assert answer.body == path.file[10 if headers else 0 :]


def test_a_url_that_names_no_file_is_not_resumable(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    """The upstream may compress the NAR anew: a part of that could not go on with what the client has."""
    path = make_path(tmp_path / "elsewhere")
    upstream.add(path.info, path.file, replace(path.nar, file_size=None, file_hash=None), keys=(KEY,))
    server = begin(entry(upstream))
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    for _ in range(2):  # on its way, and kept
        whole = server.get(url)
        assert (whole.status, whole.body) == (200, path.file)
        assert whole.headers["accept-ranges"] == "none"
        assert whole.headers["cache-control"] == "no-store, no-transform"
        assert server.get(url, {"Range": "bytes=10-"}).status == 404


def test_fetches_are_bounded(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    paths = [make_path(tmp_path / f"elsewhere-{n}", size=64 << 10, compression="none") for n in range(6)]
    for path in paths:
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    upstream.behaviours["^/nar/"] = drip(8192, 0.2)
    server = begin(
        entry(upstream), workers=1, program=patched("from harmonia.upstream import fetch; fetch._MAX_FETCHES = 2")
    )
    urls = [fields(server.get(narinfo_path(path)))["URL"] for path in paths]
    for url in urls:
        with server.connect() as connection:
            connection.sendall(f"GET /{url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    assert sum(bool(cached(server, path)) for path in paths) == 2
    assert server.get(f"/{urls[0]}").body == paths[0].file  # with those who fetch it already
    assert server.get(f"/{urls[-1]}").body == paths[-1].file


@pytest.mark.parametrize("name", ["x" * 8100, "\x01", f"harmonia-{'0' * 8000}"])
def test_what_an_upstream_calls_itself_harms_no_other(
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


def test_a_worker_that_dies_takes_no_other_download_with_it(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    path = make_path(tmp_path / "elsewhere", size=8 << 20, compression="none")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = drip(1 << 18, 0.2)
    server = begin(entry(upstream), workers=2)
    url = "/" + fields(server.get(narinfo_path(path)))["URL"]
    filler = None

    def fetch() -> bool:
        return not aborted(server, url)

    def reads_it(worker: int) -> bool:
        return any(os.path.basename(name) in cached(server, path) for name in open_files(worker))

    with ThreadPoolExecutor(60) as threads:
        downloads = []
        while not all(map(reads_it, server.workers)):
            downloads.append(threads.submit(fetch))
            time.sleep(0.03)
        growing = (server.cache_dir / "nar" / cached(server, path)[0]).stat()
        for worker in server.workers:
            held = [f.read_text() for f in Path(f"/proc/{worker}/fdinfo").iterdir()]
            if any("FLOCK" in text and f":{growing.st_ino} " in text for text in held):
                filler = worker
        assert filler is not None
        upstream.behaviours.clear()
        os.kill(filler, signal.SIGKILL)
        outcomes = [download.result() for download in downloads]
    assert True in outcomes  # those of the other worker
    assert server.get(url).body == path.file


def test_a_connection_that_was_idle_for_long_serves_again(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
    """Longer than an answer may take: nobody has asked anything meanwhile."""
    server = begin(entry(upstream, timeout=0.3))
    for number in range(3):
        path = make_path(tmp_path / str(number))
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
        assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
        time.sleep(0.5)


def test_two_paths_of_the_same_content_are_one_fetch(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    alike = replace(there.info, path=StorePath("9" + there.info.path[1:]))
    for info in (there.info, alike):
        upstream.add(info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    for info in (there.info, alike):
        url = fields(server.get(f"/{info.path.hash_part}.narinfo"))["URL"]
        assert server.get(f"/{url}").body == there.file
    assert upstream.asked[f"GET /{there.nar.url}"] == 1


# Upstreams that do wrong


def aborted(server: Server, url: str) -> bool:
    try:
        return server.get(url).status != 200
    except (http.client.IncompleteRead, ConnectionError):
        return True


@pytest.mark.parametrize("compression", ["xz", "none"])
@pytest.mark.parametrize("with_hash", [True, False])
def test_wrong_bytes_never_arrive_whole_nor_stay(
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


def test_a_right_file_hash_hides_no_wrong_nar_hash(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """Only the NarHash is signed. The first client gets what the upstream has, and refuses it; nobody else gets it."""
    evil = lzma.compress(bytes(len(there.content)))
    nar = NarFile("nar/evil.nar.xz", "xz", hashlib.sha256(evil).digest(), len(evil))
    upstream.add(there.info, evil, nar, keys=(KEY,))
    server = begin(entry(upstream))
    aborted(server, "/" + fields(server.get(narinfo_path(there)))["URL"])
    server.wait_for_log("the unpacked NAR has another NarHash")
    wait_until(lambda: cached(server, there) == [])


def test_nobody_waits_for_the_check_of_what_the_file_hash_vouches_for(
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
def test_a_bomb_is_defused(begin: Start, upstream: UpstreamServer, there: Remote, compression: str) -> None:
    bomb = PACK[compression][1](bytes(16 << 20))
    upstream.add(there.info, bomb, NarFile("nar/bomb", compression), keys=(KEY,))
    server = begin(entry(upstream))
    assert aborted(server, "/" + fields(server.get(narinfo_path(there)))["URL"])
    server.wait_for_log("the unpacked NAR is longer than its NarSize")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "stale",
    [
        {"file_hash": bytes(32)},
        {"file_size": 1},
        {"file_size": 1 << 62},
        {"file_hash": bytes(32), "file_size": 100_000},
        {"file_size": 0},
        {"file_hash": None, "file_size": 5},
    ],
    ids=str,
)
def test_a_stale_file_hash_or_size_does_not_matter(
    begin: Start, upstream: UpstreamServer, there: Remote, stale: dict[str, Any], *, kept: bool, workers: int
) -> None:
    """Only the NarHash and the NarSize are signed: caches that name files by NarHash pack them anew."""
    upstream.add(there.info, there.file, replace(there.nar, **stale), keys=(KEY,))
    server = begin(entry(upstream), workers=workers, settings=f"{PATIENT}\ncache_size = '{'1G' if kept else '1K'}'")
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    head = server.head(url)
    assert (head.status, head.headers["content-length"]) == (200, str(len(there.file)))
    for _ in range(2 * workers):
        answer = server.get(url)
        assert (answer.status, answer.body) == (200, there.file)
        # A worker does not know the length of what another one is still fetching.
        assert answer.headers.get("content-length", str(len(there.file))) == str(len(there.file))
    part = server.get(url, {"Range": f"bytes=1000-{len(there.file) - 1}"})
    # Without a FileHash, the URL does not name the bytes that a part would be of.
    names_bytes = stale.get("file_hash", there.nar.file_hash) is not None
    assert (part.status, part.body) == ((206, there.file[1000:]) if names_bytes else (404, b"Not Found\n"))
    assert server.get(url).body == there.file
    assert server.get(narinfo_path(there)).status == 200


def test_a_narinfo_tells_of_the_file_that_is_kept(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """What has proved stale is not passed on, though the URL stays the same."""
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
def test_a_narinfo_is_404_after_its_nar_could_not_be_had(
    begin: Start, upstream: UpstreamServer, there: Remote, fault: str
) -> None:
    """In all workers, so that clients ask other caches; and 200 again once it could."""
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


def test_another_upstream_tells_of_a_path_whose_nar_one_has_lost(
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
def test_a_nar_that_cannot_be_checked_has_no_narinfo(
    begin: Start, upstream: UpstreamServer, there: Remote, compression: str
) -> None:
    upstream.add(there.info, there.file, replace(there.nar, compression=compression), keys=(KEY,))
    server = begin(entry(upstream))
    assert server.get(narinfo_path(there)).status == 404
    server.wait_for_log(f"cannot verify NARs with the compression {compression}; .*mode = 'redirect'")
    redirecting = begin(entry(upstream, mode="redirect"))
    assert fields(redirecting.get(narinfo_path(there)))["Compression"] == compression


def encoded(*codings: str, name: str = "Content-Encoding") -> upstream_server.Behaviour:
    """The file in these content codings, as a static cache has stored it."""

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
@pytest.mark.parametrize(
    "codings", [["br"], ["GZIP"], ["x-gzip"], ["deflate"], ["zstd"], ["xz"], ["gzip", "br"]], ids=str
)
def test_answers_come_in_any_content_coding(
    begin: Start, upstream: UpstreamServer, there: Remote, codings: list[str], *, kept: bool
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.files[f"/{there.info.path.hash_part}.ls"] = b'{"version":1}'
    upstream.behaviours["^/(nar/.*|.*narinfo|.*ls)$"] = encoded(*codings)
    server = begin(entry(upstream), settings=f"{PATIENT}\ncache_size = '{'1G' if kept else '1K'}'")
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
def test_a_status_that_nix_takes_for_200_is_taken(
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
def test_an_unknown_content_coding_is_no_answer(
    begin: Start, upstream: UpstreamServer, there: Remote, where: str
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours[where] = lambda handler: handler.answer(
        200, handler.server.files[handler.path], {"Content-Encoding": "rot13"}
    )
    server = begin(entry(upstream))
    said = server.get(narinfo_path(there))
    if said.status == 200:
        assert server.get(f"/{fields(said)['URL']}").status == 404
        server.wait_for_log("its Content-Encoding 'rot13' is unknown")
        said = server.get(narinfo_path(there))
    assert said.status == 404


def test_a_length_of_the_answer_that_is_wrong_breaks_off(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["^/nar/"] = lambda handler: handler.answer(200, handler.server.files[handler.path][:-1])
    server = begin(entry(upstream))
    assert aborted(server, "/" + fields(server.get(narinfo_path(there)))["URL"])
    wait_until(lambda: cached(server, there) == [])


@pytest.mark.parametrize("status_", [404, 500, 503])
def test_a_nar_that_is_not_there_is_a_plain_miss(
    begin: Start, upstream: UpstreamServer, there: Remote, status_: int
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = status(status_)
    server = begin(entry(upstream))
    answer = server.get("/" + fields(server.get(narinfo_path(there)))["URL"])
    assert (answer.status, answer.headers["cache-control"]) == (404, "no-store")
    assert cached(server, there) == []


@pytest.mark.parametrize("fault", ["hang", "reset", "loop", "nowhere"])
def test_a_nar_that_does_not_come_is_a_plain_miss(
    begin: Start, upstream: UpstreamServer, there: Remote, fault: str
) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = FAULTS[fault]
    # Bounds other than 1 s and 1 s + 1 s, such as those of the defaults, never end.
    bounded = patched("import asyncio as a\nof = a.timeout\na.timeout = lambda s: of(s if s in (1, 2) else None)")
    server = begin(entry(upstream, timeout=1.0, connect_timeout=1.0), program=bounded)
    assert server.get("/" + fields(server.get(narinfo_path(there)))["URL"]).status == 404


def test_a_nar_that_does_not_come_when_nobody_waits_for_it_any_longer_is_no_error_of_ours(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    def slow_reset(handler: upstream_server.Handler) -> None:
        time.sleep(0.5)
        reset(handler)

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = slow_reset
    server = begin(entry(upstream), cache_dir=NO_CACHE)
    url = fields(server.get(narinfo_path(there)))["URL"]
    with server.connect() as connection:
        connection.sendall(f"GET /{url} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        wait_until(lambda: upstream.asked[f"GET /{there.nar.url}"] == 1)
    time.sleep(1)
    assert server.stop() == 0
    assert not [line for line in server.log if "never retrieved" in line]


def test_a_nar_that_drips_comes_nevertheless(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    """It takes longer than an answer may; only no pause does."""
    path = make_path(tmp_path / "elsewhere", size=2000)
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    upstream.behaviours["/nar/"] = drip(len(path.file) // 10, 0.2)
    server = begin(entry(upstream, timeout=1.5))
    assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file


def test_a_disk_that_is_slow_to_sync_keeps_nobody_waiting(
    begin: Start, upstream: UpstreamServer, tmp_path: Path
) -> None:
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
def test_a_disk_that_fills_up_stops_no_download(begin: Start, upstream: UpstreamServer, tmp_path: Path) -> None:
    path = make_path(tmp_path / "elsewhere", size=16 << 20, compression="none")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    cache_dir = tmp_path / "small"
    cache_dir.mkdir()
    mount = f"mount -t tmpfs -o size=4m tmpfs '{cache_dir}' && exec \"$@\""
    program = ["unshare", "--mount", "sh", "-c", mount, "sh", *HARMONIA]
    server = begin(entry(upstream), settings=f"{PATIENT}\ncache_size = '1G'", cache_dir=cache_dir, program=program)
    for _ in range(2):
        assert server.get("/" + fields(server.get(narinfo_path(path)))["URL"]).body == path.file
    assert len([line for line in server.log if "cannot write to the cache" in line]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_nar_that_breaks_off_is_resumed(begin: Start, upstream: UpstreamServer, tmp_path: Path, seed: int) -> None:
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
        assert 0 <= reached + sent - position <= 2 * 256 * 1024  # of what had arrived, a buffer may not be taken yet
        reached = position


def test_one_that_cannot_be_resumed_breaks_our_transfer(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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
def test_a_miss_is_answered_within_the_bound(begin: Start, upstream: UpstreamServer, there: Remote, fault: str) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours["narinfo"] = FAULTS[fault]
    server = begin(entry(upstream, **SLOW), settings=IMPATIENT)
    for method in ("GET", "HEAD"):
        answer = server.request(method, narinfo_path(there))
        assert (answer.status, answer.headers["cache-control"]) == (404, "no-store")


def test_dead_upstreams_delay_neither_start_nor_misses(begin: Start, store: StoreBuilder) -> None:
    here = store.add_text("more", b"more\n")
    dead = ["[[upstream]]\nurl = 'http://127.0.0.1:1'\n"]
    with UpstreamServer() as silent:
        silent.behaviours["."] = hang
        server = begin(*dead, entry(silent, **SLOW), settings=IMPATIENT, up=False)
        for number in range(3):
            assert server.get(f"/{number:032}.narinfo").status == 404
        assert server.get(f"/{here.path.hash_part}.narinfo").status == 200
        assert server.get("/health").text == "OK\n"
        assert server.get("/health?verbose").text.count(": down\n") == 2


def test_one_that_fails_is_left_alone_and_found_again(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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
def test_one_that_is_slow_keeps_nobody_waiting_for_long(
    begin: Start, upstream: UpstreamServer, what: str, fault: upstream_server.Behaviour
) -> None:
    names = [f"/{number:032}.narinfo" if what == "narinfo" else f"/log/{number:032}-x.drv" for number in range(4)]
    upstream.files |= dict.fromkeys(names, b"x" * 1000)
    server = begin(entry(upstream), settings=IMPATIENT)
    upstream.behaviours = {what: fault, "cache-info": hang}
    with ThreadPoolExecutor(3) as threads:
        assert {answer.status for answer in threads.map(server.get, names[:3])} == {404}
    wait_until(lambda: ": down\n" in server.get("/health?verbose").text)
    server.wait_for_log("is down: late response; it is probed until it answers")
    assert server.get(names[3]).status == 404
    assert not upstream.asked[f"GET {names[3]}"]


def test_one_that_is_late_and_then_fails_has_failed_once(begin: Start, upstream: UpstreamServer) -> None:
    def late_and_gone(handler: upstream_server.Handler) -> None:
        time.sleep(0.8)
        reset(handler)

    server = begin(entry(upstream), settings=IMPATIENT, workers=1)
    upstream.behaviours["narinfo"] = late_and_gone
    for number in range(2):
        assert server.get(f"/{number:032}.narinfo").status == 404
    time.sleep(0.8)
    assert re.search(r'harmonia_upstream_failures_total\{upstream="[^"]+"\} 2.0', server.get("/metrics").text)
    assert all_up(server, 1)


def test_who_has_much_to_answer_is_not_taken_for_slow(begin: Start, upstream: UpstreamServer) -> None:
    """Questions wait for their turn, longer than an answer may take."""
    upstream.behaviours["narinfo"] = late
    one_at_a_time = patched("from harmonia.upstream import client; client._MAX_SMALL_REQUESTS = 1")
    server = begin(entry(upstream), settings="upstream_timeout = 2.0", program=one_at_a_time)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda number: server.get(f"/{number:032}.narinfo"), range(6)))
    wait_until(lambda: sum("narinfo" in path for path in upstream.asked) == 6)
    assert all_up(server, 1)
    assert "left alone" not in "".join(server.log)


def test_long_answers_are_in_memory_a_few_at_a_time(begin: Start, upstream: UpstreamServer) -> None:
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


def test_questions_that_nobody_waits_for_hold_up_no_other(
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
    time.sleep(1)
    assert server.get(narinfo_path(there)).status == 200
    assert "left alone" not in "".join(server.log)


def wrong(handler: upstream_server.Handler) -> None:
    content = bytearray(handler.server.files[handler.path])
    content[len(content) // 2] ^= 1
    handler.answer(200, bytes(content), {"Accept-Ranges": "bytes"})


def short(handler: upstream_server.Handler) -> None:
    handler.answer(200, handler.server.files[handler.path][:-1])


@pytest.mark.parametrize("kept", [True, False])
def test_whatever_an_upstream_does_no_whole_nar_is_wrong(
    begin: Start, upstream: UpstreamServer, tmp_path: Path, *, kept: bool
) -> None:
    chance = random.Random(1)

    def misbehave(handler: upstream_server.Handler) -> None:
        size = len(handler.server.files[handler.path])
        faults = [late, wrong, short, chunked, status(500), status(302, Location=handler.path)]
        chance.choice([*faults, *[cut(chance.randrange(1, size))] * 3, *[upstream_server.Handler.serve] * 6])(handler)

    paths = [make_path(tmp_path / str(n), size=20_000 << n, compression=name) for n, name in enumerate(PACK)]
    for path in paths:
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    cache_dir = tmp_path / "cache" if kept else NO_CACHE
    server = begin(entry(upstream, timeout=0.5), workers=2, cache_dir=cache_dir, program=PROBING)
    urls = ["/" + fields(server.get(narinfo_path(path)))["URL"] for path in paths]
    upstream.behaviours["^/nar/"] = misbehave
    end = time.monotonic() + 3

    def arrives(which: int) -> bool:
        """Return whether the NAR arrives complete."""
        try:
            answer = server.get(urls[which])
        except (http.client.IncompleteRead, ConnectionError):
            return False
        assert answer.status == 404 or (answer.status == 200 and answer.body == paths[which].file)
        return answer.status == 200

    def ask(number: int) -> int:
        """Return how often the NAR arrives complete. Remove it from the cache each time."""
        which = number % len(paths)
        whole = 0
        while time.monotonic() < end:
            for name in cached(server, paths[which]):
                if not name.endswith(".growing"):
                    (cache_dir / "nar" / name).unlink(missing_ok=True)
            whole += arrives(which)
        return whole

    with ThreadPoolExecutor(2 * len(paths)) as threads:
        assert sum(threads.map(ask, range(2 * len(paths)))) > 0
    upstream.behaviours.clear()
    for which in range(len(paths)):  # once is enough: the other worker may pause the upstream for longer
        wait_until(partial(arrives, which))


def test_a_cache_of_another_store_is_not_asked(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.files["/nix-cache-info"] = b"StoreDir: /gnu/store\n"
    server = begin(entry(upstream), up=False)
    server.wait_for_log("its store directory is '/gnu/store', not /nix/store")
    assert server.get(narinfo_path(there)).status == 404


# Several upstreams


def test_the_lowest_priority_is_asked_first(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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


def test_of_equal_ones_the_fastest_wins(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    with UpstreamServer() as slow:
        for each in (upstream, slow):
            each.add(there.info, there.file, there.nar, keys=(KEY,))
        slow.behaviours["narinfo"] = hang
        server = begin(entry(slow, **SLOW), entry(upstream), settings="upstream_timeout = 600.0")
        assert server.get(narinfo_path(there)).status == 200


def test_a_slow_one_does_not_hold_up_the_next(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    with UpstreamServer() as slow:
        upstream.add(there.info, there.file, there.nar, keys=(KEY,))
        slow.behaviours["narinfo"] = hang
        server = begin(entry(slow, priority=1), entry(upstream, priority=2))
        assert server.get(narinfo_path(there)).status == 200


def test_another_upstream_steps_in_for_one_that_has_lost_a_nar(
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


def test_a_nar_that_does_not_come_leaves_no_file_open(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    def late_and_gone(handler: upstream_server.Handler) -> None:
        time.sleep(0.5)
        handler.answer(404, b"")

    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    upstream.behaviours[r"^/nar/"] = late_and_gone
    server = begin(entry(upstream), workers=1)
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    with ThreadPoolExecutor(30) as threads:
        assert {answer.status for answer in threads.map(server.get, [url] * 30)} == {404}
    assert not [name for name in open_files(server.workers[0]) if ".growing" in name]


def test_a_nar_is_the_same_whichever_upstream_has_it(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """Also of one that is gone from the settings: its clients remember the URL for a month."""
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


def test_without_a_file_hash_no_other_upstream_steps_in(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    """Its file may have other bytes, with which a download that is resumed must not go on."""
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
def test_credentials_go_to_the_upstream_and_nowhere_else(
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


def test_what_a_client_says_of_itself_goes_no_further(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
    upstream.add(there.info, there.file, there.nar, keys=(KEY,))
    server = begin(entry(upstream))
    said = {"Authorization": "Bearer sesame", "Cookie": "sesame", "X-Forwarded-For": "sesame", "User-Agent": "sesame"}
    url = fields(server.get(narinfo_path(there), said))["URL"]
    for path in (f"/{url}", f"/{'1' * 32}.ls", f"/log/{'1' * 32}-x.drv"):
        server.get(path, said)
    assert len(upstream.headers) >= 4
    assert "sesame" not in str(upstream.headers)


def test_only_a_nar_is_fetched_from_where_an_upstream_redirects(
    begin: Start, upstream: UpstreamServer, there: Remote
) -> None:
    with UpstreamServer() as other:
        other.add(there.info, there.file, there.nar, keys=(KEY,))
        drv = "8" * 32 + "-there.drv"
        other.files[f"/log/{drv}"] = b"secret"
        # The NAR that a debuginfo file leads to is checked by nobody.
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


def test_a_nar_comes_from_where_an_upstream_redirects_but_not_from_outside_to_inside(
    tmp_path: Path, begin: Start, upstream: UpstreamServer
) -> None:
    """127.0.0.1 is in our network, unless we say that it is not."""
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


# The other resources


def test_logs_listings_and_the_like_fall_through(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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
def test_what_is_not_what_they_should_say_is_not_passed_on(begin: Start, upstream: UpstreamServer, text: bytes) -> None:
    realisation, build_id = "sha256:" + "0" * 64 + "!out.doi", "ab" * 20
    upstream.files |= {f"/realisations/{realisation}": text, f"/debuginfo/{build_id}.debug": text}
    server = begin(entry(upstream))
    for path in (f"/realisations/{realisation}", f"/debuginfo/{build_id}"):
        assert server.get(path).status == 404
    assert not [line for line in server.log if "Traceback" in line]


def test_a_log_of_unknown_length_is_measured_for_who_must_know_it(begin: Start, upstream: UpstreamServer) -> None:
    log = b"built\n" * 100_000
    where = "/log/" + "0" * 32 + "-there.drv"
    upstream.files[where] = log
    upstream.behaviours["/log/"] = chunked
    server = begin(entry(upstream))
    assert server.get(where).body == log
    old = server.request("GET", where, version="1.0")
    assert (old.body, old.headers["content-length"]) == (log, str(len(log)))
    assert server.get(where, {"Range": "bytes=6-11"}).body == b"built\n"


def test_debug_info_comes_through_a_chain(begin: Start, upstream: UpstreamServer, there: Remote) -> None:
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
def test_their_upstreams_are_bounded_too(begin: Start, upstream: UpstreamServer, fault: str) -> None:
    server = begin(entry(upstream, **SLOW), settings=IMPATIENT)
    upstream.behaviours["."] = FAULTS[fault]
    drv = "0" * 32 + "-there.drv"
    for path in (f"/log/{drv}", f"/{'0' * 32}.ls", f"/build-trace-v2/{drv}/out.doi", f"/debuginfo/{'0' * 40}"):
        assert server.get(path).status == 404


# Harmonias among themselves


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def test_a_chain_of_three(begin: Start, start: Start, tmp_path: Path) -> None:
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


def test_a_private_harmonia_is_asked_with_its_token(begin: Start, start: Start, tmp_path: Path) -> None:
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
def test_a_question_does_not_go_round_in_circles(
    start: Start, store: StoreBuilder, tmp_path: Path, size: int, upstreams: int
) -> None:
    """Each has the next ones for upstreams: one in a ring, all others in a mesh."""
    store.add_text("here", b"here\n")
    far = StoreBuilder(tmp_path / "far")
    info = far.add(far.output_path("far"), {"file": b"far"}, keys=[KEY])
    ports = free_ports(size)
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
def test_only_an_upstream_with_a_certificate_that_is_vouched_for_is_used(
    begin: Start, start: Start, tmp_path: Path
) -> None:
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
