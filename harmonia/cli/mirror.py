"""`harmonia mirror`."""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

import click

from harmonia import cli
from harmonia.cache.disk_cache import DiskCache
from harmonia.cache.frame_index import index_files
from harmonia.cache.nar_compressor import Compressor
from harmonia.cli import progress
from harmonia.config import credentials, loader
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, InvalidPathError
from harmonia.mirror.connection import open_bucket
from harmonia.mirror.writer import MirrorWriter
from harmonia.nix.path_info import PathInfo
from harmonia.store import path_arguments
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store
from harmonia.tools import warm


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
    environment: NARs are compressed into the server's cache, at the lowest CPU and disk priority.
    """
    if not (paths or gc_roots):
        raise click.UsageError("give PATHs or --gc-roots")
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    infos = _closure(settings, store, paths, gc_roots=gc_roots)
    keys = credentials.secret_keys(settings)
    bucket = open_bucket(settings)
    own_settings = warm.become_owner(settings)
    warm.lower_priority()
    writer = MirrorWriter(own_settings, bucket, store, keys, _compressor(own_settings))
    began = time.monotonic()
    counts: Counter[str] = Counter()

    async def run() -> None:
        sizes = {info.path: info.nar_size for info in infos}
        with progress.bar("writing", sum(sizes.values())) as advance:
            async for result in writer.write(infos):
                advance(sizes[result.path])
                counts[result.state] += 1
                if result.state == "failed":
                    click.echo(f"failed: {store.store_dir}/{result.path}: {result.what}", err=True)

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        click.echo("harmonia: interrupted; the same command continues", err=True)
        os._exit(cli.EXIT_INTERRUPTED)  # do not wait for threads that compress
    if counts["failed"] or not quiet:
        took = time.monotonic() - began
        click.echo(
            f"{counts['written']} written to {bucket.url} in {took:.1f} s, {counts['there']} already there,"
            f" {counts['failed']} failed",
            err=True,
        )
    if counts["failed"]:
        sys.exit(1)


def _closure(settings: Settings, store: Store, paths: Sequence[str], *, gc_roots: bool) -> list[PathInfo]:
    """Return the closure of the named paths. Raises InvalidPathError if the publish rules forbid one of its paths."""
    chosen = [path_arguments.resolve(store, path)[0].path for path in paths]
    if gc_roots:
        chosen += path_arguments.gc_roots(store, os.path.dirname(os.path.dirname(settings.database)))
    found = (store.path_info(path.hash_part) for path in path_arguments.closure(store, chosen))
    infos = [info for info in found if info is not None]
    policy = PublishPolicy(settings.publish, Store.of(settings))
    if policy.closure is not None:
        policy.closure.refresh()
    for info in infos:
        if not policy.permits(info) or (policy.closure is not None and info.path not in policy.closure):
            what = f"{store.store_dir}/{info.path} may not be served, by the rules in [publish]"
            raise InvalidPathError(f"{what}; name paths whose closures may be")
    return infos


def _compressor(settings: Settings) -> Compressor:
    directory = os.path.join(str(settings.cache_dir), "nar")
    try:
        cache = DiskCache(directory, settings.cache_bytes)
    except OSError as error:
        what = f"cache_dir: cannot write {directory!r}: {error.strerror}; run this as root or as the user of the server"
        raise ConfigError(what) from None
    return Compressor(settings.zstd, cache, index_files(settings))
