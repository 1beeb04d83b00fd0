"""Debug info is a file in `lib/debug/.build-id/xx`, as in Nix `src/libstore/binary-cache-store.cc`."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.nix.build_id import build_ids, is_build_id, member
from harmonia.tools.fixture_tree import Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.debug_info import ONE, TWO, add, tree


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "root")


def ids(builder: StoreBuilder, contents: Tree) -> list[str]:
    return sorted(build_ids(builder.real_path(builder.add_source("path", contents).path)))


def test_build_ids_of_debug_files_are_found(builder: StoreBuilder) -> None:
    same_directory = "11" + "4" * 38
    assert ids(builder, tree(ONE, TWO, same_directory)) == sorted([ONE, TWO, same_directory])


@pytest.mark.parametrize("length", [4, 15, 16, 32, 64, 128])
def test_build_ids_of_4_to_128_digits_are_found(builder: StoreBuilder, length: int) -> None:
    assert ids(builder, tree("a" * length)) == ["a" * length]


@pytest.mark.parametrize("build_id", ["aa", "aa" * 65, "AA" * 20, "xx" * 20, "aaa/" * 9, "aa" * 19 + "a\n"], ids=repr)
def test_malformed_build_ids_are_ignored(builder: StoreBuilder, build_id: str) -> None:
    assert not is_build_id(build_id)
    if "/" not in build_id:
        assert ids(builder, tree(build_id, ONE)) == [ONE]


@pytest.mark.parametrize(
    "contents",
    [
        b"a file",
        Symlink("elsewhere"),
        {},
        {"lib": b""},
        {"lib": {"debug": b""}},
        {"lib": {"debug": {"xbuild-id": {}}}},
        {"lib": {"debug": {".build-id": b""}}},
        {"lib": {"debug": {".build-id": {}}}},
        {"lib": {"debug": {".build-id": {"11": b"", "22": {}, "333": {f"{ONE[2:]}.debug": b""}}}}},
        {"lib": {"debug": {".build-id": {"11": {b"\xff.debug": b"", ".debug": b"", ONE[2:]: b""}}}}},
        {"lib": {"debug": {".build-id": {"11": {f"{ONE[2:]}.debug": {}, f"{TWO[2:]}.source": Symlink("/x")}}}}},
    ],
    ids=repr,
)
def test_paths_without_debug_files_have_no_build_ids(builder: StoreBuilder, contents: Tree) -> None:
    assert ids(builder, contents) == []


def test_files_behind_symlinks_are_ignored(builder: StoreBuilder) -> None:
    """A profile links to debug outputs, at any level: the files are in those outputs, not in its own NAR."""
    real = f"{builder.real_dir}/{add(builder, 'debug', ONE).path}"
    inner = f"lib/debug/.build-id/{ONE[:2]}"
    assert ids(builder, Symlink(real)) == []
    assert ids(builder, {"lib": Symlink(f"{real}/lib")}) == []
    assert ids(builder, {"lib": {"debug": Symlink(f"{real}/lib/debug")}}) == []
    assert ids(builder, {"lib": {"debug": {".build-id": Symlink(f"{real}/lib/debug/.build-id")}}}) == []
    assert ids(builder, {"lib": {"debug": {".build-id": {ONE[:2]: Symlink(f"{real}/{inner}")}}}}) == []
    file = f"{ONE[2:]}.debug"
    linked: Tree = {"lib": {"debug": {".build-id": {ONE[:2]: {file: Symlink(f"{real}/{inner}/{file}")}}}}}
    assert ids(builder, linked) == []


@given(build_id=st.text("0123456789abcdef", min_size=4, max_size=128))
def test_member_is_the_path_of_the_debug_file(build_id: str) -> None:
    directory, first, rest = member(build_id).rsplit("/", 2)
    assert directory == "lib/debug/.build-id"
    assert first + rest == f"{build_id}.debug"
    assert len(first) == 2
