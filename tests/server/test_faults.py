"""What befalls the store while it is read: what is there is not denied, and no part of a body passes for a whole."""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmonia.store_builder import Sparse, StoreBuilder
from running import Server, read_answer

Start = Callable[..., Server]

SIZE = 64 << 20
"""More than any buffer holds."""


@contextmanager
def begun(server: Server, path: str) -> Iterator[socket.socket]:
    """An answer that has begun, while most of its body waits for the client to read."""
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        yield connection


def test_a_locked_database_is_503_for_all_that_depends_on_it(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation, output = store.add_derivation("app", "/bin/sh")
    app = store.add(output, {"app": b"app"}, deriver=derivation.path)
    store.add_log(derivation.path, b"built")
    with store.connect() as connection:
        connection.execute("pragma journal_mode = delete")
    server = start(store=tmp_path / "store", settings="browse = true")
    hash_part = app.path.hash_part
    asked = [
        f"/{hash_part}.narinfo", f"/{hash_part}.ls", f"/nar/{hash_part}.nar", f"/path/{hash_part}", "/search?q=app",
        f"/serve/{hash_part}/app", f"/log/{hash_part}", f"/log/{derivation.path.hash_part}", f"/debuginfo/{'0' * 40}",
        f"/realisations/sha256:{'a' * 64}!out.doi", f"/build-trace-v2/{derivation.path}/out.doi", "/health",
    ]  # fmt: skip
    with store.connect() as connection, ThreadPoolExecutor(len(asked)) as clients:
        connection.execute("begin exclusive")
        answers = list(clients.map(server.get, asked))
        assert {path: answer.status for path, answer in zip(asked, answers, strict=True)} == dict.fromkeys(asked, 503)
        assert {(answer.text, answer.headers["retry-after"]) for answer in answers} == {("Service Unavailable\n", "1")}
        assert [server.get(path).status for path in ("/", "/nix-cache-info", "/version", "/metrics")] == [200] * 4
        assert server.get(f"/log/{derivation.path}").body == b"built"
    assert server.get(f"/path/{hash_part}").status == 200


@pytest.mark.parametrize("kept", ["finished", "growing"])
def test_a_log_that_is_removed_while_it_is_sent_comes_whole(
    start: Start, store: StoreBuilder, tmp_path: Path, kept: str
) -> None:
    derivation = store.output_path("removed.drv")
    path = store.add_log(derivation, b"", compressed=False)
    os.truncate(path, SIZE)
    if kept == "finished":
        os.utime(path, (0, 0))
    server = start(store=tmp_path / "store")
    with begun(server, f"/log/{derivation}") as connection:
        os.unlink(path)
        assert read_answer(connection).body == bytes(SIZE)
    assert server.get(f"/log/{derivation}").status == 404


def test_a_file_whose_path_is_collected_while_it_is_sent_comes_whole(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    info = store.add(store.output_path("collected"), {"big": Sparse(SIZE)})
    server = start(store=tmp_path / "store")
    where = f"/serve/{info.path.hash_part}/big"
    with begun(server, where) as connection:
        store.delete(info.path)
        assert read_answer(connection).body == bytes(SIZE)
    assert server.get(where).status == 404
    assert not [line for line in server.log if "Traceback" in line]
