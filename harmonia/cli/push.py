"""`harmonia push`."""

import os
import sys

import click

from harmonia import cli
from harmonia.cli.arguments import jobs_option, key_option
from harmonia.cli.closures import upload_closure
from harmonia.config import credentials, loader
from harmonia.errors import FormatError
from harmonia.store import path_arguments
from harmonia.store.store import Store
from harmonia.upload.http_target import HttpTarget, check_url

DEFAULT_JOBS = 8


def _check_url(_: click.Context, __: click.Parameter, url: str) -> str:
    try:
        check_url(url)
    except FormatError as error:
        raise click.BadParameter(str(error)) from error
    return url


@click.command("push")
@click.argument("url", callback=_check_url)
@click.argument("paths", type=cli.PATH, metavar="PATH...", nargs=-1, required=True)
@key_option(help="File with a secret key, which signs the pushed paths. Repeatable.")
@jobs_option(default=DEFAULT_JOBS, show_default=True, help="Number of NARs to upload at a time.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@click.pass_obj
def command(
    config_file: str | None,
    url: str,
    paths: tuple[str, ...],
    *,
    key_files: tuple[str, ...],
    jobs: int,
    quiet: bool,
) -> None:
    """Upload store paths and their closures to a binary cache.

    URL is any HTTP binary cache that takes PUT, such as the /push of a Harmonia. PATHs are store paths, or symlinks to
    them such as ./result; `-` reads them from standard input, one a line.

    Asks for all missing paths at once, and uploads their NARs in parallel, references first. Run the same command again
    after an interruption: what the cache has is not sent again. Credentials come from netrc(5) ($NETRC).

    \b
    After a build:  harmonia push https://cache.example.org/push ./result --key /etc/nix/ci.secret
    In a pipe:      nix-build | harmonia push https://cache.example.org/push -
    """  # noqa: D301 (click keeps the line breaks after \b)
    settings = loader.read(config_file, os.environ)
    keys = [credentials.load_secret_key(path) for path in key_files]
    store = Store.of(settings)
    named = [name for path in paths for name in (sys.stdin.read().split() if path == "-" else [path])]
    chosen = [path_arguments.resolve(store, name)[0].path for name in named]
    counts = upload_closure(settings, store, lambda: HttpTarget(url, store.store_dir), chosen, keys, jobs, "pushing")
    failed = counts["failed"]
    if failed or not quiet:
        rest = f", {failed} failed" if failed else ""
        click.echo(f"{counts['uploaded']} pushed, {counts['there']} already there{rest}", err=True)
    if failed:
        sys.exit(1)
