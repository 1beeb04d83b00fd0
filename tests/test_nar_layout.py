"""A layout is a NAR without the contents of its files: it locates any range, and takes few bytes of memory."""

import gc
import os
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harmonia.cache import layout_cache
from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.layout_cache import Layouts
from harmonia.errors import CacheFileError, StoreObjectError
from harmonia.nix import nar
from harmonia.nix.nar import Entry, Segment
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store import file_reader, nar_layout, tree_reader
from harmonia.store.nar_layout import Layout
from harmonia.store.store_nar import StoreNar
from support.nars import open_files, reference, whole
from support.running import PATIENCE_S, wait_until
from support.strategies import Tree, on_disk, small_trees, trees, write_tree


@pytest.fixture(params=[256, 2], ids=["one block", "many blocks"], autouse=True)
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nar_layout, "_BLOCK_MAX_ENTRIES", request.param)


class Memory:
    """A file in memory that takes blocks."""

    def __init__(self) -> None:
        self.content = bytearray()

    def append(self, data: bytes) -> None:
        self.content += data

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self.content[start:stop])

    def close(self) -> None: ...


def parts(layout: Layout, start: int, stop: int) -> list[Segment]:
    """Return the segments of a range of a complete layout."""
    segments = list(layout.window(start, stop))
    return [segment for segment in segments if not isinstance(segment, Future)]


def available(layout: Layout, start: int, stop: int) -> int:
    """Return how many bytes of a range are available without waiting."""
    known = takewhile(lambda segment: not isinstance(segment, Future), layout.window(start, stop))
    return sum(len(segment) for segment in known if not isinstance(segment, Future))


def size_of(layout: Layout) -> int:
    assert layout.size is not None
    return layout.size


FIXTURES = [HealthCheck.function_scoped_fixture]


def kind(entry: Entry) -> Entry:
    """Return the entry with only those mode bits that a NAR has."""
    flags = entry.mode & stat.S_IXUSR if stat.S_ISREG(entry.mode) else 0
    return entry._replace(mode=stat.S_IFMT(entry.mode) | flags)


@settings(deadline=None, suppress_health_check=FIXTURES)
@given(trees, st.data())
def test_window_equals_a_slice_of_the_nar(tree: Tree, data: st.DataObject) -> None:
    expected = reference(tree)
    with on_disk(tree) as path:
        layout = Layout.of(path)
        assert layout.size == len(expected)
        for _ in range(10):
            start, stop = data.draw(st.tuples(*[st.integers(0, len(expected) + 9)] * 2))
            view = parts(layout, start, stop)
            assert sum(map(len, view)) == len(expected[start:stop])
            assert whole(view) == expected[start:stop]


@settings(deadline=None, suppress_health_check=FIXTURES)
@given(small_trees)
def test_window_may_begin_anywhere(tree: Tree) -> None:
    expected = reference(tree)
    with on_disk(tree) as path:
        layout = Layout.of(path)
        for start in range(len(expected) + 1):
            assert sum(map(len, parts(layout, start, len(expected)))) == len(expected) - start
            assert whole(layout.window(start, start + 30)) == expected[start : start + 30]


@settings(deadline=None, suppress_health_check=FIXTURES)
@given(trees)
def test_layout_has_all_entries_of_a_walk(tree: Tree) -> None:
    with on_disk(tree) as path:
        layout = Layout.of(path)
        located = list(nar.located(map(kind, tree_reader.walk(path))))
        assert [(offset, kind(entry)) for offset, entry in layout.located()] == located
        assert layout.entries == len(located)


