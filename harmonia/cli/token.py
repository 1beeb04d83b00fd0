"""`harmonia token`."""

import re

import click

from harmonia.config import tokens
from harmonia.config.name_patterns import check_pattern
from harmonia.config.tokens import SCOPES
from harmonia.errors import FormatError


class _Scope(click.Choice[str]):
    """A scope, or `sign:` with a pattern."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.startswith("sign:"):
            return super().convert(value, param, ctx)
        try:
            check_pattern(value.removeprefix("sign:"))
        except FormatError as error:
            self.fail(str(error), param, ctx)
        if re.search(r"[\s,#]", value):
            self.fail("the pattern has white space, a comma or #; use ? for that character", param, ctx)
        return value


@click.command("token")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=_Scope(SCOPES),
    multiple=True,
    default=("read",),
    help="What the token allows: `read` to download, `browse` to search, `metrics` to read /metrics, `push` to upload, "
    "`sign` to let the server sign uploads, `sign:PATTERN` only if their names match. Repeatable. Default: read.",
)
def command(name: str, scopes: tuple[str, ...]) -> None:
    """Create an access token for a client.

    NAME is a label. The token is shown once; the server stores only its hash.
    """
    try:
        secret, token = tokens.new(name, scopes)
    except FormatError:
        raise click.BadParameter(f"{name!r}: use letters, digits and ._@- only", param_hint="NAME") from None
    click.echo(f"""\
The token, for the client:

  {secret}

Its hash, for the server: add this line to the file at tokens_path, and send the server SIGHUP.
If systemd passes the file to the server, as on NixOS, restart the server instead.

  {token}

For Nix: add this line to the client's netrc-file (/etc/nix/netrc), readable only to its owner.

  machine cache.example.org login {name} password {secret}
""")
