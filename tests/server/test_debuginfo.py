"""`/debuginfo/<build id>`: the debug info of every binary whose debug output is in the store."""

import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

from harmonia.nix import base32, nar_parser
from harmonia.nix.nar import Entry
from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.debug_info import ONE, OTHER, TWO, add, add_rows
from support.programs import needs
from support.running import PATIENCE_S, Answer, Server, nar_url, open_files, patched, wait_until

Start = Callable[..., Server]


def answer_for(info: PathInfo, build_id: str) -> dict[str, str]:
    return {
        "archive": f"../nar/{info.path.hash_part}-{base32.encode(info.nar_hash)}.nar",
        "member": f"lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug",
    }


def lookup(server: Server, build_id: str) -> Any:
    answer = server.get(f"/debuginfo/{build_id}")
    assert answer.status == 200
    return json.loads(answer.body)


def is_404(answer: Answer) -> bool:
    assert answer.headers["cache-control"] == "no-store"
    return (answer.status, answer.text) == (404, "Not Found\n")


@contextmanager
def index_locked(server: Server) -> Iterator[None]:
    """Lock the index, as another process does while it writes."""
    wait_until(lambda: list(server.directory.glob("cache/debug-info/*.lock")))
    [lock] = server.directory.glob("cache/debug-info/*.lock")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_build_id_gets_archive_and_member(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    one, two = add(store, "one-debug", ONE, OTHER), add(store, "two-debug", TWO)
    server = start(store=tmp_path / "store")
    for info, build_id in ((one, ONE), (one, OTHER), (two, TWO)):
        answer = server.get(f"/debuginfo/{build_id}")
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "public, max-age=86400"
        assert json.loads(answer.body) == answer_for(info, build_id)
        assert server.get(f"/debuginfo/{build_id}.debug") == answer
        head = server.head(f"/debuginfo/{build_id}")
        assert (head.status, head.headers, head.body) == (200, answer.headers, b"")
        again = server.get(f"/debuginfo/{build_id}", {"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.headers["etag"], again.body) == (304, answer.headers["etag"], b"")
        nar = server.get(urljoin(f"/debuginfo/{build_id}", json.loads(answer.body)["archive"]))
        assert len(nar.body) == info.nar_size
    refused = server.request("POST", f"/debuginfo/{ONE}")
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "name",
    [
        "4" * 40,
        f"{'4' * 40}.debug",
        "444",
        "4" * 129,
        ONE[:-1],
        ONE.replace("1", "A"),
        f"{ONE}.debug.debug",
        f"{ONE}.xdebug",
        f"{ONE}%0a",
        f"{ONE}/debuginfo",
        f"{ONE}/",
        f"..%2f{ONE}",
        f"%00{ONE}",
        "%ff",
        "",
        ".debug",
    ],
)
def test_unknown_or_malformed_build_id_gets_404(server: Server, name: str) -> None:
    assert is_404(server.get(f"/debuginfo/{name}"))


def test_added_and_deleted_paths_are_noticed(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store")
    for _ in range(3):
        assert is_404(server.get(f"/debuginfo/{ONE}"))
        one, two = add(store, "one-debug", ONE), add(store, "two-debug", ONE)
        assert lookup(server, ONE) in (answer_for(one, ONE), answer_for(two, ONE))
        store.delete(one.path)
        assert lookup(server, ONE) == answer_for(two, ONE)
        store.delete(two.path)
    assert is_404(server.get(f"/debuginfo/{ONE}"))


@pytest.mark.parametrize(
    ("options", "cache_dir"),
    [({}, "/proc/none"), ({"settings": "enable_compression = false"}, None), ({"workers": 2}, "/proc/none")],
)
def test_build_ids_are_found_without_cache_directory_and_with_several_workers(
    start: Start, store: StoreBuilder, tmp_path: Path, options: dict[str, object], cache_dir: str | None
) -> None:
    one = add(store, "one-debug", ONE)
    server = start(store=tmp_path / "store", **options)
    if cache_dir:
        server.stop()
        server.config.write_text(server.config.read_text().replace(f"{server.directory}/cache", cache_dir))
        server.log.clear()
        server.start()
    for _ in range(10):
        assert lookup(server, ONE) == answer_for(one, ONE)
    two = add(store, "two-debug", TWO)
    for _ in range(10):
        assert lookup(server, TWO) == answer_for(two, TWO)
    server.stop()
    assert any("keeping it in memory" in line for line in server.log) == bool(cache_dir)
    assert not [line for line in server.log if "Traceback" in line]


def test_debug_info_false_disables_the_index(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    add(store, "one-debug", ONE)
    server = start(store=tmp_path / "store", settings="debug_info = false")
    assert is_404(server.get(f"/debuginfo/{ONE}"))
    assert not (server.directory / "cache/debug-info").exists()


def test_unknown_build_id_gets_503_while_paths_are_indexed(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """The client dwarffs would remember a 404 for a day."""
    one = add(store, "one-debug", ONE)
    server = start(store=tmp_path / "store")
    assert lookup(server, ONE) == answer_for(one, ONE)
    with index_locked(server):
        two = add(store, "two-debug", TWO)
        answer = server.get(f"/debuginfo/{TWO}")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["cache-control"] == "no-store"
    assert lookup(server, TWO) == answer_for(two, TWO)


PATIENT = patched("""
from harmonia.process import threads
from harmonia.server.resources import debuginfo
threads.BUSY_TIMEOUT_S = debuginfo._TIMEOUT_S = 600.0
""")


def wait_for_lookups(server: Server, number: int) -> None:
    """Wait until so many lookups have begun."""
    wait_until(lambda: f'in_flight{{route="debuginfo"}} {number}.0' in server.get("/metrics").text)


def test_request_that_waits_for_the_index_delays_no_other(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    one = add(store, "one-debug", ONE)
    server = start(store=tmp_path / "store", program=PATIENT)
    assert lookup(server, ONE) == answer_for(one, ONE)
    with ThreadPoolExecutor(1) as threads, index_locked(server):
        two = add(store, "two-debug", TWO)
        waiting = threads.submit(server.get, f"/debuginfo/{TWO}")
        wait_for_lookups(server, 1)
        for _ in range(3):
            assert lookup(server, ONE) == answer_for(one, ONE)
            assert server.get("/version").status == 200
        assert not waiting.done()
    assert json.loads(waiting.result().body) == answer_for(two, TWO)


def test_two_workers_share_one_index(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    one = add(store, "one-debug", ONE)
    server = start(store=tmp_path / "store", workers=2)
    assert lookup(server, ONE) == answer_for(one, ONE)
    with index_locked(server):
        seen: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while len(seen) < 2 and time.monotonic() < deadline:  # neither worker can write, both answer
            with server.connect() as connection:
                connection.sendall(f"GET /debuginfo/{ONE} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
                seen |= {pid for pid in server.workers if _holds(pid, connection.getsockname()[1])}
        assert len(seen) == 2
    [index] = server.directory.glob("cache/debug-info/*.sqlite")
    assert index.stat().st_size < 100_000


def _holds(pid: int, port: int) -> bool:
    """Return True if the process has the server's end of the connection from that port."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[2].endswith(f":{port:04X}")}
    names = open_files(pid)
    return any(f"socket:[{inode}]" in names for inode in inodes)


def test_worker_killed_while_indexing_is_replaced_and_indexing_completes(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    one = add(store, "one-debug", ONE)
    add_rows(store, 20_000)
    two = add(store, "two-debug", TWO)
    server = start(store=tmp_path / "store")
    assert lookup(server, ONE) == answer_for(one, ONE)
    workers = server.workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.workers and server.workers != workers)

    def has_two() -> bool:
        try:
            return server.get(f"/debuginfo/{TWO}").status == 200
        except OSError:
            return False

    wait_until(has_two)
    assert lookup(server, TWO) == answer_for(two, TWO)
    assert lookup(server, ONE) == answer_for(one, ONE)


@needs("gcc", "objcopy")
def test_debug_file_of_a_real_binary_is_found_and_fetched(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    """Start from the build id of a binary, as dwarffs does, and fetch by the whole NAR, and by listing and range."""
    (tmp_path / "main.c").write_text("int main(void) { return 0; }\n")
    program, debug = str(tmp_path / "program"), tmp_path / "program.debug"
    subprocess.run(["gcc", "-g", "-Wl,--build-id", "-o", program, str(tmp_path / "main.c")], check=True)
    subprocess.run(["objcopy", "--only-keep-debug", program, str(debug)], check=True)
    notes = subprocess.run(["readelf", "--notes", program], check=True, capture_output=True, text=True).stdout
    build_id = re.findall(r"Build ID: ([0-9a-f]+)", notes)[0]
    directory = tmp_path / f"lib/debug/.build-id/{build_id[:2]}"
    directory.mkdir(parents=True)
    debug.rename(directory / f"{build_id[2:]}.debug")
    info = store.add(store.output_path("program-debug"), {"lib": tmp_path / "lib", "nix-support": {"x": b"x" * 10_000}})
    content = (directory / f"{build_id[2:]}.debug").read_bytes()

    server = start(store=tmp_path / "store")
    response = lookup(server, build_id)
    archive = urljoin(f"/debuginfo/{build_id}", response["archive"])
    nar = server.get(archive).body

    parts = iter(nar_parser.parse([nar]))
    entry = next(part for part in parts if isinstance(part, Entry) and part.path == f"/{response['member']}".encode())
    member = b""
    while len(member) < entry.size:
        piece = next(parts)
        assert isinstance(piece, bytes)
        member += piece
    assert member == content

    node = json.loads(server.get(f"/{info.path.hash_part}.ls").body)["root"]
    for name in response["member"].split("/"):
        node = node["entries"][name]
    start_at, size = node["narOffset"], node["size"]
    part = server.get(archive, {"Range": f"bytes={start_at}-{start_at + size - 1}"})
    assert (part.status, part.body) == (206, content)
    assert member[:4] == b"\x7fELF"


def test_downloads_do_not_wait_for_a_locked_index(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    info = add(store, "debug", ONE)
    server = start(store=tmp_path / "store", program=PATIENT)
    assert server.get(f"/debuginfo/{ONE}").status == 200
    (path,) = server.cache_dir.rglob("*.sqlite")
    with ThreadPoolExecutor(21) as clients, closing(sqlite3.connect(path, isolation_level=None)) as index:
        index.execute("begin exclusive")  # as while another worker commits to a slow disk
        waiting = [clients.submit(server.get, f"/debuginfo/{ONE}") for _ in range(20)]
        wait_for_lookups(server, 20)
        assert server.get(nar_url(info)).status == 200
        assert not all(each.done() for each in waiting)
        index.execute("rollback")
