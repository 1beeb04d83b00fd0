"""`harmonia watch`."""

import asyncio
import os

import click

from harmonia import cli
from harmonia.cli.arguments import jobs_option, key_option
from harmonia.config import credentials, loader
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.errors import FormatError
from harmonia.process import log_setup
from harmonia.tools import watch


@click.command("watch")
@click.argument("url", required=False)
@key_option(help="File with a secret key, which signs the uploaded paths, in addition to sign_key_paths. Repeatable.")
@jobs_option(help="Number of NARs to upload at a time. Default: the setting `watch.jobs`.")
@click.pass_obj
def command(config_file: str | None, url: str | None, *, key_files: tuple[str, ...], jobs: int | None) -> None:
    """Upload each store path that becomes valid to a binary cache, until it is stopped.

    URL is any HTTP binary cache that takes PUT, such as the /push of another Harmonia (default: the setting
    `watch.url`), or `mirror`, the bucket of [mirror]. [watch] in the settings file chooses paths.

    The queue is on disk: it survives kills, a full disk, and a cache that is down. Paths that were garbage-collected
    meanwhile are dropped with a line in the log.
    """
    source = loader.Source.read(config_file, os.environ)
    settings = source.settings()
    url = url or settings.watch.url
    if url is None:
        raise click.UsageError("give a URL, or set watch.url")
    log_setup.to_stderr(settings)
    with cli.exit_at_once():
        try:
            keys = [*credentials.secret_keys(settings), *map(credentials.load_secret_key, key_files)]
            asyncio.run(watch.serve(settings, url, keys, jobs or settings.watch.jobs))
        except WrongSettingError as error:
            raise source.located(error) from None
        except FormatError as error:
            raise click.BadParameter(str(error)) from error
