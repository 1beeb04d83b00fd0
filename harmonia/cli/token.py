"""`harmonia token`."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import click

from harmonia import cli
from harmonia.cli.arguments import DefaultGroup
from harmonia.config import amounts, credentials, loader, token_file, tokens
from harmonia.config.name_patterns import check_pattern
from harmonia.config.settings import Settings
from harmonia.config.tokens import SCOPES, Token, Tokens
from harmonia.errors import ConfigError, FormatError

_MAX_SECRET_BYTES = 4096


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


def _parse_end(text: str) -> float:
    """Return the end of a token in seconds since 1970: a day, a time with zone, or a duration from now.

    Raises BadParameter if `text` is none of these, or is past.
    """
    with suppress(FormatError):
        end = tokens.parse_end(text)
        if end <= time.time():
            raise click.BadParameter(f"{text!r} is past; give a later end, or a duration like 90d")
        return end
    with suppress(FormatError):
        end = float(int(time.time() + amounts.duration(text)))
        if end <= tokens.LAST_END_S:
            return end
    raise click.BadParameter(
        f"{text!r}: expected a duration like 90d, a day like 2026-12-31, or a time with zone like 2026-12-31T18:00:00Z"
    )


_FILE = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="File with the tokens' hashes. Default: the setting `tokens_path`.",
)


@click.group("token", cls=DefaultGroup, default="create", no_args_is_help=True)
def command() -> None:
    """Create, list, check and revoke access tokens.

    `harmonia token NAME` is short for `harmonia token create NAME`.
    """


@command.command("create")
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
@click.option(
    "--until",
    "expires_at",
    type=_parse_end,
    metavar="END",
    help="When the token expires: a duration like 90d, the last day (UTC) like 2026-12-31, or a time like "
    "2026-12-31T18:00:00Z. Default: never.",
)
def create(name: str, scopes: tuple[str, ...], *, expires_at: float | None) -> None:
    """Create an access token for a client.

    NAME is a label. The token is shown once; the server stores only its hash.
    """
    try:
        secret, token = tokens.new(name, scopes, math.inf if expires_at is None else expires_at)
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


@command.command("list")
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print JSON: name, scopes, expires, expired.")
@click.pass_obj
def list_tokens(config_file: str | None, path: str | None, *, as_json: bool) -> None:
    """List the tokens: name, scopes, and when each expires.

    Neither tokens nor their hashes are shown.
    """
    found = credentials.load_tokens(_settings(config_file, path))
    now = time.time()
    if as_json:
        rows = [
            {
                "name": token.name,
                "scopes": token.scope_text.split(","),
                "expires": None if token.expires_at == math.inf else token.end,
                "expired": token.expires_at <= now,
            }
            for token in found
        ]
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    names = max((len(token.name) for token in found), default=0)
    scopes = max((len(token.scope_text) for token in found), default=0)
    for token in found:
        click.echo(f"{token.name:<{names}}  {token.scope_text:<{scopes}}  {_end(token, now)}")


@command.command("check")
@_FILE
@click.pass_obj
def check(config_file: str | None, path: str | None) -> None:
    """Show whose token is on standard input, and whether it is valid.

    Exits with status 3 if it is not valid.

    \b
    From a file:     harmonia token check <secret
    From a terminal: harmonia token check
    """  # noqa: D301 (click keeps the line breaks after \b)
    found = credentials.load_tokens(_settings(config_file, path))
    if sys.stdin.isatty():
        secret = click.prompt("Token", hide_input=True, err=True)
    else:
        secret = sys.stdin.buffer.read(_MAX_SECRET_BYTES).decode(errors="surrogateescape").strip()
    token, now = Tokens(found).find_token(secret), time.time()
    if token is None:
        click.echo("not valid: no line of the file has the hash of this token")
        sys.exit(cli.EXIT_FOUND)
    click.echo(f"{token.name}  {token.scope_text}  {_end(token, now)}")
    if token.expires_at <= now:
        sys.exit(cli.EXIT_FOUND)


@command.command("revoke")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_FILE
@click.pass_obj
def revoke(config_file: str | None, names: Sequence[str], path: str | None) -> None:
    """Remove the lines of tokens from the file of their hashes.

    Comments, other lines, owner and permissions stay as they are. If the file lacks one of the tokens, nothing changes.
    Then send the server SIGHUP: it accepts the tokens until it reloads the file.
    """
    token_file.revoke(str(_settings(config_file, path).tokens_path), names)
    click.echo("removed; send the server SIGHUP, or restart it if systemd passes the file to it", err=True)


def _settings(config_file: str | None, path: str | None) -> Settings:
    """Return settings with the path of the tokens. Raises ConfigError if there is none."""
    if path is not None:
        return Settings(tokens_path=path)
    settings = loader.read(config_file, os.environ)
    if settings.tokens_path is None:
        raise ConfigError("tokens_path is not set; set it, or give --file FILE")
    return settings


def _end(token: Token, now: float) -> str:
    if token.expires_at == math.inf:
        return "does not expire"
    return f"{'expires' if token.expires_at > now else 'expired'} {token.end}"
