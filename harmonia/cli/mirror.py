"""`harmonia mirror`."""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import click

from harmonia import cli
from harmonia.cache import warmer
from harmonia.cli.arguments import DefaultGroup, Duration, choose_paths
from harmonia.cli.closures import upload_closure
from harmonia.config import credentials, loader
from harmonia.config.settings import Settings
from harmonia.errors import InvalidPathError
from harmonia.mirror import verify as checks
from harmonia.mirror.collector import Collector, Deletion
from harmonia.mirror.connection import open_bucket
from harmonia.mirror.target import BucketTarget
from harmonia.mirror.verify import read_contents
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import StorePath
from harmonia.store import path_arguments
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

_JOBS = 4  # NARs at once: 16 MiB of memory for each
_MAX_KEEP_S = 100 * 365 * 86400


class _MirrorCommands(DefaultGroup):
    def invoke(self, ctx: click.Context) -> object:
        with cli.exit_at_once():
            return super().invoke(ctx)


@click.group("mirror", cls=_MirrorCommands, default="write", no_args_is_help=True)
def command() -> None:
    """Write store paths to the bucket of [mirror], check it, and delete old paths from it.

    `harmonia mirror PATH...` is short for `harmonia mirror write PATH...`. Write ./ before a PATH
    with the name of a command.

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
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    chosen = choose_paths(settings, store, paths, gc_roots=gc_roots)
    _check_published(settings, store, chosen)
    keys = credentials.secret_keys(settings)
    bucket = open_bucket(settings)
    warmer.lower_priority()
    began = time.monotonic()
    counts = upload_closure(settings, store, lambda: BucketTarget(settings, bucket), chosen, keys, _JOBS, "writing")
    if counts["failed"] or not quiet:
        click.echo(
            f"{counts['uploaded']} written to {bucket.url} in {time.monotonic() - began:.1f} s,"
            f" {counts['there']} already there, {counts['failed']} failed",
            err=True,
        )
    if counts["failed"]:
        sys.exit(1)


@command.command("gc")
@click.option(
    "--keep",
    type=Duration(0, _MAX_KEEP_S),
    metavar="TIME",
    required=True,
    help="Keep paths that were written, or named in `harmonia mirror PATH`, within this time, like 90d.",
)
@click.option(
    "--keep-nars",
    type=Duration(0, _MAX_KEEP_S),
    metavar="TIME",
    default="30d",
    show_default=True,
    help="Keep a NAR for this time after the last narinfo that named it. Nix remembers narinfos for 30 days.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only print what would be deleted, and why.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@click.pass_obj
def collect(config_file: str | None, *, keep: float, keep_nars: float, dry_run: bool, quiet: bool) -> None:
    """Delete old paths from the bucket.

    A path stays if it was written or named within --keep, or if a path that stays refers to it. With
    `mirror.write_served`, a download from a server counts as named. NARs are deleted by a later run, when no narinfo
    has named them for --keep-nars. Only one run at a time is possible; uploads may go on.
    """
    settings = loader.read(config_file, os.environ)
    bucket = open_bucket(settings)
    counts: Counter[str] = Counter()

    def report(deletion: Deletion) -> None:
        kind = "narinfos" if deletion.key.endswith(".narinfo") else "NARs" if "nar/" in deletion.key else "others"
        counts[kind] += 1
        if dry_run:
            click.echo(f"{deletion.key}: {deletion.why}")

    collector = Collector(bucket, settings.virtual_nix_store, timedelta(seconds=keep), timedelta(seconds=keep_nars))
    asyncio.run(collector.collect(report, dry_run=dry_run))
    if not quiet:
        verb = "would be deleted" if dry_run else "deleted"
        listed = f"{counts['narinfos']} narinfos, {counts['NARs']} NARs and {counts['others']} other objects"
        click.echo(f"{listed} {verb} in {bucket.url}", err=True)


@command.command("verify")
@click.option(
    "--no-content", is_flag=True, help="Do not read NARs and listings: check only that NARs exist, and their length."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing if nothing is wrong.")
@click.pass_obj
def verify(config_file: str | None, *, no_content: bool, quiet: bool) -> None:
    """Check the bucket.

    Checks that each narinfo has its NAR, with the right length and hashes, all its references, and a signature by one
    of `mirror.public_keys` (default: those of `sign_key_paths`); that `nix-cache-info` is there and right; and that
    realisations, build traces, debug info and listings are well-formed, and what they name is there. Prints one line on
    stdout for each wrong object, and exits with status 3 if there is one.
    """
    settings = loader.read(config_file, os.environ)
    bucket = open_bucket(settings)
    keys = [PublicKey.parse(key) for key in settings.mirror.public_keys]
    keys = keys or [key.public_key for key in credentials.secret_keys(settings)]
    began = time.monotonic()

    async def run() -> tuple[int, int]:
        contents = await read_contents(bucket, settings.virtual_nix_store)
        count = 0
        async for finding in checks.verify(bucket, contents, settings.virtual_nix_store, keys, content=not no_content):
            count += 1
            click.echo(f"wrong: {finding.key}: {finding.what}")
        return len(contents.paths), count

    paths, wrong = asyncio.run(run())
    if wrong or not quiet:
        took = time.monotonic() - began
        click.echo(f"{paths} paths verified in {bucket.url} in {took:.1f} s, {wrong} wrong objects", err=True)
    if wrong:
        click.echo(
            "Delete the wrong objects and the narinfos of their paths, and write the paths again with:"
            " harmonia mirror PATH",
            err=True,
        )
        sys.exit(cli.EXIT_FOUND)


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
