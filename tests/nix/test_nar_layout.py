"""A layout is the archive without its files' bytes: it knows any part of it, and takes few bytes to remember."""

import gc
import os
import stat
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonia.nix import nar, nar_index
from harmonia.nix.nar import Entry
from harmonia.nix.nar_index import Layout, Layouts
from support.nars import reference, whole
from support.strategies import Tree, on_disk, small_trees, trees, write_tree


def kind(entry: Entry) -> Entry:
    """The entry with no more of its mode than a NAR tells."""
    flags = entry.mode & stat.S_IXUSR if stat.S_ISREG(entry.mode) else 0
    return entry._replace(mode=stat.S_IFMT(entry.mode) | flags)


@settings(deadline=None)
@given(trees, st.data())
def test_a_window_is_a_slice(tree: Tree, data: st.DataObject) -> None:
    expected = reference(tree)
    with on_disk(tree) as path:
        layout = Layout.of(path)
        assert layout.size == len(expected)
        for _ in range(10):
            start, stop = data.draw(st.tuples(*[st.integers(0, len(expected) + 9)] * 2))
            view = list(layout.window(start, stop))
            assert sum(map(len, view)) == len(expected[start:stop])
            assert whole(view) == expected[start:stop]


@settings(deadline=None, max_examples=30)
@given(small_trees)
def test_a_window_may_begin_anywhere(tree: Tree) -> None:
    expected = reference(tree)
    with on_disk(tree) as path:
        layout = Layout.of(path)
        for start in range(len(expected) + 1):
            assert sum(map(len, layout.window(start, len(expected)))) == len(expected) - start
            assert whole(layout.window(start, start + 30)) == expected[start : start + 30]


@settings(deadline=None)
@given(trees, st.integers(0, 12))
def test_it_has_what_a_walk_finds(tree: Tree, first: int) -> None:
    with on_disk(tree) as path:
        layout = Layout.of(path)
        walked = [kind(entry) for entry in nar.walk(path)]
        assert list(map(kind, layout.entries())) == walked
        assert list(map(kind, layout.entries(first))) == walked[first:]
        assert len(layout) == len(walked)
        names = sum(len(entry.path) - entry.path.rindex(b"/") - 1 for entry in walked[1:])
        assert layout.memory == 25 * len(walked) + names + sum(len(entry.target) for entry in walked)


@given(small_trees)
def test_it_is_recorded_in_passing(tree: Tree) -> None:
    with on_disk(tree) as path:
        layout = Layout(path)
        frames = list(nar.frame(nar.walk(path)))
        assert list(layout.record(frames)) == frames
        assert layout.size == len(reference(tree))


COUNT = 100_000


