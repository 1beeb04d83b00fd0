"""The parser accepts exactly the valid NARs; `restore` writes their content, and nothing outside of its target."""

import os
import stat
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonia.errors import FormatError
from harmonia.nix.nar import Entry
from harmonia.nix.nar_parser import MAX_DEPTH, parse, restore
from harmonia.store import file_reader, tree_reader
from support.nars import open_files, parsed, reference, whole, word, written
from support.strategies import Regular, Symlink, Tree, file_names, on_disk, small_trees, trees, write_tree


def accepted(archive: bytes) -> bool:
    """Return True if the parser accepts the archive, and check that our serialization of the result is identical."""
    try:
        parts = parsed([archive])
    except FormatError:
        return False
    assert written(parts) == archive
    return True


@settings(deadline=None)
@given(trees)
def test_restore_is_the_inverse_of_dump(tree: Tree) -> None:
    with on_disk(tree) as path:
        archive = whole(tree_reader.dump(path))
        restore(parse(file_reader.read(tree_reader.dump(path))), path + b" again")
        assert whole(tree_reader.dump(path + b" again")) == archive


@settings(deadline=None)
@given(trees)
def test_parsed_entries_and_contents_equal_the_disk(tree: Tree) -> None:
    with on_disk(tree) as path:
        parts = parsed([reference(tree)])
        assert written(parts) == reference(tree)
        assert len(parts) == len(list(tree_reader.walk(path)))
        for (parsed_entry, contents), entry in zip(parts, tree_reader.walk(path), strict=True):
            assert (parsed_entry.depth, parsed_entry.size, parsed_entry.target) == (
                entry.depth,
                entry.size,
                entry.target,
            )
            assert path + parsed_entry.path == entry.path
            assert stat.S_IFMT(parsed_entry.mode) == stat.S_IFMT(entry.mode)
            if stat.S_ISREG(entry.mode):
                assert parsed_entry.mode & 0o111 == (0o111 if entry.mode & stat.S_IXUSR else 0)
                assert contents == Path(os.fsdecode(entry.path)).read_bytes()


@given(small_trees, st.data())
def test_chunking_does_not_matter_and_truncation_and_trailing_data_are_rejected(
    tree: Tree, data: st.DataObject
) -> None:
    archive = reference(tree)
    expected = parsed([archive])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(archive)), max_size=20)))
    odd = [archive[first:last] for first, last in pairwise([0, *cuts, len(archive)])]
    size = data.draw(st.integers(2, 20))
    for chunks in (odd, [bytes([byte]) for byte in archive], [*map(bytes, file_reader.read([archive], size))]):
        assert parsed(chunks) == expected
        with pytest.raises(FormatError, match="data follows the end"):
            parsed([*chunks, b"", b"\0"])
    with pytest.raises(FormatError, match="ends early"):
        parsed([archive[: data.draw(st.integers(0, len(archive) - 1))]])


def test_entries_and_contents_are_yielded_before_the_archive_is_complete() -> None:
    archive = reference({b"a": Regular(100)})
    position = archive.index(Regular(100).contents)

    def chunks() -> Iterator[bytes]:
        yield archive[: position + 50]
        raise TimeoutError

    parts = parse(chunks())
    assert [cast_entry(next(parts)).path for _ in range(2)] == [b"", b"/a"]
    assert next(parts) == Regular(100).contents[:50]
    with pytest.raises(TimeoutError):
        next(parts)


def cast_entry(part: Entry | bytes) -> Entry:
    assert isinstance(part, Entry)
    return part


@pytest.mark.parametrize("chunk", [1 << 16, 5_000_000])
def test_large_contents_are_yielded_in_pieces(chunk: int) -> None:
    size = 20_000_000
    head, tail = reference(Regular(0))[:-24], word(b")")
    chunks = (bytes(min(chunk, size - start)) for start in range(0, size, chunk))
    archive = iter([head + size.to_bytes(8, "little"), *chunks, tail])
    tracemalloc.start()
    try:
        pieces = [len(part) for part in parse(archive) if isinstance(part, bytes)]
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert sum(pieces) == size
    assert max(pieces) <= 256 * 1024


# Mutations: each is rejected, or is the canonical archive of other content.

SAMPLE: Tree = {
    b"a": {b"empty": {}, b"x": Regular(0, 0o555), b"y": Regular(9, 0o555)},
    b"b": Regular(8),
    b"c": Regular(3),
    b"d": Symlink(b"target"),
}


