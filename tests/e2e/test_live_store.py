"""A store that changes while it is served: responses are current, and partial NARs never look complete."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.closure import Closure, build_one, instantiate
from support.nix_client import Client
from support.running import HARMONIA, PATIENCE_S, Server, patched

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]

# An unprivileged user. CAP_DAC_READ_SEARCH is only needed to reach this Python, which may belong to root.
NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


PLAIN = "enable_compression = false"
"""NARs come directly from the store object. tests/e2e/test_compression.py tests compressed NARs."""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Create a directory that every user can reach, unlike that of pytest."""
    with tempfile.TemporaryDirectory(prefix="harmonia-", ignore_cleanup_errors=True) as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@pytest.fixture(params=["root", "nobody"])
def start_as(request: pytest.FixtureRequest, start: Start) -> Start:
    """Return a function that starts servers, as root or as a user who cannot write to the store."""
    program = [*NOBODY, *HARMONIA] if request.param == "nobody" else HARMONIA
    return lambda **options: start(program=program, settings=PLAIN, **options)


@pytest.fixture
def store(make_client: MakeClient) -> Client:
    """Return the client whose store is served."""
    return make_client("store")


def narinfo(path: str) -> str:
    return f"/{path.removeprefix('/nix/store/')[:32]}.narinfo"


def nar(server: Server, path: str) -> str:
    (url,) = (line for line in server.get(narinfo(path)).text.splitlines() if line.startswith("URL: "))
    return "/" + url.removeprefix("URL: ")


def holds(client: Client, path: str) -> bool:
    return client.run("nix-store", "--check-validity", path, check=False).returncode == 0


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a condition that can become true only while `process` runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_added_and_deleted_paths_are_noticed_at_once(start_as: Start, store: Client, client: Client) -> None:
    path = build_one(store, "changing-1.0", "echo changing > $out")
    store.run("nix-store", "--delete", path)
    # The files that Nix leaves beside its database decide how an unprivileged user can read it.
    assert store.db_path.with_name("db.sqlite-shm").exists() == (store.nix.version >= (2, 22))
    server = start_as(store=store.directory)
    assert server.get(narinfo(path)).status == 404

    build_one(store, "changing-1.0", "echo changing > $out")
    url = nar(server, path)
    assert server.get(url).body == store.run("nix-store", "--dump", path).stdout
    assert "Sig:" not in server.get(narinfo(path)).text
    key = store.generate_key("late-1")
    store.run("nix", "store", "sign", "--key-file", key.secret_file, path)
    assert "\nSig: late-1:" in server.get(narinfo(path)).text
    client.settings |= {"substituters": server.url, "trusted-public-keys": key.public}
    client.run("nix-store", "--realise", path)
    client.run("nix-store", "--verify-path", path)

    store.run("nix-store", "--delete", path)
    assert server.get(narinfo(path)).status == server.get(url).status == 404
    build_one(store, "changing-1.0", "echo changing > $out")
    assert server.get(narinfo(path)).status == server.get(url).status == 200
    store.run("nix-collect-garbage")
    assert server.get(narinfo(path)).status == server.get(url).status == 404


def test_paths_in_the_wal_of_a_running_daemon_are_served(start_as: Start, store: Client, tmp_path: Path) -> None:
    """While a build runs, its process keeps the database open, and new paths are only in the WAL."""
    go, waiting, added = tmp_path / "go", tmp_path / "waiting", tmp_path / "added"
    added.touch()
    with store.daemon():
        script = f"touch {waiting}; until [ -e {go} ]; do sleep 0.05; done; echo slow > $out"
        slow = instantiate(store, "slow-1.0", script)
        with store.running("nix-store", "--realise", slow) as build:
            wait_until(waiting.exists, build)
            server = start_as(store=store.directory)
            path = store.run("nix-store", "--add", added).text
            assert store.db_path.with_name("db.sqlite-wal").stat().st_size > 0
            assert server.get(nar(server, path)).body == store.run("nix-store", "--dump", path).stdout
            store.run("nix-store", "--delete", path)
            assert server.get(narinfo(path)).status == 404
            go.touch()
            assert build.wait(PATIENCE_S) == 0
        built = store.run("nix-store", "--query", "--outputs", slow).text
        assert server.get(nar(server, built)).body == store.run("nix-store", "--dump", built).stdout
    assert server.get(narinfo(built)).status == 200


# Changes during a download. The store object has two files; the server is halted within the first.


@pytest.fixture
def big(store: Client) -> str:
    """Build a path with a file larger than all buffers, and another file after it."""
    return build_one(store, "big-1.0", "mkdir $out; truncate --size 128M $out/a; echo end > $out/b")


