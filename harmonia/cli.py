"""The command line: the only place that prints, and the only one that exits."""

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import click

from harmonia import __version__, config, demo, sockets, systemd
from harmonia.config import Settings
from harmonia.errors import ConfigError, HarmoniaError
from harmonia.server import app, worker
from harmonia.server.cache import Cache
from harmonia.supervisor import Supervisor

_log = logging.getLogger("harmonia")

EXIT_CONFIG = 2
"""A wrong setting or a wrong word on the command line. 1 is any other failure."""


_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _LineFormatter(logging.Formatter):
    """One line for each event. For the journal it has no time, and starts with its priority (sd-daemon(3))."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(levelname)s %(message)s" if journal else "%(asctime)s %(levelname)s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace("\n", " | ")
        return f"<{_PRIORITIES[record.levelno]}>{line}" if self._journal else line


def _log_to_stderr(settings: Settings | None = None) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(journal="JOURNAL_STREAM" in os.environ))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    _log.setLevel((settings.log_level if settings else "info").upper())
    logging.getLogger("harmonia.access").setLevel(
        logging.INFO if settings and settings.access_log else logging.CRITICAL
    )
    # Sanic tells of each client that went away, and of each error that we have already told.
    for name in ("sanic.root", "sanic.error", "sanic.server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="harmonia", message="%(prog)s %(version)s")
@click.option(
    "--config", "config_file", metavar="FILE", help="The TOML file with the settings; else $CONFIG_FILE, else defaults."
)
@click.pass_context
def main(context: click.Context, config_file: str | None) -> None:
    """A Nix binary cache: serves this machine's store to others. Without a command, it serves."""
    _log_to_stderr()
    context.obj = config_file
    if context.invoked_subcommand is None:
        context.invoke(serve)


@main.command()
@click.pass_obj
def serve(config_file: str | None) -> None:
    """Serve until SIGTERM. SIGHUP reads the TLS certificate again."""
    with _errors_told():
        settings = config.load(config_file, os.environ)
        keys = config.secret_keys(settings)
        _log_to_stderr(settings)
        inherited = systemd.inherited_sockets(os.environ)
        with (
            nullcontext(inherited) if inherited else sockets.listen(settings, "bind") as listening,
            sockets.listen(settings, "metrics_bind") as for_metrics,
        ):
            for each in listening:
                _log.info("serving %s at %s", settings.real_store, sockets.url(each, tls=bool(settings.tls_cert_path)))
            for each in for_metrics:
                _log.info("metrics are at %s/metrics", sockets.url(each, tls=False))
            work = partial(worker.run, Cache(settings, keys, app.count_with(settings)), for_metrics)
            status = Supervisor(work, [*listening, *for_metrics], settings.workers, settings.shutdown_grace).run()
    sys.exit(status)


@main.command("check-config")
@click.option(
    "--text-only", is_flag=True, help="Leave out the store, keys and certificates: they are on another machine."
)
@click.pass_obj
def check_config(config_file: str | None, *, text_only: bool) -> None:
    """Check the settings as a start would, and say whether they work."""
    with _errors_told():
        config.load(config_file, os.environ, elsewhere=text_only)
    click.echo("The configuration is valid.")


@main.command("demo")
@click.argument("directory", default="demo-store", type=click.Path(file_okay=False))
def make_demo(directory: str) -> None:
    """Make a small demo store in DIRECTORY, to try Harmonia without Nix, and say how to serve and use it."""
    with _errors_told():
        made = demo.make(directory)
    url = "http://localhost:5000"
    whole = made.paths["demo"]
    click.echo(f"""\
The demo store is in {made.directory}. Serve it with

  harmonia --config {shlex.quote(made.config_path)}

and then try

  curl {url}/nix-cache-info
  curl {url}/{whole.hash_part}.narinfo
  nix --extra-experimental-features nix-command copy --from {url} --to /tmp/demo-copy \\
    --option trusted-public-keys {made.public_key} /nix/store/{whole}

or open {url}/ in a browser.
""")


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        click.echo(f"harmonia: {error}", err=True)
        sys.exit(EXIT_CONFIG)
    except HarmoniaError as error:
        click.echo(f"harmonia: {error}", err=True)
        sys.exit(1)
