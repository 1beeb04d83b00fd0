"""New paths of a store are read once each, in order, with bounded memory, whatever happens to the database."""

import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

import pytest

from harmonia.errors import StoreUnavailableError
from harmonia.nix.store_path import StorePath
from harmonia.store import new_paths
from harmonia.store.new_paths import Cursor, DatabaseChanges, NewPaths
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from support.debug_info import add_rows

LONG_S = 30.0


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "root")


@pytest.fixture
def new(builder: StoreBuilder) -> Iterator[NewPaths]:
    store = Store(builder.store_dir, builder.real_dir, builder.db_path)
    yield NewPaths(store, builder.db_path)
    store.database.close()


@pytest.fixture
def changes(builder: StoreBuilder) -> Iterator[DatabaseChanges]:
    with closing(DatabaseChanges(builder.db_path)) as changes:
        yield changes


def add(builder: StoreBuilder, name: str) -> StorePath:
    return builder.add(builder.output_path(name), name.encode()).path


def pages(new: NewPaths, after: Cursor | None, limit: int) -> Iterator[list[StorePath]]:
    complete = False
    while not complete:
        paths, after, complete = new.page(after, limit)
        yield [path for _, path in paths]


class TestCursor:
    def test_each_path_is_on_one_page_in_the_order_of_registration(self, builder: StoreBuilder, new: NewPaths) -> None:
        added = [add(builder, name) for name in ("d", "b", "c", "a", "e")]
        for limit in (1, 2, 5, 9):
            assert list(chain(*pages(new, None, limit))) == added
            assert all(len(page) <= limit for page in pages(new, None, limit))

    def test_page_has_only_paths_after_its_cursor(self, builder: StoreBuilder, new: NewPaths) -> None:
        add(builder, "before")
        cursor = new.newest()
        assert new.page(cursor) == ([], cursor, True)
        after = add(builder, "after")
        paths, cursor, complete = new.page(cursor)
        assert ([path for _, path in paths], complete) == ([after], True)
        assert cursor == new.newest()
        assert new.page(cursor).paths == []

    def test_collected_paths_are_skipped_and_their_numbers_not_reused(
        self, builder: StoreBuilder, new: NewPaths
    ) -> None:
        builder.delete(add(builder, "collected"))
        cursor = new.page(None).cursor
        assert cursor == new.newest()
        assert cursor.number == 1
        again = add(builder, "collected")
        assert [path for _, path in new.page(cursor).paths] == [again]

    def test_replaced_database_is_read_from_its_beginning(self, builder: StoreBuilder, new: NewPaths) -> None:
        one = add(builder, "one")
        cursor = new.newest()
        shutil.copy(builder.db_path, f"{builder.db_path}.copy")
        os.rename(f"{builder.db_path}.copy", builder.db_path)
        assert [path for _, path in new.page(cursor).paths] == [one]

    def test_restored_backup_is_read_from_its_beginning(self, builder: StoreBuilder, new: NewPaths) -> None:
        one = add(builder, "one")
        ahead = new.newest()._replace(number=7)
        assert [path for _, path in new.page(ahead).paths] == [one]

    def test_malformed_rows_are_skipped(self, builder: StoreBuilder, new: NewPaths) -> None:
        with builder.connect() as connection:
            for path in ("/elsewhere/x", "/nix/store/short", b"\xff", 7):
                connection.execute("insert into ValidPaths (path, hash, registrationTime) values (?, '', 1)", (path,))
        good = add(builder, "good")
        assert list(chain(*pages(new, None, 2))) == [good]

    def test_missing_database_is_an_error(self, tmp_path: Path) -> None:
        missing = str(tmp_path / "none" / "db.sqlite")
        with pytest.raises(StoreUnavailableError, match=re.escape(missing)):
            NewPaths(Store("/nix/store", "/nix/store", missing), missing).newest()

    def test_100000_paths_come_in_pages(self, builder: StoreBuilder, new: NewPaths) -> None:
        add_rows(builder, 100_000)
        sizes = [len(page) for page in pages(new, None, new_paths.PAGE_PATHS)]
        assert (sum(sizes), max(sizes)) == (100_000, new_paths.PAGE_PATHS)


WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
for line in sys.stdin:
    with connection:
        connection.execute("insert into ValidPaths (path, hash, registrationTime) values (?, '', 1)", (line.strip(),))
    print(flush=True)
"""


class TestChanges:
    def test_new_path_ends_the_wait(self, builder: StoreBuilder, changes: DatabaseChanges) -> None:
        adding = threading.Timer(0.05, add, (builder, "new"))
        adding.start()
        began = time.monotonic()
        assert changes.wait(LONG_S)
        assert time.monotonic() - began < LONG_S / 2
        adding.join()

    def test_commit_into_an_open_log_is_noticed(self, builder: StoreBuilder, new: NewPaths) -> None:
        """Nix keeps the database and its log open, so a commit creates no file."""
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, builder.db_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdin
        assert writer.stdout
        with writer, closing(DatabaseChanges(builder.db_path)) as changes:
            cursor = new.newest()
            for number in range(3):
                path = f"{number:032}-path"
                writer.stdin.write(f"/nix/store/{path}\n")
                writer.stdin.flush()
                assert changes.wait(LONG_S)
                writer.stdout.readline()
                [(_, found)], cursor, _ = new.page(cursor)
                assert found == path
                changes.clear()
            writer.stdin.close()

    def test_reading_the_database_is_no_change(
        self, builder: StoreBuilder, new: NewPaths, changes: DatabaseChanges
    ) -> None:
        add(builder, "path")
        new.page(None)
        changes.clear()
        new.page(None)
        assert not changes.wait(0.01)

    def test_descriptor_is_readable_until_cleared(self, builder: StoreBuilder, changes: DatabaseChanges) -> None:
        descriptor = changes.fileno()
        assert descriptor is not None
        add(builder, "path")
        assert select.select([descriptor], [], [], 0)[0]
        changes.clear()
        assert not select.select([descriptor], [], [], 0)[0]

    def test_without_inotify_it_polls(self, tmp_path: Path) -> None:
        changes = DatabaseChanges(str(tmp_path / "none" / "db.sqlite"))
        assert changes.fileno() is None
        assert changes.wait(0.01)
        changes.clear()

    def test_change_during_a_page_is_not_missed(self, builder: StoreBuilder, new: NewPaths) -> None:
        with closing(DatabaseChanges(builder.db_path)) as changes:
            new.page(None)
            add(builder, "meanwhile")
            assert changes.wait(LONG_S)

    def test_no_descriptor_is_leaked(self, builder: StoreBuilder, tmp_path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for path in (builder.db_path, str(tmp_path / "none" / "db.sqlite")):
            DatabaseChanges(path).close()
        assert len(os.listdir("/proc/self/fd")) == before
