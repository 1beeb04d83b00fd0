"""`/<hash>.ls`: what is in a NAR, and where."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server
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
    """A path whose listing is too long to be rendered twice."""
    return store.add(store.output_path("large"), {f"a-name-of-many-letters-{number:06}": b"" for number in range(9000)})


def test_a_large_one_is_sent_while_it_is_made(start: Start, large: PathInfo, tmp_path: Path) -> None:
    server, where = start(store=tmp_path / "store"), f"/{large.path.hash_part}.ls"
    streamed = server.get(where)
    assert streamed.headers["transfer-encoding"] == "chunked"
    assert server.head(where).headers == streamed.headers
    assert len(json.loads(streamed.body)["root"]["entries"]) == 9000
    compressed = server.get(where, {"Accept-Encoding": "zstd"})
    assert zstandard.ZstdDecompressor().decompressobj().decompress(compressed.body) == streamed.body
    of_an_old_client = server.request("GET", where, version="1.0")
    assert of_an_old_client.headers["content-length"] == str(len(streamed.body))
    assert of_an_old_client.body == streamed.body
    part = server.get(where, {"Range": "bytes=300000-300099"})
    assert part.headers["content-range"] == f"bytes 300000-300099/{len(streamed.body)}"
    assert part.body == streamed.body[300000:300100]
