"""A listing has the entries of the directory tree, and the offset of each file's contents in the NAR."""

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonia.nix import listing, nar
from harmonia.store import file_reader, tree_reader
from harmonia.store.nar_layout import Layout
from support.nars import reference, word
from support.strategies import Regular, Symlink, Tree, on_disk, trees

Node = dict[str, Any]


def naive(path: bytes) -> Node:
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        return {"type": "symlink", "target": os.fsdecode(os.readlink(path))}
    if stat.S_ISREG(mode):
        return {"type": "regular", "size": os.stat(path).st_size, "executable": bool(mode & stat.S_IXUSR)}
    entries = {os.fsdecode(name): naive(path + b"/" + name) for name in os.listdir(path)}
    return {"type": "directory", "entries": entries}


def listed(path: bytes) -> Node:
    text = b"".join(listing.render(Layout.of(path).located()))
    found = json.loads(text.decode(errors="surrogateescape"))
    assert list(found) == ["version", "root"]
    assert found["version"] == 1
    root: Node = found["root"]
    return root


def files(node: Node, path: bytes) -> Iterator[tuple[bytes, Node]]:
    """Yield the regular files with their paths."""
    if node["type"] == "regular":
        yield path, node
    for name, child in node.get("entries", {}).items():
        yield from files(child, path + b"/" + os.fsencode(name))


@settings(deadline=None)
@given(trees)
def test_listing_equals_the_disk_and_offsets_point_at_contents(tree: Tree) -> None:
    archive = reference(tree)
    with on_disk(tree) as path:
        found = listed(path)
        for name, node in files(found, path):
            contents = Path(os.fsdecode(name)).read_bytes()
            offset = node.pop("narOffset")
            length = len(contents).to_bytes(8, "little")
            start = offset - len(word(b"contents") + length)
            assert archive[start : offset + len(contents)] == word(b"contents") + length + contents
        assert found == naive(path)


@settings(deadline=None)
@given(trees)
def test_entries_are_in_the_order_of_the_nar(tree: Tree) -> None:
    with on_disk(tree) as path:
        offsets = [node["narOffset"] for _, node in files(listed(path), path)]
    assert offsets == sorted(offsets)
    assert len(set(offsets)) == len(offsets)


NASTY = bytes(sorted({*range(1, 256)} - {ord("/")}))


def test_every_byte_in_names_and_targets_is_escaped_correctly() -> None:
    names = [b"%b-" % bytes([byte]) for byte in NASTY] + [b'"', b"\\", b"\\u0000", b'\\"', b"\\n", b"\n", b"\x7f"]
    with on_disk({name: Symlink(name + b"->" + NASTY) for name in names}) as path:
        assert listed(path) == naive(path)


def test_rendered_json_is_exact() -> None:
    tree: Tree = {b'"\\\n\x1f\xff\x7f': Symlink(b'\t"'), b"a": {}, b"b": Regular(3, 0o555)}
    offset = reference(tree).index(Regular(3).contents)
    with on_disk(tree) as path:
        assert b"".join(listing.render(Layout.of(path).located())) == (
            b'{"version":1,"root":{"type":"directory","entries":{'
            rb'"\u0022\u005c\u000a\u001f'
            b"\xff\x7f"
            rb'":{"type":"symlink","target":"\u0009\u0022"},'
            b'"a":{"type":"directory","entries":{}},'
            b'"b":{"type":"regular","size":3,"executable":true,"narOffset":%d}}}}' % offset
        )


def test_listing_is_rendered_in_small_pieces() -> None:
    tree: Tree = {b"%04d" % number: Regular(0) for number in range(1000)}
    with on_disk(tree) as path:
        pieces = list(listing.render(Layout.of(path).located()))
    assert len(pieces) > 1000
    assert max(map(len, pieces)) < 200


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def readable(tree: Tree) -> Tree:
    """Return the tree without names and targets that are not UTF-8: Nix 2.8 writes no JSON for those."""
    if isinstance(tree, dict):
        return {name: readable(child) for name, child in tree.items() if is_text(name)}
    return Symlink(b"readable") if isinstance(tree, Symlink) and not is_text(tree.target) else tree


@pytest.mark.nix
@settings(deadline=None, max_examples=25)
@given(trees.map(readable))
def test_listing_equals_that_of_nix_nar_ls(tree: Tree) -> None:
    with on_disk(tree) as path:
        with open(path + b".nar", "xb") as file:
            file.writelines(file_reader.read(tree_reader.dump(path)))
        command = ["nix", "--extra-experimental-features", "nix-command", "nar", "ls", "--json", "--recursive"]
        nix = subprocess.run([*command, path + b".nar", "/"], check=True, capture_output=True)
        ours = listed(path)
    for _, node in files(ours, b""):
        if not node["executable"]:
            del node["executable"]  # as Nix 2.34 and older do
    assert ours == json.loads(nix.stdout)


@given(st.binary(max_size=30))
def test_rendering_reads_no_file(name: bytes) -> None:
    entry = nar.Entry(0, b"/root", stat.S_IFLNK, 0, name)
    text = b"".join(listing.render([(0, entry)]))
    assert json.loads(text.decode(errors="surrogateescape"))["root"]["target"] == os.fsdecode(name)
