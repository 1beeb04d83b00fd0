"""`harmonia token`."""

import click

from harmonia import access
from harmonia.access import SCOPES, Scope
from harmonia.errors import FormatError


@click.command("token")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("read",),
    help="What it is good for; may be given several times. `read` if not given.",
)
def command(name: str, scopes: tuple[Scope, ...]) -> None:
    """Make a token that lets a client in.

    NAME is for you to know it by. The token is shown once and kept nowhere. The server gets its hash, which is no
    secret.
    """
    try:
        secret, token = access.new(name, scopes)
    except FormatError:
        raise click.BadParameter(f"{name!r}: letters, digits and ._@- make up a name", param_hint="NAME") from None
    click.echo(f"""\
The token, for the client:

  {secret}

Its hash, for the server: a line for the file that tokens_path names. SIGHUP makes the server read that again.

  {token}

For Nix, in the client's netrc-file (/etc/nix/netrc), which others must not read:

  machine cache.example.org login {name} password {secret}
""")
