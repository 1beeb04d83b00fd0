"""Cached paths of an upstream are served after a restart, even if the upstream is unreachable."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from harmonia.cache.disk_cache import DiskCache
from harmonia.nix import base32, listing, nar
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.store import tree_reader
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream.nar_name import NarName
from support.running import Answer, Server, case, open_files, patched, wait_until
from support.upstream_paths import KEY, PACK, Remote, entry, fields, make_path, narinfo_path
from support.upstream_server import UpstreamServer, hang, reset, status

Start = Callable[..., Server]
Site = Callable[..., Server]

SHORT_TIMEOUT = "upstream_timeout = 0.5"
OTHER_KEY = SecretKey.generate("other-1")


@pytest.fixture
def upstream() -> Iterator[UpstreamServer]:
    with UpstreamServer() as upstream:
        yield upstream


@pytest.fixture
def remote(tmp_path: Path, upstream: UpstreamServer) -> Remote:
    path = make_path(tmp_path / "elsewhere")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    return path


@pytest.fixture
def site(start: Start, tmp_path: Path, upstream: UpstreamServer) -> Site:
    """Start a server, repeatedly with the same cache directory."""
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")

    def site(settings: str = "", *, up: bool = True, entries: str = "", **options: object) -> Server:
        patience = "upstream_timeout = 20.0" if up else SHORT_TIMEOUT
        server = start(
            store=tmp_path / "store",
            settings=f"{patience}\n{settings}\n{entries or entry(upstream)}",
            **{"cache_dir": tmp_path / "cache", **options},
        )
        if up:
            wait_until(lambda: ": up\n" in server.get("/health?verbose").text)
        return server

    return site


def kept_narinfos(server: Server) -> list[str]:
    return sorted(path.name for path in (server.cache_dir / "narinfo").iterdir())


def fetch(server: Server, *paths: Remote) -> list[str]:
    """Download the NARs of these paths into the cache, and return their URLs."""
    urls = []
    for path in paths:
        urls.append("/" + fields(server.get(narinfo_path(path)))["URL"])
        assert server.get(urls[-1]).body == path.file
    wait_until(lambda: {path.info.path.hash_part for path in paths} <= set(kept_narinfos(server)))
    return urls


def nars(server: Server) -> list[Path]:
    return sorted((server.cache_dir / "nar").iterdir())


def listing_of(path: Remote, directory: Path) -> bytes:
    root = f"{StoreBuilder(directory).real_dir}/{path.info.path}".encode()
    return b"".join(listing.render(nar.located(tree_reader.walk(root))))


def test_cached_path_is_served_after_a_restart_without_its_upstream(
    site: Site, upstream: UpstreamServer, tmp_path: Path
) -> None:
    paths = {compression: make_path(tmp_path / compression, compression=compression) for compression in PACK}
    for path in paths.values():
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    first = site()
    urls = fetch(first, *paths.values())
    before = [first.get(narinfo_path(path)) for path in paths.values()]
    first.stop()
    upstream.behaviours["."] = reset
    again = site(up=False, workers=2)
    for (compression, path), url, narinfo in zip(paths.items(), urls, before, strict=True):
        with case(compression):
            check_cached(again, path, url, narinfo, tmp_path / compression)
    assert again.stop() == 0
    assert not [line for line in again.log if "Traceback" in line or "Unclosed" in line]


def check_cached(again: Server, path: Remote, url: str, before: Answer, directory: Path) -> None:
    for _ in range(4):  # by both workers
        after = again.get(narinfo_path(path))
        assert (after.status, after.body) == (200, before.body)
    assert again.head(narinfo_path(path)).headers == after.headers
    assert json.loads(again.get(f"{narinfo_path(path)}?json").text)["path"] == path.info.path
    answer = again.get(url)
    assert (answer.status, answer.body) == (200, path.file)
    assert again.head(url).headers["content-length"] == str(len(path.file))
    part = again.get(url, {"Range": "bytes=1000-", "If-Range": answer.headers["etag"]})
    assert (part.status, part.body) == (206, path.file[1000:])
    old = again.request("GET", url, version="1.0")
    assert (old.status, old.body) == (200, path.file)
    ls = again.get(f"/{path.info.path.hash_part}.ls")
    assert (ls.status, ls.body) == (200, listing_of(path, directory))
    assert again.head(f"/{path.info.path.hash_part}.ls").headers == ls.headers
    assert again.get(f"/{path.info.path.hash_part}.ls", {"Range": "bytes=0-10"}).body == ls.body[:11]
    assert again.request("GET", f"/{path.info.path.hash_part}.ls", version="1.0").body == ls.body


@pytest.mark.parametrize("fault", [hang, reset, status(500), status(404)], ids=["hang", "reset", "500", "404"])
def test_cached_path_is_served_after_a_restart_despite_any_upstream_failure(
    site: Site, upstream: UpstreamServer, remote: Remote, fault: Callable[..., None]
) -> None:
    server = site()
    fetch(server, remote)
    server.stop()
    upstream.behaviours[r"narinfo|\.ls|nar/"] = fault
    again = site(up=False)
    wait_until(lambda: ": up\n" in again.get("/health?verbose").text)
    assert again.get(narinfo_path(remote)).status == 200
    assert again.get(f"/{remote.info.path.hash_part}.ls").status == 200


def test_reachable_upstream_takes_precedence_over_the_cache(
    site: Site, upstream: UpstreamServer, remote: Remote
) -> None:
    server = site()
    fetch(server, remote)
    server.stop()
    upstream.add(remote.info, remote.file, remote.nar, keys=(KEY, OTHER_KEY))
    again = site()
    new = again.get(narinfo_path(remote))
    assert new.text.count("Sig: ") == 2
    record = again.cache_dir / "narinfo" / remote.info.path.hash_part
    wait_until(lambda: b"other-1:" in (record.read_bytes() if record.exists() else b""))
    again.stop()
    upstream.behaviours["."] = reset
    assert site(up=False).get(narinfo_path(remote)).body == new.body


def test_cached_nar_without_a_narinfo_gets_one(site: Site, remote: Remote) -> None:
    """An older Harmonia kept_narinfos no narinfos, and a narinfo can be lost."""
    server = site()
    fetch(server, remote)
    server.stop()
    (server.cache_dir / "narinfo" / remote.info.path.hash_part).unlink()
    again = site()
    again.get(narinfo_path(remote))
    wait_until(lambda: kept_narinfos(again) == [remote.info.path.hash_part])


def test_two_paths_with_the_same_content_share_one_nar(
    site: Site, upstream: UpstreamServer, remote: Remote, tmp_path: Path
) -> None:
    """Both narinfos are requested first, as Nix does, and only one NAR is fetched."""
    path = StoreBuilder(tmp_path / "twin").output_path("twin-of-it")
    twin = replace(remote, info=replace(remote.info, path=path))
    upstream.add(twin.info, twin.file, twin.nar, keys=(KEY,))
    server = site()
    urls = ["/" + fields(server.get(narinfo_path(path)))["URL"] for path in (remote, twin)]
    for url in urls:
        assert server.get(url).body == remote.file
    wait_until(lambda: kept_narinfos(server) == sorted(path.info.path.hash_part for path in (remote, twin)))
    assert upstream.asked[f"GET /{remote.nar.url}"] == 1
    server.stop()
    upstream.behaviours["."] = reset
    again = site(up=False)
    assert {again.get(narinfo_path(path)).status for path in (remote, twin)} == {200}


def test_narinfo_is_kept_if_another_process_fetches_the_nar(site: Site, remote: Remote) -> None:
    """The test plays the other process: it holds the writer lock of the file."""
    server = site()
    url = fields(server.get(narinfo_path(remote)))["URL"]
    opened = DiskCache(str(server.cache_dir / "nar")).open_file(NarName.parse(url.removeprefix("upstream/")).key)
    assert opened
    reader, filler = opened
    assert filler
    with ThreadPoolExecutor(1) as threads, closing(reader):
        download = threads.submit(server.get, f"/{url}")
        wait_until(lambda: any(name.endswith(".growing") for name in open_files(server.workers[0])))
        filler.append(remote.file)
        filler.commit()
        assert download.result().body == remote.file
    wait_until(lambda: kept_narinfos(server) == [remote.info.path.hash_part])


def sign_ours(key: Path) -> str:
    return f"sign_key_paths = ['{key}']"


def test_changed_keys_apply_to_cached_narinfos(
    site: Site, upstream: UpstreamServer, remote: Remote, tmp_path: Path
) -> None:
    ours = SecretKey.generate("ours-1")
    (tmp_path / "key").write_text(ours.export())
    (tmp_path / "key").chmod(0o600)
    server = site()
    fetch(server, remote)
    server.stop()
    upstream.behaviours["."] = reset
    unsigned = site(up=False, entries=entry(upstream, verify=False))
    assert unsigned.get(narinfo_path(remote)).status == 200
    unsigned.stop()
    other = f"[[upstream]]\nurl = '{upstream.url}'\npublic_keys = ['{OTHER_KEY.public_key}']\n"
    refusing = site(up=False, entries=other)
    for _ in range(3):
        assert refusing.get(narinfo_path(remote)).status == 404
        assert refusing.get(f"/{remote.info.path.hash_part}.ls").status == 404
    assert len([line for line in refusing.log if "no signature by any of public_keys" in line]) == 1
    refusing.stop()
    signing = site(sign_ours(tmp_path / "key"), up=False, entries=entry(upstream, sign=True))
    sigs = [line[5:] for line in signing.get(narinfo_path(remote)).text.splitlines() if line.startswith("Sig: ")]
    fingerprint = remote.info.fingerprint("/nix/store")
    assert [any(PublicKey.parse(str(key.public_key)).verify(fingerprint, sig) for sig in sigs) for key in (KEY, ours)]


@pytest.mark.parametrize("change", ["other upstream", "redirect", "other store"])
def test_cached_narinfo_of_an_upstream_removed_from_the_settings_gets_404(
    site: Site, upstream: UpstreamServer, remote: Remote, change: str
) -> None:
    server = site()
    fetch(server, remote)
    server.stop()
    upstream.behaviours["."] = reset
    changed = {
        "other upstream": {"entries": entry(upstream).replace(upstream.url, upstream.url + "/other")},
        "redirect": {"entries": entry(upstream, mode="redirect")},
        "other store": {"settings": "virtual_nix_store = '/other/store'"},
    }[change]
    again = site(up=False, **changed)
    assert again.get(narinfo_path(remote)).status == 404
    assert again.get(f"/{remote.info.path.hash_part}.ls").status == 404


def damage_file(file: Path, damage: str, other: bytes) -> None:
    content = file.read_bytes()
    file.unlink()
    match damage:
        case "flip":
            file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
        case "cut":
            file.write_bytes(content[:-10])
        case "garbage":
            file.write_bytes(b"\xff\n" * 1000)
        case "empty":
            file.touch()
        case "other path":
            file.write_bytes(other)
        case "symlink":
            target = file.parents[2] / "target"
            target.write_bytes(content)
            file.symlink_to(target)
        case "directory":
            file.mkdir()


def test_damaged_narinfo_file_is_ignored_and_replaced(site: Site, upstream: UpstreamServer, tmp_path: Path) -> None:
    damages = ("flip", "cut", "garbage", "empty", "other path", "symlink", "directory")
    other, *paths = (make_path(tmp_path / name) for name in ("other", *damages))
    for path in (other, *paths):
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = site()
    fetch(server, other, *paths)
    server.stop()
    files = {path.info.path.hash_part: server.cache_dir / "narinfo" / path.info.path.hash_part for path in paths}
    whole = (server.cache_dir / "narinfo" / other.info.path.hash_part).read_bytes()
    for file, damage in zip(files.values(), damages, strict=True):
        damage_file(file, damage, whole)
    behaviours, upstream.behaviours = upstream.behaviours, {".": reset}
    again = site(up=False)
    assert {damage: again.get(narinfo_path(path)).status for damage, path in zip(damages, paths, strict=True)} == (
        dict.fromkeys(damages, 404)
    )
    assert again.get(narinfo_path(other)).status == 200
    again.stop()
    assert not [line for line in again.log if "Traceback" in line]
    upstream.behaviours = behaviours
    repairable = paths[:-1]  # only the owner can have made a directory
    repaired = site()
    fetch(repaired, *repairable)
    repaired.stop()
    upstream.behaviours = {".": reset}
    last = site(up=False)
    assert [last.get(narinfo_path(path)).status for path in repairable] == [200] * len(repairable)


def test_narinfo_is_evicted_with_its_nar(site: Site, upstream: UpstreamServer, tmp_path: Path) -> None:
    paths = [make_path(tmp_path / str(number), 2 << 20, "none") for number in range(4)]
    for path in paths:
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = site("cache_size = '5 MiB'")
    for path in paths:
        url = "/" + fields(server.get(narinfo_path(path)))["URL"]
        assert server.get(url).body == path.file

    def is_clean() -> bool:
        remote = [path for path in paths if any(base32.encode(path.info.nar_hash) in nar.name for nar in nars(server))]
        return len(nars(server)) == 2 and kept_narinfos(server) == sorted(path.info.path.hash_part for path in remote)

    wait_until(is_clean)
    server.stop()
    upstream.behaviours["."] = reset
    again = site("cache_size = '5 MiB'", up=False)
    assert sorted(again.get(narinfo_path(path)).status for path in paths) == [200, 200, 404, 404]


@pytest.mark.parametrize("is_running", [False, True])
def test_narinfo_whose_nar_was_removed_gets_404(
    site: Site, upstream: UpstreamServer, remote: Remote, *, is_running: bool
) -> None:
    server = site()
    fetch(server, remote)
    server.stop()
    upstream.behaviours["."] = reset
    if is_running:
        server = site(up=False)
        assert server.get(narinfo_path(remote)).status == 200
    for file in nars(server):
        file.unlink()
    again = server if is_running else site(up=False)
    assert again.get(narinfo_path(remote)).status == 404
    assert again.get(f"/{remote.info.path.hash_part}.ls").status == 404
    wait_until(lambda: kept_narinfos(again) == [])


def test_start_removes_leftovers_of_a_killed_process(site: Site, remote: Remote) -> None:
    server = site()
    fetch(server, remote)
    server.stop()
    for file in nars(server):
        file.unlink()
    (server.cache_dir / "narinfo" / f"{'0' * 32}.growing").write_bytes(b"half")
    again = site()
    wait_until(lambda: kept_narinfos(again) == [])


def test_damaged_nar_is_removed_with_its_narinfo(site: Site, upstream: UpstreamServer, remote: Remote) -> None:
    server = site()
    (url,) = fetch(server, remote)
    server.stop()
    (file,) = nars(server)
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    upstream.behaviours["."] = reset
    again = site(up=False)
    assert again.get(f"/{remote.info.path.hash_part}.ls").status == 404
    assert again.get(narinfo_path(remote)).status == 404
    wait_until(lambda: not kept_narinfos(again) and not nars(again))
    assert again.get(url).status == 404


def test_narinfo_files_are_private(site: Site, remote: Remote) -> None:
    server = site()
    fetch(server, remote)
    directory = server.cache_dir / "narinfo"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_narinfo_without_a_fetched_nar_is_not_kept(site: Site, upstream: UpstreamServer, remote: Remote) -> None:
    server = site()
    assert server.get(narinfo_path(remote)).status == 200
    server.stop()
    upstream.behaviours["."] = reset
    again = site(up=False)
    assert again.get(narinfo_path(remote)).status == 404
    assert kept_narinfos(again) == []


def test_unusable_narinfo_directory_is_logged_and_nars_are_served(site: Site, remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "narinfo").write_text("in the way")
    server = site()
    url = "/" + fields(server.get(narinfo_path(remote)))["URL"]
    assert server.get(url).body == remote.file
    server.wait_for_log("cannot keep narinfos of upstreams: .*narinfo: ")


def test_listing_of_a_cached_nar_needs_no_layouts_directory(
    site: Site, upstream: UpstreamServer, remote: Remote, tmp_path: Path
) -> None:
    server = site()
    fetch(server, remote)
    server.stop()
    upstream.behaviours["."] = reset
    without_layouts = (
        "from harmonia.server import context; opened = context.open_cache;"
        "context.open_cache = lambda *how, **more: None if how[1] == 'layouts' else opened(*how, **more)"
    )
    again = site(up=False, program=patched(without_layouts))
    ls = listing_of(remote, tmp_path / "elsewhere")
    assert again.get(f"/{remote.info.path.hash_part}.ls").body == ls
    assert again.get(f"/{remote.info.path.hash_part}.ls", {"Range": "bytes=5-9"}).body == ls[5:10]
