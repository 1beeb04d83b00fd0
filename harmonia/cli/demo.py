"""`harmonia demo`."""

import shlex

import click

from harmonia import demo


@click.command("demo")
@click.argument("directory", default="demo-store", type=click.Path(file_okay=False))
def command(directory: str) -> None:
    """Make a small demo store, to try Harmonia without Nix.

    It is made in DIRECTORY, else in demo-store; then it is told how to serve and use it.
    """
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
