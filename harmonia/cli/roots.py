"""`harmonia roots`."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import click

from harmonia import cli
from harmonia.config import loader
from harmonia.nix.store_path import StorePath
from harmonia.push.receiver import open_roots
from harmonia.push.roots import PushRoots
from harmonia.store import path_arguments
from harmonia.store.store import Store


@click.group("roots", no_args_is_help=True)
def command() -> None:
    """List, pin and drop the GC roots of pushed paths.

    A root keeps a pushed path and its closure for `push.keep` after the last push or download. Run it with the server's
    --config and environment, as root or as the server's user.
    """


@command.command("list")
@click.pass_obj
def list_roots(config_file: str | None) -> None:
    """List the roots.

    Prints the time of the last push or download (UTC), the days that are left or `pinned`, and the path.
    """
    settings = loader.read(config_file, os.environ)
    now = time.time()
    for root in open_roots(settings).find_all():
        last_use = datetime.fromtimestamp(root.last_use, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        days = max(root.last_use + settings.push.keep - now, 0) / 86400
        left = "pinned" if root.pinned else f"{days:.1f}d"
        click.echo(f"{last_use}  {left:>6}  {settings.virtual_nix_store}/{root.path}")


@command.command()
@click.argument("paths", type=cli.PATH, metavar="PATH...", nargs=-1, required=True)
@click.pass_obj
def pin(config_file: str | None, paths: Sequence[str]) -> None:
    """Keep the roots of PATHs until they are dropped."""
    _change_each(config_file, paths, PushRoots.pin)


@command.command()
@click.argument("paths", type=cli.PATH, metavar="PATH...", nargs=-1, required=True)
@click.pass_obj
def drop(config_file: str | None, paths: Sequence[str]) -> None:
    """Remove the roots of PATHs. The next garbage collection may take the paths."""
    _change_each(config_file, paths, PushRoots.drop)


def _change_each(config_file: str | None, paths: Sequence[str], change: Callable[[PushRoots, StorePath], bool]) -> None:
    """Change the root of each path. Exit with an error if one has none."""
    settings = loader.read(config_file, os.environ)
    store, roots = Store.of(settings), open_roots(settings)
    absent = [path for path in paths if not change(roots, path_arguments.resolve(store, path)[0].path)]
    for path in absent:
        click.echo(f"harmonia: {path} has no root; `harmonia roots list` lists the paths that have one", err=True)
    if absent:
        sys.exit(1)
