"""What came from an upstream is served after a restart, when the upstream is gone."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from harmonia.cache.disk_cache import NarCache
from harmonia.nix import base32, listing, nar
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.store import tree_reader
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream.nar_name import NarName
from support.running import Server, open_files, patched, wait_until
from support.upstream_paths import KEY, PACK, Remote, entry, fields, make_path, narinfo_path
from support.upstream_server import UpstreamServer, hang, reset, status

Start = Callable[..., Server]
Site = Callable[..., Server]

IMPATIENT = "upstream_timeout = 0.5"
OTHER_KEY = SecretKey.generate("other-1")


@pytest.fixture
def upstream() -> Iterator[UpstreamServer]:
    with UpstreamServer() as upstream:
        yield upstream


@pytest.fixture
def there(tmp_path: Path, upstream: UpstreamServer) -> Remote:
    path = make_path(tmp_path / "elsewhere")
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    return path


@pytest.fixture
def site(start: Start, tmp_path: Path, upstream: UpstreamServer) -> Site:
    """Start a server of one site, again and again with the same cache directory."""
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")

    def site(settings: str = "", *, up: bool = True, entries: str = "", **options: object) -> Server:
        patience = "upstream_timeout = 20.0" if up else IMPATIENT
        server = start(
            store=tmp_path / "store",
            settings=f"{patience}\n{settings}\n{entries or entry(upstream)}",
            **{"cache_dir": tmp_path / "cache", **options},
        )
        if up:
            wait_until(lambda: ": up\n" in server.get("/health?verbose").text)
        return server

    return site


def kept(server: Server) -> list[str]:
    return sorted(path.name for path in (server.cache_dir / "narinfo").iterdir())


def fetch(server: Server, *paths: Remote) -> list[str]:
    """Have the NARs of these paths in the cache, and return their URLs."""
    urls = []
    for path in paths:
        urls.append("/" + fields(server.get(narinfo_path(path)))["URL"])
        assert server.get(urls[-1]).body == path.file
    wait_until(lambda: {path.info.path.hash_part for path in paths} <= set(kept(server)))
    return urls


def nars(server: Server) -> list[Path]:
    return sorted((server.cache_dir / "nar").iterdir())


def listing_of(path: Remote, directory: Path) -> bytes:
    root = f"{StoreBuilder(directory).real_dir}/{path.info.path}".encode()
    return b"".join(listing.render(nar.located(tree_reader.walk(root))))


@pytest.mark.parametrize("compression", PACK)
def test_a_path_is_served_after_a_restart_without_its_upstream(
    site: Site, upstream: UpstreamServer, tmp_path: Path, compression: str
) -> None:
    path = make_path(tmp_path / "there", compression=compression)
    upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    first = site()
    (url,) = fetch(first, path)
    before = first.get(narinfo_path(path))
    first.stop()
    upstream.behaviours["."] = reset
    again = site(up=False, workers=2)
    for _ in range(4):  # by either worker
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
    assert (ls.status, ls.body) == (200, listing_of(path, tmp_path / "there"))
    assert again.head(f"/{path.info.path.hash_part}.ls").headers == ls.headers
    assert again.get(f"/{path.info.path.hash_part}.ls", {"Range": "bytes=0-10"}).body == ls.body[:11]
    assert again.request("GET", f"/{path.info.path.hash_part}.ls", version="1.0").body == ls.body
    assert again.stop() == 0
    assert not [line for line in again.log if "Traceback" in line or "Unclosed" in line]


@pytest.mark.parametrize("fault", [hang, reset, status(500), status(404)], ids=["hang", "reset", "500", "404"])
def test_it_does_not_matter_in_which_way_the_upstream_fails(
    site: Site, upstream: UpstreamServer, there: Remote, fault: Callable[..., None]
) -> None:
    server = site()
    fetch(server, there)
    server.stop()
    upstream.behaviours[r"narinfo|\.ls|nar/"] = fault
    again = site(up=False)
    wait_until(lambda: ": up\n" in again.get("/health?verbose").text)
    assert again.get(narinfo_path(there)).status == 200
    assert again.get(f"/{there.info.path.hash_part}.ls").status == 200


def test_an_upstream_that_answers_is_asked_first(site: Site, upstream: UpstreamServer, there: Remote) -> None:
    server = site()
    fetch(server, there)
    server.stop()
    upstream.add(there.info, there.file, there.nar, keys=(KEY, OTHER_KEY))
    again = site()
    new = again.get(narinfo_path(there))
    assert new.text.count("Sig: ") == 2
    record = again.cache_dir / "narinfo" / there.info.path.hash_part
    wait_until(lambda: b"other-1:" in (record.read_bytes() if record.exists() else b""))
    again.stop()
    upstream.behaviours["."] = reset
    assert site(up=False).get(narinfo_path(there)).body == new.body


def test_a_nar_that_was_kept_before_gets_its_narinfo(site: Site, there: Remote) -> None:
    """From an older Harmonia, or where a narinfo was lost."""
    server = site()
    fetch(server, there)
    server.stop()
    (server.cache_dir / "narinfo" / there.info.path.hash_part).unlink()
    again = site()
    again.get(narinfo_path(there))
    wait_until(lambda: kept(again) == [there.info.path.hash_part])


def test_two_paths_of_the_same_content_are_both_kept(
    site: Site, upstream: UpstreamServer, there: Remote, tmp_path: Path
) -> None:
    """The narinfos come first, as Nix asks, and only one NAR is fetched."""
    path = StoreBuilder(tmp_path / "twin").output_path("twin-of-it")
    twin = replace(there, info=replace(there.info, path=path))
    upstream.add(twin.info, twin.file, twin.nar, keys=(KEY,))
    server = site()
    urls = ["/" + fields(server.get(narinfo_path(path)))["URL"] for path in (there, twin)]
    for url in urls:
        assert server.get(url).body == there.file
    wait_until(lambda: kept(server) == sorted(path.info.path.hash_part for path in (there, twin)))
    assert upstream.asked[f"GET /{there.nar.url}"] == 1
    server.stop()
    upstream.behaviours["."] = reset
    again = site(up=False)
    assert {again.get(narinfo_path(path)).status for path in (there, twin)} == {200}


def test_the_narinfo_of_a_nar_that_another_worker_fetches_is_kept_too(site: Site, there: Remote) -> None:
    """The other worker is this test, which holds the right to fill the file."""
    server = site()
    url = fields(server.get(narinfo_path(there)))["URL"]
    opened = NarCache(str(server.cache_dir / "nar")).open_file(NarName.parse(url.removeprefix("upstream/")).key)
    assert opened
    reader, filler = opened
    assert filler
    with ThreadPoolExecutor(1) as threads, closing(reader):
        download = threads.submit(server.get, f"/{url}")
        wait_until(lambda: any(name.endswith(".growing") for name in open_files(server.workers[0])))
        filler.append(there.file)
        filler.commit()
        assert download.result().body == there.file
    wait_until(lambda: kept(server) == [there.info.path.hash_part])


def sign_ours(key: Path) -> str:
    return f"sign_key_paths = ['{key}']"


def test_what_the_settings_say_of_keys_today_counts(
    site: Site, upstream: UpstreamServer, there: Remote, tmp_path: Path
) -> None:
    ours = SecretKey.generate("ours-1")
    (tmp_path / "key").write_text(ours.export())
    (tmp_path / "key").chmod(0o600)
    server = site()
    fetch(server, there)
    server.stop()
    upstream.behaviours["."] = reset
    unsigned = site(up=False, entries=entry(upstream, verify=False))
    assert unsigned.get(narinfo_path(there)).status == 200
    unsigned.stop()
    other = f"[[upstream]]\nurl = '{upstream.url}'\npublic_keys = ['{OTHER_KEY.public_key}']\n"
    refusing = site(up=False, entries=other)
    for _ in range(3):
        assert refusing.get(narinfo_path(there)).status == 404
        assert refusing.get(f"/{there.info.path.hash_part}.ls").status == 404
    assert len([line for line in refusing.log if "no signature by any of public_keys" in line]) == 1
    refusing.stop()
    signing = site(sign_ours(tmp_path / "key"), up=False, entries=entry(upstream, sign=True))
    sigs = [line[5:] for line in signing.get(narinfo_path(there)).text.splitlines() if line.startswith("Sig: ")]
    fingerprint = there.info.fingerprint("/nix/store")
    assert [any(PublicKey.parse(str(key.public_key)).verify(fingerprint, sig) for sig in sigs) for key in (KEY, ours)]


@pytest.mark.parametrize("change", ["other upstream", "redirect", "other store"])
def test_an_upstream_that_is_not_in_the_settings_any_longer_vouches_for_nothing(
    site: Site, upstream: UpstreamServer, there: Remote, change: str
) -> None:
    server = site()
    fetch(server, there)
    server.stop()
    upstream.behaviours["."] = reset
    changed = {
        "other upstream": {"entries": entry(upstream).replace(upstream.url, upstream.url + "/other")},
        "redirect": {"entries": entry(upstream, mode="redirect")},
        "other store": {"settings": "virtual_nix_store = '/other/store'"},
    }[change]
    again = site(up=False, **changed)
    assert again.get(narinfo_path(there)).status == 404
    assert again.get(f"/{there.info.path.hash_part}.ls").status == 404


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "empty", "other path", "symlink", "directory"])
def test_a_damaged_narinfo_is_ignored(
    site: Site, upstream: UpstreamServer, there: Remote, tmp_path: Path, damage: str
) -> None:
    other = make_path(tmp_path / "other")
    upstream.add(other.info, other.file, other.nar, keys=(KEY,))
    server = site()
    fetch(server, there, other)
    server.stop()
    file = server.cache_dir / "narinfo" / there.info.path.hash_part
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
            file.write_bytes((file.parent / other.info.path.hash_part).read_bytes())
        case "symlink":
            (tmp_path / "target").write_bytes(content)
            file.symlink_to(tmp_path / "target")
        case "directory":
            file.mkdir()
    behaviours, upstream.behaviours = upstream.behaviours, {".": reset}
    again = site(up=False)
    assert again.get(narinfo_path(there)).status == 404
    assert again.get(narinfo_path(other)).status == 200
    again.stop()
    assert not [line for line in again.log if "Traceback" in line]
    upstream.behaviours = behaviours
    if damage != "directory":  # which only its owner can have made
        mended = site()
        fetch(mended, there)
        mended.stop()
        upstream.behaviours = {".": reset}
        assert site(up=False).get(narinfo_path(there)).status == 200


def test_a_narinfo_goes_with_its_nar(site: Site, upstream: UpstreamServer, tmp_path: Path) -> None:
    """When the cache is full: no narinfo is left of a NAR that was evicted."""
    paths = [make_path(tmp_path / str(number), 2 << 20, "none") for number in range(4)]
    for path in paths:
        upstream.add(path.info, path.file, path.nar, keys=(KEY,))
    server = site("cache_size = '5 MiB'")
    for path in paths:
        url = "/" + fields(server.get(narinfo_path(path)))["URL"]
        assert server.get(url).body == path.file

    def is_clean() -> bool:
        there = [path for path in paths if any(base32.encode(path.info.nar_hash) in nar.name for nar in nars(server))]
        return len(nars(server)) == 2 and kept(server) == sorted(path.info.path.hash_part for path in there)

    wait_until(is_clean)
    server.stop()
    upstream.behaviours["."] = reset
    again = site("cache_size = '5 MiB'", up=False)
    assert sorted(again.get(narinfo_path(path)).status for path in paths) == [200, 200, 404, 404]


@pytest.mark.parametrize("is_running", [False, True])
def test_a_narinfo_is_404_when_its_nar_was_removed(
    site: Site, upstream: UpstreamServer, there: Remote, *, is_running: bool
) -> None:
    server = site()
    fetch(server, there)
    server.stop()
    upstream.behaviours["."] = reset
    if is_running:
        server = site(up=False)
        assert server.get(narinfo_path(there)).status == 200
    for file in nars(server):
        file.unlink()
    again = server if is_running else site(up=False)
    assert again.get(narinfo_path(there)).status == 404
    assert again.get(f"/{there.info.path.hash_part}.ls").status == 404
    wait_until(lambda: kept(again) == [])


def test_a_start_removes_what_a_killed_process_left(site: Site, there: Remote) -> None:
    server = site()
    fetch(server, there)
    server.stop()
    for file in nars(server):
        file.unlink()
    (server.cache_dir / "narinfo" / f"{'0' * 32}.growing").write_bytes(b"half")
    again = site()
    wait_until(lambda: kept(again) == [])


def test_a_damaged_nar_takes_its_narinfo_with_it(site: Site, upstream: UpstreamServer, there: Remote) -> None:
    server = site()
    (url,) = fetch(server, there)
    server.stop()
    (file,) = nars(server)
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    upstream.behaviours["."] = reset
    again = site(up=False)
    assert again.get(f"/{there.info.path.hash_part}.ls").status == 404
    assert again.get(narinfo_path(there)).status == 404
    wait_until(lambda: not kept(again) and not nars(again))
    assert again.get(url).status == 404


def test_narinfos_are_private(site: Site, there: Remote) -> None:
    server = site()
    fetch(server, there)
    directory = server.cache_dir / "narinfo"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_nothing_is_kept_that_was_never_fetched(site: Site, upstream: UpstreamServer, there: Remote) -> None:
    server = site()
    assert server.get(narinfo_path(there)).status == 200
    server.stop()
    upstream.behaviours["."] = reset
    again = site(up=False)
    assert again.get(narinfo_path(there)).status == 404
    assert kept(again) == []


def test_without_a_place_for_narinfos_all_else_works(site: Site, there: Remote, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "narinfo").write_text("in the way")
    server = site()
    url = "/" + fields(server.get(narinfo_path(there)))["URL"]
    assert server.get(url).body == there.file
    server.wait_for_log("cannot keep narinfos of upstreams: .*narinfo: ")


def test_a_listing_needs_no_place_on_disk(site: Site, upstream: UpstreamServer, there: Remote, tmp_path: Path) -> None:
    server = site()
    fetch(server, there)
    server.stop()
    upstream.behaviours["."] = reset
    without_layouts = (
        "from harmonia.server import context; opened = context.open_cache;"
        "context.open_cache = lambda *how, **more: None if how[1] == 'layouts' else opened(*how, **more)"
    )
    again = site(up=False, program=patched(without_layouts))
    ls = listing_of(there, tmp_path / "elsewhere")
    assert again.get(f"/{there.info.path.hash_part}.ls").body == ls
    assert again.get(f"/{there.info.path.hash_part}.ls", {"Range": "bytes=5-9"}).body == ls[5:10]
