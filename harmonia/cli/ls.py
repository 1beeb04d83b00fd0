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
    """List what is in a store path.

    PATH is a valid store path, something in it, or a symlink to it, such as ./result. The output is that of
    `nix store ls`.

    \b
    What is in a build:  harmonia ls -lR ./result
    As an .ls file:      harmonia ls --json -R ./result
    """  # noqa: D301 (\b is click's mark of lines to be kept)
    cli.in_a_pipe()
    _, real_path = path_arguments.named(Store.of(loader.read(config_file, os.environ)), path)
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
