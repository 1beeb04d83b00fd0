"""The store is read without a daemon, always in its current state; trouble is never reported as a missing path."""

import multiprocessing
import multiprocessing.connection
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmonia.errors import HarmoniaError, StoreObjectError, StoreUnavailableError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store.store import _PATH_INFO, Store
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs_root
from support.realisations import BUILD_TRACE, REALISATIONS, create

NOBODY = 65534
TIMEOUT = 0.2
CA = "fixed:r:sha256:" + "0" * 52


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "root")


@pytest.fixture
def open_store() -> Iterator[Callable[..., Store]]:
    """Return a function that opens the store of a builder, or another database of it."""
    opened: list[Store] = []

    def open_store(builder: StoreBuilder, db_path: str | None = None) -> Store:
        opened.append(Store(builder.store_dir, builder.real_dir, db_path or builder.db_path, TIMEOUT))
        return opened[-1]

    yield open_store
    for store in opened:
        store.database.close()


@pytest.fixture
def store(builder: StoreBuilder, open_store: Callable[..., Store]) -> Store:
    return open_store(builder)


def look_up(store: Store, info: PathInfo) -> PathInfo | None:
    return store.path_info(info.path.hash_part)


class TestPathInfo:
    def test_path_info_has_all_columns(self, builder: StoreBuilder, store: Store) -> None:
        path, deriver = builder.output_path("all-1.0"), builder.output_path("all-1.0.drv")
        others = [builder.add_source(f"other-{number}", b"").path for number in range(20)]
        info = builder.add(path, b"", references=[*others, path], deriver=deriver, sigs=["a-1:YQ==", "b-1:Yg=="], ca=CA)
        found = look_up(store, info)
        assert found == info
        assert list(info.references) == sorted([*others, path])
        assert found.path in found.references
        assert all(type(reference) is StorePath for reference in found.references)
        assert store.real_path(path) == os.fsencode(f"{builder.real_dir}/{path}")

    def test_path_info_of_empty_columns(self, builder: StoreBuilder, store: Store) -> None:
        info = builder.add(builder.output_path("plain"), b"")
        assert look_up(store, info) == info
        assert (info.references, info.deriver, info.sigs, info.ca) == ((), None, (), None)

    @pytest.mark.parametrize("missing", ["0" * 32, "z" * 32])
    def test_missing_path_is_none(self, builder: StoreBuilder, store: Store, missing: str) -> None:
        assert store.path_info(missing) is None
        info = builder.add_source("there", b"")
        assert store.path_info(missing) is None
        last = "1" if info.path.hash_part[-1] == "0" else "0"
        assert store.path_info(info.path.hash_part[:-1] + last) is None

    def test_query_uses_indexes_only(self, builder: StoreBuilder) -> None:
        with builder.connect() as connection:
            plan = [row[3] for row in connection.execute(f"explain query plan {_PATH_INFO}", ("/nix/store/x",))]
        assert any(step.startswith("SEARCH found USING INDEX") for step in plan)
        assert not any(step.startswith("SCAN") or "TEMP B-TREE" in step for step in plan)

    def test_tables_of_a_newer_nix_change_nothing(self, builder: StoreBuilder, store: Store) -> None:
        info = builder.add_source("path", b"")
        assert look_up(store, info) == info
        create(builder, REALISATIONS + BUILD_TRACE)
        assert look_up(store, info) == info

    def test_store_dir_selects_the_paths(self, tmp_path: Path, open_store: Callable[..., Store]) -> None:
        builder = StoreBuilder(tmp_path, "/gnu/store")
        info = builder.add_source("path", b"")
        assert look_up(open_store(builder), info) == info
        assert Store("/nix/store", builder.real_dir, builder.db_path).path_info(info.path.hash_part) is None


def set_column(builder: StoreBuilder, column: str, value: object) -> None:
    with builder.connect() as connection:
        connection.execute(f"update ValidPaths set {column} = ?", (value,))


