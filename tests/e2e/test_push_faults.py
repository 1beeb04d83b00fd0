"""Faulty pushes: no wrong path becomes valid, no file stays in the spool, and the next push succeeds."""

import fcntl
import lzma
import os
import random
import shutil
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import pytest
import zstandard

from harmonia.nix.signing import SecretKey
from support.closure import make_closure, requisites
from support.nix_client import Client
from support.push_target import Target, push, spooled
from support.pusher import Pushed, Pusher, signed
from support.running import Server, patched, peak_bytes, read_answer, run, wait_until
from support.small_disk import mounted

FAULTY_PUSHES = int(os.environ.get("HARMONIA_FAULTY_PUSHES", "60"))
"""Number of faulty pushes in one run of the test."""
SIZES = (2000, 2000, 2000, 400_000)
"""Bounds of the sizes of their files: large ones are imported by threads."""
SEED = int(os.environ.get("HARMONIA_SEED", "1"))


def flipped(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def faulty_push(pusher: Pusher, good: Pushed, other: Pushed, key: SecretKey, chance: random.Random) -> None:
    """Push a path with one of many faults. Most of them are refused; some are harmless."""
    info = good.info
    match chance.randrange(9):
        case 0:  # another NAR with the correct narinfo
            pusher.push(replace(good, body=flipped(good.body, chance)))
        case 1:  # a body whose hash is not that of its name
            pusher.request("PUT", good.nar_url, flipped(good.body, chance))
            pusher.put_narinfo(good)
        case 2:
            pusher.put_nar(good)
            name = f"{info.path.hash_part}.narinfo"
            pusher.request("PUT", name, flipped(good.narinfo, chance))
        case 3:
            pusher.put_nar(good)
            pusher.request("PUT", f"{info.path.hash_part}.narinfo", good.narinfo[: chance.randrange(len(good.narinfo))])
        case 4:  # a signature of another path, or by another key
            sigs = chance.choice([other.info.sigs, (), signed(info, SecretKey.generate(key.name)).sigs])
            pusher.push(replace(good, info=replace(info, sigs=sigs)))
        case 5:  # signed, but with the NAR of another path
            pusher.put_nar(other)
            pusher.put_narinfo(replace(other, info=info))
        case 6:  # a compressed file that is damaged or truncated
            packed = zstandard.compress(good.body)
            wrong = chance.choice([flipped(packed, chance), packed[: chance.randrange(1, len(packed))]])
            pusher.push(replace(good, body=wrong, compression="zstd"))
        case 7:
            pusher.push(replace(good, info=signed(replace(info, nar_size=info.nar_size + 8), key)))
        case _:
            pusher.put_nar(good)
            cut = good.body[: chance.randrange(len(good.body))]
            pusher.send("PUT", *chance.choice([(good.nar_url, cut, len(good.body)), narinfo_of(good)]))


def narinfo_of(path: Pushed) -> tuple[str, bytes, int]:
    return f"{path.info.path.hash_part}.narinfo", path.narinfo, len(path.narinfo)


def test_no_wrong_path_of_random_faulty_pushes_becomes_valid(target: Target) -> None:
    chance = random.Random(SEED)
    # NARs without a narinfo stay for six hours.
    server = target.serve("max_nar_size = '1M'\nspool_size = '2G'\n")
    pusher, key = target.pusher(server), target.secret
    right: dict[str, str] = {}
    with target.client.daemon():
        for number in range(FAULTY_PUSHES):
            good, other = (
                Pushed.make(f"{name}-{number}", chance.randbytes(chance.randrange(chance.choice(SIZES))), key)
                for name in ("one", "other")
            )
            right |= {f"/nix/store/{path.info.path}": path.info.nar_hash.hex() for path in (good, other)}
            with suppress(ConnectionError, HTTPException):
                faulty_push(pusher, good, other, key, chance)
            if chance.randrange(10) == 0:
                assert pusher.push(good).status == 200
        valid = registered(target.client)
        assert 0 < len(valid) < len(right)
        assert valid.items() <= right.items()
        target.client.run("nix-store", "--verify", "--check-contents")
        assert registered(target.client) == valid
    assert not [line for line in server.log if "Traceback" in line], server.log


def registered(client: Client) -> dict[str, str]:
    """Return the NAR hashes of all valid paths."""
    lines = client.run("nix-store", "--dump-db").lines
    return {
        path: lines[at + 1]
        for at, path in enumerate(lines)
        if path.startswith("/nix/store/") and lines[at + 1 : at + 2]
    }


@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_parallel_pushes_of_one_path_all_succeed(target: Target, size: int) -> None:
    server = target.serve()
    path = Pushed.make("twice", random.Random(SEED).randbytes(size), target.secret)
    with target.client.daemon(), ThreadPoolExecutor(8) as threads:
        pushers = [target.pusher(server) for _ in range(8)]
        assert {answer.status for answer in threads.map(lambda pusher: pusher.push(path), pushers)} == {200}
    target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")


def test_import_that_waits_in_the_daemon_does_not_delay_others_for_long(target: Target) -> None:
    """A local build of the same path holds its lock, for example."""
    server = target.serve()
    first, *others = (Pushed.make(f"path-{number}", b"content", target.secret) for number in range(4))
    lock = target.client.real_path(f"/nix/store/{first.info.path}.lock")
    with target.client.daemon(), ThreadPoolExecutor(1) as threads:
        with lock.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            waiting = threads.submit(target.pusher(server).push, first)
            pusher = target.pusher(server)
            wait_until(lambda: os.path.lexists(target.client.shared / "state/push-roots" / first.info.path))
            assert {pusher.push(path).status for path in others} == {200}
            assert not waiting.done()
        assert waiting.result().status == 200


@pytest.mark.parametrize("size", [1 << 10, 5 << 20])
def test_wrong_signature_gets_403_with_the_remedy(target: Target, size: int) -> None:
    """The Nix daemon finds that of a small path."""
    server = target.serve()
    chance = random.Random(SEED)
    good, other = (Pushed.make(name, chance.randbytes(size), target.secret) for name in ("good", "other"))
    pusher = target.pusher(server)
    with target.client.daemon():
        answer = pusher.push(replace(good, info=replace(good.info, sigs=other.info.sigs)))
        assert (answer.status, b"wrong; sign it again" in answer.body) == (403, True)
        assert pusher.push(good).status == 200


def test_push_without_a_daemon_gets_409_and_succeeds_later(target: Target) -> None:
    server = target.serve()
    pusher, path = target.pusher(server), Pushed.make("good", b"content", target.secret)
    answer = pusher.push(path)
    assert (answer.status, b"push again later" in answer.body) == (409, True)
    with target.client.daemon():
        assert pusher.put_narinfo(path).status == 200  # the NAR is still in the spool


def test_push_succeeds_after_a_worker_was_killed_during_one(target: Target) -> None:
    server = target.serve()
    path = Pushed.make("good", random.Random(SEED).randbytes(32 << 20), target.secret)
    pusher = target.pusher(server)
    with target.client.daemon():
        with pusher.raw() as connection:
            connection.sendall(pusher.head("PUT", path.nar_url, len(path.body)) + path.body[: 1 << 20])
            wait_until(lambda: spooled(server))
            kill_worker(server)
        wait_until(lambda: not spooled(server))
        assert pusher.put_nar(path).status == 200
        with pusher.raw() as connection:
            connection.sendall(
                pusher.head("PUT", f"{path.info.path.hash_part}.narinfo", len(path.narinfo)) + path.narinfo
            )
            wait_until(lambda: target.client.real_path(f"/nix/store/{path.info.path}").exists())
            kill_worker(server)
        assert pusher.put_narinfo(path).status == 200
    target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")


def test_imported_path_is_kept_if_the_connection_to_the_daemon_is_lost_at_its_end(target: Target) -> None:
    """Nix does not push it again, because the server has it."""
    lossy = """
from harmonia.errors import RemoteError
from harmonia.store.nix_daemon import DaemonClient
add_to_store = DaemonClient.add_to_store
async def lose(*arguments):
    await add_to_store(*arguments)
    raise RemoteError("lost")
DaemonClient.add_to_store = lose
"""
    server = target.serve(program=patched(lossy))
    path = Pushed.make("good", b"content", target.secret)
    with target.client.daemon():
        assert target.pusher(server).push(path).status == 409
        server.stop()  # ends its temporary roots
        target.client.run("nix-store", "--gc")
    target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")


def kill_worker(server: Server) -> None:
    """Kill the only worker, and wait for the one that replaces it."""
    (worker,) = server.workers
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: server.workers and worker not in server.workers)
    wait_until(lambda: server.get("/version").status == 200)


