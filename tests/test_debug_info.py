"""The index of debug info: true at every moment, and no path is looked at twice."""

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
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The store objects that were looked at."""
    seen: list[bytes] = []

    def spy(root: bytes) -> Iterator[str]:
        seen.append(root)
        return build_ids(root)

    monkeypatch.setattr(debug_index, "build_ids", spy)
    return seen


def found(index: DebugInfo, build_id: str) -> list[StorePath]:
    index.update()
    paths, complete = index.look_up(build_id)
    assert complete
    return paths


def index_file(directory: Path) -> Path:
    [path] = directory.glob("*.sqlite")
    return path


def rows(directory: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(index_file(directory))) as connection:
        return connection.execute(statement).fetchall()


class TestTrueAtEveryMoment:
    def test_paths_that_come(self, builder: StoreBuilder, open_index: Open, looked_at: list[bytes]) -> None:
        index = open_index()
        assert found(index, ONE) == []
        one = add(builder, "one-debug", ONE, OTHER)
        assert index.look_up(ONE) == ([], False)
        assert found(index, ONE) == [one.path]
        two = add(builder, "two-debug", TWO)
        assert found(index, TWO) == [two.path]
        assert found(index, OTHER) == [one.path]
        assert found(index, "4" * 40) == []
        assert looked_at == [builder.real_path(one.path), builder.real_path(two.path)]

    def test_paths_that_go(self, builder: StoreBuilder, open_index: Open, directory: Path) -> None:
        one, two = add(builder, "one-debug", ONE), add(builder, "two-debug", TWO)
        index = open_index()
        assert found(index, ONE) == [one.path]
        builder.delete(one.path)
        assert index.look_up(ONE) == ([], True)
        assert found(index, ONE) == []
        assert rows(directory, "select path from Paths") == [(two.path,)]
        assert rows(directory, "select build_id from Files") == [(TWO,)]

    def test_paths_that_go_and_come_again(self, builder: StoreBuilder, open_index: Open) -> None:
        index = open_index()
        for contents in ([ONE, TWO], [OTHER], [ONE]):
            path = add(builder, "debug", *contents).path
            for build_id in (ONE, TWO, OTHER):
                assert found(index, build_id) == ([path] if build_id in contents else [])
            builder.delete(path)

    def test_paths_that_go_while_nobody_asks(
        self, builder: StoreBuilder, open_index: Open, directory: Path, looked_at: list[bytes]
    ) -> None:
        one = add(builder, "one-debug", ONE)
        assert found(open_index(), ONE) == [one.path]
        builder.delete(one.path)
        two = add(builder, "two-debug", TWO)
        assert found(open_index(), TWO) == [two.path]
        assert rows(directory, "select path from Paths") == [(two.path,)]
        assert len(looked_at) == 2

    def test_several_paths_with_the_same_file(self, builder: StoreBuilder, open_index: Open) -> None:
        index = open_index()
        one, two = add(builder, "one-debug", ONE), add(builder, "two-debug", ONE)
        assert sorted(found(index, ONE)) == sorted([one.path, two.path])
        builder.delete(one.path)
        assert found(index, ONE) == [two.path]

    def test_rows_that_are_no_paths(self, builder: StoreBuilder, open_index: Open) -> None:
        with builder.connect() as connection:
            for path in ("/elsewhere/path", "/nix/store/short", b"\xff"):
                connection.execute("insert into ValidPaths (path, hash, registrationTime) values (?, '', 1)", (path,))
        one = add(builder, "one-debug", ONE)
        assert found(open_index(), ONE) == [one.path]

    def test_paths_that_cannot_be_read(
        self, builder: StoreBuilder, open_index: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        bad, one = add(builder, "bad-debug", TWO), add(builder, "one-debug", ONE)
        index = open_index()

        def broken(root: bytes) -> Iterator[str]:
            if root == builder.real_path(bad.path):
                raise PermissionError(13, "Permission denied", root)
            return build_ids(root)

        monkeypatch.setattr(debug_index, "build_ids", broken)
        assert found(index, ONE) == [one.path]
        assert f"cannot scan {bad.path} for debug info: Permission denied" in caplog.text

    def test_another_database(self, builder: StoreBuilder, open_index: Open, tmp_path: Path) -> None:
        """In the place of the first: the paths are numbered anew."""
        index = open_index()
        one = add(builder, "one-debug", ONE)
        assert found(index, ONE) == [one.path]
        other = StoreBuilder(tmp_path / "other")
        two, same = add(other, "two-debug", TWO), add(other, "one-debug", ONE)
        remove_tree(os.fsencode(builder.real_dir))
        os.rename(other.real_dir, builder.real_dir)
        os.rename(other.db_path, builder.db_path)
        assert index.look_up(TWO) == ([], False)
        assert found(index, TWO) == [two.path]
        assert found(index, ONE) == [same.path]

    def test_an_older_database(self, builder: StoreBuilder, open_index: Open, tmp_path: Path) -> None:
        """From a backup, written into the same file: its numbers are given a second time."""
        index = open_index()
        add(builder, "old", OTHER)
        shutil.copyfile(builder.db_path, tmp_path / "backup")
        one, later = add(builder, "one-debug", ONE), add(builder, "later-debug", OTHER)
        assert found(index, ONE) == [one.path]
        shutil.copyfile(tmp_path / "backup", builder.db_path)
        for path in (one.path, later.path):
            remove_tree(builder.real_path(path))
        two = add(builder, "two-debug", TWO)
        assert index.look_up(ONE) == ([], False)
        assert found(index, ONE) == []
        assert found(index, TWO) == [two.path]

    def test_no_database(self, builder: StoreBuilder, open_index: Open) -> None:
        index = open_index()
        one = add(builder, "one-debug", ONE)
        assert found(index, ONE) == [one.path]
        os.rename(builder.db_path, builder.db_path + ".away")
        for ask in (index.update, lambda: index.look_up(ONE)):
            with pytest.raises(StoreUnavailableError):
                ask()
        os.rename(builder.db_path + ".away", builder.db_path)
        assert found(index, ONE) == [one.path]


class TestKept:
    def test_a_restart_looks_at_nothing(self, builder: StoreBuilder, open_index: Open, looked_at: list[bytes]) -> None:
        one = add(builder, "one-debug", ONE)
        builder.add_derivation("drv", "/bin/sh")
        assert found(open_index(), ONE) == [one.path]
        assert looked_at == [builder.real_path(one.path)]  # and not at the derivation
        assert open_index().look_up(ONE) == ([one.path], True)
        assert found(open_index(), TWO) == []
        assert len(looked_at) == 1

    def test_two_stores_in_one_directory(
        self, builder: StoreBuilder, open_index: Open, directory: Path, tmp_path: Path
    ) -> None:
        other = StoreBuilder(tmp_path / "other")
        one, two = add(builder, "one-debug", ONE), add(other, "two-debug", TWO)
        store = Store(other.store_dir, other.real_dir, other.db_path)
        with closing(store.database), closing(DebugInfo(store, other.db_path, str(directory))) as second:
            first = open_index()
            assert found(first, ONE) == [one.path]
            assert found(second, TWO) == [two.path]
            assert first.look_up(TWO) == second.look_up(ONE) == ([], True)

    def test_only_one_process_writes(
        self, builder: StoreBuilder, open_index: Open, directory: Path, looked_at: list[bytes]
    ) -> None:
        writer, reader = open_index(), open_index()
        assert found(writer, ONE) == []
        one = add(builder, "one-debug", ONE)
        with index_file(directory).with_suffix(".sqlite.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            reader.update()
            assert reader.look_up(ONE) == ([], False)
            assert looked_at == []
        writer.update()
        assert reader.look_up(ONE) == ([one.path], True)
        assert found(reader, ONE) == [one.path]
        assert len(looked_at) == 1

    @pytest.mark.parametrize("where", ["a file", "nowhere", "a directory in its place"])
    def test_in_memory_where_it_cannot_be_written(
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
        assert found(index, ONE) == [one.path]
        two = add(builder, "two-debug", TWO)
        assert found(index, TWO) == [two.path]
        assert "keeping it in memory" in caplog.text

    def test_on_disk_after_a_shortage_of_descriptors(
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
        assert found(open_index(), ONE) == [one.path]
        assert not caplog.text

    def test_in_memory_where_the_disk_is_full(
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
        assert found(index, ONE) == [one.path]
        assert file.is_symlink()  # it was given up
        assert "cannot use the index" in caplog.text


class TestDamage:
    @pytest.fixture
    def good(self, builder: StoreBuilder, open_index: Open) -> PathInfo:
        """Of an index that has more than a page of everything."""
        add(builder, "many-debug", *(f"{number:040x}" for number in range(400)))
        one = add(builder, "one-debug", ONE)
        assert found(open_index(), ONE) == [one.path]
        return one

    @pytest.mark.parametrize("damage", ["garbage", "empty", "half", "its end", "another schema", "gone"])
    def test_is_mended(
        self, builder: StoreBuilder, open_index: Open, directory: Path, good: PathInfo, damage: str
    ) -> None:
        before, file = open_index(), index_file(directory)
        if damage == "half":
            assert found(before, ONE) == [good.path]  # it goes on with a file that another process damages
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
            assert found(each, ONE) == [good.path]
            assert found(each, TWO) == [two.path]
        assert rows(directory, "pragma quick_check") == [("ok",)]

    def test_is_mended_where_no_path_is_new(self, open_index: Open, directory: Path, good: PathInfo) -> None:
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
        assert found(index, ONE) == [good.path]

    def test_a_process_killed_while_it_writes(
        self, builder: StoreBuilder, open_index: Open, directory: Path, looked_at: list[bytes]
    ) -> None:
        one = add(builder, "one-debug", ONE)
        add_rows(builder, 20_000)
        two = add(builder, "two-debug", TWO)
        process = multiprocessing.get_context("fork").Process(target=open_index().update)
        process.start()
        reader = open_index()
        while not reader.look_up(ONE)[0]:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert reader.look_up(ONE) == ([one.path], False)
        assert found(reader, TWO) == [two.path]
        assert len(looked_at) < 20_002
        assert rows(directory, "pragma integrity_check") == [("ok",)]


def test_a_large_store(builder: StoreBuilder, open_index: Open, looked_at: list[bytes]) -> None:
    """100,000 paths: 2 s of one processor, at half speed where nobody waits; then nothing at all."""
    add_rows(builder, MANY)
    one = add(builder, "one-debug", ONE)
    index = open_index()
    index.hurry()
    began = time.process_time()
    index.update()
    assert time.process_time() - began < 10
    assert index.look_up(ONE) == ([one.path], True)
    assert len(looked_at) == MANY + 1
    again = open_index()
    began = time.process_time()
    assert found(again, ONE) == [one.path]
    assert time.process_time() - began < 0.1
    assert len(looked_at) == MANY + 1


def test_a_path_is_not_passed_over_for_want_of_descriptors(
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
    assert found(index, ONE) == [path]


def test_an_index_that_does_not_know_how_far_it_came_begins_anew(
    builder: StoreBuilder, open_index: Open, directory: Path
) -> None:
    path = add(builder, "debug", ONE).path
    open_index().update()
    with closing(sqlite3.connect(index_file(directory))) as connection, connection:
        connection.execute("update State set checked = 'x'")
    assert found(open_index(), ONE) == [path]


class CountingLock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.times = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.times += 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_the_search_for_paths_that_are_gone_asks_in_batches_and_lets_lookups_in(
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
    monkeypatch.setattr(index, "_gone", {0})  # so that there is something to do
    index.update()
    assert len([statement for statement in queries if statement == debug_index._VALID_BATCH]) == 3  # noqa: SLF001
    assert debug_index._VALID not in queries  # noqa: SLF001
    assert len(set(taken)) == 3  # the lock was free between the batches
    assert [index.look_up(f"{number:040}")[0] for number in range(4)] == [[path.path] for path in kept]
    assert index.look_up(f"{9:040}")[0] == []
