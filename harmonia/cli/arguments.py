"""Command-line arguments: URLs, durations, sizes, and the paths that they name."""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import click

from harmonia import cli
from harmonia.config import amounts
from harmonia.config.settings import Settings
from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath
from harmonia.store import path_arguments
from harmonia.store.store import Store
from harmonia.tools.http_client import Client
from harmonia.untrusted import integer

_MAX_MEBIBYTES = 1 << 43

key_option = partial(click.option, "--key", "key_files", type=cli.PATH, metavar="FILE", multiple=True)
jobs_option = partial(click.option, "--jobs", type=click.IntRange(1, 100), metavar="N")


def parse_url(text: str) -> Client:
    """Return a client of the server with this URL. Raises BadParameter if it is malformed."""
    try:
        return Client(text)
    except FormatError as error:
        raise click.BadParameter(str(error)) from error


def choose_paths(settings: Settings, store: Store, paths: Iterable[str], *, gc_roots: bool) -> list[StorePath]:
    """Return the valid paths that PATHs name and, with `gc_roots`, those of the GC roots.

    Raises UsageError if neither is given, InvalidPathError if a PATH does not name a valid path.
    """
    chosen = [path_arguments.resolve(store, path)[0].path for path in paths]
    if not (chosen or gc_roots):
        raise click.UsageError("give PATHs or --gc-roots")
    if gc_roots:
        chosen += path_arguments.gc_roots(store, os.path.dirname(os.path.dirname(settings.database)))
    return chosen


class DefaultGroup(click.Group):
    """A group in which a first argument that is not a command belongs to the command `default`."""

    def __init__(self, name: str | None = None, *, default: str, **attributes: Any) -> None:  # noqa: ANN401 (click's)
        super().__init__(name, **attributes)
        self._default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {*self.commands, "--config", *ctx.help_option_names}
        return super().parse_args(ctx, args if not args or args[0] in names else [self._default, *args])


class Duration(click.FloatRange):
    """Seconds, or a duration like 500ms or 12h."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(super().convert(amounts.duration(str(value)), param, ctx))
        except FormatError as error:
            self.fail(str(error), param, ctx)


class Mebibytes(click.IntRange):
    """A number of MiB, or a size like 512K or 1GB, rounded up to MiB."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        try:
            count = integer(text, _MAX_MEBIBYTES)
            if count is None:
                count = -(-amounts.size(text) >> 20)
        except FormatError as error:
            self.fail(str(error), param, ctx)
        return int(super().convert(count, param, ctx))
