"""Hypothesis strategies for the data that Harmonia handles, and `on_disk`, which writes a tree of files to disk."""

import base64
import os
import random
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from hypothesis import strategies as st

from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StorePath
from harmonia.store.file_reader import CHUNK_BYTES

NIX32 = "0123456789abcdfghijklmnpqrsvwxyz"
NAME_CHARACTERS = string.ascii_letters + string.digits + "+-._?="
STORE_DIR = "/nix/store"

digests = st.binary(min_size=32, max_size=32)
"""SHA-256 digests."""
hash_parts = st.text(NIX32, min_size=32, max_size=32)

names = st.one_of(
    st.text(NAME_CHARACTERS, min_size=1, max_size=20),
    st.text(".-a", min_size=1, max_size=6),
    st.text(NAME_CHARACTERS, min_size=1, max_size=5).map(lambda text: (text * 211)[:211]),
).filter(lambda name: name.split("-")[0] not in {".", ".."})
"""Names after the dash, including long names and names with a leading dot."""

base_names = st.builds("{}-{}".format, hash_parts, names)

_foreign_characters = st.sampled_from("/\\ \n\0:!%~,'\"*é٣１")


@st.composite
def _with_a_foreign_character(draw: st.DrawFn) -> str:
    text = draw(base_names)
    position = draw(st.integers(0, len(text)))
    return text[:position] + draw(_foreign_characters) + text[position:]


@st.composite
def _with_another_character_in_the_hash_part(draw: st.DrawFn) -> str:
    text = draw(base_names)
    position = draw(st.integers(0, 32))  # position 32 is the dash
    return text[:position] + draw(st.sampled_from("eotuAZ._")) + text[position + 1 :]


near_base_names = st.one_of(
    _with_a_foreign_character(),
    _with_another_character_in_the_hash_part(),
    base_names.map(lambda text: text[1:]),
    st.builds("{}-{}".format, hash_parts, st.sampled_from(["", ".", "..", ".-a", "..-a", ".-", "a" * 212])),
)
"""Near misses: texts that are almost, but not quite, base names of store paths."""

store_paths = base_names.map(StorePath)
derivation_paths = st.builds("{}-{}.drv".format, hash_parts, st.text(string.ascii_letters, min_size=1)).map(StorePath)
key_names = st.text(NAME_CHARACTERS, min_size=1, max_size=20)


def _join_signature(name: str, value: bytes) -> str:
    return f"{name}:{base64.b64encode(value).decode()}"


sigs = st.builds(_join_signature, key_names, st.binary(min_size=64, max_size=64))
content_addresses = st.builds(
    "{}:sha256:{}".format, st.sampled_from(["text", "fixed", "fixed:r"]), digests.map(base32.encode)
)


@st.composite
def path_infos(draw: st.DrawFn) -> PathInfo:
    path = draw(store_paths)
    references = draw(st.sets(st.just(path) | store_paths, max_size=4))
    return PathInfo(
        path=path,
        nar_hash=draw(digests),
        nar_size=draw(st.integers(1, 2**63 - 1)),
        references=tuple(sorted(references)),
        deriver=draw(st.none() | derivation_paths),
        sigs=tuple(draw(st.lists(sigs, max_size=2))),
        ca=draw(st.none() | content_addresses),
    )


@dataclass(frozen=True)
class Regular:
    size: int
    mode: int = 0o444
    seed: int = 0

    @property
    def contents(self) -> bytes:
        return random.Random(self.seed).randbytes(self.size)

    @property
    def executable(self) -> bool:
        return bool(self.mode & 0o100)


@dataclass(frozen=True)
class Symlink:
    target: bytes


Tree: TypeAlias = "Regular | Symlink | Directory"
Directory: TypeAlias = dict[bytes, Tree]

file_names = st.one_of(
    # Prefixes of one another, and characters on both sides of `.` and `/`, because whole names are sorted as bytes.
    st.sampled_from([b"a", b"a.b", b"a-b", b"a0", b"a b", b"A", b"aa", b"...", b"-", b"a~nix~case~hack~1"]),
    st.sampled_from(["é", "e\u0301", "\u65e5", "\U0001f600"]).map(str.encode),
    st.sampled_from([b"\xff", b"\xc3", b"\x01\n", b"a" * 7, b"a" * 8, b"a" * 9, b"a" * 255, b"\xff" * 255]),
    st.binary(min_size=1, max_size=10).filter(lambda name: name not in {b".", b".."} and not {0, 47} & set(name)),
)
_sizes = st.one_of(
    st.integers(0, 17),
    st.sampled_from([4095, 4096, 4097, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 3]),
)
# Only the owner's x bit counts.
_modes = st.sampled_from([0o444, 0o555, 0o644, 0o744, 0o455])
regular_files = st.builds(Regular, _sizes, _modes, st.integers(0, 255))
symlinks = st.builds(
    Symlink,
    st.sampled_from([b"a", b"..", b"../a", b"/nix/store", b"dangling/\xc3\xa9", b"\xff\n", b"x" * 300, b"x" * 4095]),
)


def _trees_of(leaves: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.recursive(leaves, lambda trees: st.dictionaries(file_names, trees, max_size=5), max_leaves=12)


trees = _trees_of(regular_files | symlinks)
"""File system objects of any kind. No path inside comes near PATH_MAX."""
small_trees = _trees_of(st.builds(Regular, st.integers(0, 17), _modes) | st.just(Symlink(b"../a")))
"""Trees with short NARs, in which every byte matters."""
directories: st.SearchStrategy[Directory] = st.dictionaries(file_names, trees, max_size=6)


def write_tree(tree: Tree, path: bytes) -> None:
    """Create the file system object at `path`, which must not exist."""
    if isinstance(tree, Regular):
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(tree.contents)
            os.fchmod(file.fileno(), tree.mode)
    elif isinstance(tree, Symlink):
        os.symlink(tree.target, path)
    else:
        os.mkdir(path)
        for name, child in tree.items():
            write_tree(child, path + b"/" + name)


@contextmanager
def on_disk(tree: Tree) -> Iterator[bytes]:
    """Yield the path of the tree on disk. (A test function has many examples, but only one `tmp_path`.)"""
    with tempfile.TemporaryDirectory() as directory:
        path = os.fsencode(directory) + b"/root"
        write_tree(tree, path)
        yield path