@pytest.mark.slow
def test_decompression_bomb_is_refused_in_little_memory(target: Target) -> None:
    server = target.serve("max_nar_size = '64M'\n")
    pusher = target.pusher(server)
    bomb = Pushed.make("bomb", b"", target.secret)
    packed = zstandard.compress(bytes(1 << 30), 19)
    with target.client.daemon():
        assert pusher.push(replace(bomb, body=packed, compression="zstd")).status == 400
        before = peak_bytes(server.workers[0])
        large = signed(replace(bomb.info, nar_size=1 << 30), target.secret)
        assert pusher.push(replace(bomb, info=large, body=packed, compression="zstd")).status == 413
        assert pusher.request("PUT", bomb.nar_url, headers={"Content-Length": str(1 << 30)}).status == 413
    assert peak_bytes(server.workers[0]) < before + (8 << 20)
    assert not target.client.real_path(f"/nix/store/{bomb.info.path}").exists()


def test_file_with_a_too_large_window_gets_the_remedy(target: Target) -> None:
    server = target.serve()
    path = Pushed.make("window", b"content", target.secret)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    packed = replace(path, body=lzma.compress(path.body, filters=filters), compression="xz")
    with target.client.daemon():
        answer = target.pusher(server).push(packed)
    assert answer.status == 400
    assert answer.text.endswith("a window of this xz file is too large; push with ?compression=zstd\n")


