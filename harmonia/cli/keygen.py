"""`harmonia keygen`."""

import os
import re

import click

from harmonia.nix.signing import SecretKey

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")  # becomes a file name, and a word in nix.conf


@click.command("keygen")
@click.argument("name")
@click.argument("directory", default=".", type=click.Path(exists=True, file_okay=False))
def command(name: str, directory: str) -> None:
    """Create a signing key pair.

    Writes NAME.secret, for `sign_key_paths`, and NAME.public, for clients, to DIRECTORY (default: the current one).
    Never overwrites a file.

    By convention, NAME is the host name of the cache and a number: cache.example.org-1. The files have the format of
    `nix-store --generate-binary-cache-key`.
    """
    if not _NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r}: use letters, digits and ._+- only, as in cache.example.org-1")
    secret_file, public_file = (os.path.join(directory, f"{name}.{kind}") for kind in ("secret", "public"))
    for path in (secret_file, public_file):
        if os.path.lexists(path):
            raise click.UsageError(f"{path} already exists; use another name or directory")
    key = SecretKey.generate(name)
    _write(secret_file, key.export(), 0o600)
    _write(public_file, str(key.public_key), 0o644)
    click.echo(f"""\
The secret key is in {secret_file}. Keep it secret. Set it in the server's configuration:

  sign_key_paths = ["{os.path.abspath(secret_file)}"]

The public key is in {public_file}. Add it to nix.conf on each client:

  extra-trusted-public-keys = {key.public_key}
""")


def _write(path: str, text: str, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w", encoding="ascii") as file:
        file.write(text)
