"""`harmonia cat`."""

import os
import stat
import sys

import click

from harmonia import cli
from harmonia.config import loader
from harmonia.errors import InvalidPathError
from harmonia.store import path_arguments
from harmonia.store.store import Store


@click.command("cat")
@click.argument("paths", type=cli.PATH, metavar="PATH...", nargs=-1, required=True)
@click.pass_obj
def command(config_file: str | None, paths: tuple[str, ...]) -> None:
    """Print files in store paths.

    Each PATH is a regular file in a valid store path, or a symlink to one. The output is that of `nix store cat`.
    """
    cli.end_on_sigpipe()
    store = Store.of(loader.read(config_file, os.environ))
    for path in paths:
        _, real_path = path_arguments.resolve(store, path)
        if not stat.S_ISREG(os.lstat(real_path).st_mode):
            raise InvalidPathError(f"{path!r} is not a regular file; `harmonia ls -l` shows its type")
        with open(real_path, "rb") as file:
            for chunk in cli.chunks(file):
                sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()
