"""`/<hash>.ls`: the entries of a NAR, and the offsets of their contents."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.running import FROZEN_RATES, KNOWN_LENGTHS, NO_CACHE, Server, patched
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


def test_listing_has_all_entries(server: Server, shared_store: StoreBuilder) -> None:
    response = listing(server, info(shared_store, "tree").path.hash_part)
    assert response["version"] == 1
    nodes = dict(files(response["root"]))
    for node in nodes.values():
        node.pop("narOffset", None)
        node.pop("entries", None)
    assert nodes == {
        "": {"type": "directory"},
        "/big": {"type": "regular", "size": 3145728, "executable": False},
        "/bin": {"type": "directory"},
        "/bin/link": {"type": "symlink", "target": "run"},
        "/bin/run": {"type": "regular", "size": 10, "executable": True},
        "/empty": {"type": "regular", "size": 0, "executable": False},
        "/empty-dir": {"type": "directory"},
        "/\udcff\udcfe": {"type": "regular", "size": 9, "executable": False},
    }


def test_offsets_point_at_the_contents_in_the_nar(server: Server, shared_store: StoreBuilder) -> None:
    path = info(shared_store, "tree")
    whole = dump(shared_store, "tree")
    path_of_listing = url(server, path.path.hash_part)
    root = shared_store.real_path(path.path)
    for name, node in files(listing(server, path.path.hash_part)["root"]):
        if node["type"] == "regular":
            contents = Path(
                (root + name.encode(errors="surrogateescape")).decode(errors="surrogateescape")
            ).read_bytes()
            first, size = node["narOffset"], node["size"]
            assert whole[first : first + size] == contents
            if size:
                answer = server.get(path_of_listing, {"Range": f"bytes={first}-{first + size - 1}"})
                assert answer.body == contents


@pytest.mark.parametrize("name", ["dep", "tree.drv"])
def test_listing_of_a_single_file(server: Server, shared_store: StoreBuilder, name: str) -> None:
    root = listing(server, info(shared_store, name).path.hash_part)["root"]
    assert root["type"] == "regular"
    assert root["narOffset"] == 96


def test_headers_conditions_and_ranges(server: Server, shared_store: StoreBuilder) -> None:
    path_of_listing = f"/{info(shared_store, 'tree').path.hash_part}.ls"
    answer = server.get(path_of_listing)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["etag"] != server.head(url(server, path_of_listing[1:33])).headers["etag"]
    assert server.get(path_of_listing, {"If-None-Match": answer.headers["etag"]}).status == 304
    assert server.get(path_of_listing, {"Range": "bytes=0-9"}).body == answer.body[:10]


@pytest.mark.parametrize("path", [f"/{'0' * 32}.ls", "/x.ls", "/.ls"])
def test_unknown_path_gets_404(server: Server, path: str) -> None:
    assert server.get(path).status == 404


def test_path_that_differs_from_its_registration_gets_404(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("tree"), {"a": b"a"}).path
    server = start(store=tmp_path / "store")
    root = Path(store.real_path(path).decode())
    root.chmod(0o700)
    (root / "b").write_bytes(b"b")
    assert server.get(f"/{path.hash_part}.ls").status == 404
    assert server.wait_for_log("were registered")
    (root / "b").unlink()
    assert server.get(f"/{path.hash_part}.ls").status == 200


class Stock(NamedTuple):
    """A store with a path whose listing is large enough to be kept in a file, and one with a short listing."""

    root: Path
    large: PathInfo
    short: PathInfo


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    store = StoreBuilder(root := tmp_path_factory.mktemp("stock"))
    large = store.add(store.output_path("large"), {f"a-name-of-many-letters-{n:06}": b"" for n in range(9000)})
    return Stock(root, large, store.add(store.output_path("short"), {"file": b""}))


@pytest.mark.parametrize("cache_dir", [None, NO_CACHE], ids=["kept", "no cache directory"])
def test_large_listing_is_identical_in_all_encodings_and_protocols(
    start: Start, stock: Stock, cache_dir: Path | None
) -> None:
    server = start(store=stock.root, cache_dir=cache_dir, program=KNOWN_LENGTHS)
    path_of_listing = f"/{stock.large.path.hash_part}.ls"
    streamed = server.get(path_of_listing)
    assert server.head(path_of_listing).headers == streamed.headers
    assert len(json.loads(streamed.body)["root"]["entries"]) == 9000
    for _ in range(2):
        compressed = server.get(path_of_listing, {"Accept-Encoding": "zstd"})
        assert zstandard.ZstdDecompressor().decompressobj().decompress(compressed.body) == streamed.body
    http_1_0 = server.request("GET", path_of_listing, version="1.0")
    assert http_1_0.headers["content-length"] == str(len(streamed.body))
    assert http_1_0.body == streamed.body
    part = server.get(path_of_listing, {"Range": "bytes=300000-300099"})
    assert part.headers["content-range"] == f"bytes 300000-300099/{len(streamed.body)}"
    assert part.body == streamed.body[300000:300100]


COUNTED = """
import logging
from harmonia.nix import listing
render = listing.render
def counted(located):
    logging.getLogger("harmonia").warning("a listing is rendered")
    return render(located)
listing.render = counted
"""


@pytest.mark.parametrize("length", ["short", "long"])
def test_listing_is_rendered_once_for_all_ranges(start: Start, stock: Stock, length: str) -> None:
    path = (stock.large if length == "long" else stock.short).path
    server, path_of_listing = start(store=stock.root, program=patched(COUNTED)), f"/{path.hash_part}.ls"
    with ThreadPoolExecutor(8) as clients:
        parts = list(
            clients.map(lambda number: server.get(path_of_listing, {"Range": f"bytes={number}-{number}"}), range(30))
        )
    whole = server.get(path_of_listing).body
    assert b"".join(part.body for part in parts) == whole[:30]
    assert len([line for line in server.log if "a listing is rendered" in line]) == 1


def test_damaged_listing_file_is_rendered_again(start: Start, stock: Stock, tmp_path: Path) -> None:
    path_of_listing = f"/{stock.large.path.hash_part}.ls"
    server = start(store=stock.root, cache_dir=tmp_path / "cache")
    whole = server.get(path_of_listing).body
    server.stop()
    [file] = (tmp_path / "cache/layouts").glob("*.ls")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(file.read_bytes()[:-1000])
    assert start(store=stock.root, cache_dir=tmp_path / "cache").get(path_of_listing).body == whole


def test_max_query_rate_limits_long_listings_only(start: Start, stock: Stock) -> None:
    settings = "max_query_rate = 3\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=stock.root, settings=settings, program=patched(FROZEN_RATES))
    path_of_listing = f"/{stock.large.path.hash_part}.ls"
    answers = [server.get(path_of_listing, {"Range": "bytes=-1"}) for _ in range(5)]
    assert [answer.status for answer in answers] == [206] * 3 + [429] * 2
    assert "retry-after" in answers[-1].headers
    assert server.get(path_of_listing, {"X-Forwarded-For": "192.0.2.1"}).status == 200
    assert [server.get(f"/{stock.short.path.hash_part}.ls").status for _ in range(5)] == [200] * 5
