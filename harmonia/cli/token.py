"""`harmonia token`."""

import click

from harmonia.config import tokens
from harmonia.config.tokens import SCOPES, Scope
from harmonia.errors import FormatError


@click.command("token")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("read",),
    help="What it lets the client do; may be given several times. The default is `read`.",
)
def command(name: str, scopes: tuple[Scope, ...]) -> None:
    """Make a token that lets a client in.

    NAME is for you, to tell tokens apart. The token is shown once and kept nowhere. The server gets its hash, which is
    no secret.
    """
    try:
        secret, token = tokens.new(name, scopes)
    except FormatError:
        raise click.BadParameter(f"{name!r}: letters, digits and ._@- make up a name", param_hint="NAME") from None
    click.echo(f"""\
The token, for the client:

  {secret}

Its hash, for the server: add this line to the file that tokens_path names, and send the server SIGHUP.

  {token}

For Nix: add this line to the client's netrc-file (/etc/nix/netrc), which nobody else may read.

  machine cache.example.org login {name} password {secret}
""")
