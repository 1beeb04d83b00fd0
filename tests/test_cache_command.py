"""`harmonia cache` lists, shows and removes cached NARs, and breaks no download of a running server."""

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harmonia.cache.disk_cache import CacheEntry
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.store.store import Store
from harmonia.tools.cached_nars import CachedNars
from harmonia.tools.store_builder import StoreBuilder
from support.disk_cache import at, fill
from support.held_compression import held_by
from support.programs import needs_root
from support.running import Server, file_url, read_answer, run, unpacked, wait_until
from support.upstream_paths import KEY, entry, fields, make_path, narinfo_path
from support.upstream_server import UpstreamServer

Start = Callable[..., Server]

NOBODY = 65534
DAY = 86400


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


def cache(server: Server, *arguments: str) -> str:
    """Run the command beside the server. Return its stdout, and fail if it does."""
    done = run("--config", str(server.config), "cache", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_big(store: StoreBuilder, name: str) -> PathInfo:
    return store.add(store.output_path(name), os.urandom(3 << 20))


def fetch(server: Server, info: PathInfo) -> bytes:
    """Download a compressed NAR, and wait until the cache has it."""
    body = server.get(file_url(info)).body
    wait_until(lambda: file_of(server, info).exists())
    return body


def file_of(server: Server, info: PathInfo) -> Path:
    encoding = file_url(info).rpartition("-zstd-")[2].removesuffix(".nar.zst")
    return server.cache_dir / "nar" / f"{base32.encode(info.nar_hash)}.zstd-{encoding}"


def listed(server: Server, *arguments: str) -> list[dict[str, object]]:
    return list(json.loads(cache(server, "ls", "--json", *arguments)))


def test_cached_nars_are_listed_with_path_size_and_last_use(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    old, new = add_big(store, "old"), add_big(store, "new")
    server = start(store=tmp_path / "store")
    for info in (new, old):
        fetch(server, info)
    os.utime(file_of(server, old), (time.time() - 3 * DAY,) * 2)
    first, second = cache(server, "ls").splitlines()
    assert first.split() == ["3.0", "MiB", "3d", "0", f"/nix/store/{old.path}"]  # evicted next
    assert second.split() == ["3.0", "MiB", "now", "0", f"/nix/store/{new.path}"]
    [event] = listed(server, f"/nix/store/{old.path}")
    status = file_of(server, old).stat()
    assert event == {
        "paths": [f"/nix/store/{old.path}"],
        "file": file_of(server, old).name,
        "from": "store",
        "encoding": file_of(server, old).name.partition(".")[2],
        "narHash": f"sha256:{base32.encode(old.nar_hash)}",
        "diskSize": status.st_blocks * 512,
        "lastUsed": int(status.st_mtime),
        "uses": 0,
    }
    server.get(file_url(old))  # refreshes its time
    uses = [(each["paths"], each["uses"]) for each in listed(server)]
    assert uses == [([f"/nix/store/{new.path}"], 0), ([f"/nix/store/{old.path}"], 1)]


def test_details_of_a_path_are_shown(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = add_big(store, "big")
    server = start(store=tmp_path / "store")
    body = fetch(server, info)
    narinfo = dict(line.split(": ", 1) for line in server.get(f"/{info.path.hash_part}.narinfo").text.splitlines())
    [shown] = json.loads(cache(server, "show", "--json", info.path.hash_part))
    assert (shown["fileSize"], shown["fileHash"], shown["narSize"]) == (len(body), narinfo["FileHash"], info.nar_size)
    lines = cache(server, "show", f"/nix/store/{info.path}").splitlines()
    assert f"fileSize: {len(body)}" in lines
    assert f"paths: /nix/store/{info.path}" in lines
    used_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(shown["lastUsed"]))
    assert f"lastUsed: {used_at}" in lines


def test_nar_of_a_collected_path_is_known_by_its_file(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = add_big(store, "big")
    server = start(store=tmp_path / "store")
    fetch(server, info)
    store.delete(info.path)
    [event] = listed(server)
    assert event["paths"] == []
    assert cache(server, "ls").split()[-1] == event["file"]
    cache(server, "rm", str(event["file"]))
    assert listed(server) == []


def test_nar_of_an_upstream_is_known_by_its_path(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_text("here", b"")
    remote = make_path(tmp_path / "remote", size=2 << 20)
    with UpstreamServer() as upstream:
        upstream.add(remote.info, remote.file, remote.nar, (KEY,))
        server = start(store=tmp_path / "store", settings=f"upstream_timeout = 20.0\n{entry(upstream)}")
        url = f"/{fields(server.get(narinfo_path(remote)))['URL']}"
        assert server.get(url).body == remote.file
        wait_until(lambda: list((server.cache_dir / "narinfo").glob("?" * 32)))
        # The client has the NAR before the file is on the disk, and gets its name.
        wait_until(lambda: not list((server.cache_dir / "nar").glob("*.growing")))
        [event] = listed(server, f"/nix/store/{remote.info.path}")
        assert (event["from"], event["encoding"]) == ("upstream", "xz")
        cache(server, "rm", f"/nix/store/{remote.info.path}")
        assert listed(server) == []
        assert server.get(url).body == remote.file  # fetched again


def test_removed_nar_is_compressed_again_to_the_same_bytes(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, other = add_big(store, "big"), add_big(store, "other")
    server = start(store=tmp_path / "store")
    body = fetch(server, info)
    fetch(server, other)
    assert "would be removed" in run("--config", str(server.config), "cache", "rm", "-n", info.path).stderr
    assert file_of(server, info).exists()
    cache(server, "rm", info.path)
    assert not file_of(server, info).exists()
    assert file_of(server, other).exists()
    assert fetch(server, info) == body


def test_download_continues_while_its_file_is_removed(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = store.add(store.output_path("big"), os.urandom(24 << 20))
    server = start(store=tmp_path / "store")
    body = fetch(server, info)
    with server.connect(receive_buffer=8192) as connection:
        connection.sendall(f"GET {file_url(info)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        assert connection.recv(12, 2) == b"HTTP/1.1 200"  # MSG_PEEK: most of the body waits for this client
        cache(server, "rm", info.path)
        assert not file_of(server, info).exists()
        assert read_answer(connection).body == body
    part = server.get(file_url(info), {"Range": f"bytes={20 << 20}-"})  # resumed elsewhere
    assert (part.status, part.body) == (206, body[20 << 20 :])


def test_nar_in_compression_stays(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, held = add_big(store, "big"), tmp_path / "held"
    server = start(store=tmp_path / "store", program=held_by(held))
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(server.get, file_url(info))
        wait_until(lambda: list((server.cache_dir / "nar").glob("*.growing")))
        refused = run("--config", str(server.config), "cache", "rm", info.path)
        assert refused.returncode == 1
        assert f"{str(info.path)!r} is not in the cache" in refused.stderr
        assert "1 more being filled" in run("--config", str(server.config), "cache", "ls").stderr
        cache(server, "purge", "--all")
        held.unlink()
        assert len(unpacked(download.result().body)) == info.nar_size
    wait_until(lambda: file_of(server, info).exists())


def test_file_completed_during_the_count_does_not_count_as_growing(store: StoreBuilder, tmp_path: Path) -> None:
    with at(tmp_path / "cache") as cache_on_disk:
        scan = cache_on_disk.entries

        def scan_before_completion(*, growing: bool = False) -> list[CacheEntry]:
            found = scan(growing=growing)
            Path(cache_on_disk.path("key")).touch()
            return found

        cache_on_disk.entries = scan_before_completion  # type: ignore[method-assign]
        assert CachedNars(cache_on_disk, None, Store("/nix/store", store.real_dir, store.db_path)).growing() == 0


def test_downloads_are_whole_while_all_is_purged_again_and_again(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    infos = [add_big(store, f"big-{number}") for number in range(3)]
    server = start(store=tmp_path / "store", workers=2)
    bodies = {info: fetch(server, info) for info in infos}
    with ThreadPoolExecutor(4) as pool:
        downloads = [pool.submit(server.get, file_url(info)) for info in infos * 20]
        cache(server, "purge", "--all", "--quiet")
        while not all(download.done() for download in downloads):
            cache(server, "purge", "--all", "--quiet")
        assert [download.result().body for download in downloads] == [bodies[info] for info in infos * 20]
    assert not [line for line in server.log if " ERROR " in line], server.log


def test_files_that_nginx_sends_are_removed_with_their_digests(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    info = add_big(store, "big")
    settings = "nginx_location = '/harmonia-nar/'\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=tmp_path / "store", settings=settings)
    body = fetch(server, info)
    wait_until(lambda: len(list((server.cache_dir / "nar").iterdir())) == 2)
    mode = (server.cache_dir / "nar").stat().st_mode
    [shown] = json.loads(cache(server, "show", "--json", info.path))
    assert shown["fileSize"] == len(body)
    assert len(listed(server)) == 1
    cache(server, "rm", info.path)
    assert not list((server.cache_dir / "nar").iterdir())
    assert (server.cache_dir / "nar").stat().st_mode == mode


def test_unused_nars_are_purged(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    old, new = add_big(store, "old"), add_big(store, "new")
    server = start(store=tmp_path / "store")
    for info in (old, new):
        fetch(server, info)
    os.utime(file_of(server, old), (time.time() - 40 * DAY,) * 2)
    assert cache(server, "purge", "--older-than", "30d", "--dry-run").split()[-1] == f"/nix/store/{old.path}"
    assert file_of(server, old).exists()
    done = run("--config", str(server.config), "cache", "purge", "--older-than", "30d")
    assert done.stderr == "1 NAR, 3.0 MiB removed\n"
    assert not file_of(server, old).exists()
    assert file_of(server, new).exists()
    cache(server, "purge", "--all")
    assert listed(server) == []


def test_uses_are_counted_once_a_minute(tmp_path: Path) -> None:
    with at(tmp_path / "cache") as files:
        path = fill(files)
        for minute in range(3):
            assert files.uses("key") == minute
            os.utime(path, (time.time() - 61,) * 2)
            for _ in range(5):
                file = files.use_file("key")
                assert file is not None
                file.close()
        assert files.uses("none") is None


def test_cache_works_without_extended_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "getxattr", refused)
    monkeypatch.setattr(os, "setxattr", refused)
    with at(tmp_path / "cache") as files:
        path = fill(files)
        os.utime(path, (time.time() - DAY,) * 2)
        files.touch("key")
        assert time.time() - os.stat(path).st_mtime < DAY / 2
        assert files.uses("key") is None


def test_nar_that_was_used_meanwhile_is_not_purged(tmp_path: Path) -> None:
    with at(tmp_path / "cache") as files:
        path = fill(files)
        os.utime(path, (time.time() - 40 * DAY,) * 2)
        before = time.time() - 30 * DAY
        files.touch("key")
        assert not files.remove("key", unused_since=before)
        assert os.path.exists(path)
        assert files.remove("key", unused_since=time.time())
        assert not files.remove("key")


def test_purge_removes_what_a_killed_server_left(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_text("here", b"")
    server = start(store=tmp_path / "store")
    left = server.cache_dir / "nar/left.growing"
    left.write_bytes(b"unfinished")
    cache(server, "purge", "--older-than", "30d")
    assert not left.exists()


def test_purge_needs_to_know_what_to_remove(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    store.add_text("here", b"")
    server = start(store=tmp_path / "store")
    for arguments in ([], ["--all", "--older-than", "1d"]):
        done = run("--config", str(server.config), "cache", "purge", *arguments)
        assert done.returncode == 2
        assert "give either --older-than TIME or --all" in done.stderr


def test_cache_that_does_not_exist_is_empty_and_not_created(store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add_text("here", b"").path
    config = tmp_path / "harmonia.toml"
    config.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{tmp_path}/cache'\n"
    )
    done = run("--config", str(config), "cache", "ls")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "0 NARs, 0 B\n")
    assert run("--config", str(config), "cache", "purge", "--all").returncode == 0
    assert run("--config", str(config), "cache", "rm", path).returncode == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.root
@needs_root
def test_root_uses_the_cache_as_the_user_of_the_server() -> None:
    with tempfile.TemporaryDirectory() as directory:  # accessible to other users
        tmp_path = Path(directory)
        tmp_path.chmod(0o755)
        store = StoreBuilder(tmp_path / "store")
        path = store.add_text("text", b"").path
        (tmp_path / "cache").mkdir(mode=0o700)
        os.chown(tmp_path / "cache", NOBODY, NOBODY)
        config = tmp_path / "harmonia.toml"
        config.write_text(
            f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ncache_dir = '{tmp_path}/cache'\n"
        )
        assert run("--config", str(config), "warm", path).returncode == 0
        done = run("--config", str(config), "cache", "ls")
        assert done.stdout.split()[-1] == f"/nix/store/{path}"
        assert run("--config", str(config), "cache", "rm", path).returncode == 0
        assert (tmp_path / "cache/nar").stat().st_uid == NOBODY
