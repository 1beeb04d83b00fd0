"""`harmonia warm`."""

import os
import sys
import time

import click

from harmonia import cli
from harmonia.cache import warmer
from harmonia.cache.owner import become_owner
from harmonia.cli import progress
from harmonia.cli.arguments import choose_paths
from harmonia.config import loader
from harmonia.errors import ConfigError
from harmonia.store import path_arguments
from harmonia.store.store import Store


@click.command("warm")
@click.argument("paths", type=cli.PATH, metavar="[PATH]...", nargs=-1)
@click.option("--gc-roots", is_flag=True, help="Include all GC roots: profiles, systems, results.")
@click.option(
    "--closure/--no-closure",
    default=True,
    help="Include the closure of the paths (default), or only the paths themselves.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@click.pass_obj
def command(config_file: str | None, paths: tuple[str, ...], *, gc_roots: bool, closure: bool, quiet: bool) -> None:
    """Compress NARs into the server's cache ahead of the first download.

    PATHs are store paths, or symlinks to them such as ./result or /run/current-system. Use the server's --config and
    environment: the first line of output shows which cache is filled.

    Safe while the server runs, at the lowest CPU and disk priority. Never evicts: NARs that do not fit are skipped and
    counted.

    \b
    After a build:       harmonia warm ./result
    Before a deployment: harmonia warm /nix/var/nix/profiles/system
    """  # noqa: D301 (click keeps the line breaks after \b)
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    chosen = choose_paths(settings, store, paths, gc_roots=gc_roots)
    chosen = path_arguments.closure(store, chosen) if closure else list(dict.fromkeys(chosen))
    total = sum(info.nar_size for path in chosen if (info := store.path_info(path.hash_part)))
    if not settings.enable_compression:
        raise ConfigError("enable_compression is false: this server has no cache of compressed NARs")
    own_settings = become_owner(settings)
    warmer.lower_priority()
    if not quiet:
        click.echo(f"Filling the cache in {settings.cache_dir}", err=True)
    began = time.monotonic()
    counts = dict.fromkeys(("compressed", "there", "too large", "failed"), 0)
    try:
        with progress.bar("compressing", total) as advance:
            for result in warmer.Warmer(own_settings, store).warm(chosen, advance):
                counts[result.state] += 1
                if result.state == "failed":
                    click.echo(f"failed: {store.store_dir}/{result.path}: {result.what}", err=True)
    except KeyboardInterrupt:
        click.echo("harmonia: interrupted; finished NARs stay in the cache, and the same command continues", err=True)
        os._exit(cli.EXIT_INTERRUPTED)  # do not wait for threads whose unfinished NARs are discarded
    wrong = counts["too large"] or counts["failed"]
    if wrong or not quiet:
        click.echo(
            f"{counts['compressed']} compressed in {time.monotonic() - began:.1f} s, {counts['there']} already cached,"
            f" {counts['too large']} did not fit, {counts['failed']} failed",
            err=True,
        )
    if counts["too large"]:
        click.echo("The cache is full: raise cache_size, or warm fewer paths", err=True)
    if wrong:
        sys.exit(1)
