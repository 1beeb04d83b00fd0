"""The cache on disk: filled once by one of many readers, visible only when complete, with few errors for readers."""

import errno
import fcntl
import hashlib
import os
import random
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harmonia.cache import disk_cache, growing_file
from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.growing_file import BLOCK_BYTES, CachedFile, Filler, content_size
from harmonia.errors import CacheFileError
from harmonia.store.file_reader import OpenSlice
from support.disk_cache import at, fill, filling, messages, no_leak, opened, read, stress, without
from support.preloaded import PATCHED, popen
from support.small_disk import mounted

TRAILER = 72
"""Bytes after the content of a file of one block, including its digest."""
KIB = 1024

PROCESS = """
import sys
from harmonia.cache.disk_cache import DiskCache

file, filler = DiskCache(sys.argv[1]).open_file("key")
print("filler" if filler else "follower", flush=True)
for line in sys.stdin:
    what, _, data = line.strip().partition(" ")
    if what == "append":
        filler.append(data.encode())
    elif what == "commit":
        filler.commit()
    else:
        file.refresh()
    print(file.whole, file.slice(0, file.size).read(file.size).decode(), flush=True)
"""

STRESS = """
import random, sys
sys.path.append(sys.argv[4])
from support.disk_cache import stress
from harmonia.cache.disk_cache import DiskCache

stress(DiskCache(sys.argv[1], 200_000, bare=sys.argv[3] == "True"), random.Random(int(sys.argv[2])), set())
"""


class Process:
    """Another process that has opened the same key."""

    def __init__(self, directory: Path) -> None:
        command = [*PATCHED, PROCESS, str(directory)]
        pipe = subprocess.PIPE
        self.popen: subprocess.Popen[str] = popen(command, env=os.environ, stdin=pipe, stdout=pipe, text=True)
        self.role = self._answer()

    def __call__(self, command: str) -> str:
        assert self.popen.stdin
        self.popen.stdin.write(command + "\n")
        self.popen.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.popen.stdout
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(params=[False, True], ids=["with-trailer", "bare"])
def cache(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DiskCache]:
    with at(tmp_path, bare=request.param) as cache:
        yield cache


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    """Start the fork server before `_no_leak` counts: from its first process on, it keeps descriptors open."""
    popen([*PATCHED, ""], env=os.environ).wait()


