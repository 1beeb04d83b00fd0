"""`harmonia keygen`."""

import os
import re

import click

from harmonia.nix.signing import SecretKey

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")  # it becomes a file's name, and a word in nix.conf


@click.command("keygen")
@click.argument("name")
@click.argument("directory", default=".", type=click.Path(exists=True, file_okay=False))
def command(name: str, directory: str) -> None:
    """Make a key pair to sign with.

    NAME.secret, for `sign_key_paths`, and NAME.public, for clients, are written to DIRECTORY, by default the current
    one. Files that exist are not touched.

    By custom, NAME is the host name of the cache and a number: cache.example.org-1. The files have the form of those
    that `nix-store --generate-binary-cache-key` makes.
    """
    if not _NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r}: letters, digits and ._+- make up a name, like cache.example.org-1")
    secret_file, public_file = (os.path.join(directory, f"{name}.{kind}") for kind in ("secret", "public"))
    for path in (secret_file, public_file):
        if os.path.lexists(path):
            raise click.UsageError(f"{path} exists and is left alone; take another name, or another directory")
    key = SecretKey.generate(name)
    _write(secret_file, key.export(), 0o600)
    _write(public_file, str(key.public_key), 0o644)
    click.echo(f"""\
The secret key is in {secret_file}: keep it from others. Tell the server of it:

  sign_key_paths = ["{os.path.abspath(secret_file)}"]

The public key is in {public_file}. Tell clients of it, in nix.conf:

  extra-trusted-public-keys = {key.public_key}
""")


def _write(path: str, text: str, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w", encoding="ascii") as file:
        file.write(text)
