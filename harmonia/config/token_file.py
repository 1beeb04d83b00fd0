"""Atomic edits of the file with the tokens' hashes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import reduce

from harmonia.config import tokens
from harmonia.errors import ConfigError, FormatError


def revoke(path: str, names: Iterable[str]) -> None:
    """Remove the lines of tokens. All other lines, the owner and the permissions stay as they are.

    A reader sees the old file or the new one. If `path` is a symlink, its target is replaced. Raises ConfigError if the
    file lacks one of the tokens, or cannot be changed: then all lines stay.
    """
    target = os.path.realpath(path)
    try:
        directory = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)  # two edits at once would keep one of the lines
            _replace(directory, target, names)
        finally:
            os.close(directory)
    except FormatError as error:
        raise ConfigError(f"{path!r}: {error}; harmonia token list shows the names") from None
    except OSError as error:
        remedy = "remove the line of the token in the program or configuration that creates the file"
        raise ConfigError(f"cannot change {path!r}: {error.strerror}; {remedy}") from None


def _replace(directory: int, target: str, names: Iterable[str]) -> None:
    with open(target, "rb") as file:
        text = reduce(tokens.without_token, dict.fromkeys(names), file.read().decode(errors="surrogateescape"))
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
