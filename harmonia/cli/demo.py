"""`harmonia demo`."""

import shlex

import click

from harmonia.tools import demo


@click.command("demo")
@click.argument("directory", default="demo-store", type=click.Path(file_okay=False))
def command(directory: str) -> None:
    """Create a small demo store, to try Harmonia without Nix.

    The store is created in DIRECTORY (default: demo-store). The output shows how to serve and use it.
    """
    made = demo.make(directory)
    url = "http://localhost:5000"
    hello, manual = made.paths["hello-2.13.0"], made.paths["hello-manual-2.13.0"]
    click.echo(f"""\
The demo store is in {made.directory}. To serve it:

  harmonia --config {shlex.quote(made.config_path)}

To try it, from another terminal:

  curl {url}/nix-cache-info
  curl {url}/{hello.hash_part}.narinfo
  nix --extra-experimental-features nix-command copy --refresh --from {url} --to /tmp/demo-copy \\
    --option trusted-public-keys {made.public_key} /nix/store/{hello}
  /tmp/demo-copy/nix/store/{hello}/bin/hello Ada Grace

Or open {url}/, or the manual at {url}/serve/{manual.hash_part}/, in a browser.
""")
