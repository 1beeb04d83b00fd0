"""`harmonia ls`."""

import os
from collections.abc import Iterator

import click

from harmonia import cli
from harmonia.cli import listing
from harmonia.cli.listing import Node
from harmonia.config import loader
from harmonia.store import confined, path_arguments, tree_reader
from harmonia.store.store import Store


@click.command("ls")
@click.argument("path", type=cli.PATH)
@listing.options
@click.pass_obj
def command(config_file: str | None, /, path: str, *, recursive: bool, **how: bool) -> None:
    """List the content of a store path.

    PATH is a valid store path, a file or directory in one, or a symlink to one, such as ./result. The output is that of
    `nix store ls`.

    \b
    The files of a build:  harmonia ls -lR ./result
    The .ls file of one:   harmonia ls --json -R ./result
    """  # noqa: D301 (click keeps the line breaks after \b)
    cli.end_on_sigpipe()
    _, real_path = path_arguments.resolve(Store.of(loader.read(config_file, os.environ)), path)
    real_path = confined.resolved(real_path)
    nodes = _nodes(real_path, recursive=recursive)
    listing.show(nodes, os.path.basename(real_path), recursive=recursive, **how)


def _nodes(root: bytes, *, recursive: bool) -> Iterator[Node]:
    if recursive:
        yield from (Node(entry.path[len(root) :], entry) for entry in tree_reader.walk(root))
        return
    entry = next(tree_reader.walk(root))
    yield Node(b"", entry)
    if os.path.isdir(root) and not os.path.islink(root):
        for name in sorted(os.listdir(root)):
            yield Node(b"/" + name, next(tree_reader.walk(root + b"/" + name)))
