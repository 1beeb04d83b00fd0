"""NARs built directly from the grammar, for comparison with ours."""

import os
from collections.abc import Iterable
from concurrent.futures import Future

from harmonia.nix import nar, nar_parser
from harmonia.nix.nar import Entry, FileSlice, Segment
from harmonia.store import file_reader
from support.strategies import Regular, Symlink, Tree


def word(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8)


def reference_node(tree: Tree) -> bytes:
    if isinstance(tree, Regular):
        flag = word(b"executable") + word(b"") if tree.executable else b""
        body = word(b"regular") + flag + word(b"contents") + word(tree.contents)
    elif isinstance(tree, Symlink):
        body = word(b"symlink") + word(b"target") + word(tree.target)
    else:
        body = word(b"directory")
        for name, child in sorted(tree.items()):
            entry = word(b"name") + word(name) + word(b"node") + reference_node(child)
            body += word(b"entry") + word(b"(") + entry + word(b")")
    return word(b"(") + word(b"type") + body + word(b")")


def reference(tree: Tree) -> bytes:
    """Return the NAR, following the grammar literally."""
    return word(b"nix-archive-1") + reference_node(tree)


def whole(archive: Iterable[Segment | Future[bytes]]) -> bytes:
    return b"".join(file_reader.read(archive))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


Parts = list[tuple[Entry, bytes]]


def parsed(chunks: Iterable[bytes]) -> Parts:
    """Return each entry with its whole contents."""
    parts: Parts = []
    for part in nar_parser.parse(chunks):
        if isinstance(part, Entry):
            parts.append((part, b""))
        else:
            entry, contents = parts.pop()
            parts.append((entry, contents + part))
    return parts


def written(parts: Parts) -> bytes:
    """Return our serialization of the parsed entries."""
    contents = {entry.path: contents for entry, contents in parts}
    archive = nar.segments(nar.serialize(entry for entry, _ in parts))
    return b"".join(contents[segment.path] if isinstance(segment, FileSlice) else segment for segment in archive)
