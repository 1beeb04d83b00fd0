"""`harmonia nar dump`, `nar ls` and `nar restore`."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import click

from harmonia import cli
from harmonia.cli import listing
from harmonia.cli.listing import Node
from harmonia.errors import FormatError, InvalidPathError
from harmonia.nix import nar, nar_parser
from harmonia.nix.nar import Entry
from harmonia.store import file_reader, tree_reader


@click.group("nar")
def command() -> None:
    """Make, list and unpack NARs.

    A NAR is the archive of a store path. As a FILE, - is stdin.

    \b
    From one machine to another:  harmonia nar dump tree | ssh host harmonia nar restore tree
    The hash of a tree:           harmonia nar dump tree | sha256sum
    What a download holds:        curl URL | zstd -d | harmonia nar ls -lR -
    """  # noqa: D301 (\b is click's mark of lines to be kept)


@command.command("dump")
@click.argument("path", type=cli.PATH)
def dump(path: str) -> None:
    """Write a NAR to stdout.

    It archives the file, directory or symlink at PATH, as `nix-store --dump` does.
    """
    cli.in_a_pipe()
    if sys.stdout.isatty():
        raise click.UsageError("a NAR is no text: send it to a file or into a pipe")
    if not os.path.lexists(path):
        raise click.UsageError(f"{path!r} is not there; name a file, a directory or a symlink")
    for chunk in file_reader.read(tree_reader.dump(os.fsencode(path))):
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


@command.command("ls")
@click.argument("file", type=click.File("rb"))
@click.argument("path", default="/")
@listing.options
def list_(file: BinaryIO, path: str, **how: bool) -> None:
    """List what is in a NAR.

    It lists all of the NAR in FILE, or what is at PATH in it, as `nix nar ls` does. The whole NAR is read and checked;
    its contents are not kept in memory.
    """
    cli.in_a_pipe()
    root = os.fsencode(path).rstrip(b"/")
    root = root if root.startswith(b"/") or not root else b"/" + root
    with _told(file):
        parts = nar_parser.parse(cli.chunks(file))
        # A NAR that was parsed is the one that we would write.
        located = nar.located(part for part in parts if isinstance(part, Entry))
        nodes = _below(root, (Node(entry.path, entry, offset) for offset, entry in located))
        listing.show(nodes, os.path.basename(root), **how)


@command.command("restore")
@click.argument("path", type=cli.PATH)
@click.argument("file", type=click.File("rb"), default="-")
def restore(path: str, file: BinaryIO) -> None:
    """Unpack a NAR.

    It unpacks the NAR in FILE, by default from stdin, to PATH, which must not exist, as `nix-store --restore` does. The
    NAR is checked strictly. If it breaks off or is damaged, what was unpacked until then stays.
    """
    if os.path.lexists(path):
        raise click.UsageError(f"{path} exists and is left alone; name a place where nothing is")
    with _told(file):
        nar_parser.restore(nar_parser.parse(cli.chunks(file)), os.fsencode(path))


@contextmanager
def _told(file: BinaryIO) -> Iterator[None]:
    """Say in which file the damage is."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{file.name} is no whole NAR: {error}; get it anew") from None


def _below(root: bytes, nodes: Iterable[Node]) -> Iterator[Node]:
    found = False
    for node in nodes:
        if node.path == root or node.path.startswith(root + b"/"):
            found = True
            yield node._replace(path=node.path[len(root) :])
    if not found:
        raise InvalidPathError(f"{os.fsdecode(root)!r} is not in the NAR; list all of it with -R and no path")