@settings(deadline=None, suppress_health_check=FIXTURES)
@given(small_trees, st.integers(0, 9), st.data())
def test_saved_layout_is_loaded_unchanged(tree: Tree, spilled_after: int, data: st.DataObject) -> None:
    expected, file = reference(tree), Memory()
    with on_disk(tree) as path:
        layout = Layout(path)
        for blocks, _ in enumerate(layout.record(tree_reader.walk(path))):
            if blocks >= spilled_after:
                layout.spill(file)
        layout.seal(file)
        loaded = Layout(path)
        loaded.load(file, len(file.content))
        assert loaded.size == len(expected)
        assert loaded.entries == layout.entries
        for each in (layout, loaded):
            start, stop = data.draw(st.tuples(*[st.integers(0, len(expected) + 9)] * 2))
            assert whole(each.window(start, stop)) == expected[start:stop]
            assert list(each.located()) == list(Layout.of(path).located())


@settings(deadline=None, suppress_health_check=FIXTURES)
@given(small_trees, st.data())
def test_flipped_bit_is_detected(tree: Tree, data: st.DataObject) -> None:
    file = Memory()
    with on_disk(tree) as path:
        layout = Layout.of(path)
        layout.spill(file)
        position = data.draw(st.integers(0, len(file.content) - 1))
        file.content[position] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(CacheFileError):
            whole(layout.window(0, size_of(layout)))


def test_truncated_file_is_not_loaded(tmp_path: Path) -> None:
    file = Memory()
    layout = Layout.of(os.fsencode(tmp_path))
    layout.seal(file)
    for size in range(len(file.content)):
        with pytest.raises(CacheFileError):
            Layout(b"/root").load(file, size)


