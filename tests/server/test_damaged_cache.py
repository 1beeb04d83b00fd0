"""A cached file that changes on disk after it was verified is never sent."""

import http.client
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.disk_cache import cached_file, flip
from support.running import Server

BROKEN = (http.client.IncompleteRead, ConnectionResetError)
SIZE = 2 << 20  # bytes, incompressible


@pytest.fixture
def server(start: Callable[..., Server], tmp_path: Path, store: StoreBuilder) -> Server:  # noqa: ARG001 (makes it)
    return start(store=tmp_path / "store")


@pytest.fixture
def path(store: StoreBuilder) -> PathInfo:
    return store.add(store.output_path("random"), random.Random(1).randbytes(SIZE))


def url_of(server: Server, path: PathInfo) -> str:
    """Return the URL of the compressed NAR from its narinfo."""
    lines = server.get(f"/{path.path.hash_part}.narinfo").text.splitlines()
    return "/" + dict(line.split(": ", 1) for line in lines)["URL"]


def test_changed_byte_breaks_the_download_and_the_next_download_is_complete(server: Server, path: PathInfo) -> None:
    url = url_of(server, path)
    whole = server.get(url).body
    for position in (SIZE // 2, SIZE - 1):
        file = cached_file(server.cache_dir)
        assert server.get(url).body == whole
        flip(file, position)
        with pytest.raises(BROKEN) as broken:
            server.get(url)
        server.wait_for_log("removed a damaged file from the cache")
        if isinstance(broken.value, http.client.IncompleteRead):
            received = broken.value.partial
            assert whole.startswith(received)
            rest = server.get(url, {"Range": f"bytes={len(received)}-"})
            assert received + rest.body == whole
        assert server.get(url).body == whole
    assert "harmonia_cache_corrupt_total 2.0" in server.get("/metrics").text


def test_changed_byte_in_the_first_block_gets_503_and_the_next_request_200(server: Server, path: PathInfo) -> None:
    """Nix retries after a 503."""
    url = url_of(server, path)
    whole = server.get(url).body
    flip(cached_file(server.cache_dir), 100)
    answer = server.get(url)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert server.get(url).body == whole


def test_range_verifies_only_its_own_blocks(server: Server, path: PathInfo) -> None:
    url = url_of(server, path)
    whole = server.get(url).body
    flip(cached_file(server.cache_dir), SIZE // 2)
    assert server.get(url, {"Range": "bytes=1000-1999"}).body == whole[1000:2000]
    assert server.get(url, {"Range": "bytes=-100"}).body == whole[-100:]
    assert server.get(url, {"Range": f"bytes={SIZE // 2}-{SIZE // 2}"}).status == 503
    assert server.get(url, {"Range": f"bytes={SIZE // 2}-{SIZE // 2}"}).body == whole[SIZE // 2 : SIZE // 2 + 1]