@pytest.fixture(autouse=True)
def _no_leak() -> Iterator[None]:
    with no_leak():
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the clock of the cache, which can be advanced."""
    clock = SimpleNamespace(passed=0.0)
    times = SimpleNamespace(time=lambda: time.time() + clock.passed, monotonic=lambda: time.monotonic() + clock.passed)
    monkeypatch.setattr(disk_cache, "time", times)
    return clock


def content_of(cache: DiskCache, key: str = "key") -> bytes | None:
    """Return the content of a key, or None if it is not complete."""
    if (file := cache.find_file(key)) is None:
        return None
    content = read(file)
    assert file.sha256 == hashlib.sha256(content).digest()
    file.close()
    return content


# Filling and reading


@given(st.lists(st.binary(max_size=150), max_size=6))
@example([])
@example([b"a" * TRAILER, b"b"])
def test_follower_sees_only_content_and_all_of_it_after_commit(pieces: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory, at(directory) as cache, at(directory) as other:
        first, filler = filling(cache)
        second, other_filler = opened(other)
        assert other_filler is None
        content = b""
        for piece in pieces:
            filler.append(piece)
            content += piece
            for file in (first, second):
                assert read(file) == content[: max(len(content) - TRAILER, 0)]
                assert not file.whole
                assert not file.lock()
        assert other.find_file("key") is None
        filler.commit()
        for file in (first, second):
            assert read(file) == content
            assert file.sha256 == hashlib.sha256(content).digest()
            file.close()
        assert content_of(other) == content


def test_slow_reader_of_an_abandoned_file_blocks_no_other(cache: DiskCache) -> None:
    filler = os.open(f"{cache.path('key')}.growing", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(filler, fcntl.LOCK_EX)
    os.write(filler, bytes(2 * TRAILER))
    slow, _ = opened(cache)
    following = slow.follow(0, None)
    part = next(following)
    assert part is not None
    os.write(filler, bytes(TRAILER))  # while the slow reader's client takes that part
    os.close(filler)  # as the kernel does when a process dies
    assert len(part.read()) == TRAILER
    assert list(following) == []  # the slow reader has the lock, and must not hold it as long as its client takes
    slow.close()
    file, another = filling(cache)
    another.abandon()
    file.close()


def test_partly_written_trailer_is_not_content(tmp_path: Path) -> None:
    """The write of the trailer may be split at any byte."""
    with at(tmp_path) as cache:
        path = Path(fill(cache, content=b"x" * 100))
        data = path.read_bytes()
        path.unlink()
        file, filler = filling(cache)
        growing = Path(f"{path}.growing")
        for length in range(len(data) + 1):
            growing.write_bytes(data[:length])
            assert read(file) == data[: max(length - TRAILER, 0)]
            assert file.whole == (length == len(data))
        filler.abandon()
        file.close()


def test_bare_file_has_only_its_content(tmp_path: Path) -> None:
    with at(tmp_path, bare=True) as cache:
        assert Path(fill(cache)).read_bytes() == b"content"
        assert sorted(os.listdir(tmp_path)) == ["key", "key.sums"]
        assert cache.keys() == ["key"]
        cache.remove("key")
        assert os.listdir(tmp_path) == []


def test_incomplete_digests_make_no_file_complete(tmp_path: Path) -> None:
    """They are written before the file has its final name, but a crash may lose them."""
    with at(tmp_path, bare=True) as cache:
        path = Path(fill(cache))
        sums = Path(f"{path}.sums").read_bytes()
        for length in range(len(sums)):
            path.write_bytes(b"content")
            Path(f"{path}.sums").write_bytes(sums[:length])
            assert cache.find_file("key") is None
            assert os.listdir(tmp_path) == []


def test_digests_of_an_earlier_file_are_not_used(tmp_path: Path) -> None:
    with at(tmp_path, bare=True) as cache:
        os.unlink(fill(cache, content=b"earlier"))
        file, filler = filling(cache)
        filler.append(b"content")
        file.refresh()
        assert not file.whole
        filler.commit()
        assert read(file) == b"content"
        assert file.whole
        file.close()


def test_withdrawn_file_leaves_no_digests(tmp_path: Path) -> None:
    with at(tmp_path, bare=True) as cache:
        file, filler = filling(cache)
        filler.append(b"content")
        filler.finish()
        filler.withdraw()
        file.close()
        assert os.listdir(tmp_path) == []


def test_digests_without_a_file_are_removed_after_a_minute(tmp_path: Path, clock: SimpleNamespace) -> None:
    with at(tmp_path, bare=True) as cache:
        os.unlink(fill(cache))
        cache.sweep()
        assert os.listdir(tmp_path) == ["key.sums"]
        clock.passed = 61
        cache.sweep()
        assert os.listdir(tmp_path) == []


def test_eviction_while_a_file_is_opened_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(tmp_path, bare=True) as cache:
        fill(cache)
        refresh = CachedFile.refresh

        def evicted(file: CachedFile) -> None:
            cache.remove("key")
            refresh(file)

        monkeypatch.setattr(CachedFile, "refresh", evicted)
        assert cache.find_file("key") is None
        assert cache.counters.corrupt == 0


@pytest.mark.parametrize("growing", [".growing", ".warm.growing"])
def test_sweep_keeps_the_digests_of_a_file_that_is_being_flushed(tmp_path: Path, growing: str) -> None:
    cache = DiskCache(str(tmp_path), growing=growing, bare=True)
    file, filler = filling(cache)
    with closing(file):
        filler.append(b"content")
        filler.finish()
        os.utime(tmp_path / "key.sums", (0, 0))
        cache.sweep()
        filler.commit()
    assert content_of(cache) == b"content"


def found(cache: DiskCache) -> CachedFile:
    file = cache.find_file("key")
    assert file is not None
    return file


def test_file_is_sendable_for_a_while_after_all_of_it_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(1).randbytes(BLOCK_BYTES + 100)

    def follow(cache: DiskCache, start: int, stop: int | None) -> str | None:
        with closing(found(cache)) as file:
            for part in file.follow(start, stop):
                assert part is not None
                all_of(part, "read")
            return file.sendable_name

    with at(tmp_path, bare=True) as cache:
        fill(cache, content=content)
        assert follow(cache, 1, None) is None
        assert follow(cache, 0, BLOCK_BYTES) is None
        assert follow(cache, 0, None) == "key"
        assert follow(cache, 5, 7) == "key"
    monkeypatch.setattr(disk_cache, "_INTACT_S", 0.0)
    with at(tmp_path, bare=True) as cache:
        assert follow(cache, 0, None) is None
    with at(tmp_path / "other") as cache:
        fill(cache, content=content)
        assert follow(cache, 0, None) is None


def test_growing_file_is_not_sendable(tmp_path: Path) -> None:
    with at(tmp_path, bare=True) as cache:
        file, filler = filling(cache)
        with closing(file):
            filler.append(b"content")
            filler.finish()
            for part in file.follow(0, None):
                assert part is not None
                all_of(part, "read")
            assert file.sendable_name is None  # under this name, other programs would find no file
            filler.commit()
            assert file.sendable_name == "key"


def test_file_is_not_sendable_after_damage_was_found(tmp_path: Path) -> None:
    with at(tmp_path, bare=True) as cache:
        path = fill(cache)
        with closing(found(cache)) as file:
            for part in file.follow(0, None):
                assert part is not None
                all_of(part, "read")
            assert file.sendable_name == "key"
            Path(path).write_bytes(b"CONTENT")
            with pytest.raises(CacheFileError):
                file.content()
            assert not os.path.exists(path)
            assert file.sendable_name is None


def test_file_with_the_inode_number_of_a_verified_file_is_not_sendable(tmp_path: Path) -> None:
    with at(tmp_path, bare=True) as cache:
        path = Path(fill(cache))
        with closing(found(cache)) as file:
            for part in file.follow(0, None):
                assert part is not None
                all_of(part, "read")
            assert file.sendable_name == "key"
        path.write_bytes(b"CONTENT")  # of the next file, which the disk has damaged
        sums = Path(f"{path}.sums")
        content, created = sums.read_bytes(), sums.stat().st_ctime_ns
        while sums.stat().st_ctime_ns == created:  # the clock of a file system has steps of some milliseconds
            sums.unlink()
            sums.write_bytes(content)
        with closing(found(cache)) as file:
            assert file.whole
            assert file.sendable_name is None


def test_one_of_many_threads_fills(cache: DiskCache) -> None:
    found: list[tuple[CachedFile, Filler | None]] = []
    threads = [threading.Thread(target=lambda: found.append(opened(cache))) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [filler] = filter(None, (filler for _, filler in found))
    filler.append(b"content")
    filler.commit()
    for file, _ in found:
        assert read(file) == b"content"
        file.close()
    assert (cache.counters.misses, cache.counters.fills, cache.counters.filled_bytes) == (30, 1, 7)


def test_one_of_many_processes_fills(cache: DiskCache, process: Callable[[], Process]) -> None:
    processes = [process() for _ in range(4)]
    assert [each.role for each in processes] == ["filler", "follower", "follower", "follower"]
    processes[0]("append " + "a" * 100)
    assert processes[1]("look") == "False " + "a" * (100 - TRAILER)
    processes[0]("commit")
    assert {each("look") for each in processes} == {"True " + "a" * 100}
    assert content_of(cache) == b"a" * 100


def test_another_process_takes_over_from_a_killed_filler(cache: DiskCache, process: Callable[[], Process]) -> None:
    killed = process()
    killed("append " + "a" * 100)
    follower = process()
    file, filler = opened(cache)
    assert filler is None
    assert read(file) == b"a" * (100 - TRAILER)
    assert not file.lock()
    killed.kill()
    assert file.lock()
    file.close()
    file, filler = filling(cache)
    assert read(file) == b""
    filler.append(b"a" * 100)
    filler.append(b"b" * 100)
    assert follower("look") == "False " + "a" * 100 + "b" * (100 - TRAILER)
    filler.commit()
    assert follower("look") == "True " + "a" * 100 + "b" * 100
    file.close()


def test_complete_file_without_its_final_name_is_filled_again_beside_its_readers(cache: DiskCache) -> None:
    """The filler died before it renamed the file."""
    path = fill(cache)
    os.rename(path, path + ".growing")
    reader = CachedFile(os.open(path + ".growing", os.O_RDONLY), path)
    assert read(reader) == b"content"
    file, filler = filling(cache)
    assert read(reader) == b"content"
    filler.append(b"content")
    filler.commit()
    assert content_of(cache) == b"content"
    for each in (reader, file):
        each.close()


def test_only_leftovers_are_truncated(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4 writes a truncated file to disk at close, which would delay the last chunk."""
    truncated: list[int] = []
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, _: truncated.append(descriptor))
    file, filler = filling(cache)
    filler.abandon()
    file.close()
    assert not truncated
    Path(cache.path("key") + ".growing").write_bytes(b"left")
    file, filler = filling(cache)
    assert len(truncated) == 1
    filler.abandon()
    file.close()