def follow(layout: Layout, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes that a reader gets, with an empty piece for each wait."""
    for segment in layout.window(start, stop):
        yield b"" if isinstance(segment, Future) else whole([segment])


@settings(deadline=None, suppress_health_check=FIXTURES)
@given(small_trees, st.data())
def test_reader_follows_a_growing_layout(tree: Tree, data: st.DataObject) -> None:
    expected = reference(tree)
    with on_disk(tree) as path:
        layout = Layout(path)
        start = data.draw(st.integers(0, len(expected)))
        readers = [(follow(layout, begin, len(expected)), [b""], begin) for begin in (0, start)]
        for _ in layout.record(tree_reader.walk(path)):
            for reader, pieces, begin in readers:
                for piece in reader:
                    pieces.append(piece)
                    if not piece:
                        break
                assert b"".join(pieces) == expected[begin:][: len(b"".join(pieces))]
        for reader, pieces, begin in readers:
            assert b"".join([*pieces, *reader]) == expected[begin:]


def test_waits_end_as_soon_as_their_range_is_covered() -> None:
    layout = Layout(b"/root")
    growing = layout.record(many(b"/root"))
    everything, cancelled = layout.wait_whole(), layout.wait_whole()
    assert everything is not None
    assert cancelled is not None
    cancelled.cancel()
    covered = layout.wait_covered(10_000)
    assert covered is not None
    while not covered.done():
        assert available(layout, 0, 10_000) < 10_000
        next(growing)
    assert available(layout, 0, 10_000) == 10_000
    assert layout.wait_covered(10_000) is None
    assert not everything.done()
    for _ in growing:
        pass
    assert everything.done()
    assert layout.wait_whole() is None


def test_reader_is_woken_at_intervals_during_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(nar_layout, "perf_counter", lambda: now)
    layout = Layout(b"/root")
    growing = layout.record(many(b"/root"))
    reader = layout.window(0, 1 << 30)
    waiting = next(reader)
    assert isinstance(waiting, Future)
    for _ in range(3):
        next(growing)
    assert not waiting.done()
    now = 0.2
    next(growing)
    assert waiting.done()
    later = next(segment for segment in reader if isinstance(segment, Future))
    next(growing)
    assert not later.done()
    for _ in growing:
        pass
    assert later.done()


def test_readers_that_wait_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wake 4,000 readers took 0.2 s, for which the event loop could wait."""
    compared = []

    class Compared(Future[bytes]):
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return self is other

        __hash__ = Future.__hash__

    monkeypatch.setattr(nar_layout, "Future", Compared)
    layout = Layout(b"/root")
    waiting = [next(layout.window(0, 1 << 30)) for _ in range(100)]
    for _ in layout.record(many(b"/root")):
        pass
    assert all(isinstance(each, Future) and each.done() for each in waiting)
    assert not compared


@pytest.mark.parametrize("error", [StoreObjectError("it is a fifo"), FileNotFoundError(2, "gone", "/root/a")])
def test_error_of_the_walk_reaches_all_readers(error: Exception) -> None:
    layout = Layout(b"/root")
    growing = layout.record(many(b"/root"))
    next(growing)
    reader = layout.window(0, 1 << 30)
    while not isinstance(next(reader), Future):
        pass
    waiting = layout.wait_whole()
    assert waiting is not None
    layout.fail(error)
    assert waiting.done()
    with pytest.raises(type(error), match=str(error)[:5].replace("[", r"\[")):
        next(reader)


COUNT = 40_000


def many(root: bytes) -> Iterator[Entry]:
    """Yield a tree of 40,000 entries; only the last needs to be on disk."""
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
    for _ in layout.record(entries):
        pass
    return layout


def calls(patches: pytest.MonkeyPatch, module: object, name: str) -> list[tuple[Any, ...]]:
    """Return a list that will get the arguments of all calls of this function of the module."""
    made = []
    function = getattr(module, name)

    def recording(*arguments: object, **more: object) -> object:
        made.append(arguments)
        return function(*arguments, **more)

    patches.setattr(module, name, recording)
    return made


def test_last_byte_of_a_tree_of_many_files_needs_no_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.fsencode(tmp_path)
    layout = recorded(root, many(root))
    assert layout.entries == COUNT
    (tmp_path / "last").write_bytes(b"12345")
    with monkeypatch.context() as patches:
        walked = [calls(patches, os, name) for name in ("lstat", "listdir", "scandir", "readlink")]
        opened = calls(patches, os, "open")
        assert whole(layout.window(size_of(layout) - 1, size_of(layout))) == b"\0"
        assert opened == []
        assert whole(layout.window(size_of(layout) - 56, size_of(layout))).startswith(b"12345\0\0\0")
        assert [path for path, _ in opened] == [b"last"]
    assert walked == [[], [], [], []]


def test_window_start_is_found_without_reading_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = recorded(b"/root", many(b"/root"))
    assert layout.size
    made = calls(monkeypatch, nar_layout, "Entry")
    for start in range(0, layout.size, layout.size // 50):
        assert available(layout, start, start + 1) == 1
    assert len(made) < 52 * 2 * 256


def test_memory_attribute_is_close_to_the_real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nar_layout, "_BLOCK_MAX_ENTRIES", 256)
    tracemalloc.start()
    try:
        layout = recorded(b"/root", islice(many(b"/root"), 20_000))
        gc.collect()
        assert layout.memory < tracemalloc.get_traced_memory()[0] < 2 * layout.memory + 100_000
    finally:
        tracemalloc.stop()


# Layouts of several paths.

Walk = Callable[[bytes], Iterator[Entry]]


@pytest.fixture(name="root")
def make_root(tmp_path: Path) -> bytes:
    root = os.fsencode(tmp_path / "root")
    (tmp_path / "other").touch()
    write_tree({b"%03d" % number: {} for number in range(200)}, root)
    return root


def opened(layouts: Layouts, key: str, root: bytes, client: str = "") -> Layout:
    """Return the layout when it is complete."""
    layout = layouts.open_layout(key, root, client)
    if waiting := layout.wait_whole():
        waiting.result(PATIENCE_S)
    wait_until(lambda: key not in layouts._growing)  # noqa: SLF001 (a private part is tested)
    return layout


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    walked = []

    def walk(root: bytes) -> Iterator[Entry]:
        walked.append(root)
        return tree_reader_walk(root)

    tree_reader_walk = tree_reader.walk
    monkeypatch.setattr(tree_reader, "walk", walk)
    return walked


def test_least_recently_used_layout_is_evicted(root: bytes, walks: list[bytes]) -> None:
    cost = Layout.of(root).memory
    layouts = Layouts(2 * cost)
    del walks[:]
    for key in "abac":
        opened(layouts, key, root)
    assert len(walks) == 3
    opened(layouts, "a", root)
    assert len(walks) == 3
    opened(layouts, "b", root)
    assert len(walks) == 4


def test_too_large_layout_is_not_cached_and_evicts_nothing(root: bytes, walks: list[bytes]) -> None:
    cost = Layout.of(root + b"/000").memory
    layouts = Layouts(cost)
    opened(layouts, "small", root + b"/000")
    opened(layouts, "large", root)
    del walks[:]
    opened(layouts, "small", root + b"/000")
    assert walks == []
    opened(layouts, "large", root)
    assert walks == [root]


def test_forgotten_layout_is_walked_again(root: bytes, walks: list[bytes]) -> None:
    layouts = Layouts(1 << 20)
    opened(layouts, "a", root)
    layouts.forget("a")
    layouts.forget("a")
    opened(layouts, "a", root)
    assert len(walks) == 2


class Gate:
    """Block walks of roots whose names begin with `name`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
        self.begun = 0
        self.opened = threading.Event()
        walk = tree_reader.walk

        def waiting(root: bytes) -> Iterator[Entry]:
            _, at_root, below = root.partition(b"/root")
            if at_root and below.startswith(name):
                self.begun += 1
                assert self.opened.wait(PATIENCE_S)
            return walk(root)

        monkeypatch.setattr(tree_reader, "walk", waiting)


def test_one_walk_serves_all_callers_and_blocks_no_other_path(root: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, b"")
    layouts = Layouts(1 << 20)
    found = [layouts.open_layout("key", root, client) for client in range(100)]
    assert len(set(map(id, found))) == 1
    assert opened(layouts, "other", os.path.dirname(root) + b"/other", "another").entries
    gate.opened.set()
    assert opened(layouts, "key", root) is found[0]
    assert gate.begun == 1
    assert found[0].size


def test_walks_of_one_client_do_not_take_all_threads(root: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, b"/")
    layouts = Layouts(1 << 20)
    for number in range(100):
        layouts.open_layout(f"{number}", root + b"/%03d" % number, "one")
    wait_until(lambda: gate.begun == 2)
    assert opened(layouts, "key", os.path.dirname(root) + b"/other", "another").entries
    gate.opened.set()
    wait_until(lambda: gate.begun == 100)


def test_failed_walk_is_not_cached(root: bytes) -> None:
    layouts = Layouts(1 << 20)
    assert isinstance(opened(layouts, "key", root + b"/gone").error, FileNotFoundError)
    assert opened(layouts, "key", root).size


class TestOnDisk:
    @pytest.fixture(autouse=True)
    def _all_are_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nar_layout, "_SPILL_BYTES", 0)
        monkeypatch.setattr(nar_layout, "_BLOCK_MAX_ENTRIES", 2)

    def layouts(self, tmp_path: Path, limit: int = 1 << 30) -> Layouts:
        return Layouts(0, DiskCache(str(tmp_path / "cache"), limit))

    def test_large_layout_is_kept_for_the_next_process(self, root: bytes, tmp_path: Path, walks: list[bytes]) -> None:
        expected = whole(tree_reader.dump(root))
        del walks[:]
        for _ in range(3):
            layout = opened(self.layouts(tmp_path), "key", root)
            assert whole(layout.window(0, len(expected))) == expected
            assert layout.size == len(expected)
        assert len(walks) == 1
        [file] = (tmp_path / "cache").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("damage", ["cut", "emptied", "grown", "replaced"])
    def test_damaged_file_is_walked_again(self, root: bytes, tmp_path: Path, walks: list[bytes], damage: str) -> None:
        size = opened(self.layouts(tmp_path), "key", root).size
        [file] = (tmp_path / "cache").iterdir()
        content = file.read_bytes()
        file.write_bytes(
            {
                "cut": content[:-100],
                "emptied": b"",
                "grown": content + b"x",
                "replaced": bytes(len(content)),
            }[damage]
        )
        assert opened(self.layouts(tmp_path), "key", root).size == size
        assert len(walks) == 2
        assert opened(self.layouts(tmp_path), "key", root).size == size
        assert len(walks) == 2

    def test_file_damaged_under_a_reader_breaks_it(self, root: bytes, tmp_path: Path) -> None:
        layout = opened(self.layouts(tmp_path), "key", root)
        [file] = (tmp_path / "cache").iterdir()
        with file.open("r+b") as opened_file:
            opened_file.seek(60)
            opened_file.write(b"\xff\xff\xff\xff")
        assert layout.size
        with pytest.raises(CacheFileError):
            whole(layout.window(0, layout.size))

    def test_damage_found_by_a_reader_causes_a_new_walk(self, root: bytes, tmp_path: Path, walks: list[bytes]) -> None:
        expected = whole(tree_reader.dump(root))
        del walks[:]
        layouts = Layouts(1 << 20, DiskCache(str(tmp_path / "cache"), 1 << 30))
        path = StoreNar(PathInfo(StorePath("0" * 32 + "-name"), bytes(32), len(expected)), root, layouts)
        opened(layouts, path.key, root)
        [file] = (tmp_path / "cache").iterdir()
        with file.open("r+b") as opened_file:
            opened_file.seek(60)
            opened_file.write(b"\xff\xff\xff\xff")
        with pytest.raises(CacheFileError):
            b"".join(file_reader.flatten(path.read(0, None)))
        assert b"".join(file_reader.flatten(path.read(0, None))) == expected
        assert len(walks) == 2

    def test_full_disk_keeps_the_rest_in_memory(
        self, root: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = whole(tree_reader.dump(root))
        append, times = layout_cache._File.append, []  # noqa: SLF001 (a private part is tested)

        def failing(file: layout_cache._File, data: bytes) -> None:
            times.append(file)
            if len(times) > 3:
                raise OSError(28, "No space left on device")
            append(file, data)

        monkeypatch.setattr(layout_cache._File, "append", failing)  # noqa: SLF001 (a private part is tested)
        layout = opened(self.layouts(tmp_path), "key", root)
        assert whole(layout.window(0, len(expected))) == expected
        assert len(times) <= 4
        assert list((tmp_path / "cache").iterdir()) == []

    def test_file_that_another_process_fills_is_not_waited_for(self, root: bytes, tmp_path: Path) -> None:
        other = DiskCache(str(tmp_path / "cache"), 1 << 30)
        filling = other.open_file("key")
        assert filling is not None
        with closing(filling[0]):
            assert opened(self.layouts(tmp_path), "key", root).size == len(whole(tree_reader.dump(root)))

    def test_file_is_open_until_the_last_owner_closes_the_layout(self, root: bytes, tmp_path: Path) -> None:
        expected = whole(tree_reader.dump(root))
        before = open_files()
        layout = opened(self.layouts(tmp_path), "key", root)  # the cache has no room, so it is not an owner
        reader = layout.share()
        layout.close()
        assert whole(reader.window(0, len(expected))) == expected
        reader.close()
        assert open_files() == before

    def test_cache_closes_evicted_and_forgotten_layouts(self, root: bytes, tmp_path: Path) -> None:
        before = open_files()
        layouts = Layouts(400 << 10, DiskCache(str(tmp_path / "cache"), 1 << 30))  # room for one file
        opened(layouts, "key", root).close()
        opened(layouts, "other", root).close()
        assert open_files() == before + 1
        layouts.forget("other")
        assert open_files() == before

    def test_failed_walk_leaves_no_file(self, root: bytes, tmp_path: Path) -> None:
        os.mkfifo(root + b"/fifo")
        layout = opened(self.layouts(tmp_path), "key", root)
        assert isinstance(layout.error, StoreObjectError)
        assert list((tmp_path / "cache").iterdir()) == []
