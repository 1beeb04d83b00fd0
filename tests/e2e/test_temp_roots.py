"""With a Nix daemon, paths are not garbage-collected while they are sent. Real Nix tries to delete them."""

import fcntl
import hashlib
import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.closure import build_one
from support.nix_client import Client
from support.running import Server, unpacked, wait_until

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

PLAIN, COMPRESSED = "enable_compression = false", "enable_compression = true"


@pytest.fixture
def store(make_client: MakeClient) -> Client:
    """Return the client whose store is served."""
    return make_client("store")


@pytest.fixture
def path(store: Client) -> str:
    """Build an unreferenced path with a file larger than all buffers, even compressed, and another file after it."""
    return build_one(store, "big-1.0", "mkdir $out; head -c 16M /dev/urandom > $out/a; echo end > $out/b")


@contextmanager
def begun(server: Server, path: str) -> Iterator[http.client.HTTPResponse]:
    """Start a download of the NAR, and stop reading."""
    info = server.get(f"/{Path(path).name[:32]}.narinfo").text
    (url,) = (line.removeprefix("URL: ") for line in info.splitlines() if line.startswith("URL: "))
    with server.connect(60, receive_buffer=8192) as connection:
        connection.sendall(f"GET /{url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            assert response.status == 200
            yield response


def is_rooted(store: Client, path: str) -> bool:
    """Return True if a process has a temporary root for the path, in a locked file (Nix `src/libstore/gc.cc`)."""
    for file in (store.directory / "nix/var/nix/temproots").iterdir():
        with suppress(FileNotFoundError), file.open("rb") as roots:
            try:
                fcntl.flock(roots, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if path.encode() + b"\0" in roots.read():
                    return True
    return False


def delete(store: Client, path: str) -> bool:
    """Try to delete the path. Return True if Nix deleted it."""
    return store.run("nix-store", "--delete", path, check=False).returncode == 0


@pytest.mark.parametrize("settings", [PLAIN, COMPRESSED], ids=["plain", "compressed"])
def test_path_is_deletable_after_its_download_and_not_before(
    start: Start, store: Client, path: str, settings: str
) -> None:
    nar_hash = hashlib.sha256(store.run("nix-store", "--dump", path).stdout).digest()
    server = start(store=store.directory, settings=settings)
    with store.daemon():
        with begun(server, path) as response:
            wait_until(lambda: is_rooted(store, path))
            store.run("nix-store", "--gc")
            assert (store.real_path(path) / "b").exists()
            assert not delete(store, path)
            body = response.read()
        assert hashlib.sha256(unpacked(body) if settings == COMPRESSED else body).digest() == nar_hash
        wait_until(lambda: delete(store, path))
    assert len(server.log) == 2, server.log  # start and overview


def test_path_is_deletable_after_its_client_disconnects(start: Start, store: Client, path: str) -> None:
    server = start(store=store.directory, settings=PLAIN)
    with store.daemon():
        with begun(server, path):
            wait_until(lambda: is_rooted(store, path))
        wait_until(lambda: delete(store, path))


def test_root_is_registered_again_after_a_restart_of_the_daemon(start: Start, store: Client, path: str) -> None:
    server = start(store=store.directory, settings=PLAIN)
    with begun(server, path) as response:
        for _ in range(2):
            with store.daemon():
                wait_until(lambda: is_rooted(store, path))
                assert not delete(store, path)
        assert len(response.read()) > 16 << 20


def test_without_a_daemon_the_download_breaks_off(start: Start, store: Client, path: str) -> None:
    server = start(store=store.directory, settings=PLAIN)
    with begun(server, path) as response:
        store.run("nix-store", "--gc")
        assert not store.real_path(path).exists()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()
    server.wait_for_log("ERROR .* breaks off")