def test_push_beyond_the_spool_size_gets_413(target: Target) -> None:
    server = target.serve("max_nar_size = '1M'\nspool_size = '2M'\n")
    pusher, chance = target.pusher(server), random.Random(SEED)
    paths = [Pushed.make(f"path-{number}", chance.randbytes(900_000), target.secret) for number in range(3)]
    with target.client.daemon():
        assert [pusher.put_nar(path).status for path in paths] == [200, 200, 413]
        assert pusher.put_narinfo(paths[0]).status == 200
        assert pusher.push(paths[2]).status == 200  # in the space of the first


@pytest.mark.root
def test_push_to_a_full_disk_gets_413(target: Target, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "4m") as disk:
        server = target.serve(cache_dir=disk / "cache")
        pusher = target.pusher(server)
        chance = random.Random(SEED)
        large, small = (Pushed.make(f"of-{size}", chance.randbytes(size), target.secret) for size in (8 << 20, 1 << 20))
        with target.client.daemon():
            with pusher.raw() as connection:
                connection.sendall(pusher.head("PUT", large.nar_url, len(large.body), "Expect: 100-continue"))
                answer = read_answer(connection)
            assert (answer.status, b"full" in answer.body) == (413, True)
            assert pusher.push(small).status == 200
        server.stop()


@pytest.mark.root
def test_disk_that_fills_up_during_a_push_refuses_it_and_takes_it_later(target: Target, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "8m") as disk:
        server = target.serve(cache_dir=disk / "cache")
        pusher = target.pusher(server)
        path = Pushed.make("large", random.Random(SEED).randbytes(4 << 20), target.secret)
        with target.client.daemon():
            with pusher.raw() as connection:
                connection.sendall(pusher.head("PUT", path.nar_url, len(path.body)) + path.body[: 1 << 20])
                wait_until(lambda: spooled(server) and allocated(server) > 1 << 18)
                with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                    while filler.write(bytes(1 << 16)):
                        pass
                with suppress(ConnectionError):  # the server drops only a part of a refused body
                    connection.sendall(path.body[1 << 20 :])
                answer = read_answer(connection)
            assert (answer.status, b"full" in answer.body) == (413, True)
            wait_until(lambda: not spooled(server))
            (disk / "filler").unlink()
            assert pusher.push(path).status == 200
        server.stop()
    target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")


@pytest.mark.root
def test_push_into_a_full_store_gets_413_and_succeeds_later(target: Target) -> None:
    shutil.rmtree(target.client.store_dir)
    with mounted(target.client.store_dir, "1m") as disk:
        server = target.serve()
        pusher = target.pusher(server)
        path = Pushed.make("large", random.Random(SEED).randbytes(2 << 20), target.secret)
        with target.client.daemon():
            answer = pusher.push(path)
            assert (answer.status, answer.text.partition(";")[0]) == (413, "the disk of the server's store is full")
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
            assert pusher.put_narinfo(path).status == 200  # the NAR is still in the spool
        target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")
        server.stop()


def allocated(server: Server) -> int:
    """Return the bytes that the files of the spool take on the disk."""
    allocated = 0
    for path in (server.cache_dir / "push").iterdir():
        with suppress(FileNotFoundError):  # removed meanwhile
            allocated += path.stat().st_blocks * 512
    return allocated


@pytest.mark.slow
def test_thousand_pushes_at_once_all_succeed_in_little_memory(target: Target) -> None:
    server = target.serve()
    chance = random.Random(SEED)
    paths = [Pushed.make(f"path-{number}", chance.randbytes(20_000), target.secret) for number in range(1000)]
    pusher = target.pusher(server)
    with target.client.daemon(), ThreadPoolExecutor(200) as threads:
        assert {answer.status for answer in threads.map(pusher.push, paths)} == {200}
        assert peak_bytes(server.workers[0]) < 80 << 20
    assert registered(target.client) == {f"/nix/store/{path.info.path}": path.info.nar_hash.hex() for path in paths}
    target.client.run("nix-store", "--verify", "--check-contents")


