"""File listings in the formats of `nix store ls` and `nix nar ls` (Nix `src/nix/ls.cc`)."""

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import click

from harmonia.nix.nar import Entry


class Node(NamedTuple):
    path: bytes
    """Path relative to the listed root: `b""` for the root, otherwise with a slash before each name."""
    entry: Entry
    offset: int | None = None
    """Byte offset of a file's contents in the NAR."""


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the `ls` commands."""
    for option in (
        click.option("-d", "--directory", is_flag=True, help="List a directory itself, not its content."),
        click.option("-R", "--recursive", is_flag=True, help="List subdirectories as well."),
        click.option("-l", "--long", is_flag=True, help="Show types, sizes and symlink targets."),
        click.option("--json", "as_json", is_flag=True, help="Print a NAR listing as JSON."),
    ):
        command = option(command)
    return command


def show(nodes: Iterable[Node], name: bytes, *, long: bool, recursive: bool, directory: bool, as_json: bool) -> None:
    """Print the nodes. The root comes first and is called `name`."""
    if as_json:
        text = json.dumps(_json(nodes, recursive=recursive), ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        click.echo(text.encode(errors="surrogateescape"))
        return
    for line in _lines(nodes, name, long=long, recursive=recursive, directory=directory):
        click.echo(line)


def _lines(nodes: Iterable[Node], name: bytes, *, long: bool, recursive: bool, directory: bool) -> Iterator[bytes]:
    for path, entry, _ in nodes:
        whole = not path
        is_directory = stat.S_ISDIR(entry.mode)
        if whole and is_directory and not directory:
            continue
        if not whole and not recursive and (directory or path.count(b"/") > 1):
            continue
        shown = (b"." if is_directory else name) if whole else b"." + path
        if long:
            target = b" -> " + entry.target if stat.S_ISLNK(entry.mode) else b""
            size = entry.size if stat.S_ISREG(entry.mode) else 0
            shown = b"%b %20d %b%b" % (_kind(entry.mode), size, shown, target)
        yield shown


def _kind(mode: int) -> bytes:
    if stat.S_ISDIR(mode):
        return b"dr-xr-xr-x"
    if stat.S_ISLNK(mode):
        return b"lrwxrwxrwx"
    return b"-r-xr-xr-x" if mode & stat.S_IXUSR else b"-r--r--r--"


def _json(nodes: Iterable[Node], *, recursive: bool) -> dict[str, Any]:
    by_path: dict[bytes, dict[str, Any]] = {}
    for path, entry, offset in nodes:
        if not recursive and path.count(b"/") > 1:
            continue
        node: dict[str, Any] = {}
        if recursive or not path:
            node = _object(entry, offset)
        by_path[path] = node
        if path:
            parent, _, name = path.rpartition(b"/")
            by_path[parent]["entries"][os.fsdecode(name)] = node
    return by_path[b""]


def _object(entry: Entry, offset: int | None) -> dict[str, Any]:
    if stat.S_ISDIR(entry.mode):
        return {"type": "directory", "entries": {}}
    if stat.S_ISLNK(entry.mode):
        return {"type": "symlink", "target": os.fsdecode(entry.target)}
    node = {"type": "regular", "size": entry.size, "executable": bool(entry.mode & stat.S_IXUSR)}
    return node if offset is None else node | {"narOffset": offset}
