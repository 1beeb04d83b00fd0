"""`harmonia demo`."""

import shlex

import click

from harmonia import cli
from harmonia.config.settings import Settings
from harmonia.process import sockets
from harmonia.tools import demo


@click.command("demo")
@cli.bind_option
@click.argument("directory", default="demo-store", type=click.Path(file_okay=False))
def command(directory: str, bind: str | None) -> None:
    """Create a small demo store, to try Harmonia without Nix.

    The store is created in DIRECTORY (default: demo-store). The output shows how to serve and use it.
    """
    address = (Settings() if bind is None else Settings(bind=bind)).address("bind")
    assert address is not None  # noqa: S101 (it has a default)
    if isinstance(address, str):
        raise click.UsageError("--bind: the demo needs a TCP address, like :8080")
    url = sockets.url(address, tls=False)
    serve = "" if bind is None else f" serve --bind {shlex.quote(bind)}"
    made = demo.make(directory)
    hello, manual = made.paths["hello-2.13.0"], made.paths["hello-manual-2.13.0"]
    click.echo(f"""\
The demo store is in {made.directory}. To serve it:

  harmonia --config {shlex.quote(made.config_path)}{serve}

To try it, from another terminal:

  curl {url}/nix-cache-info
  curl {url}/{hello.hash_part}.narinfo
  nix --extra-experimental-features nix-command copy --refresh --from {url} --to /tmp/demo-copy \\
    --option trusted-public-keys {made.public_key} /nix/store/{hello}
  /tmp/demo-copy/nix/store/{hello}/bin/hello Ada Grace

Or open {url}/, or the manual at {url}/serve/{manual.hash_part}/, in a browser.
""")
