import os
import random
import stat
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonia.errors import StoreObjectError
from harmonia.nix import nar
from harmonia.nix.nar import Entry, FileSlice
from harmonia.process.loop_reads import finish
from harmonia.store import file_reader, tree_reader
from harmonia.store.file_reader import CHUNK_BYTES, OpenSlice
from support.nars import open_files, reference, whole, word
from support.strategies import Directory, Regular, Symlink, Tree, directories, on_disk, trees, write_tree

segment_runs = st.lists(st.binary(max_size=40), max_size=8)


@settings(deadline=None)
@given(trees)
def test_dump_follows_the_grammar(tree: Tree) -> None:
    with on_disk(tree) as path:
        assert whole(tree_reader.dump(path)) == reference(tree)
        assert sum(map(len, tree_reader.dump(path))) == len(reference(tree))


@settings(deadline=None)
@given(trees, st.data())
def test_read_small_returns_the_dump_or_refuses_more_than_the_limit(tree: Tree, data: st.DataObject) -> None:
    nar = reference(tree)
    with on_disk(tree) as path:
        assert finish(tree_reader.read_small(path, len(nar))) == nar
        limit = data.draw(st.integers(0, len(nar)))
        try:
            assert finish(tree_reader.read_small(path, limit)) == nar
        except StoreObjectError as error:
            assert "is larger than the registered NAR" in str(error)  # noqa: PT017 (may also return)


def test_read_small_closes_all_files_when_it_fails_or_is_abandoned(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "zz")
    for number in range(40):
        (tmp_path / f"{number:02}").write_bytes(b"a")
    before = open_files()
    with pytest.raises(StoreObjectError, match="is not a regular file"):
        finish(tree_reader.read_small(os.fsencode(tmp_path), 100_000))
    steps = tree_reader.read_small(os.fsencode(tmp_path), 100_000)
    next(steps)
    steps.close()
    assert open_files() == before


@pytest.mark.parametrize(
    "tree",
    [
        Regular(0),
        Regular(5),
        Regular(8, 0o555),
        Regular(0, 0o744),
        Symlink(b"dangling"),
        {},
        {b"a": {}},
        {b"a": {b"b": {b"c": {}}}, b"d": Regular(1)},
        {b"a": {b"z": Regular(1)}, b"a.b": Regular(2), b"a-b": Symlink(b"a"), b"a0": {}, b"A": Regular(0)},
    ],
    ids=str,
)
def test_dump_of_small_trees(tree: Tree) -> None:
    with on_disk(tree) as path:
        assert whole(tree_reader.dump(path)) == reference(tree)


def test_dump_of_a_tree_62_deep(tmp_path: Path) -> None:
    tree: Tree = {b"file": Regular(3)}
    for _ in range(62):
        tree = {b"directory": tree, b"next to it": Symlink(b"directory")}
    path = os.fsencode(tmp_path / "root")
    write_tree(tree, path)
    assert whole(tree_reader.dump(path)) == reference(tree)


@pytest.mark.nix
@settings(deadline=None, max_examples=30)
@given(st.lists(trees, min_size=5, max_size=20))
def test_dump_of_many_trees_equals_that_of_nix_store(trees: list[Tree]) -> None:
    """Each example starts a process, so many trees share one directory."""
    with on_disk({b"%d" % number: tree for number, tree in enumerate(trees)}) as path:
        nix = subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True)
        assert whole(tree_reader.dump(path)) == nix.stdout


@pytest.mark.nix
@settings(deadline=None, max_examples=15)
@given(trees)
def test_dump_of_any_root_equals_that_of_nix_store(tree: Tree) -> None:
    with on_disk(tree) as path:
        nix = subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True)
        assert whole(tree_reader.dump(path)) == nix.stdout


@settings(deadline=None)
@given(directories, st.integers(1, 100) | st.just(CHUNK_BYTES), st.data())
def test_window_equals_a_slice_of_the_nar(tree: Directory, chunk_size: int, data: st.DataObject) -> None:
    with on_disk(tree) as path:
        archive, expected = list(tree_reader.dump(path)), reference(tree)
        for _ in range(10):
            start, stop = data.draw(st.tuples(*[st.integers(0, len(expected) + 9)] * 2))
            view = list(nar.window(archive, start, stop))
            assert sum(map(len, view)) == len(expected[start:stop])
            # Small chunks of a long file take long, and test the same as those of a short file.
            size = chunk_size if len(expected) < 10_000 else CHUNK_BYTES
            assert b"".join(file_reader.read(view, size)) == expected[start:stop]