class TestUnusableRows:
    @pytest.mark.parametrize(
        ("column", "value"),
        [
            *[("narSize", size) for size in (None, 0, -1, "many", b"many", "")],
            *[
                ("hash", text)
                for text in (
                    "",
                    "sha256:",
                    "sha256:" + "0" * 63,
                    "sha256:" + "g" * 64,
                    "sha256:" + "0" * 52,
                    "md5:" + "0" * 32,
                    "0" * 64,
                    b"\0",
                    b"\xff",
                    7,
                )
            ],
            *[
                ("deriver", text)
                for text in ("/elsewhere/x", "unknown-deriver", 5, b"\x01", "/nix/store/" + "e" * 34, b"\xff")
            ],
            *[("ca", text) for text in ("fixed:r:sha256:x", "text:", f"{CA}\n", f" {CA}", CA.replace("r:", "x:"), 7)],
        ],
    )
    def test_unusable_column_raises(self, builder: StoreBuilder, store: Store, column: str, value: object) -> None:
        info = builder.add_source("path", b"")
        set_column(builder, column, value)
        with pytest.raises(StoreObjectError, match=str(info.path)):
            look_up(store, info)
        other = builder.add_source("other", b"")
        assert look_up(store, other) == other

    def test_unusable_path_raises(self, builder: StoreBuilder, store: Store) -> None:
        info = builder.add_source("path", b"")
        set_column(builder, "path", f"/nix/store/{info.path.hash_part}+path")
        with pytest.raises(StoreObjectError):
            look_up(store, info)

    def test_unusable_reference_raises(self, builder: StoreBuilder, store: Store) -> None:
        base = builder.add_source("base", b"")
        info = builder.add_source("path", b"", [base.path])
        with builder.connect() as connection:
            connection.execute("update ValidPaths set path = 'nonsense' where path like '%-base'")
        with pytest.raises(StoreObjectError):
            look_up(store, info)

    @pytest.mark.parametrize("path", [b"/nix/store/\xff", "/nix/store/~", b"\0"])
    def test_unusable_row_does_not_affect_others(self, builder: StoreBuilder, store: Store, path: bytes | str) -> None:
        info = builder.add_source("path", b"")
        with builder.connect() as connection:
            row = (path, b"\xff", b"\xff")
            connection.execute("insert into ValidPaths (path, hash, sigs, registrationTime) values (?, ?, ?, 0)", row)
            connection.execute("update ValidPaths set path = cast(path as text)")
        assert look_up(store, info) == info
        assert store.path_info("z" * 32) is None

    def test_bytes_instead_of_text_are_accepted_as_by_nix(self, builder: StoreBuilder, store: Store) -> None:
        info = builder.add_source("path", b"")
        set_column(builder, "hash", f"sha256:{info.nar_hash.hex()}".encode())
        set_column(builder, "sigs", b"a-1:YQ==")
        set_column(builder, "narSize", str(info.nar_size).encode())
        assert look_up(store, info) == replace(info, sigs=("a-1:YQ==",))


