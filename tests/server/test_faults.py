"""Faults of the store while it is read: existing paths never get a 404, and no partial body looks complete."""

import errno
import http.client
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.programs import require
from support.running import Server, nar_url, read_answer, wait_until
from support.small_disk import with_mount
from support.unscathed import unscathed

Start = Callable[..., Server]

SIZE = 16 << 20
"""More than the buffers of a slow client hold."""


@contextmanager
def begun(server: Server, path: str) -> Iterator[socket.socket]:
    """Start a response, and yield its connection while most of the body still waits for the client to read."""
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        assert connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        yield connection


def test_locked_database_gets_503_for_everything_that_needs_it(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
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
def test_log_removed_while_it_is_sent_arrives_whole(
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


def test_file_garbage_collected_while_it_is_sent_arrives_whole(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    info = store.add(store.output_path("collected"), {"big": Sparse(SIZE)})
    server = start(store=tmp_path / "store")
    url = f"/serve/{info.path.hash_part}/big"
    with begun(server, url) as connection:
        store.delete(info.path)
        assert read_answer(connection).body == bytes(SIZE)
    assert server.get(url).status == 404
    assert not [line for line in server.log if "Traceback" in line]


BROKEN = (http.client.IncompleteRead, ConnectionResetError)


def remove(directory: Path) -> None:
    (directory / "b").unlink()


def shorten(directory: Path) -> None:
    os.truncate(directory / "a", 1000)


def lengthen(directory: Path) -> None:
    os.truncate(directory / "a", SIZE + 1)


def replace_by_outside_symlink(directory: Path) -> None:
    (directory / "b").unlink()
    (directory / "b").symlink_to("/etc/passwd")


def replace_by_fifo(directory: Path) -> None:
    (directory / "b").unlink()
    os.mkfifo(directory / "b")


@pytest.mark.parametrize("damage", [remove, shorten, lengthen, replace_by_outside_symlink, replace_by_fifo])
def test_file_damaged_during_a_download_breaks_it(
    start: Start, store: StoreBuilder, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    other = store.add_text("other", b"other")
    info = store.add(store.output_path("damaged"), {"a": Sparse(SIZE), "b": b"end"})
    directory = Path(os.fsdecode(store.real_path(info.path)))
    server = start(store=tmp_path / "store")
    directory.chmod(0o755)
    (directory / "a").chmod(0o644)
    with unscathed(server, info, other):
        with begun(server, nar_url(info)) as connection:
            damage(directory)
            with pytest.raises(BROKEN):
                read_answer(connection)
        server.wait_for_log(f"ERROR {nar_url(info)} breaks off")
        assert server.get(nar_url(other)).status == 200
        os.truncate(directory / "a", SIZE)
        (directory / "b").unlink(missing_ok=True)
        (directory / "b").write_bytes(b"end")
        os.chmod(directory / "b", 0o444)


@pytest.mark.root
def test_unreadable_disk_gets_404_or_breaks_off(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """A squashfs with a wrong checksum makes the kernel report EIO."""
    require("mksquashfs")
    chance = random.Random(1)
    marks = [chance.randbytes(64 << 10) for _ in range(2)]
    early = store.add(store.output_path("early"), {"a": marks[0] + bytes(64 << 10)})
    late = store.add(store.output_path("late"), {"a": Sparse(SIZE), "b": marks[1] + bytes(1 << 20)})
    whole = store.add(store.output_path("whole"), {"a": b"whole"})
    image = tmp_path / "image"
    subprocess.run(["mksquashfs", store.real_dir, image, "-quiet", "-no-progress"], check=True)
    content = bytearray(image.read_bytes())
    for mark in marks:
        position = content.index(mark[1000:1064])
        content[position] ^= 1
    image.write_bytes(content)
    program = with_mount("-t", "squashfs", "-o", "loop,ro", str(image), store.real_dir)
    server = start(store=tmp_path / "store", program=program)
    with unscathed(server, whole):
        for _ in range(3):
            assert server.get(nar_url(early)).status == server.get(nar_url(early) + ".zst").status == 404
            for suffix in ("", ".zst"):
                with pytest.raises(BROKEN):
                    server.get(nar_url(late) + suffix)
            assert server.get(f"/serve/{early.path.hash_part}/a").status == 404
    assert server.wait_for_log(f"ERROR GET {nar_url(early)}: 404, .*{os.strerror(errno.EIO)}")
    assert server.wait_for_log(f"ERROR {nar_url(late)} breaks off after .*{os.strerror(errno.EIO)}")


@contextmanager
def away(path: Path) -> Iterator[None]:
    path.rename(path.with_suffix(".away"))
    yield
    path.with_suffix(".away").rename(path)


@contextmanager
def truncated(path: Path) -> Iterator[None]:
    content = path.read_bytes()
    os.truncate(path, 100)
    yield
    path.write_bytes(content)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    with away(path):
        path.write_bytes(b"nonsense" * 1000)
        yield
        path.unlink()


@pytest.mark.parametrize("fault", [away, truncated, replaced])
def test_missing_or_damaged_database_gets_503_until_restored(
    start: Start, store: StoreBuilder, tmp_path: Path, fault: Callable[[Path], AbstractContextManager[None]]
) -> None:
    info = store.add(store.output_path("app"), {"app": b"app"})
    with store.connect() as connection:
        connection.execute("pragma journal_mode = delete")
    server = start(store=tmp_path / "store")
    with unscathed(server, info):
        for _ in range(3):
            with fault(tmp_path / "store/nix/var/nix/db/db.sqlite"):
                for path in (f"/{info.path.hash_part}.narinfo", nar_url(info), f"/{'0' * 32}.narinfo", "/health"):
                    answer = server.get(path)
                    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            wait_until(lambda: server.get("/health").status == 200)
