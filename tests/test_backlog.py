"""The backlog yields each new path once, newest first, in bounded memory, whatever becomes valid meanwhile."""

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.config.tables.publish import PublishRules
from harmonia.store.backlog import Backlog
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder


class Paths:
    """A store with rows for paths, named by numbers that count up from 0."""

    def __init__(self, root: Path) -> None:
        self.builder = StoreBuilder(root)
        self.count = 0

    def add(self, count: int) -> None:
        insert = "insert into ValidPaths (path, hash, registrationTime, narSize) values (?, 'sha256:', 0, 1)"
        with self.builder.connect() as connection:
            names = (f"/nix/store/{'0' * 32}-{number}" for number in range(self.count, self.count + count))
            connection.executemany(insert, ((name,) for name in names))
        self.count += count

    def backlog(self, file: Path, policy: PublishPolicy | None = None) -> Backlog:
        return Backlog(self.store, self.builder.db_path, policy, str(file))

    @property
    def store(self) -> Store:
        return Store("/nix/store", self.builder.real_dir, self.builder.db_path)


def numbers(paths: Iterator[str]) -> list[int]:
    return [int(path[33:]) for path in paths]


@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), max_size=6))
def test_each_path_is_yielded_and_the_newest_first(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("backlog")
    paths = Paths(directory / "store")
    paths.add(3)
    backlog = paths.backlog(directory / "cursor")
    assert numbers(backlog.paths()) == []
    seen: set[int] = set()
    for added, taken in steps:
        paths.add(added)
        some = numbers(islice(backlog.paths(), taken))  # a call that ends early repeats a page later
        assert len(some) == len(set(some))
        if added and some:
            assert some[0] == paths.count - 1
        seen |= set(some)
    last = numbers(backlog.paths())
    assert len(last) == len(set(last))
    assert seen | set(last) == set(range(3, paths.count))
    paths.add(100)
    assert numbers(backlog.paths()) == [*range(paths.count - 1, paths.count - 101, -1)]


def test_paths_that_arrive_meanwhile_come_before_older_ones(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "store")
    paths.add(1)
    backlog = paths.backlog(tmp_path / "cursor")
    assert not list(backlog.paths())
    paths.add(200)
    running = backlog.paths()
    first = numbers(islice(running, 64))
    paths.add(10)
    rest = numbers(running)
    assert first == [*range(200, 136, -1)]
    assert rest == [*range(210, 200, -1), *range(136, 0, -1)]


def test_saved_cursor_continues_after_a_restart(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "store")
    paths.add(1)
    first = paths.backlog(tmp_path / "cursor")
    assert not list(first.paths())
    first.save()
    paths.add(5)
    assert next(first.paths())  # ends before the others were processed
    first.save()
    second = paths.backlog(tmp_path / "cursor")
    assert numbers(second.paths()) == [5, 4, 3, 2, 1]
    second.save()
    assert not list(paths.backlog(tmp_path / "cursor").paths())


@pytest.mark.parametrize("content", ["", "[]", '["other", 0]', '["x"]', "{}", '["x", "y"]'])
def test_cursor_of_another_database_or_a_damaged_one_is_ignored(tmp_path: Path, content: str) -> None:
    paths = Paths(tmp_path / "store")
    paths.add(5)
    (tmp_path / "cursor").write_text(content)
    assert not list(paths.backlog(tmp_path / "cursor").paths())


def test_only_published_paths_are_yielded(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "store")
    paths.add(1)
    policy = PublishPolicy(PublishRules(allow=("*text",)), paths.store)
    backlog = paths.backlog(tmp_path / "cursor", policy)
    assert not list(backlog.paths())
    paths.add(3)
    info = paths.builder.add_text("text", b"")
    assert list(backlog.paths()) == [info.path]


def test_100000_new_paths_at_once_take_little_memory(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "store")
    backlog = paths.backlog(tmp_path / "cursor")
    assert not list(backlog.paths())
    paths.add(100_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in backlog.paths()) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
