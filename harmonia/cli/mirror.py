"""`harmonia mirror`."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import click

from harmonia import cli
from harmonia.cache import warmer
from harmonia.cli.closures import upload_closure
from harmonia.config import credentials, loader
from harmonia.config.settings import Settings
from harmonia.errors import InvalidPathError
from harmonia.mirror.connection import open_bucket
from harmonia.mirror.target import BucketTarget
from harmonia.nix.store_path import StorePath
from harmonia.store import path_arguments
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.upload.nar_files import NarFiles

_JOBS = 4  # NARs at once: 16 MiB of memory for each


class _MirrorGroup(click.Group):
    """A group in which a first argument that is not a command belongs to `write`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {*self.commands, "--config", *ctx.help_option_names}
        return super().parse_args(ctx, args if not args or args[0] in names else ["write", *args])


@click.group("mirror", cls=_MirrorGroup, no_args_is_help=True)
def command() -> None:
    """Write store paths to the bucket of [mirror].

    `harmonia mirror PATH...` is short for `harmonia mirror write PATH...`. Name a PATH that is called like a command
    with ./ before it.

    \b
    After a build:       harmonia mirror ./result
    Before a deployment: harmonia mirror /nix/var/nix/profiles/system
    """  # noqa: D301 (click keeps the line breaks after \b)


@command.command("write")
@click.argument("paths", type=cli.PATH, metavar="[PATH]...", nargs=-1)
@click.option("--gc-roots", is_flag=True, help="Include all GC roots: profiles, systems, results.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@click.pass_obj
def write(config_file: str | None, paths: Sequence[str], *, gc_roots: bool, quiet: bool) -> None:
    """Write closures of PATHs to the bucket.

    PATHs are store paths, or symlinks to them such as ./result. Paths that the bucket has are skipped, so the same
    command continues after an interruption. Each NAR is verified before it is written. Use the server's --config and
    environment: NARs in the server's cache are not compressed again. Runs at the lowest CPU and disk priority.
    """
    if not (paths or gc_roots):
        raise click.UsageError("give PATHs or --gc-roots")
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    chosen = [path_arguments.resolve(store, path)[0].path for path in paths]
    if gc_roots:
        chosen += path_arguments.gc_roots(store, os.path.dirname(os.path.dirname(settings.database)))
    _check_published(settings, store, chosen)
    keys = credentials.secret_keys(settings)
    bucket = open_bucket(settings)
    warmer.lower_priority()
    began = time.monotonic()
    with closing(NarFiles(settings, store.real_dir)) as nars:
        try:
            target = partial(BucketTarget, settings, bucket)
            counts = asyncio.run(upload_closure(store, nars, target, chosen, keys, _JOBS, "writing"))
        except KeyboardInterrupt:
            click.echo("harmonia: interrupted; the same command continues", err=True)
            logging.disable()  # threads still compress NARs into the directory that is removed now
            nars.close()
            os._exit(cli.EXIT_INTERRUPTED)
    if counts["failed"] or not quiet:
        click.echo(
            f"{counts['uploaded']} written to {bucket.url} in {time.monotonic() - began:.1f} s,"
            f" {counts['there']} already there, {counts['failed']} failed",
            err=True,
        )
    if counts["failed"]:
        sys.exit(1)


def _check_published(settings: Settings, store: Store, paths: Sequence[StorePath]) -> None:
    """Raise InvalidPathError if the publish rules forbid a path of the closure."""
    policy = PublishPolicy(settings.publish, Store.of(settings))
    if policy.closure is not None:
        policy.closure.refresh()
    for path in path_arguments.closure(store, paths):
        info = store.path_info(path.hash_part)
        if info and not (policy.permits(info) and (policy.closure is None or path in policy.closure)):
            what = f"{store.store_dir}/{path} may not be served, by the rules in [publish]"
            raise InvalidPathError(f"{what}; name paths whose closures may be")
