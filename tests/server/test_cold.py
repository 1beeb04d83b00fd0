"""A NAR that was never compressed is sent at once, in whatever way it is asked for."""

import http.client
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.tools.store_builder import StoreBuilder
from support.cutting_proxy import CuttingProxy
from support.held_compression import held_by
from support.nginx import nginx
from support.running import NO_CACHE, PATIENCE_S, Answer, Server, file_url, unpacked, wait_until

Start = Callable[..., Server]

MIB = 1 << 20


def add_big(store: StoreBuilder) -> tuple[PathInfo, bytes]:
    """Add a path with files of all sizes, whose NAR has many blocks and two frames."""
    small = {f"{number}": os.urandom(number) for number in range(300)}
    info = store.add(store.output_path("big"), {**small, "large": os.urandom(8 * MIB), "other": bytes(2 * MIB + 1)})
    return info, b"".join(file_reader.read(tree_reader.dump(store.real_path(info.path))))


def fetched(url: str, path: str, method: str = "GET", **headers: str) -> Answer:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)) as connection:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as response:
            named = {name.lower(): value for name, value in response.getheaders() if name != "Date"}
            return Answer(response.status, named, response.read())


def test_http_1_0_gets_a_cold_file_before_it_is_compressed(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, plain = add_big(store)
    server = start(store=tmp_path / "store", program=held_by(tmp_path / "held"))
    with nginx(tmp_path / "nginx", f"location / {{ proxy_pass {server.url}; }}") as (url, _):
        head = fetched(url, file_url(info), "HEAD")
        cold = fetched(url, file_url(info))
        assert (cold.status, unpacked(cold.body)) == (200, plain)
        assert cold.headers["accept-ranges"] == "none"
        assert cold.headers["cache-control"] == "no-store, no-transform"
        assert "etag" not in cold.headers
        assert (head.status, head.headers) == (200, cold.headers)
        (tmp_path / "held").unlink()
        wait_until(lambda: "etag" in fetched(url, file_url(info), "HEAD").headers)  # compressed by the first request
        warm = fetched(url, file_url(info))
        assert (warm.status, unpacked(warm.body)) == (200, plain)
        assert len(warm.body) < len(cold.body)
        assert warm.headers["accept-ranges"] == "bytes"
        part = fetched(url, file_url(info), Range="bytes=1000-")
        assert (part.status, part.body) == (206, warm.body[1000:])


def test_http_1_1_still_gets_the_compressed_file(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, plain = add_big(store)
    server = start(store=tmp_path / "store")
    answer = server.get(file_url(info))
    assert unpacked(answer.body) == plain
    assert len(answer.body) < len(plain) - MIB
    assert answer.headers["accept-ranges"] == "bytes"


def test_http_1_0_sees_a_cold_file_that_breaks_off(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info, _ = add_big(store)
    server = start(store=tmp_path / "store", program=held_by(tmp_path / "held"))
    port = int(server.url.rpartition(":")[2])
    with (
        CuttingProxy(port, MIB, 5 * MIB) as network,
        nginx(tmp_path / "nginx", f"location / {{ proxy_pass {network.url}; }}") as (url, _),
        pytest.raises(http.client.IncompleteRead),
    ):
        fetched(url, file_url(info))
    (tmp_path / "held").unlink()


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_a_damaged_nar_breaks_off_before_its_last_block(
    start: Start, store: StoreBuilder, tmp_path: Path, *, cache: bool
) -> None:
    info, _ = add_big(store)
    damaged = Path(os.fsdecode(store.real_path(info.path)), "large")
    damaged.chmod(0o600)
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)
    server = start(store=tmp_path / "store", cache_dir=None if cache else NO_CACHE)
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        server.request("GET", file_url(info), version="1.0")
    assert server.wait_for_log("its NAR hash is")