@given(segment_runs, st.integers(0, 350), st.integers(0, 350), st.integers(1, 50))
def test_window_of_a_window_equals_a_slice_of_a_slice(run: list[bytes], start: int, stop: int, chunk_size: int) -> None:
    expected = b"".join(run)[start:stop]
    view = list(nar.window(run, start, stop))
    assert b"".join(file_reader.read(view, chunk_size)) == expected
    assert b"".join(file_reader.read(nar.window(view, 3, 20), chunk_size)) == expected[3:20]


@given(st.integers(0, 50), st.integers(-60, 60), st.integers(-60, 60), st.integers(0, 60))
def test_file_slice_is_sliced_like_bytes(size: int, start: int, stop: int, again: int) -> None:
    expected = range(size)[start:stop][again:]
    cut = FileSlice(b"/file", size, 0, size)[start:stop][again:]
    assert list(range(cut.start, cut.stop)) == list(expected)
    assert len(cut) == len(expected)
    assert cut.size == size


@given(segment_runs, st.integers(1, 50))
def test_chunks_have_the_promised_size(run: list[bytes], chunk_size: int) -> None:
    chunks = list(file_reader.read(run, chunk_size))
    assert all(chunk_size <= len(chunk) < 2 * chunk_size for chunk in chunks[:-1])
    assert all(0 < len(chunk) < 2 * chunk_size for chunk in chunks[-1:])


@settings(deadline=None, max_examples=30)
@given(trees, st.sampled_from([1000, 4096, CHUNK_BYTES]))
def test_chunks_across_files_have_the_promised_size(tree: Tree, chunk_size: int) -> None:
    with on_disk(tree) as path:
        assert all(0 < len(chunk) < 2 * chunk_size for chunk in file_reader.read(tree_reader.dump(path), chunk_size))