HALTING = patched("""
import os, signal, sys
from harmonia.store.file_reader import OpenSlice
read_cached = OpenSlice.read_cached
def halting(self, *size):
    if self.position > 1 << 20 and os.path.exists(halt):
        os.unlink(halt)
        os.kill(os.getpid(), signal.SIGSTOP)
    return read_cached(self, *size)
halt = os.path.join(os.path.dirname(sys.argv[-1]), "halt")
OpenSlice.read_cached = halting
""")
"""A server whose worker halts itself within a large file, once, if the file `halt` exists."""


@contextmanager
def halfway(server: Server, client: Client, path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a client that copies the path, and halt the server's worker during the `with`."""
    (worker,) = server.workers
    (server.directory / "halt").touch()

    def is_halted() -> bool:
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    with client.running(*copying(server, path)) as copy:
        wait_until(is_halted, copy)
        yield copy
        if worker in server.workers:
            os.kill(worker, signal.SIGCONT)
        copy.wait(PATIENCE_S)


def copying(server: Server, path: str) -> tuple[str, ...]:
    return ("nix", "copy", "--no-check-sigs", "--from", server.url, path)


def remove(path: Path) -> None:
    shutil.rmtree(path)


def shorten(path: Path) -> None:
    os.truncate(path / "a", 1000)


def lengthen(path: Path) -> None:
    os.truncate(path / "a", 129 << 20)


@pytest.mark.parametrize("damage", [remove, shorten, lengthen])
def test_path_damaged_during_a_download_breaks_it(
    start: Start, store: Client, client: Client, big: str, damage: Callable[[Path], None]
) -> None:
    server = start(store=store.directory, settings=PLAIN, program=HALTING)
    url = nar(server, big)
    with halfway(server, client, big) as copy:
        damage(store.real_path(big))
    assert copy.returncode != 0
    assert not holds(client, big)
    client.run("nix-store", "--verify", "--check-contents")
    server.wait_for_log(f"ERROR {url} breaks off")


def restart(server: Server) -> None:
    """Restart the server as after a crash: running responses break off."""
    workers = server.workers
    server.process.kill()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    server.stop()
    server.start()


def test_download_is_resumed_after_a_restart(
    start: Start, store: Client, client: Client, big: str, new_port: Callable[[], int]
) -> None:
    bind = f"127.0.0.1:{new_port()}"
    server = start(store=store.directory, settings=PLAIN, program=HALTING, bind=bind)
    with halfway(server, client, big) as copy:
        restart(server)
    assert holds(client, big) == (copy.returncode == 0)
    client.run("nix-store", "--verify", "--check-contents")
    client.run(*copying(server, big))
    client.run("nix-store", "--verify-path", big)


def test_request_is_repeated_after_a_restart(
    start: Start, client: Client, closure: Closure, new_port: Callable[[], int]
) -> None:
    port = new_port()
    server = start(store=closure.server.directory, settings=PLAIN, bind=f"127.0.0.1:{port}")
    (worker,) = server.workers
    os.kill(worker, signal.SIGSTOP)
    with client.running(*copying(server, closure.top)) as copy:
        # Linux Documentation/networking/proc_net_tcp.rst: the local address in hexadecimal, and 01 is "established".
        wait_until(lambda: has_connection(port), copy)
        restart(server)
        assert copy.wait(PATIENCE_S) == 0
    client.run("nix-store", "--verify-path", *client.run("nix-store", "--query", "--requisites", closure.top).lines)


def has_connection(port: int) -> bool:
    entries = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(local.endswith(f":{port:04X}") and state == "01" for _, local, _, state, *_ in entries)


def test_path_missing_on_disk_is_substituted_from_the_next_cache(
    start: Start, store: Client, client: Client, tmp_path: Path
) -> None:
    path = build_one(store, "gone-1.0", "mkdir $out; echo gone > $out/file")
    key = store.generate_key("gone-1")
    store.run("nix", "store", "sign", "--key-file", key.secret_file, path)
    next_cache = f"file://{tmp_path}/static"
    store.run("nix", "copy", "--to", next_cache, path)
    server = start(store=store.directory, settings=PLAIN)
    shutil.rmtree(store.real_path(path))

    assert server.get(nar(server, path)).status == 404
    client.settings["trusted-public-keys"] = key.public
    assert client.run(*copying(server, path), check=False).returncode != 0
    assert not holds(client, path)
    client.settings["substituters"] = f"{server.url} {next_cache}?priority=50"
    fetched = client.run("nix-store", "--realise", path)
    assert f"copying path '{path}' from '{server.url}'" in fetched.stderr
    assert f"copying path '{path}' from '{next_cache}'" in fetched.stderr
    client.run("nix-store", "--verify-path", path)