class TestChanges:
    def test_changes_are_visible_at_once(self, builder: StoreBuilder, store: Store) -> None:
        assert store.path_info("0" * 32) is None
        for number in range(5):
            info = builder.add_source(f"path-{number}", b"")
            assert look_up(store, info) == info
            builder.delete(info.path)
            assert look_up(store, info) is None

    def test_changes_are_visible_once_committed(self, builder: StoreBuilder, store: Store) -> None:
        info = builder.add_source("path", b"")
        with builder.connect() as connection:
            connection.execute("delete from ValidPaths")
            assert look_up(store, info) == info
        assert look_up(store, info) is None

    def test_generation_changes_with_the_database(self, builder: StoreBuilder, store: Store) -> None:
        def changed() -> bool:
            before, known[0] = known[0], store.database.generation()
            return known[0] != before

        known = [store.database.generation()]
        assert not changed()
        info = builder.add_source("path", b"")
        assert changed()
        look_up(store, info)
        with pytest.raises(StoreUnavailableError):
            store.database.query("select nonsense")
        known = [store.database.generation()]
        look_up(store, info)
        assert not changed()
        builder.delete(info.path)
        look_up(store, info)
        assert changed()
        assert not changed()

    def test_generation_changes_with_the_database_after_an_error(self, builder: StoreBuilder, store: Store) -> None:
        info = builder.add_source("path", b"")
        before = store.database.generation()
        with pytest.raises(StoreUnavailableError):
            store.database.query("select nonsense")
        builder.delete(info.path)
        assert store.database.generation() != before

    def test_replaced_database_file_is_noticed(self, builder: StoreBuilder, store: Store, tmp_path: Path) -> None:
        info = builder.add_source("old", b"")
        assert look_up(store, info) == info
        generation = store.database.generation()
        other = StoreBuilder(tmp_path / "other")
        added = other.add_source("new", b"")
        os.replace(other.db_path, builder.db_path)
        assert look_up(store, info) is None
        assert look_up(store, added) == added
        assert store.database.generation() != generation

    def test_database_file_replaced_during_a_lookup_is_noticed(
        self, builder: StoreBuilder, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = builder.add_source("old", b"")
        other = StoreBuilder(tmp_path / "other")
        connected = store.database._connected  # noqa: SLF001 (replaces the file right after it)

        def replaced_too_late() -> sqlite3.Connection:
            connection = connected()
            if os.path.exists(other.db_path):
                os.replace(other.db_path, builder.db_path)
            return connection

        monkeypatch.setattr(store.database, "_connected", replaced_too_late)
        assert look_up(store, info) is None


class TestTrouble:
    @pytest.mark.parametrize("opened", [False, True])
    def test_locked_database_raises_after_the_timeout(
        self, builder: StoreBuilder, store: Store, *, opened: bool
    ) -> None:
        info = builder.add_source("path", b"")
        with builder.connect() as connection:
            connection.execute("pragma journal_mode = delete")
        if opened:
            look_up(store, info)
        with builder.connect() as connection:
            connection.execute("begin exclusive")
            started = time.monotonic()
            for _ in range(2):
                with pytest.raises(StoreUnavailableError, match="locked"):
                    look_up(store, info)
            assert time.monotonic() - started >= 2 * TIMEOUT
        assert look_up(store, info) == info

    @pytest.mark.parametrize("opened", [False, True])
    @pytest.mark.parametrize("trouble", ["missing", "empty", "cut", "garbage", "directory", "no directory"])
    def test_damaged_database_raises_until_it_is_restored(
        self, builder: StoreBuilder, store: Store, trouble: str, *, opened: bool
    ) -> None:
        info = builder.add_source("path", b"")
        if opened:
            look_up(store, info)
        content = Path(builder.db_path).read_bytes()
        directory = os.path.dirname(builder.db_path)
        kept = directory + ".kept"
        shutil.copytree(directory, kept)
        remove_tree(os.fsencode(builder.db_path))
        if trouble == "directory":
            os.mkdir(builder.db_path)
        elif trouble == "no directory":
            shutil.rmtree(directory)
        elif trouble != "missing":
            damaged = {"empty": b"", "cut": content[:5000], "garbage": b"no database\n" * 1000}[trouble]
            Path(builder.db_path).write_bytes(damaged)
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="cannot read"):
                look_up(store, info)
        with pytest.raises(StoreUnavailableError):
            store.database.generation()
        with pytest.raises(StoreUnavailableError):
            store.check()
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(kept, directory)
        assert look_up(store, info) == info
        store.check()

    def test_check_raises_if_the_store_directory_is_missing(self, builder: StoreBuilder, store: Store) -> None:
        store.check()
        os.rmdir(builder.real_dir)
        with pytest.raises(StoreUnavailableError, match="cannot read"):
            store.check()


class Reader:
    """A store opened by another process, without privileges. (Within one process, SQLite shares the -shm file.)"""

    def __init__(self, builder: StoreBuilder, db_path: str | None = None) -> None:
        fork = multiprocessing.get_context("fork")
        self._pipe, pipe = fork.Pipe()
        store = Store(builder.store_dir, builder.real_dir, db_path or builder.db_path, TIMEOUT)
        self._process = fork.Process(target=self._answer, args=(pipe, store), daemon=True)
        self._process.start()

    @staticmethod
    def _answer(pipe: "multiprocessing.connection.Connection[object, Any]", store: Store) -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        while info := pipe.recv():
            try:
                pipe.send((look_up(store, info), store.database.generation()))
            except HarmoniaError as error:
                pipe.send(error)

    def _ask(self, info: PathInfo) -> tuple[PathInfo | None, Hashable]:
        self._pipe.send(info)
        answer: tuple[PathInfo | None, Hashable] | HarmoniaError = self._pipe.recv()
        if isinstance(answer, HarmoniaError):
            raise answer
        return answer

    def look_up(self, info: PathInfo) -> PathInfo | None:
        return self._ask(info)[0]

    def generation(self, info: PathInfo) -> Hashable:
        return self._ask(info)[1]

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()
        assert self._process.exitcode == 0


