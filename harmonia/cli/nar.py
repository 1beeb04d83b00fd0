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
    """Create, list and unpack NARs.

    A NAR is the archive of a store path. FILE can be - for stdin.

    \b
    Copy to another machine:  harmonia nar dump tree | ssh host harmonia nar restore tree
    Hash a tree:              harmonia nar dump tree | sha256sum
    List a download:          curl URL | zstd -d | harmonia nar ls -lR -
    """  # noqa: D301 (click keeps the line breaks after \b)


@command.command("dump")
@click.argument("path", type=cli.PATH)
def dump(path: str) -> None:
    """Write a NAR to stdout.

    Archives the file, directory or symlink at PATH, as `nix-store --dump` does.
    """
    cli.end_on_sigpipe()
    if sys.stdout.isatty():
        raise click.UsageError("refusing to write a NAR (binary data) to the terminal; redirect it to a file or a pipe")
    if not os.path.lexists(path):
        raise click.UsageError(f"{path!r} does not exist; name a file, a directory or a symlink")
    for chunk in file_reader.read(tree_reader.dump(os.fsencode(path))):
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


@command.command("ls")
@click.argument("file", type=click.File("rb"))
@click.argument("path", default="/")
@listing.options
def list_(file: BinaryIO, path: str, **how: bool) -> None:
    """List the files in a NAR.

    Lists the NAR in FILE, or the file or directory at PATH in it, as `nix nar ls` does. Reads and checks the whole NAR
    without keeping file contents in memory.
    """
    cli.end_on_sigpipe()
    root = os.fsencode(path).rstrip(b"/")
    root = root if root.startswith(b"/") or not root else b"/" + root
    with _name_file_in_errors(file):
        parts = nar_parser.parse(cli.chunks(file))
        # The parser accepts only canonical NARs, so the offsets are those of the NAR that we would write.
        located = nar.located(part for part in parts if isinstance(part, Entry))
        nodes = _below(root, (Node(entry.path, entry, offset) for offset, entry in located))
        listing.show(nodes, os.path.basename(root), **how)


@command.command("restore")
@click.argument("path", type=cli.PATH)
@click.argument("file", type=click.File("rb"), default="-")
def restore(path: str, file: BinaryIO) -> None:
    """Unpack a NAR.

    Unpacks the NAR in FILE (default: stdin) to PATH, as `nix-store --restore` does. PATH must not exist. The NAR is
    checked strictly. If the NAR is truncated or damaged, the files unpacked so far stay.
    """
    if os.path.lexists(path):
        raise click.UsageError(f"{path} already exists; name a path that does not exist")
    with _name_file_in_errors(file):
        nar_parser.restore(nar_parser.parse(cli.chunks(file)), os.fsencode(path))


@contextmanager
def _name_file_in_errors(file: BinaryIO) -> Iterator[None]:
    """Add the file's name to a FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{file.name} is not a complete NAR: {error}; download it again") from None


def _below(root: bytes, nodes: Iterable[Node]) -> Iterator[Node]:
    is_found = False
    for node in nodes:
        if node.path == root or node.path.startswith(root + b"/"):
            is_found = True
            yield node._replace(path=node.path[len(root) :])
    if not is_found:
        raise InvalidPathError(f"{os.fsdecode(root)!r} is not in the NAR; list the whole NAR with -R and no PATH")