@pytest.mark.parametrize("dropped", [False, True])
def test_cached_and_uncached_reads_together_give_the_whole_slice(tmp_path: Path, *, dropped: bool) -> None:
    content = random.Random(1).randbytes(1_000_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if dropped:
            os.posix_fadvise(file.fileno(), 300_000, 0, os.POSIX_FADV_DONTNEED)
        part = OpenSlice(file.fileno(), 10, 999_990)
        read = b""
        while len(part):
            cached = part.read_cached(70_000)
            assert cached is None or cached
            read += part.read(70_000) if cached is None else cached
        assert read == content[10:999_990]
        assert not part.read()
        assert not part.read_cached()
        assert not OpenSlice(file.fileno(), 1_000_000, 1_000_010).read_cached()


def test_many_small_entries_take_little_time_and_memory() -> None:
    """A profile has tens of thousands of symlinks in a row. Joining all their words took a minute."""
    links = [Entry(1, b"/root/%06d" % number, stat.S_IFLNK, 0, b"target") for number in range(50_000)]
    lengths = [
        len(segment) for segment in nar.segments(nar.serialize([Entry(0, b"/root", stat.S_IFDIR, 0, b""), *links]))
    ]
    assert max(lengths) < 10_000
    empty, with_one = len(reference({})), len(reference({b"000000": Symlink(b"target")}))
    assert sum(lengths) == empty + 50_000 * (with_one - empty)


# Changes between the walk and the end of the download.


@pytest.fixture(name="root")
def make_root(tmp_path: Path) -> Path:
    """Return a directory of three files; the one in the middle has 100 bytes."""
    root = tmp_path / "root"
    write_tree({b"a": Regular(10, 0o644), b"b": Regular(100, 0o644), b"c": Regular(10, 0o644)}, os.fsencode(root))
    return root


def grow(file: Path) -> None:
    os.truncate(file, 101)


def shrink(file: Path) -> None:
    os.truncate(file, 99)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def vanish(file: Path) -> None:
    file.unlink()


def become_symlink(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def become_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGES = [
    (grow, StoreObjectError, "root/b changed its length"),
    (shrink, StoreObjectError, "root/b changed its length"),
    (empty, StoreObjectError, "root/b changed its length"),
    (vanish, FileNotFoundError, "root/b"),
    (become_symlink, OSError, "root/b"),
    (become_directory, OSError, "directory"),
    (become_fifo, StoreObjectError, "changed its length"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES)
def test_file_changed_after_the_walk_raises(
    root: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    archive = list(tree_reader.dump(os.fsencode(root)))
    change(root / "b")
    with pytest.raises(error, match=message):
        whole(archive)


@pytest.mark.parametrize("change", [grow, shrink])
def test_file_changed_while_it_is_read_raises(root: Path, change: Callable[[Path], None]) -> None:
    archive = list(tree_reader.dump(os.fsencode(root)))
    chunks = file_reader.read([segment for segment in archive if isinstance(segment, FileSlice)][1:2], 40)
    assert len(next(chunks)) == 40
    change(root / "b")
    with pytest.raises(StoreObjectError, match="changed its length"):
        list(chunks)


def test_window_into_a_grown_file_raises(root: Path) -> None:
    archive = list(tree_reader.dump(os.fsencode(root)))
    position = whole(archive).index(Regular(100).contents)
    grow(root / "b")
    with pytest.raises(StoreObjectError, match="changed its length"):
        whole(nar.window(archive, position, position + 1))


def test_vanished_root_raises_file_not_found(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        whole(tree_reader.dump(os.fsencode(root / "gone")))


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)], ids=["fifo", "socket"]
)
@pytest.mark.parametrize("name", ["root/d", "special"])
def test_special_file_raises_and_is_named(root: Path, make: Callable[[Path], None], name: str) -> None:
    special = root.parent / name
    make(special)
    with pytest.raises(StoreObjectError, match=f"{name} is not a regular file, directory or symlink"):
        whole(tree_reader.dump(os.fsencode(special if name == "special" else root)))


def test_path_that_is_not_utf8_is_shown_in_the_error(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    os.mkfifo(path)
    with pytest.raises(StoreObjectError) as caught:
        whole(tree_reader.dump(path))
    assert "\udcff is not a regular file" in str(caught.value)


# Opened files.


def test_window_opens_only_the_files_it_covers(root: Path) -> None:
    archive = list(tree_reader.dump(os.fsencode(root)))
    expected = whole(archive)
    position = expected.index(Regular(100).contents)
    vanish(root / "a")
    vanish(root / "c")
    assert whole(nar.window(archive, position - 8, position + 108)) == expected[position - 8 : position + 108]
    vanish(root / "b")
    for start, stop in [(0, 20), (position - 8, position), (position + 100, position + 108), (position, position)]:
        assert whole(nar.window(archive, start, stop)) == expected[start:stop]


def test_files_are_closed_after_reading_abandoning_and_failing(root: Path) -> None:
    before = open_files()
    whole(tree_reader.dump(os.fsencode(root)))
    assert open_files() == before

    (file,) = [segment for segment in tree_reader.dump(os.fsencode(root)) if len(segment) == 100]
    half_way = file_reader.read([file], 10)
    next(half_way)
    assert open_files() == before + 1
    half_way.close()
    assert open_files() == before

    shrink(root / "b")
    with pytest.raises(StoreObjectError):
        whole([file])
    assert open_files() == before


def test_tail_of_a_huge_file_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 5 * 2**30 + 3
    with open(tmp_path / "huge", "wb") as file:
        file.seek(size - 6)
        file.write(b"abcdef")
    archive = list(tree_reader.dump(os.fsencode(tmp_path / "huge")))
    length = sum(map(len, archive))
    assert length == len(reference(Regular(0))) + size + 5

    asked = []
    pread = os.pread

    def counting_pread(descriptor: int, count: int, position: int) -> bytes:
        asked.append(count)
        return pread(descriptor, count, position)

    monkeypatch.setattr(os, "pread", counting_pread)
    tail = b"abcdef" + bytes(5) + word(b")")
    assert whole(nar.window(archive, length - 100, length)) == tail.rjust(100, b"\0")
    assert sum(asked) < 100


def test_empty_cached_read_is_not_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)  # as Linux 5.10 does
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        part = OpenSlice(descriptor, 0, 7)
        assert part.read_cached() is None
        assert part.read() == b"content"
    finally:
        os.close(descriptor)


def test_suspended_reader_holds_only_its_chunk() -> None:
    reader = file_reader.chunks(b"%0100d" % number for number in range(10_000))
    tracemalloc.start()
    try:
        chunk = next(reader)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(chunk, bytes)
    assert len(chunk) < held < 1.1 * len(chunk)


@pytest.mark.parametrize("count", [0, 7, 8, 9, 100])
def test_names_are_sorted_below_and_above_the_in_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(tree_reader, "_SORT_MAX_NAMES", 8)
    monkeypatch.setattr(tree_reader, "_JOINED_NAMES", 3)
    names = [b"%d" % (number * 7919 % 1009) for number in range(count)]
    for name in names:
        (tmp_path / name.decode()).touch()
    found = [os.path.basename(entry.path) for entry in tree_reader.walk(os.fsencode(tmp_path))]
    assert found[1:] == sorted(names)
