"""The index of debug info: always current, and each path is scanned once."""

import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harmonia.errors import StoreUnavailableError
from harmonia.nix.build_id import build_ids
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import debug_index
from harmonia.store.debug_index import DebugInfo
from harmonia.store.store import Database, Store
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder
from support.debug_info import ONE, OTHER, TWO, add, add_rows

Open = Callable[..., DebugInfo]

MANY = 100_000


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "root")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "debug-info"


@pytest.fixture
def open_index(builder: StoreBuilder, directory: Path) -> Iterator[Open]:
    opened: list[tuple[Store, DebugInfo]] = []

    def open_index(where: Path = directory) -> DebugInfo:
        store = Store(builder.store_dir, builder.real_dir, builder.db_path)
        opened.append((store, DebugInfo(store, builder.db_path, str(where))))
        return opened[-1][1]

    yield open_index
    for store, index in opened:
        store.database.close()
        index.close()


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the list of scanned store objects."""
    seen: list[bytes] = []

    def spy(root: bytes) -> Iterator[str]:
        seen.append(root)
        return build_ids(root)

    monkeypatch.setattr(debug_index, "build_ids", spy)
    return seen


def lookup(index: DebugInfo, build_id: str) -> list[StorePath]:
    index.update()
    paths, complete = index.look_up(build_id)
    assert complete
    return paths


def never_done_with(last: bytes) -> Callable[[bytes], Iterator[str]]:
    """Return a function that finds build ids, and waits until its process is killed at the path `last`."""

    def halting(root: bytes) -> Iterator[str]:
        while root == last:
            time.sleep(1)
        return build_ids(root)

    return halting


def index_file(directory: Path) -> Path:
    [path] = directory.glob("*.sqlite")
    return path


def rows(directory: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(index_file(directory))) as connection:
        return connection.execute(statement).fetchall()


class TestCurrentAtAnyTime:
    def test_added_paths_are_found(self, builder: StoreBuilder, open_index: Open, scanned: list[bytes]) -> None:
        index = open_index()
        assert lookup(index, ONE) == []
        one = add(builder, "one-debug", ONE, OTHER)
        assert index.look_up(ONE) == ([], False)
        assert lookup(index, ONE) == [one.path]
        two = add(builder, "two-debug", TWO)
        assert lookup(index, TWO) == [two.path]
        assert lookup(index, OTHER) == [one.path]
        assert lookup(index, "4" * 40) == []
        assert scanned == [builder.real_path(one.path), builder.real_path(two.path)]

    def test_deleted_paths_are_forgotten(self, builder: StoreBuilder, open_index: Open, directory: Path) -> None:
        one, two = add(builder, "one-debug", ONE), add(builder, "two-debug", TWO)
        index = open_index()
        assert lookup(index, ONE) == [one.path]
        builder.delete(one.path)
        assert index.look_up(ONE) == ([], True)
        assert lookup(index, ONE) == []
        assert rows(directory, "select path from Paths") == [(two.path,)]
        assert rows(directory, "select build_id from Files") == [(TWO,)]

    def test_deleted_and_added_again(self, builder: StoreBuilder, open_index: Open) -> None:
        index = open_index()
        for contents in ([ONE, TWO], [OTHER], [ONE]):
            path = add(builder, "debug", *contents).path
            for build_id in (ONE, TWO, OTHER):
                assert lookup(index, build_id) == ([path] if build_id in contents else [])
            builder.delete(path)

    def test_path_deleted_between_runs_is_forgotten(
        self, builder: StoreBuilder, open_index: Open, directory: Path, scanned: list[bytes]
    ) -> None:
        one = add(builder, "one-debug", ONE)
        assert lookup(open_index(), ONE) == [one.path]
        builder.delete(one.path)
        two = add(builder, "two-debug", TWO)
        assert lookup(open_index(), TWO) == [two.path]
        assert rows(directory, "select path from Paths") == [(two.path,)]
        assert len(scanned) == 2

    def test_several_paths_with_the_same_file(self, builder: StoreBuilder, open_index: Open) -> None:
        index = open_index()
        one, two = add(builder, "one-debug", ONE), add(builder, "two-debug", ONE)
        assert sorted(lookup(index, ONE)) == sorted([one.path, two.path])
        builder.delete(one.path)
        assert lookup(index, ONE) == [two.path]

    def test_invalid_rows_are_ignored(self, builder: StoreBuilder, open_index: Open) -> None:
        with builder.connect() as connection:
            for path in ("/elsewhere/path", "/nix/store/short", b"\xff"):
                connection.execute("insert into ValidPaths (path, hash, registrationTime) values (?, '', 1)", (path,))
        one = add(builder, "one-debug", ONE)
        assert lookup(open_index(), ONE) == [one.path]

    def test_unreadable_path_is_logged_and_skipped(
        self, builder: StoreBuilder, open_index: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        bad, one = add(builder, "bad-debug", TWO), add(builder, "one-debug", ONE)
        index = open_index()

        def broken(root: bytes) -> Iterator[str]:
            if root == builder.real_path(bad.path):
                raise PermissionError(13, "Permission denied", root)
            return build_ids(root)

        monkeypatch.setattr(debug_index, "build_ids", broken)
        assert lookup(index, ONE) == [one.path]
        assert f"cannot scan {bad.path} for debug info: Permission denied" in caplog.text

    def test_replaced_database_is_indexed_anew(self, builder: StoreBuilder, open_index: Open, tmp_path: Path) -> None:
        """A new database numbers its paths differently."""
        index = open_index()
        one = add(builder, "one-debug", ONE)
        assert lookup(index, ONE) == [one.path]
        other = StoreBuilder(tmp_path / "other")
        two, same = add(other, "two-debug", TWO), add(other, "one-debug", ONE)
        remove_tree(os.fsencode(builder.real_dir))
        os.rename(other.real_dir, builder.real_dir)
        os.rename(other.db_path, builder.db_path)
        assert index.look_up(TWO) == ([], False)
        assert lookup(index, TWO) == [two.path]
        assert lookup(index, ONE) == [same.path]

    def test_database_restored_from_a_backup_is_indexed_anew(
        self, builder: StoreBuilder, open_index: Open, tmp_path: Path
    ) -> None:
        """A backup copied over the same file assigns numbers a second time."""
        index = open_index()
        add(builder, "old", OTHER)
        shutil.copyfile(builder.db_path, tmp_path / "backup")
        one, later = add(builder, "one-debug", ONE), add(builder, "later-debug", OTHER)
        assert lookup(index, ONE) == [one.path]
        shutil.copyfile(tmp_path / "backup", builder.db_path)
        for path in (one.path, later.path):
            remove_tree(builder.real_path(path))
        two = add(builder, "two-debug", TWO)
        assert index.look_up(ONE) == ([], False)
        assert lookup(index, ONE) == []
        assert lookup(index, TWO) == [two.path]

    def test_missing_database_raises_until_restored(self, builder: StoreBuilder, open_index: Open) -> None:
        index = open_index()
        one = add(builder, "one-debug", ONE)
        assert lookup(index, ONE) == [one.path]
        os.rename(builder.db_path, builder.db_path + ".away")
        for ask in (index.update, lambda: index.look_up(ONE)):
            with pytest.raises(StoreUnavailableError):
                ask()
        os.rename(builder.db_path + ".away", builder.db_path)
        assert lookup(index, ONE) == [one.path]


class TestPersistence:
    def test_restart_scans_nothing(self, builder: StoreBuilder, open_index: Open, scanned: list[bytes]) -> None:
        one = add(builder, "one-debug", ONE)
        builder.add_derivation("drv", "/bin/sh")
        assert lookup(open_index(), ONE) == [one.path]
        assert scanned == [builder.real_path(one.path)]  # and not the derivation
        assert open_index().look_up(ONE) == ([one.path], True)
        assert lookup(open_index(), TWO) == []
        assert len(scanned) == 1

    def test_two_stores_share_a_directory(
        self, builder: StoreBuilder, open_index: Open, directory: Path, tmp_path: Path
    ) -> None:
        other = StoreBuilder(tmp_path / "other")
        one, two = add(builder, "one-debug", ONE), add(other, "two-debug", TWO)
        store = Store(other.store_dir, other.real_dir, other.db_path)
        with closing(store.database), closing(DebugInfo(store, other.db_path, str(directory))) as second:
            first = open_index()
            assert lookup(first, ONE) == [one.path]
            assert lookup(second, TWO) == [two.path]
            assert first.look_up(TWO) == second.look_up(ONE) == ([], True)

    def test_only_one_process_writes(
        self, builder: StoreBuilder, open_index: Open, directory: Path, scanned: list[bytes]
    ) -> None:
        writer, reader = open_index(), open_index()
        assert lookup(writer, ONE) == []
        one = add(builder, "one-debug", ONE)
        with index_file(directory).with_suffix(".sqlite.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            reader.update()
            assert reader.look_up(ONE) == ([], False)
            assert scanned == []
        writer.update()
        assert reader.look_up(ONE) == ([one.path], True)
        assert lookup(reader, ONE) == [one.path]
        assert len(scanned) == 1

    @pytest.mark.parametrize("where", ["a file", "nowhere", "a directory in its place"])
    def test_index_is_in_memory_if_the_directory_is_not_writable(
        self, builder: StoreBuilder, open_index: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
    ) -> None:
        (tmp_path / "file").write_text("")
        path = Path({"a file": f"{tmp_path}/file", "nowhere": "/proc/none"}.get(where, f"{tmp_path}/index"))
        index = open_index(path)
        if where == "a directory in its place":
            index.update()
            index.close()
            file = index_file(path)
            file.unlink()
            file.mkdir()
        one = add(builder, "one-debug", ONE)
        for _ in range(3):
            index.update()
        assert lookup(index, ONE) == [one.path]
        two = add(builder, "two-debug", TWO)
        assert lookup(index, TWO) == [two.path]
        assert "keeping it in memory" in caplog.text

    def test_index_stays_on_disk_after_a_shortage_of_descriptors(
        self, builder: StoreBuilder, open_index: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        index = open_index()
        index.update()
        one = add(builder, "one-debug", ONE)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StoreUnavailableError, match=os.strerror(errno.EMFILE)):
                index.update()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        index.update()
        index.close()
        assert lookup(open_index(), ONE) == [one.path]
        assert not caplog.text

    def test_index_is_in_memory_if_the_disk_is_full(
        self, builder: StoreBuilder, open_index: Open, directory: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        os.makedirs(directory)
        one = add(builder, "one-debug", ONE)
        index = open_index()
        index.update()
        file = index_file(directory)
        for _ in range(2):
            file.unlink(missing_ok=True)
            file.symlink_to("/dev/full")
            index.update()
        assert lookup(index, ONE) == [one.path]
        assert file.is_symlink()  # the index gave the file up
        assert "cannot use the index" in caplog.text


class TestDamage:
    @pytest.fixture
    def good(self, builder: StoreBuilder, open_index: Open) -> PathInfo:
        """Return a path of an index with more than one page in each table."""
        add(builder, "many-debug", *(f"{number:040x}" for number in range(400)))
        one = add(builder, "one-debug", ONE)
        assert lookup(open_index(), ONE) == [one.path]
        return one

    @pytest.mark.parametrize("damage", ["garbage", "empty", "half", "its end", "another schema", "gone"])
    def test_damaged_index_is_rebuilt(
        self, builder: StoreBuilder, open_index: Open, directory: Path, good: PathInfo, damage: str
    ) -> None:
        before, file = open_index(), index_file(directory)
        if damage == "half":
            assert lookup(before, ONE) == [good.path]  # its process keeps using the file while another damages it
        content = file.read_bytes()
        match damage:
            case "garbage":
                file.write_bytes(os.urandom(20_000))
            case "empty":
                file.write_bytes(b"")
            case "half":
                file.write_bytes(content[: len(content) // 2])
            case "its end":
                file.write_bytes(content[:12_288] + os.urandom(len(content) - 12_288))
            case "gone":
                file.unlink()
            case _:
                file.unlink()
                with closing(sqlite3.connect(file)) as connection, connection:
                    connection.execute("create table State (x)")
        two = add(builder, "two-debug", TWO)
        index = open_index()
        for each in (index, before):
            for _ in range(3):
                each.look_up(ONE)
                each.update()
            assert lookup(each, ONE) == [good.path]
            assert lookup(each, TWO) == [two.path]
        assert rows(directory, "pragma quick_check") == [("ok",)]

    def test_damaged_index_is_rebuilt_without_new_paths(
        self, open_index: Open, directory: Path, good: PathInfo
    ) -> None:
        with closing(sqlite3.connect(index_file(directory))) as connection:
            [(root,)] = connection.execute("select rootpage from sqlite_schema where name = 'Files'")
            [(page,)] = connection.execute("pragma page_size")
        with index_file(directory).open("r+b") as file:
            file.seek((root - 1) * page)
            file.write(bytes(page))
        index = open_index()
        assert index.look_up(ONE) == ([], False)
        for _ in range(2):
            index.update()
        assert lookup(index, ONE) == [good.path]

    def test_process_killed_while_it_writes_leaves_a_valid_index(
        self,
        builder: StoreBuilder,
        open_index: Open,
        directory: Path,
        scanned: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        one = add(builder, "one-debug", ONE)
        add_rows(builder, 20_000)
        two = add(builder, "two-debug", TWO)
        with monkeypatch.context() as patch:
            patch.setattr(debug_index, "build_ids", never_done_with(builder.real_path(two.path)))
            process = multiprocessing.get_context("fork").Process(target=open_index().update)
            process.start()
        reader = open_index()
        while not reader.look_up(ONE)[0]:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert reader.look_up(ONE) == ([one.path], False)
        assert lookup(reader, TWO) == [two.path]
        assert len(scanned) < 20_002
        assert rows(directory, "pragma integrity_check") == [("ok",)]


def test_large_store_is_indexed_once_in_little_time(
    builder: StoreBuilder, open_index: Open, scanned: list[bytes]
) -> None:
    """100,000 paths take 2 s of CPU time, at half speed while no client waits."""
    add_rows(builder, MANY)
    one = add(builder, "one-debug", ONE)
    index = open_index()
    index.scan_soon()
    began = time.process_time()
    index.update()
    took = time.process_time() - began
    assert took < 10
    assert index.look_up(ONE) == ([one.path], True)
    assert len(scanned) == MANY + 1
    again = open_index()
    began = time.process_time()
    assert lookup(again, ONE) == [one.path]
    assert time.process_time() - began < took / 5
    assert len(scanned) == MANY + 1


def test_path_is_not_skipped_during_a_shortage_of_descriptors(
    builder: StoreBuilder, open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(builder, "debug", ONE).path
    index = open_index()

    def scandir(_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(StoreUnavailableError):
            index.update()
    assert lookup(index, ONE) == [path]


def test_index_with_a_damaged_position_is_rebuilt(builder: StoreBuilder, open_index: Open, directory: Path) -> None:
    path = add(builder, "debug", ONE).path
    open_index().update()
    with closing(sqlite3.connect(index_file(directory))) as connection, connection:
        connection.execute("update State set checked = 'x'")
    assert lookup(open_index(), ONE) == [path]


class CountingLock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.times = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.times += 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_sweep_runs_in_batches_and_lookups_run_in_between(
    builder: StoreBuilder, open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [add(builder, f"kept-{number}", f"{number:040}") for number in range(4)]
    gone = [add(builder, f"gone-{number}", f"{number:040}") for number in range(10)]
    index = open_index()
    index.update()
    for path in gone:
        builder.delete(path.path)
    queries: list[str] = []
    query = Database.query
    taken = []

    def counted(database: Database, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        queries.append(statement)
        return query(database, statement, *parameters)

    sweep = DebugInfo._sweep  # noqa: SLF001 (a batch)
    lock = CountingLock()

    def seen(index: DebugInfo, last: int) -> int | None:
        taken.append(lock.times)
        return sweep(index, last)

    monkeypatch.setattr(Database, "query", counted)
    monkeypatch.setattr(DebugInfo, "_sweep", seen)
    monkeypatch.setattr(debug_index, "_SWEEP_BATCH_PATHS", 5)
    monkeypatch.setattr(index, "_lock", lock)
    monkeypatch.setattr(index, "_next_sweep", 0)
    monkeypatch.setattr(index, "_gone", {0})  # so that a sweep is due
    index.update()
    assert len([statement for statement in queries if statement == debug_index._VALID_BATCH]) == 3  # noqa: SLF001 (a private part is tested)
    assert debug_index._VALID not in queries  # noqa: SLF001 (a private part is tested)
    assert len(set(taken)) == 3  # the lock was free between the batches
    assert [index.look_up(f"{number:040}")[0] for number in range(4)] == [[path.path] for path in kept]
    assert index.look_up(f"{9:040}")[0] == []
