"""`warm = "new"` compresses new paths before a client asks, and delays and evicts nothing."""

import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from harmonia.cache.growing_file import GROWING
from harmonia.config.loader import parse
from harmonia.errors import ConfigError
from harmonia.nix.path_info import PathInfo
from harmonia.tools.fixture_tree import Sparse
from harmonia.tools.store_builder import StoreBuilder
from support.event_client import follow
from support.held_compression import held_by
from support.running import Server, file_url, unpacked, wait_until

Start = Callable[..., Server]

WARM = 'warm = "new"'


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    store = StoreBuilder(tmp_path / "store")
    store.add_text("old", b"old")
    return store


@pytest.fixture
def serve(store: StoreBuilder, start: Start) -> Start:
    """Return a function that starts a server with `warm`, and waits until it follows the store."""

    def start_warming(settings: str = "", **options: object) -> Server:
        server = start(store=Path(store.real_dir).parents[1], settings=f"{WARM}\n{settings}", **options)
        wait_until((server.cache_dir / "warmed").exists)
        first = store.add_text("first", b"first")
        wait_until(lambda: is_cached(server, first))
        return server

    return start_warming


def is_cached(server: Server, info: PathInfo) -> bool:
    return (server.cache_dir / "nar" / cached_name(info)).exists()


def cached_name(info: PathInfo) -> str:
    match = re.fullmatch(r"/nar/\w{32}-(\w{52})-(.+)\.nar\.zst", file_url(info))
    assert match
    return f"{match[1]}.{match[2]}"


def warmers(server: Server) -> list[int]:
    """Return the processes with threads of idle priority."""
    return [pid for pid in server.workers if os.SCHED_IDLE in policies(pid)]


def warmer(server: Server) -> int:
    """Return the process that warms, and fail if there is none."""
    [pid] = warmers(server)
    return pid


def policies(pid: int) -> list[int]:
    """Return the scheduling policy of each thread of a process. Some may end meanwhile."""
    found = []
    with suppress(FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(ProcessLookupError):
                found.append(os.sched_getscheduler(int(thread)))
    return found


def total(server: Server, name: str) -> float:
    match = re.search(rf"^harmonia_{name}_total (\S+)$", server.get("/metrics").text, re.MULTILINE)
    assert match
    return float(match[1])


def test_first_narinfo_of_a_new_path_has_the_size_of_the_file(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    new = store.add(store.output_path("large"), os.urandom(1000) * 5000)
    wait_until(lambda: is_cached(server, new))
    narinfo = server.get(f"/{new.path.hash_part}.narinfo").text
    body = server.get(file_url(new)).body
    assert f"\nFileSize: {len(body)}\n" in narinfo
    assert "\nFileHash: sha256:" in narinfo
    assert len(unpacked(body)) == new.nar_size
    wait_until(lambda: total(server, "warmed_nars") == 2)
    assert total(server, "cache_hits") == 1
    assert total(server, "cache_fills") == 2


def test_paths_from_before_the_first_start_are_not_compressed(store: StoreBuilder, serve: Start) -> None:
    old = store.add_text("older", b"older")
    server = serve()
    assert not is_cached(server, old)
    assert len(list((server.cache_dir / "nar").iterdir())) == 1


def test_paths_from_while_the_server_was_down_are_compressed(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    server.stop()
    server.log.clear()
    new = store.add_text("meanwhile", b"")
    server.start()
    wait_until(lambda: is_cached(server, new))


def test_private_path_is_not_compressed(store: StoreBuilder, serve: Start) -> None:
    server = serve("publish.deny = ['secret*']")
    secret = store.add_text("secret", b"secret")
    public = store.add_text("public", b"public")
    wait_until(lambda: is_cached(server, public))
    wait_until(lambda: total(server, "warmed_nars") == 2)
    assert not is_cached(server, secret)


def test_full_cache_evicts_nothing(store: StoreBuilder, serve: Start) -> None:
    server = serve("cache_size = '1M'")
    infos = [store.add(store.output_path(f"noise-{number}"), os.urandom(400_000)) for number in range(4)]
    wait_until(lambda: total(server, "warm_no_room") == 2)  # perhaps before the other two are compressed
    wait_until(lambda: sum(is_cached(server, info) for info in infos) == 2)
    assert total(server, "cache_evictions") == 0


def test_replaced_process_continues(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    first = warmer(server)
    os.kill(first, signal.SIGSTOP)
    infos = [store.add_text(f"text-{number}", b"text" * number) for number in range(5)]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: all(is_cached(server, info) for info in infos))
    assert warmers(server) != [first]


def test_download_does_not_wait_for_a_process_that_warms(store: StoreBuilder, serve: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    server = serve(program=held_by(gate, least=1 << 20))
    info = store.add(store.output_path("large"), Sparse(64 << 20))
    growing = server.cache_dir / "nar" / f"{cached_name(info)}.warm{GROWING}"
    wait_until(growing.exists)
    os.kill(warmer(server), signal.SIGSTOP)
    gate.unlink()
    try:
        small = store.add_text("other", b"other")
        assert server.get(file_url(small)).status == 200
        with server.connect() as connection:
            connection.sendall(f"GET {file_url(info)} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            assert connection.recv(4096)
    finally:
        os.kill(warmer(server), signal.SIGCONT)
    wait_until(lambda: not growing.exists())  # it gives way to the download


def test_all_compressing_threads_have_idle_priority(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    store.add(store.output_path("large"), Sparse(64 << 20))
    wait_until(lambda: total(server, "warmed_nars") == 2)
    assert policies(warmer(server)).count(os.SCHED_OTHER) <= 1


def test_compressed_path_is_an_event(store: StoreBuilder, serve: Start) -> None:
    server = serve("browse = true", workers=2)
    with follow(server, "?event=compressed") as client:
        info = store.add_text("new", b"new")
        # That of the path which `serve` has waited for may come only now.
        assert f"/nix/store/{info.path}" in (client.until("compressed").data["path"] for _ in range(2))


def test_damaged_path_is_counted_and_does_not_stop_the_others(store: StoreBuilder, serve: Start) -> None:
    server = serve()
    bad = store.add_text("bad", b"bad")
    with store.connect() as connection:
        connection.execute("update ValidPaths set narSize = 1 where path = ?", (f"/nix/store/{bad.path}",))
    good = store.add_text("good", b"good")
    wait_until(lambda: is_cached(server, good))
    assert not [line for line in server.log if "Traceback" in line]


def test_server_stops_while_a_path_is_compressed(store: StoreBuilder, serve: Start, tmp_path: Path) -> None:
    server = serve(program=held_by(tmp_path / "gate", least=1 << 20))
    info = store.add(store.output_path("large"), Sparse(64 << 20))
    wait_until((server.cache_dir / "nar" / f"{cached_name(info)}.warm{GROWING}").exists)
    assert server.stop() == 0
    assert not list((server.cache_dir / "nar").glob(f"*{GROWING}"))


def test_warm_needs_compression() -> None:
    with pytest.raises(ConfigError, match="warm: enable_compression = false disables compression"):
        parse(f"{WARM}\nenable_compression = false", "harmonia.toml", {})
    with pytest.raises(ConfigError, match="warm"):
        parse('warm = "old"', "harmonia.toml", {})


def test_without_the_setting_nothing_is_compressed(store: StoreBuilder, start: Start, tmp_path: Path) -> None:
    server = start(store=tmp_path / "store")
    store.add_text("new", b"new")
    server.get("/version")
    assert not warmers(server)
    assert len(server.workers) == 1
