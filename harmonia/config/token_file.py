"""Atomic edits of the file with the tokens' hashes."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress

from harmonia.config import tokens
from harmonia.errors import ConfigError, FormatError


def revoke(path: str, name: str) -> None:
    """Remove the line of a token. All other lines, the owner and the permissions stay as they are.

    A reader sees the old file or the new one. If `path` is a symlink, its target is replaced. Raises ConfigError if the
    file has no such token, or cannot be changed.
    """
    target = os.path.realpath(path)
    try:
        directory = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)  # two edits at once would keep one of the lines
            _replace(directory, target, name)
        finally:
            os.close(directory)
    except FormatError as error:
        raise ConfigError(f"{path!r}: {error}; harmonia token list shows the names") from None
    except OSError as error:
        remedy = "remove the line of the token in the program or configuration that creates the file"
        raise ConfigError(f"cannot change {path!r}: {error.strerror}; {remedy}") from None


def _replace(directory: int, target: str, name: str) -> None:
    with open(target, "rb") as file:
        text = tokens.without_token(file.read().decode(errors="surrogateescape"), name)
        owner = os.fstat(file.fileno())
    number, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", dir=os.path.dirname(target))
    try:
        with open(number, "wb") as file:
            if (os.geteuid(), os.getegid()) != (owner.st_uid, owner.st_gid):
                os.fchown(number, owner.st_uid, owner.st_gid)
            shutil.copystat(target, temporary)
            file.write(text.encode(errors="surrogateescape"))
            file.flush()
            os.fsync(number)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    os.fsync(directory)
