"""`/<hash>.ls`: what is in a NAR, and where."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.running import NO_CACHE, Server, patched
from support.shared_store import dump, info, url

Start = Callable[..., Server]


def files(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("entries", {}).items():
        yield from files(child, f"{path}/{name}")


def listing(server: Server, hash_part: str) -> Any:
    answer = server.get(f"/{hash_part}.ls")
    assert answer.status == 200
    return json.loads(answer.body.decode(errors="surrogateescape"))


def test_what_it_tells(server: Server, shared_store: StoreBuilder) -> None:
    told = listing(server, info(shared_store, "tree").path.hash_part)
    assert told["version"] == 1
    found = dict(files(told["root"]))
    for node in found.values():
        node.pop("narOffset", None)
        node.pop("entries", None)
    assert found == {
        "": {"type": "directory"},
        "/big": {"type": "regular", "size": 3145728, "executable": False},
        "/bin": {"type": "directory"},
        "/bin/link": {"type": "symlink", "target": "run"},
        "/bin/run": {"type": "regular", "size": 10, "executable": True},
        "/empty": {"type": "regular", "size": 0, "executable": False},
        "/empty-dir": {"type": "directory"},
        "/\udcff\udcfe": {"type": "regular", "size": 9, "executable": False},
    }


def test_its_offsets_are_where_the_contents_are(server: Server, shared_store: StoreBuilder) -> None:
    path = info(shared_store, "tree")
    whole = dump(shared_store, "tree")
    where = url(server, path.path.hash_part)
    root = shared_store.real_path(path.path)
    for name, node in files(listing(server, path.path.hash_part)["root"]):
        if node["type"] == "regular":
            contents = Path(
                (root + name.encode(errors="surrogateescape")).decode(errors="surrogateescape")
            ).read_bytes()
            first, size = node["narOffset"], node["size"]
            assert whole[first : first + size] == contents
            if size:
                answer = server.get(where, {"Range": f"bytes={first}-{first + size - 1}"})
                assert answer.body == contents


@pytest.mark.parametrize("name", ["dep", "tree.drv"])
def test_a_single_file(server: Server, shared_store: StoreBuilder, name: str) -> None:
    root = listing(server, info(shared_store, name).path.hash_part)["root"]
    assert root["type"] == "regular"
    assert root["narOffset"] == 96


def test_its_headers(server: Server, shared_store: StoreBuilder) -> None:
    where = f"/{info(shared_store, 'tree').path.hash_part}.ls"
    answer = server.get(where)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["etag"] != server.head(url(server, where[1:33])).headers["etag"]
    assert server.get(where, {"If-None-Match": answer.headers["etag"]}).status == 304
    assert server.get(where, {"Range": "bytes=0-9"}).body == answer.body[:10]


@pytest.mark.parametrize("path", [f"/{'0' * 32}.ls", "/x.ls", "/.ls"])
def test_what_we_do_not_have_is_404(server: Server, path: str) -> None:
    assert server.get(path).status == 404


def test_what_is_not_as_registered_is_404(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("tree"), {"a": b"a"}).path
    server = start(store=tmp_path / "store")
    root = Path(store.real_path(path).decode())
    root.chmod(0o700)
    (root / "b").write_bytes(b"b")
    assert server.get(f"/{path.hash_part}.ls").status == 404
    assert server.wait_for_log("were registered")
    (root / "b").unlink()
    assert server.get(f"/{path.hash_part}.ls").status == 200


@pytest.fixture
def large(store: StoreBuilder) -> PathInfo:
    """A path whose listing is kept in a file."""
    return store.add(store.output_path("large"), {f"a-name-of-many-letters-{number:06}": b"" for number in range(9000)})


@pytest.mark.parametrize("cache_dir", [None, NO_CACHE], ids=["kept", "no cache directory"])
def test_a_large_one_is_the_same_in_all_forms(
    start: Start, large: PathInfo, tmp_path: Path, cache_dir: Path | None
) -> None:
    server, where = start(store=tmp_path / "store", cache_dir=cache_dir), f"/{large.path.hash_part}.ls"
    streamed = server.get(where)
    assert server.head(where).headers == streamed.headers
    assert len(json.loads(streamed.body)["root"]["entries"]) == 9000
    for _ in range(2):
        compressed = server.get(where, {"Accept-Encoding": "zstd"})
        assert zstandard.ZstdDecompressor().decompressobj().decompress(compressed.body) == streamed.body
    of_an_old_client = server.request("GET", where, version="1.0")
    assert of_an_old_client.headers["content-length"] == str(len(streamed.body))
    assert of_an_old_client.body == streamed.body
    part = server.get(where, {"Range": "bytes=300000-300099"})
    assert part.headers["content-range"] == f"bytes 300000-300099/{len(streamed.body)}"
    assert part.body == streamed.body[300000:300100]


COUNTED = """
import logging
from harmonia.nix import listing
render = listing.render
def counted(located):
    logging.getLogger("harmonia").warning("a listing is made")
    return render(located)
listing.render = counted
"""


@pytest.mark.parametrize("length", ["short", "long"])
def test_it_is_made_once_and_parts_are_cut_from_that(
    start: Start, store: StoreBuilder, large: PathInfo, tmp_path: Path, length: str
) -> None:
    path = large.path if length == "long" else store.add(store.output_path("short"), {"file": b""}).path
    server, where = start(store=tmp_path / "store", program=patched(COUNTED)), f"/{path.hash_part}.ls"
    with ThreadPoolExecutor(8) as clients:
        parts = list(clients.map(lambda number: server.get(where, {"Range": f"bytes={number}-{number}"}), range(30)))
    whole = server.get(where).body
    assert b"".join(part.body for part in parts) == whole[:30]
    assert len([line for line in server.log if "a listing is made" in line]) == 1


def test_a_damaged_file_is_made_again(start: Start, large: PathInfo, tmp_path: Path) -> None:
    where = f"/{large.path.hash_part}.ls"
    server = start(store=tmp_path / "store", cache_dir=tmp_path / "cache")
    whole = server.get(where).body
    server.stop()
    [file] = (tmp_path / "cache/layouts").glob("*.ls")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(file.read_bytes()[:-1000])
    assert start(store=tmp_path / "store", cache_dir=tmp_path / "cache").get(where).body == whole


def test_long_listings_have_a_rate_for_each_client_and_short_ones_none(
    start: Start, store: StoreBuilder, large: PathInfo, tmp_path: Path
) -> None:
    short = store.add(store.output_path("short"), {"file": b""})
    server = start(store=tmp_path / "store", settings="max_query_rate = 3\ntrusted_proxies = ['127.0.0.1']")
    where = f"/{large.path.hash_part}.ls"
    answers = [server.get(where, {"Range": "bytes=-1"}) for _ in range(5)]
    assert [answer.status for answer in answers] == [206] * 3 + [429] * 2
    assert "retry-after" in answers[-1].headers
    assert server.get(where, {"X-Forwarded-For": "192.0.2.1"}).status == 200
    assert [server.get(f"/{short.path.hash_part}.ls").status for _ in range(5)] == [200] * 5