def test_abandoned_file_is_removed_and_can_be_filled_again(cache: DiskCache, tmp_path: Path) -> None:
    file, filler = filling(cache)
    filler.append(b"a" * 100)
    filler.abandon()
    assert not os.listdir(tmp_path)
    assert file.lock()
    assert read(file) == b"a" * (100 - TRAILER)
    file.close()
    fill(cache)
    assert content_of(cache) == b"content"


def test_committed_file_cannot_be_abandoned(cache: DiskCache) -> None:
    file, filler = filling(cache)
    filler.commit()
    stranger = os.open("/dev/null", os.O_RDONLY)  # reuses the descriptor
    filler.abandon()
    os.close(stranger)
    file.close()
    assert cache.has("key")


def test_file_replaced_before_it_is_locked_is_followed(
    cache: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = CachedFile.lock
    others: list[tuple[CachedFile, Filler]] = []

    def replace_and_lock(file: CachedFile) -> bool:
        monkeypatch.setattr(CachedFile, "lock", lock)
        (tmp_path / "key.growing").unlink()
        others.append(filling(cache))
        return file.lock()

    monkeypatch.setattr(CachedFile, "lock", replace_and_lock)
    file, filler = opened(cache)
    assert filler is None
    [(other, other_filler)] = others
    other_filler.append(b"content")
    other_filler.commit()
    assert read(file) == b"content"
    for each in (file, other):
        each.close()


def test_files_survive_a_restart(tmp_path: Path) -> None:
    with at(tmp_path) as cache:
        fill(cache)
    with at(tmp_path) as cache:
        file, filler = opened(cache)
        assert (filler, read(file), cache.counters.hits) == (None, b"content", 1)
        file.close()
        assert content_of(cache) == b"content"
        assert cache.counters.corrupt == 0


def test_filling_many_files_leaves_no_descriptors_open(cache: DiskCache) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        fill(cache, str(number))
    assert len(os.listdir("/proc/self/fd")) == before


# Damage


@settings(max_examples=20)
@given(st.binary(max_size=100), st.binary(min_size=1, max_size=100))
def test_file_of_another_length_is_damaged(content: bytes, more: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory, at(directory) as cache:
        path = Path(fill(cache, content=content))
        data = path.read_bytes()
        for damaged in [*(data[:length] for length in range(len(data))), data + more]:
            path.write_bytes(damaged)
            assert cache.find_file("key") is None
            assert not path.exists()
        assert cache.counters.corrupt == len(data) + 1
        assert content_of(cache) is None
        assert fill(cache) == str(path)


SIZES = st.integers(0, 3).flatmap(
    lambda blocks: st.integers(-2, 2).map(lambda near: max(blocks * BLOCK_BYTES + near, 0))
)


@settings(max_examples=30)
@given(SIZES, st.lists(st.integers(1, 2 * BLOCK_BYTES), max_size=5), st.booleans(), st.data())
def test_content_of_any_size_is_read_back_from_any_position(
    size: int,
    cuts: list[int],
    bare: bool,  # noqa: FBT001 (from Hypothesis)
    choice: st.DataObject,
) -> None:
    content = random.Random(size).randbytes(size)
    with tempfile.TemporaryDirectory() as directory, at(directory, bare=bare) as cache:
        file, filler = filling(cache)
        written = 0
        for cut in [*cuts, size]:
            filler.append(content[written : written + cut])
            written += cut
            file.refresh()
            assert file.size <= filler.size
        filler.commit()
        with closing(file):  # Hypothesis may end the test at any draw
            file.refresh()
            assert (file.size, file.sha256) == (size, hashlib.sha256(content).digest())
            start = choice.draw(st.integers(0, size))
            stop = choice.draw(st.integers(start, size))
            if stop - start < BLOCK_BYTES:  # readers take a short slice as read after one call
                assert file.slice(start, stop).read() == content[start:stop]
            for method in ("read", "read_cached", "read_into"):
                assert all_of(file.slice(start, stop), method) == content[start:stop]


def all_of(part: OpenSlice, method: str) -> bytes:
    """Return the bytes of a slice, read by this method. If `read_cached` returns None, use `read`."""
    if method == "read_into":
        buffer = bytearray(len(part))
        return bytes(buffer[: part.read_into(memoryview(buffer))])
    data = b""
    while piece := (part.read_cached() if method == "read_cached" else None) or part.read():
        data += piece
    return data


@given(st.integers(0, BLOCK_BYTES + 100), st.integers(0, TRAILER))
def test_content_size_excludes_a_partly_written_trailer(size: int, written: int) -> None:
    assert content_size(size + written) <= size


@settings(max_examples=60)
@given(st.sampled_from([1, 100, BLOCK_BYTES, BLOCK_BYTES + 100]), st.data())
def test_flipped_bit_is_never_read(size: int, choice: st.DataObject) -> None:
    """The damaged file is removed and counted, so that it is filled again."""
    with tempfile.TemporaryDirectory() as directory, at(directory) as cache:
        path = Path(fill(cache, content=b"x" * size))
        file = cache.find_file("key")
        assert file is not None
        data = bytearray(path.read_bytes())
        near = choice.draw(st.sampled_from([st.integers(0, 8 * size - 1), st.integers(8 * size, 8 * len(data) - 1)]))
        bit = choice.draw(near)
        with path.open("r+b") as damaged:
            damaged.seek(bit // 8)
            damaged.write(bytes([data[bit // 8] ^ 1 << bit % 8]))
        if bit < 8 * size:  # the open reader notices it, too
            with pytest.raises(CacheFileError):
                all_of(file.slice(0, file.size), choice.draw(st.sampled_from(["read", "read_cached", "read_into"])))
        file.close()
        if (again := cache.find_file("key")) is not None:
            with pytest.raises(CacheFileError):
                all_of(again.slice(0, again.size), "read")
            again.close()
        assert not path.exists()
        assert cache.counters.corrupt == 1


def test_damaged_file_that_was_replaced_leaves_its_successor_alone(cache: DiskCache) -> None:
    path = fill(cache)
    file = cache.find_file("key")
    assert file is not None
    with open(path, "r+b") as damaged:
        damaged.write(b"C")
    os.unlink(path)
    fill(cache)
    with pytest.raises(CacheFileError):
        read(file)
    file.close()
    assert content_of(cache) == b"content"


def test_damage_is_logged_once(cache: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(cache)
    os.truncate(path, 3)
    assert cache.find_file("key") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"removed a damaged file from the cache: {path}; check the disk for faults if this repeats"
    ]


def test_unreadable_file_is_removed(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fill(cache)
    file, _ = opened(cache)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CacheFileError, match="Input/output error"):
        file.slice(0, file.size).read()
    file.close()
    assert not os.path.exists(path)


# Permissions


def test_only_the_owner_can_access_directory_and_files(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    with at(tmp_path / "cache") as cache:
        path = fill(cache)
        assert stat.S_IMODE(os.stat(tmp_path / "cache").st_mode) == 0o700
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to("real")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        DiskCache(str(tmp_path / "cache"))
    with at(tmp_path / "real") as cache:
        path = fill(cache)
        os.rename(path, tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", path)
        assert cache.find_file("key") is None
        os.symlink(tmp_path / "victim", cache.path("other.growing"))
        assert cache.open_file("other") is None
        assert not (tmp_path / "victim").exists()


# Eviction


def used_at(path: str, ago: float) -> None:
    os.utime(path, times=(0, time.time() - ago))


def test_least_recently_used_files_are_evicted_first(tmp_path: Path) -> None:
    with at(tmp_path, 100 * KIB) as cache:
        paths = {age: fill(cache, str(age), b"x" * 20 * KIB) for age in (300, 500, 100, 400)}
        for age, path in paths.items():
            used_at(path, age)
        opened(cache, "500")[0].close()  # counts as a use
        for age in (50, 40):
            used_at(fill(cache, str(age), b"x" * 20 * KIB), age)
        cache.evict()
        assert set(os.listdir(tmp_path)) == {"500", "100", "50", "40"}
        assert cache.counters.evictions == 2


def test_unused_file_is_removed_unless_another_process_has_used_it(tmp_path: Path) -> None:
    cache, other = DiskCache(f"{tmp_path}/cache"), DiskCache(f"{tmp_path}/cache")
    for key in ("used", "unused", "new"):
        cache.write_file(key, lambda: [b"content"])
    for key in ("used", "unused"):
        cache.mark_unused(key)
    file = other.use_file("used")
    assert file
    file.close()
    for key in ("used", "unused", "new", "none"):
        cache.remove_unused(key)
    assert sorted(cache.keys()) == ["new", "used"]


def test_file_larger_than_the_limit_is_evicted_before_others(tmp_path: Path) -> None:
    with at(tmp_path, 100 * KIB) as cache:
        for key in "abc":
            used_at(fill(cache, key, b"x" * 20 * KIB), 500)
        fill(cache, "large", b"x" * 200 * KIB)
        assert set(os.listdir(tmp_path)) == set("abc")


def test_limit_is_enforced_automatically(tmp_path: Path) -> None:
    with at(tmp_path, 640 * KIB) as cache:
        for number in range(100):
            fill(cache, str(number), b"x" * 20 * KIB)
            assert sum(entry.stat().st_blocks * 512 for entry in os.scandir(tmp_path)) <= 640 * KIB


def test_concurrent_evictions_do_not_evict_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(tmp_path, 1000 * KIB) as cache:
        for key in "abcd":
            used_at(fill(cache, key, b"x" * 30 * KIB), 500 - ord(key))
        cache.limit = 100 * KIB
        unlink = os.unlink

        def unlink_twice(path: str) -> None:
            unlink(path)
            unlink(path)

        monkeypatch.setattr(os, "unlink", unlink_twice)
        cache.evict()
        assert set(os.listdir(tmp_path)) == set("bcd")


def test_open_file_outlives_its_eviction(tmp_path: Path) -> None:
    with at(tmp_path, 1000 * KIB) as cache:
        fill(cache, content=b"x" * 30 * KIB)
        file, _ = opened(cache)
        cache.limit = 0
        cache.evict()
        assert not os.listdir(tmp_path)
        assert read(file) == b"x" * 30 * KIB
        file.close()


def statvfs(free: int) -> Callable[[str], SimpleNamespace]:
    return lambda _: SimpleNamespace(f_blocks=1 << 20, f_frsize=4096, f_bavail=free // 4096)


def test_spare_space_of_the_disk_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(1 << 32))
    with at(tmp_path, 1 << 30) as cache:  # a twentieth of 4 GiB is kept free
        for key in "abc":
            used_at(fill(cache, key, b"x" * 40 * KIB), 500 - ord(key))
        monkeypatch.setattr(os, "statvfs", statvfs((1 << 32) // 20 - 30 * KIB))
        cache.evict()
        assert set(os.listdir(tmp_path)) == set("bc")


@pytest.mark.parametrize(("free", "limit"), [(1 << 30, 1 << 29), (100 << 30, 20 << 30), (0, 0)])
def test_default_limit_is_half_of_the_free_space_at_most_20_gib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: int
) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(free))
    with at(tmp_path) as cache:
        assert cache.limit == limit


def test_space_used_by_the_cache_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(tmp_path, 1 << 30) as cache:
        fill(cache, content=b"x" * 400 * KIB)
    monkeypatch.setattr(os, "statvfs", statvfs(0))
    with at(tmp_path) as cache:
        assert cache.limit >= 200 * KIB


def test_leftovers_without_a_filler_are_removed_independent_of_the_clock(
    cache: DiskCache, tmp_path: Path, clock: SimpleNamespace
) -> None:
    def names() -> set[str]:
        return {name for name in os.listdir(tmp_path) if not name.endswith(".sums")}

    fill(cache, "whole")
    (tmp_path / "left.growing").write_bytes(b"part")
    file, filler = filling(cache, "key")
    clock.passed = 90_000
    cache.evict()
    assert names() == {"whole", "key.growing"}
    filler.append(b"content")
    filler.commit()
    assert read(file) == b"content"
    file.close()
    assert names() == {"whole", "key"}


# Disk errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.root
def test_full_disk_raises_is_logged_once_and_recovers(
    small_disk: Path, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with at(small_disk, 1 << 30) as cache:
        fill(cache, "kept")
        file, filler = filling(cache)
        other, other_filler = filling(cache, "other")
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            filler.append(bytes(3 << 20))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            other_filler.append(bytes(3 << 20))
        for each in (filler, other_filler):
            each.abandon()
        assert cache.open_file("key") is None
        assert messages(caplog) == [without(small_disk, errno.ENOSPC)]
        for each_file in (file, other):
            each_file.close()
        clock.passed = 61
        fill(cache)
        assert content_of(cache) == b"content"
        assert cache.counters.evictions == 0


@pytest.mark.root
def test_cached_files_are_served_from_a_full_disk(small_disk: Path) -> None:
    with at(small_disk, 1 << 30) as cache:
        fill(cache, "kept")
        file, filler = filling(cache)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            filler.append(bytes(3 << 20))
        filler.abandon()
        file.close()
        file, _ = opened(cache, "kept")
        assert read(file) == b"content"
        file.close()


@pytest.mark.root
def test_disk_filled_by_others_gets_its_spare_space_back(small_disk: Path, clock: SimpleNamespace) -> None:
    directory = small_disk / "cache"
    with at(directory, 1 << 30) as cache:
        used_at(fill(cache, "old", bytes(200 * KIB)), 500)
        used_at(fill(cache, "new", bytes(200 * KIB)), 400)
        (small_disk / "theirs").write_bytes(bytes((2 << 20) - 420 * KIB))
        file, filler = filling(cache)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            filler.append(bytes(100 * KIB))
        filler.abandon()
        file.close()
        clock.passed = 61
        fill(cache, content=bytes(100 * KIB))
        assert set(os.listdir(directory)) == {"key", "new"}


@pytest.mark.root
def test_read_only_disk_is_logged_once_and_cached_files_are_served(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with at(small_disk, 1 << 30) as cache:
        fill(cache, "kept")
        os.truncate(fill(cache, "damaged"), 3)
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        assert cache.open_file("key") is None
        assert cache.open_file("other") is None
        assert messages(caplog) == [without(small_disk, errno.EROFS)]
        file, _ = opened(cache, "kept")
        assert read(file) == b"content"
        file.close()
        assert cache.find_file("damaged") is None
        with pytest.raises(PermissionError):
            DiskCache(str(small_disk))


def test_removed_directory_is_logged_once_and_recovers(
    tmp_path: Path, clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    with at(directory) as cache:
        file, filler = filling(cache)
        filler.append(b"content")
        shutil.rmtree(directory)
        assert cache.open_file("key") is None
        assert cache.find_file("key") is None
        with pytest.raises(FileNotFoundError):
            filler.commit()
        filler.abandon()
        assert read(file) == b"content"
        file.close()
        assert messages(caplog) == [without(directory, errno.ENOENT)]
        directory.mkdir()
        clock.passed = 61
        fill(cache)
        assert content_of(cache) == b"content"


def test_unusable_directory_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DiskCache(str(tmp_path / "file" / "cache"))


def test_permission_error_is_logged_once(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(cache)
    real_open = os.open
    denials = iter(range(3))

    def deny(name: str, flags: int, mode: int = 0o777) -> int:
        if name == path:
            next(denials)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(name, flags, mode)

    monkeypatch.setattr(os, "open", deny)
    assert cache.open_file("key") is None
    assert cache.find_file("key") is None
    assert messages(caplog) == [without(os.path.dirname(path), errno.EACCES)]


def test_file_that_is_being_added_is_not_swept(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(content: bytes, sha256: bytes) -> bytes:
        cache.sweep()
        return growing_file.ending(content, sha256)

    monkeypatch.setattr(disk_cache, "ending", ending)
    assert cache.add("key", b"content")
    file = cache.find_file("key")
    assert file is not None
    with closing(file):
        assert file.content() == b"content"


def test_file_that_is_swept_before_it_is_locked_is_added_again(
    cache: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    swept: list[Path] = []

    def swept_first(file: IO[bytes], operation: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob("*.growing"))
            for path in swept:
                path.unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", swept_first)
    assert cache.add("key", b"content")
    assert len(swept) == 1
    assert cache.has("key")
    assert not list(tmp_path.glob("*.growing"))


# Stress


@pytest.mark.parametrize("bare", [False, True])
def test_threads_in_a_race(tmp_path: Path, bare: bool) -> None:  # noqa: FBT001 (a parameter)
    filled_now: set[str] = set()
    failures: list[BaseException] = []
    with at(tmp_path, 200_000, bare=bare) as cache:

        def run(seed: int) -> None:
            try:
                stress(cache, random.Random(seed), filled_now)
            except BaseException as error:  # noqa: BLE001 (raised below)
                failures.append(error)

        threads = [threading.Thread(target=run, args=[seed]) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert cache.counters.corrupt == 0
        assert cache.counters.fills > 3
        assert cache.counters.evictions
        assert not list(tmp_path.glob("*.growing"))


@pytest.mark.parametrize("bare", ["False", "True"])
def test_processes_in_a_race(tmp_path: Path, bare: str) -> None:
    commands = [[*PATCHED, STRESS, str(tmp_path), str(seed), bare, os.path.dirname(__file__)] for seed in range(3)]
    processes = [popen(command, env=os.environ, stderr=subprocess.PIPE) for command in commands]
    assert [process.communicate()[1] for process in processes] == [b"", b"", b""]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("*.growing"))