def many(root: bytes) -> Iterator[Entry]:
    """A tree of 100,000 entries, of which only the last needs to be on disk."""
    yield Entry(0, root, stat.S_IFDIR, 0, b"")
    for number in range(COUNT // 100 - 1):
        directory = root + b"/%06d" % number
        yield Entry(1, directory, stat.S_IFDIR, 0, b"")
        for file in range(99):
            yield Entry(2, directory + b"/%02d" % file, stat.S_IFREG, 1000, b"")
    yield from (Entry(1, root + b"/a%02d" % file, stat.S_IFREG, 1000, b"") for file in range(98))
    yield Entry(1, root + b"/last", stat.S_IFREG, 5, b"")


def recorded(root: bytes, entries: Iterator[Entry]) -> Layout:
    layout = Layout(root)
    for _ in layout.record(nar.frame(entries)):
        pass
    return layout


def calls(patches: pytest.MonkeyPatch, module: object, name: str) -> list[tuple[Any, ...]]:
    """The arguments of all calls from now on of what the module has by that name."""
    made = []
    function = getattr(module, name)

    def recording(*arguments: object, **more: object) -> object:
        made.append(arguments)
        return function(*arguments, **more)

    patches.setattr(module, name, recording)
    return made


def test_the_last_byte_of_many_files_needs_no_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.fsencode(tmp_path)
    layout = recorded(root, many(root))
    assert len(layout) == COUNT
    (tmp_path / "last").write_bytes(b"12345")
    with monkeypatch.context() as patches:
        walked = [calls(patches, os, name) for name in ("lstat", "listdir", "scandir", "readlink")]
        opened = calls(patches, os, "open")
        assert whole(layout.window(layout.size - 1, layout.size)) == b"\0"
        assert opened == []
        assert whole(layout.window(layout.size - 56, layout.size)).startswith(b"12345\0\0\0")
        assert [path for path, _ in opened] == [b"last"]
    assert walked == [[], [], [], []]


def test_where_a_window_begins_is_found_without_a_look_at_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = recorded(b"/root", many(b"/root"))
    made = calls(monkeypatch, nar_index, "Entry")
    for start in range(0, layout.size, layout.size // 50):
        assert sum(map(len, layout.window(start, start + 1))) == 1
    assert len(made) < 50 * 4


def test_memory_is_what_it_says() -> None:
    tracemalloc.start()
    try:
        layout = recorded(b"/root", islice(many(b"/root"), 20_000))
        gc.collect()
        assert layout.memory < tracemalloc.get_traced_memory()[0] < 1.3 * layout.memory
    finally:
        tracemalloc.stop()
    assert layout.memory < 30 * 20_000


# Many of them.


def layout_of(entries: int) -> Layout:
    """One that takes 25 bytes for each entry, and none for names."""
    links = (Entry(0, b"/root", stat.S_IFREG, 0, b"") for _ in range(entries))
    layout = recorded(b"/root", links)
    assert layout.memory == 25 * entries
    return layout


def kept(layouts: Layouts, *keys: str) -> str:
    return "".join(key for key in keys if layouts.get(key))


def test_the_least_recently_used_goes_first() -> None:
    layouts = Layouts(25 * 10)
    layouts.add("a", layout_of(4))
    layouts.add("b", layout_of(4))
    layouts.add("c", layout_of(2))
    assert kept(layouts, *"bca") == "bca"
    layouts.add("d", layout_of(1))
    assert kept(layouts, *"abcd") == "acd"
    layouts.add("e", layout_of(10))
    assert kept(layouts, *"abcde") == "e"


def test_what_is_too_large_is_not_kept_and_drives_nothing_out() -> None:
    layouts = Layouts(25 * 10)
    layouts.add("a", layout_of(10))
    layouts.add("b", layout_of(11))
    assert kept(layouts, *"ab") == "a"


def test_what_is_there_counts_once() -> None:
    layouts = Layouts(25 * 10)
    first = layout_of(5)
    layouts.add("a", first)
    layouts.add("a", layout_of(5))
    layouts.add("b", layout_of(5))
    assert layouts.get("a") is first
    assert kept(layouts, *"ab") == "ab"


def test_what_is_forgotten_makes_room() -> None:
    layouts = Layouts(25 * 10)
    layouts.add("a", layout_of(5))
    layouts.add("b", layout_of(5))
    layouts.forget("a")
    layouts.forget("a")
    layouts.add("c", layout_of(5))
    assert kept(layouts, *"abc") == "bc"


Walk = Callable[[bytes], Iterator[Entry]]


@pytest.fixture(name="root")
def make_root(tmp_path: Path) -> bytes:
    root = os.fsencode(tmp_path / "root")
    write_tree({b"a": {}, b"b": {}}, root)
    return root


def test_it_is_walked_once_for_many_threads(root: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    all_ask = threading.Barrier(8)

    def walk(path: bytes) -> Iterator[Entry]:
        walks.append(path)
        gc.collect()  # takes a while
        return nar.walk(path)

    def find(_: int) -> Layout:
        all_ask.wait(10)
        return layouts.find("key", root)

    monkeypatch.setattr(nar_index, "walk", walk)
    layouts = Layouts(10_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(find, range(8)))
    assert walks == [root]
    assert len(set(map(id, found))) == 1
    assert layouts.find("key", b"/nowhere") is found[0]


def test_different_ones_are_walked_at_the_same_time(root: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    both_walk = threading.Barrier(2)

    def walk(path: bytes) -> Iterator[Entry]:
        both_walk.wait(10)
        return nar.walk(path)

    monkeypatch.setattr(nar_index, "walk", walk)
    layouts = Layouts(10_000)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda key: layouts.find(key, root), ("one", "other"))
    assert one is not other


def test_others_are_to_be_had_meanwhile(root: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = Layouts(10_000)
    layouts.add("other", layout_of(1))
    walking, go_on = threading.Event(), threading.Event()

    def walk(path: bytes) -> Iterator[Entry]:
        walking.set()
        assert go_on.wait(10)
        return nar.walk(path)

    monkeypatch.setattr(nar_index, "walk", walk)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(layouts.find, "key", root)
        assert walking.wait(10)
        assert layouts.get("other")
        assert layouts.find("other", root)
        assert layouts.get("key") is None
        go_on.set()
        assert found.result(10).size


class Key:
    """One that shows whether it is still held."""


def test_a_walk_that_failed_leaves_nothing_and_may_be_tried_again(root: bytes) -> None:
    layouts = Layouts(10_000)
    key = Key()
    with suppress(FileNotFoundError):
        layouts.find(key, root + b"/gone")
    assert layouts.get(key) is None
    assert layouts.find(key, root).size
    layouts.forget(key)

    held = weakref.ref(key)
    with suppress(FileNotFoundError):
        layouts.find(key, root + b"/gone")
    del key
    gc.collect()
    assert held() is None