def test_garbage_collections_during_a_push_keep_its_closure(target: Target, pusher: Client) -> None:
    closure = make_closure(pusher)
    server = target.serve()
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            target.client.run("nix-store", "--gc")

    with target.client.daemon(), ThreadPoolExecutor(1) as threads:
        collecting = threads.submit(collect)
        try:
            push(pusher, server, closure.top, query=f"secret-key={target.key.secret_file}&compression=none")
        finally:
            stop.set()
        collecting.result()
        target.client.run("nix-store", "--gc")
    target.client.run("nix-store", "--verify-path", *requisites(pusher, closure.top))


@contextmanager
def collector(state: Path) -> Iterator[list[str]]:
    """Listen at the socket of a garbage collection, and yield the roots that it receives."""
    roots: list[str] = []
    (state / "gc-socket").mkdir(exist_ok=True)
    descriptor = os.open(state / "gc-socket", os.O_PATH)

    class Receive(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                roots.append(line.decode().strip())
                self.wfile.write(b"1")

    with socketserver.ThreadingUnixStreamServer(f"/proc/self/fd/{descriptor}/socket", Receive) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        try:
            yield roots
        finally:
            server.shutdown()
    os.close(descriptor)


def test_collection_learns_the_roots_of_a_daemon_that_missed_its_start(target: Target) -> None:
    """A process of the daemon of Nix 2.8 that could not connect to a collection informs no other one."""
    server = target.serve()
    first, second = (Pushed.make(name, b"content", target.secret) for name in ("first", "second"))
    state = target.client.directory / "nix/var/nix"
    with target.client.daemon(), (state / "gc.lock").open("ab") as lock, ThreadPoolExecutor(1) as threads:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a collection begins
        pushing = threads.submit(target.pusher(server).push, first)
        if target.client.nix.version < (2, 15):
            assert pushing.result().status == 200
        with collector(state) as roots:
            assert pushing.result().status == 200  # newer daemons wait until they can connect
            assert target.pusher(server).push(second).status == 200
            assert f"/nix/store/{second.info.path}" in roots
        fcntl.flock(lock, fcntl.LOCK_UN)


def test_unused_and_dropped_roots_end_and_used_and_pinned_ones_stay(target: Target) -> None:
    server = target.serve("keep = '1h'\n")
    old, used, pinned, dropped = (
        Pushed.make(name, name.encode(), target.secret) for name in ("old", "used", "pinned", "dropped")
    )
    pusher = target.pusher(server)
    roots = target.client.shared / "state/push-roots"
    with target.client.daemon():
        for path in (old, used, pinned, dropped):
            assert pusher.push(path).status == 200
        target.client.run("nix-store", "--gc")
        assert len(roots_command(server, "list").splitlines()) == 4
        roots_command(server, "pin", f"/nix/store/{pinned.info.path}")
        roots_command(server, "drop", f"/nix/store/{dropped.info.path}")
        for path in (old, used, pinned):
            os.utime(roots / path.info.path, (0, 0), follow_symlinks=False)
        token = (target.client.shared / "token").read_text()
        assert server.get(f"/nar/{used.info.path.hash_part}.nar", {"Authorization": f"Bearer {token}"}).status == 200
        wait_until(lambda: os.lstat(roots / used.info.path).st_mtime > 0)
        kill_worker(server)  # the next one removes expired roots
        wait_until(lambda: not os.path.lexists(roots / old.info.path))
        target.client.run("nix-store", "--gc")
    kept = {
        path
        for path in (old, used, pinned, dropped)
        if target.client.real_path(f"/nix/store/{path.info.path}").exists()
    }
    assert kept == {used, pinned}


def test_root_of_a_path_that_was_never_imported_is_dropped(target: Target) -> None:
    server = target.serve()
    valid, given_up, running = (Pushed.make(name, b"", target.secret) for name in ("valid", "given-up", "running"))
    roots = target.client.shared / "state/push-roots"
    with target.client.daemon():
        assert target.pusher(server).push(valid).status == 200
        for path in (given_up, running):  # of workers that died during the import
            (roots / path.info.path).symlink_to(f"/nix/store/{path.info.path}")
        two_days_ago = time.time() - 48 * 3600
        for path in (valid, given_up):
            os.utime(roots / path.info.path, (two_days_ago, two_days_ago), follow_symlinks=False)
        kill_worker(server)  # the next one registers all roots
        wait_until(lambda: not os.path.lexists(roots / given_up.info.path))
        assert "skipping invalid root" not in target.client.run("nix-store", "--gc").stderr
    assert {path.name for path in roots.iterdir()} == {valid.info.path, running.info.path}
    target.client.run("nix-store", "--verify-path", f"/nix/store/{valid.info.path}")


def roots_command(server: Server, *arguments: str) -> str:
    done = run("--config", str(server.config), "roots", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
