"""`/nar/…`: a whole NAR or a broken transfer, never a truncated NAR that looks complete."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from harmonia.nix import base32
from harmonia.store import tree_reader
from harmonia.store.store import Store
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, read_answer
from support.shared_store import dump, info, url

Start = Callable[..., Server]


@pytest.mark.parametrize("name", ["tree", "dep", "tree.drv"])
def test_nar_equals_the_registered_one(server: Server, shared_store: StoreBuilder, name: str) -> None:
    path = info(shared_store, name)
    answer = server.get(url(server, path.path.hash_part))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/x-nix-nar"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable, no-transform"
    assert answer.headers["content-length"] == str(path.nar_size)
    assert hashlib.sha256(answer.body).digest() == path.nar_hash


def test_older_nar_urls_work(server: Server, shared_store: StoreBuilder) -> None:
    path = info(shared_store, "tree")
    nar_hash, hash_part = base32.encode(path.nar_hash), path.path.hash_part
    whole = server.get(f"/nar/{hash_part}-{nar_hash}.nar")
    for older in (f"/nar/{nar_hash}.nar?hash={hash_part}", f"/nar/{hash_part}.nar"):
        answer = server.get(older)
        assert (answer.status, answer.body) == (200, whole.body)
        assert answer.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize(
    "shape",
    [
        "{hash_part}-{wrong}.nar",
        "{wrong}.nar?hash={hash_part}",
        "{nar_hash}.nar",
        "{nar_hash}.nar?hash=",
        "{nar_hash}.nar?hash=../../etc",
        "{missing}-{nar_hash}.nar",
        "{missing}.nar",
        "{hash_part}-{nar_hash}.nar.xz",
        "{hash_part}-{nar_hash}",
        "..%2f{hash_part}.nar",
        "%80.nar",
    ],
)
def test_unknown_or_malformed_nar_url_gets_404(server: Server, shared_store: StoreBuilder, shape: str) -> None:
    path = info(shared_store, "tree")
    name = shape.format(
        hash_part=path.path.hash_part, nar_hash=base32.encode(path.nar_hash), wrong="0" * 52, missing="0" * 32
    )
    answer = server.get(f"/nar/{name}")
    assert (answer.status, answer.body) == (404, b"Not Found\n")


def test_if_none_match_gets_304(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    answer = server.get(nar_path, {"If-None-Match": server.head(nar_path).headers["etag"]})
    assert (answer.status, answer.body) == (304, b"")


def test_many_nars_on_one_connection(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    expected = dump(shared_store, "tree")
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(f"GET {nar_path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert read_answer(connection).body == expected


def test_http_1_0_gets_a_content_length(server: Server, shared_store: StoreBuilder) -> None:
    nar_path = url(server, info(shared_store, "tree").path.hash_part)
    with server.connect() as connection:
        connection.sendall(f"GET {nar_path} HTTP/1.0\r\n\r\n".encode())
        answer = read_answer(connection)
        assert connection.recv(1) == b""
    assert answer.body == dump(shared_store, "tree")
    assert "transfer-encoding" not in answer.headers


def test_head_does_not_read_the_store_object(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("gone"), {"file": b"contents"})
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.path.hash_part)
    os.chmod(store.real_path(path.path), 0o755)  # otherwise only root could move it
    os.rename(store.real_path(path.path), tmp_path / "away")
    assert server.head(nar_path).headers["content-length"] == str(path.nar_size)


def test_missing_store_object_gets_404_until_restored(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("gone"), {"file": b"contents"})
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.path.hash_part)
    os.chmod(store.real_path(path.path), 0o755)  # otherwise only root could move it
    os.rename(store.real_path(path.path), tmp_path / "away")
    assert server.get(nar_path).status == 404
    assert server.wait_for_log(rf"ERROR .*{path.path}")
    os.rename(tmp_path / "away", store.real_path(path.path))
    assert server.get(nar_path).status == 200


def _truncate(root: bytes) -> None:
    os.truncate(root + b"/1", 10)


def _grow(root: bytes) -> None:
    with open(root + b"/1", "ab") as file:
        file.write(b"more")


def _remove(root: bytes) -> None:
    os.chmod(root, 0o700)
    os.unlink(root + b"/1")


def _add(root: bytes) -> None:
    os.chmod(root, 0o700)
    with open(root + b"/2", "wb") as file:
        file.write(b"x" * 100)


def _replace_by_link(root: bytes) -> None:
    os.chmod(root, 0o700)
    os.unlink(root + b"/1")
    os.symlink(b"/etc/passwd", root + b"/1")


@pytest.mark.parametrize("change", [_truncate, _grow, _remove, _add, _replace_by_link])
def test_store_object_changed_before_the_request_gets_404(
    start: Start, store: StoreBuilder, tmp_path: Path, change: Callable[[bytes], None]
) -> None:
    path = store.add(store.output_path("changed"), {"0": b"x" * 10_000_000, "1": b"y" * 1000})
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.path.hash_part)
    root = store.real_path(path.path)
    if change in (_truncate, _grow):
        os.chmod(root + b"/1", 0o600)
    change(root)
    assert server.get(nar_path).status == 404
    assert server.wait_for_log(rf"ERROR .*{path.path.hash_part}")
    assert server.get("/health").status == 200


@pytest.mark.parametrize("change", [_truncate, _grow, _remove, _replace_by_link])
def test_store_object_changed_during_the_transfer_breaks_it(
    start: Start, store: StoreBuilder, tmp_path: Path, change: Callable[[bytes], None]
) -> None:
    path = store.add(store.output_path("changed"), {"0": Sparse(64 << 20), "1": b"y" * 1000})
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.path.hash_part)
    root = store.real_path(path.path)
    with server.connect() as connection:
        connection.sendall(f"GET {nar_path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.recv(1000)
        if change in (_truncate, _grow):
            os.chmod(root + b"/1", 0o600)
        change(root)
        received = 1000
        with suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                received += len(data)
    assert received < path.nar_size
    assert server.wait_for_log(rf"ERROR .*{path.path.hash_part}.*breaks off")


def test_special_file_in_a_store_object_gets_404(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    path = store.add(store.output_path("fifo"), {"file": b"contents"})
    root = store.real_path(path.path)
    os.chmod(root, 0o700)
    os.mkfifo(root + b"/pipe")
    server = start(store=tmp_path / "store")
    assert server.get(url(server, path.path.hash_part)).status == 404
    assert server.wait_for_log("ERROR .*is not a regular file")


def test_nar_larger_than_4_gib_has_its_size(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """The file was enlarged after registration, so only the head and the first bytes are checked."""
    path = store.output_path("huge")
    store.add(path, b"small")
    real = os.fsdecode(store.real_path(path))
    os.chmod(real, 0o600)
    os.truncate(real, 5 << 30)
    size = sum(map(len, tree_reader.dump(os.fsencode(real))))
    with store.connect() as connection:
        connection.execute("update ValidPaths set narSize = ?", (size,))
    server = start(store=tmp_path / "store")
    nar_path = url(server, path.hash_part)
    assert server.head(nar_path).headers["content-length"] == str(size)
    with server.connect() as connection:
        connection.sendall(f"GET {nar_path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = connection.recv(4096).partition(b"\r\n\r\n")
        assert f"content-length: {size}".encode() in head
        assert body.startswith(b"\x0d\0\0\0\0\0\0\0nix-archive-1")
    assert Store(store.store_dir, store.real_dir, store.db_path).path_info(path.hash_part)