@pytest.mark.root
@needs_root
class TestWithoutPrivileges:
    """The reader cannot write beside the database, which Nix or another program leaves in any state."""

    @pytest.fixture
    def builder(self) -> Iterator[StoreBuilder]:
        directory = tempfile.mkdtemp()  # tmp_path is in a directory that only root can enter
        os.chmod(directory, 0o755)
        yield StoreBuilder(directory)
        remove_tree(os.fsencode(directory))

    @pytest.fixture
    def read(self, builder: StoreBuilder) -> Iterator[Callable[..., Reader]]:
        """Return a function that opens the database, or another database of the store."""
        readers: list[Reader] = []

        def read(db_path: str | None = None) -> Reader:
            readers.append(Reader(builder, db_path))
            return readers[-1]

        yield read
        for reader in readers:
            reader.stop()

    @staticmethod
    @contextmanager
    def writer(builder: StoreBuilder) -> Iterator[None]:
        """Keep the database open, so that the changes of other writers stay in the WAL."""
        with builder.connect() as connection:
            connection.execute("select 1 from ValidPaths").fetchall()
            yield

    @staticmethod
    def left(builder: StoreBuilder, *suffixes: str) -> str:
        """Copy the database as a killed process leaves it: with the files that have these suffixes."""
        os.mkdir(f"{builder.real_dir}/../left")
        for suffix in ("", *suffixes):
            shutil.copy(builder.db_path + suffix, f"{builder.real_dir}/../left/db.sqlite{suffix}")
        return f"{builder.real_dir}/../left/db.sqlite"

    def test_database_closed_by_nix_2_21_and_older(self, builder: StoreBuilder, read: Callable[..., Reader]) -> None:
        reader = read()
        info = builder.add_source("first", b"")
        files = sorted(os.listdir(os.path.dirname(builder.db_path)))
        assert files == ["db.sqlite", "schema"]
        assert reader.look_up(info) == info
        generation = reader.generation(info)
        for number in range(3):
            assert reader.generation(info) == generation
            time.sleep(0.02)  # file times may be that coarse
            added = builder.add_source(f"path-{number}", b"")
            assert reader.look_up(added) == added
            assert reader.generation(info) != generation
            generation = reader.generation(info)
            time.sleep(0.02)
            builder.delete(added.path)
            assert reader.look_up(added) is None
            assert reader.generation(info) != generation
            generation = reader.generation(info)
        assert sorted(os.listdir(os.path.dirname(builder.db_path))) == files

    def test_database_closed_by_a_newer_nix(self, builder: StoreBuilder, read: Callable[..., Reader]) -> None:
        info = builder.add_source("path", b"")
        with builder.connect() as connection:
            connection.execute("update ValidPaths set registrationTime = 1")
            connection.commit()
            connection.execute("pragma wal_checkpoint(truncate)")
            path = self.left(builder, "-wal", "-shm")
        assert os.path.getsize(path + "-wal") == 0
        reader = read(path)
        assert reader.look_up(info) == info
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("delete from ValidPaths")
            assert reader.look_up(info) == info
            connection.commit()
            assert reader.look_up(info) is None
        assert reader.look_up(info) is None

    def test_database_open_in_a_writer(self, builder: StoreBuilder, read: Callable[..., Reader]) -> None:
        with self.writer(builder):
            info = builder.add_source("path", b"")
            assert os.path.getsize(builder.db_path + "-wal") > 0
            reader = read()
            assert reader.look_up(info) == info
            builder.delete(info.path)
            assert reader.look_up(info) is None

    def test_reader_sees_changes_while_and_after_a_writer_is_open(
        self, builder: StoreBuilder, read: Callable[..., Reader]
    ) -> None:
        reader = read()
        first = builder.add_source("first", b"")
        assert reader.look_up(first) == first
        with self.writer(builder):
            assert reader.look_up(first) == first
            second = builder.add_source("second", b"")
            assert reader.look_up(second) == second
            generation = reader.generation(second)
            builder.delete(first.path)
            assert reader.generation(second) != generation
            assert reader.look_up(first) is None
        assert reader.look_up(first) is None
        third = builder.add_source("third", b"")
        assert reader.look_up(third) == third
        another = read()
        for info, found in ((first, None), (second, second), (third, third)):
            assert reader.look_up(info) == another.look_up(info) == found

    def test_wal_without_shm_raises(self, builder: StoreBuilder, read: Callable[..., Reader]) -> None:
        first = builder.add_source("first", b"")
        with self.writer(builder):
            second = builder.add_source("second", b"")
            path = self.left(builder, "-wal")
        reader = read(path)
        for info in (first, second):
            with pytest.raises(StoreUnavailableError, match="log"):
                reader.look_up(info)
        with closing(sqlite3.connect(path)) as connection:  # a process with write access creates it
            connection.execute("select * from ValidPaths").fetchall()
            assert reader.look_up(second) == second
        assert reader.look_up(second) == second

    def test_unreadable_database_raises_until_it_is_readable(
        self, builder: StoreBuilder, read: Callable[..., Reader]
    ) -> None:
        reader = read()
        info = builder.add_source("path", b"")
        os.chmod(builder.db_path, 0o600)
        with pytest.raises(StoreUnavailableError):
            reader.look_up(info)
        os.chmod(builder.db_path, 0o644)
        assert reader.look_up(info) == info
