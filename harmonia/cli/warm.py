"""`harmonia warm`."""

import os
import sys
import time

import click

from harmonia import cli
from harmonia.cli import progress
from harmonia.config import loader
from harmonia.store import path_arguments
from harmonia.store.store import Store
from harmonia.tools import warm


@click.command("warm")
@click.argument("paths", type=cli.PATH, metavar="[PATH]...", nargs=-1)
@click.option("--gc-roots", is_flag=True, help="Also what the garbage collector keeps: profiles, systems, results.")
@click.option(
    "--closure/--no-closure",
    default=True,
    help="With all that the paths refer to, which is the default, or without.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing if all went well.")
@click.pass_obj
def command(config_file: str | None, paths: tuple[str, ...], *, gc_roots: bool, closure: bool, quiet: bool) -> None:
    """Compress NARs before anybody asks for them.

    They go into the server's cache, so that a deployment need not wait for them.

    PATHs are store paths, or symlinks to them such as ./result or /run/current-system. Give it the server's --config
    and environment; it says which cache it fills. The server may run meanwhile, and has precedence. Nothing is evicted
    from the cache: what it has no room for is left out, and counted at the end.

    \b
    After a build:       harmonia warm ./result
    Before a deployment: harmonia warm /nix/var/nix/profiles/system
    """  # noqa: D301 (\b is click's mark of lines to be kept)
    if not (paths or gc_roots):
        raise click.UsageError("name some paths, or --gc-roots")
    settings = loader.read(config_file, os.environ)
    store = Store.of(settings)
    chosen = [path_arguments.named(store, path)[0].path for path in paths]
    if gc_roots:
        chosen += path_arguments.gc_roots(store, os.path.dirname(os.path.dirname(settings.database)))
    chosen = path_arguments.closure(store, chosen) if closure else list(dict.fromkeys(chosen))
    total = sum(info.nar_size for path in chosen if (info := store.path_info(path.hash_part)))
    own_settings = warm.take_owner(settings)
    warm.give_way()
    if not quiet:
        click.echo(f"Filling the cache in {settings.cache_dir}", err=True)
    began = time.monotonic()
    counts = dict.fromkeys(("compressed", "there", "too large", "failed"), 0)
    try:
        with progress.bar("compressing", total) as tell:
            for result in warm.warm(own_settings, store, chosen, tell):
                counts[result.state] += 1
                if result.state == "failed":
                    click.echo(f"failed: {store.store_dir}/{result.path}: {result.what}", err=True)
    except KeyboardInterrupt:
        click.echo("harmonia: interrupted; what is compressed stays, and the same command goes on from there", err=True)
        os._exit(cli.EXIT_INTERRUPTED)  # threads would go on with what they have begun, which nobody keeps
    wrong = counts["too large"] or counts["failed"]
    if wrong or not quiet:
        click.echo(
            f"{counts['compressed']} compressed in {time.monotonic() - began:.1f} s, {counts['there']} were there,"
            f" {counts['too large']} did not fit, {counts['failed']} failed",
            err=True,
        )
    if counts["too large"]:
        click.echo("The cache is full; raise cache_size, or warm fewer paths", err=True)
    if wrong:
        sys.exit(1)