@pytest.mark.slow
def test_every_changed_byte_is_rejected_or_canonical() -> None:
    archive = reference(SAMPLE)
    for position, byte in enumerate(archive):
        others = {byte ^ (1 << bit) for bit in range(8)} | {0, 0xFF, ord("/"), byte + 1 & 0xFF, byte - 1 & 0xFF}
        for other in others - {byte}:
            accepted(archive[:position] + bytes([other]) + archive[position + 1 :])


@pytest.mark.slow
def test_every_deletion_and_repetition_is_rejected_or_canonical() -> None:
    archive = reference({b"a": Regular(3, 0o555), b"b": Symlink(b"a")})
    for start in range(len(archive)):
        for stop in range(start + 1, min(start + 80, len(archive)) + 1):
            assert not accepted(archive[:start] + archive[stop:]) or contents_or_name(archive[start:stop])
            accepted(archive[:stop] + archive[start:])


def contents_or_name(cut: bytes) -> bool:
    """Return True if the cut may leave a valid archive: it has the one flag, or one whole entry."""
    return cut.count(b"executable") == 1 or cut.count(b"entry") == 1


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw an archive in which some parts are changed, dropped, repeated or swapped, by bytes or by words."""
    archive = reference(draw(small_trees))
    for _ in range(draw(st.integers(1, 3))):
        step = draw(st.sampled_from([1, 8]))
        a, b, c, d = sorted(step * draw(st.integers(0, len(archive) // step)) for _ in range(4))
        archive = draw(
            st.sampled_from(
                [
                    archive[:a] + archive[b:],
                    archive[:b] + archive[a:],
                    archive[:a] + archive[c:d] + archive[b:c] + archive[a:b] + archive[d:],
                    archive[:a] + draw(st.binary(max_size=9)) + archive[a:],
                    archive[:a] + draw(st.binary(min_size=1, max_size=1)) + archive[a + 1 :],
                ]
            )
        )
    return archive


@settings(max_examples=200)
@given(mutated())
def test_mutations_are_rejected_or_canonical(archive: bytes) -> None:
    accepted(archive)


VOCABULARY = ["nix-archive-1", "(", ")", "type", "regular", "executable", "contents", "symlink", "target", "directory"]
VOCABULARY += ["entry", "name", "node", "", "a", "b"]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(VOCABULARY), max_size=40).map(lambda texts: words(*texts)) | st.binary())
def test_arbitrary_words_raise_only_format_error(rest: bytes) -> None:
    accepted(rest)
    accepted(word(b"nix-archive-1") + rest)
    accepted(words("nix-archive-1", "(", "type") + rest)


@given(st.lists(file_names, max_size=4))
def test_names_must_be_sorted_and_unique(names: list[bytes]) -> None:
    entries = [(name, FILE) for name in names]
    assert accepted(archive(directory(*entries))) == (names == sorted(set(names)))


# The rules one by one.


def words(*texts: str) -> bytes:
    return b"".join(word(text.encode()) for text in texts)


def archive(node: bytes) -> bytes:
    return words("nix-archive-1") + node


def link(target: bytes) -> bytes:
    return words("(", "type", "symlink", "target") + word(target) + words(")")


def directory(*entries: tuple[bytes, bytes]) -> bytes:
    texts = (words("entry", "(", "name") + word(name) + words("node") + node + words(")") for name, node in entries)
    return words("(", "type", "directory") + b"".join(texts) + words(")")


def nested(depth: int, node: bytes) -> bytes:
    for _ in range(depth):
        node = directory((b"d", node))
    return node


FILE = words("(", "type", "regular", "contents", "x", ")")

ACCEPTED = {
    "file": FILE,
    "executable": words("(", "type", "regular", "executable", "", "contents", "", ")"),
    "empty directory": directory(),
    "name of 255 bytes": directory((b"n" * 255, FILE)),
    "target of 1 byte": link(b"/"),
    "target of 4095 bytes": link(b"t" * 4095),
    "63 directories": nested(63, FILE),
    "64 directories": nested(63, directory()),
    "three dots": directory((b"...", FILE)),
    "a before its longer namesakes": directory((b"a", directory((b"z", FILE))), (b"a.b", FILE), (b"ab", FILE)),
    "high bytes are the last": directory((b"~", FILE), (b"\x80", FILE), (b"\xff", FILE)),
}
REJECTED = {
    "nothing": (b"", "ends early"),
    "another magic": (words("nix-archive-2") + FILE, "expected b"),
    "only the magic": (archive(b""), "ends early"),
    "two roots": (archive(FILE + FILE), "data follows the end"),
    "another type": (archive(words("(", "type", "fifo", ")")), "is not a file type"),
    "type twice": (
        archive(words("(", "type", "regular", "type", "regular", "contents", "", ")")),
        "expected a file's contents",
    ),
    "no type": (archive(words("(", "regular", "contents", "", ")")), "expected b"),
    "no contents": (archive(words("(", "type", "regular", ")")), "expected a file's contents"),
    "executable without contents": (
        archive(words("(", "type", "regular", "executable", "", ")")),
        "expected a file's contents",
    ),
    "executable after contents": (
        archive(words("(", "type", "regular", "contents", "", "executable", "", ")")),
        "expected b",
    ),
    "executable twice": (
        archive(words("(", "type", "regular", "executable", "", "executable", "", "contents", "", ")")),
        "expected a file's contents",
    ),
    "executable with a value": (
        archive(words("(", "type", "regular", "executable", "1", "contents", "", ")")),
        "expected b",
    ),
    "contents twice": (archive(words("(", "type", "regular", "contents", "", "contents", "", ")")), "expected b"),
    "no target": (archive(words("(", "type", "symlink", ")")), "expected b"),
    "target before type": (archive(words("(", "target", "a", "type", "symlink", ")")), "expected b"),
    "node before name": (
        archive(words("(", "type", "directory", "entry", "(", "node") + FILE + words("name", "a", ")", ")")),
        "expected b",
    ),
    "entry without node": (archive(words("(", "type", "directory", "entry", "(", "name", "a", ")", ")")), "expected b"),
    "entry not closed": (
        archive(words("(", "type", "directory", "entry", "(", "name", "a", "node") + FILE + words(")")),
        "ends early",
    ),
    "something between entries": (archive(words("(", "type", "directory", "comment", ")")), "next entry or its end"),
    "long word": (archive(words("(", "type", "x" * 33, ")")), "a word has 33 bytes"),
    "unsorted": (archive(directory((b"b", FILE), (b"a", FILE))), "sorted"),
    "sorted as paths, not as names": (archive(directory((b"a.b", FILE), (b"a", directory()))), "sorted"),
    "signed bytes": (archive(directory((b"\xff", FILE), (b"a", FILE))), "sorted"),
    "duplicate": (archive(directory((b"a", FILE), (b"a", link(b"b")))), "must be sorted and unique"),
    "padding of a word": (archive(FILE).replace(b"type\0\0\0\0", b"type\0\0\0\1"), "expected b"),
    "padding of a type": (archive(FILE).replace(b"regular\0", b"regular\1"), "padding"),
    "padding of contents": (archive(FILE).replace(b"x\0", b"x\1"), "padding"),
    "padding of a target": (archive(link(b"abc")).replace(b"abc\0\0\0\0\0", b"abc\0\0\0\0\1"), "padding"),
    "padding of a name": (archive(directory((b"abc", FILE))).replace(b"abc\0", b"abc\n"), "padding"),
    "name of 256 bytes": (archive(directory((b"n" * 256, FILE))), "a name has 256 bytes"),
    "empty target": (archive(link(b"")), "cannot be the target of a symlink"),
    "NUL in a target": (archive(link(b"a\0b")), "cannot be the target of a symlink"),
    "target of 4096 bytes": (archive(link(b"t" * 4096)), "target has 4096 bytes"),
    "file at depth 64": (archive(nested(64, FILE)), "nested 64 deep"),
    "directory at depth 64": (archive(nested(64, directory())), "nested 64 deep"),
    "bottomless": (archive(words("(", "type", "directory", "entry", "(", "name", "d", "node") * 99_999), "nested 64"),
    **{
        f"name {name!r}": (archive(directory((name, FILE))), "cannot be a name")
        for name in (b"", b".", b"..", b"/", b"a/b", b"/a", b"a/", b"../a", b"\0", b"a\0", b"a\0b")
    },
}


@pytest.mark.parametrize("node", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_valid_archive_is_accepted(node: bytes) -> None:
    assert accepted(archive(node))


@pytest.mark.parametrize(("text", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_invalid_archive_is_rejected_with_the_reason(text: bytes, message: str) -> None:
    for chunks in ([text], [text[start : start + 7] for start in range(0, len(text), 7)]):
        with pytest.raises(FormatError, match=message):
            parsed(chunks)


@pytest.mark.parametrize("number", [33, 4096, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8])
def test_large_length_fields_allocate_no_memory(number: int) -> None:
    """All words are aligned: each length field is overwritten once; other positions break something else."""
    text = reference(SAMPLE)
    tracemalloc.start()
    try:
        for position in range(0, len(text), 8):
            accepted(text[:position] + number.to_bytes(8, "little") + text[position + 8 :])
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# `restore` on disk.


def test_maximum_depth_and_name_length_are_restored(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "root")
    text = archive(directory((b"l", link(b"t" * 4095)), (b"n", nested(MAX_DEPTH - 2, FILE)), (b"o" * 255, FILE)))
    restore(parse([text]), root)
    assert whole(tree_reader.dump(root)) == text


@pytest.mark.nix
@settings(deadline=None, max_examples=25)
@given(trees)
def test_restored_tree_equals_that_of_nix_store(tree: Tree) -> None:
    with on_disk(tree) as path:
        text = whole(tree_reader.dump(path))
        restore(parse([text]), path + b" ours")
        subprocess.run(["nix-store", "--restore", path + b" theirs"], input=text, check=True)
        ours, theirs = list(tree_reader.walk(path + b" ours")), list(tree_reader.walk(path + b" theirs"))
        assert [entry[2:] for entry in ours] == [entry[2:] for entry in theirs]  # modes and all
        assert whole(tree_reader.dump(path + b" theirs")) == text


@pytest.mark.nix
@pytest.mark.parametrize("name", ACCEPTED)
def test_nix_store_accepts_every_accepted_archive(name: str, tmp_path: Path) -> None:
    text = archive(ACCEPTED[name])
    subprocess.run(["nix-store", "--restore", tmp_path / "root"], input=text, check=True)
    assert whole(tree_reader.dump(os.fsencode(tmp_path / "root"))) == text


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_restored_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        restore(parse([reference(SAMPLE)]), os.fsencode(tmp_path / "root"))
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "root" / name).stat().st_mode) for name in ("", "a/y", "b")}
    assert modes == {"": 0o777 & ~umask, "a/y": 0o777 & ~umask, "b": 0o666 & ~umask}


def make_file(path: Path) -> None:
    path.write_bytes(b"kept")


def make_dangling_symlink(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_file, make_dangling_symlink, Path.mkdir])
@pytest.mark.parametrize("node", [FILE, link(b"target"), directory((b"a", FILE))], ids=["file", "link", "directory"])
def test_existing_target_is_not_overwritten(tmp_path: Path, node: bytes, make: Callable[[Path], None]) -> None:
    make(tmp_path / "root")
    before = whole(tree_reader.dump(os.fsencode(tmp_path)))
    with pytest.raises(FileExistsError):
        restore(parse([archive(node)]), os.fsencode(tmp_path / "root"))
    assert whole(tree_reader.dump(os.fsencode(tmp_path))) == before


@pytest.mark.parametrize(
    "node",
    [
        directory((b"a", link(b"../outside")), (b"a", directory((b"x", FILE)))),
        directory((b"a", link(b"../outside")), (b"a/x", FILE)),
        directory((b"a", link(b"../outside/x")), (b"a", FILE)),
        directory((b"..", directory((b"outside", directory((b"x", FILE)))))),
        directory((b"../outside/x", FILE)),
        directory((os.fsencode("/etc/harmonia-was-here"), FILE)),
    ],
)
def test_restore_writes_nothing_outside_its_target(tmp_path: Path, node: bytes) -> None:
    """Following a symlink that `restore` made needs its name twice, but names are sorted and unique."""
    write_tree({}, os.fsencode(tmp_path / "outside"))
    with pytest.raises(FormatError):
        restore(parse([archive(node)]), os.fsencode(tmp_path / "root"))
    assert list((tmp_path / "outside").iterdir()) == []
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    text = reference({b"a": Regular(100), b"b": Regular(100)})
    before = open_files()
    restore(parse([text]), os.fsencode(tmp_path / "whole"))
    assert open_files() == before
    with pytest.raises(FormatError, match="ends early"):
        restore(parse([text[: text.rindex(Regular(100).contents) + 50]]), os.fsencode(tmp_path / "half"))
    assert open_files() == before
    assert (tmp_path / "half/b").stat().st_size < 100
