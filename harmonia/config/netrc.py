"""netrc(5) parser, which finds the user and password for a host by the rules of curl, which reads the file for Nix.

The authority is curl's `lib/netrc.c`. Releases of curl differ in details; we follow the newest. A curl before 7.84 does
not support quotes. Some from 8.11 on (and Debian's 7.88) do not find a password without a login before another
`machine`.
"""

import base64
import os
import re
from collections.abc import Iterable, Iterator, Mapping

from harmonia.errors import FormatError, RemoteError

MAX_BYTES = 128 << 10
"""The maximum size of a file, as in curl."""
_FILES = ("/etc/nix/netrc", "~/.netrc")  # the first file with the host counts; $NETRC replaces both

_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"|([^\s"]\S*)|(")', re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_CONTROLS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def find_authorization(host: str, environ: Mapping[str, str]) -> str | None:
    """Return the value of Authorization for a host from the user's netrc file, or None if it has no entry for the host.

    Skips files that this user cannot read. Raises RemoteError if curl rejects the file.
    """
    for path in [environ["NETRC"]] if environ.get("NETRC") else map(os.path.expanduser, _FILES):
        try:
            with open(path, "rb") as file:
                found = authorization(file.read(MAX_BYTES + 1), host)
        except OSError:
            continue
        except FormatError as error:
            raise RemoteError(f"cannot read {path}: {error}; correct it, or name another file in $NETRC") from None
        if found:
            return found
    return None


def authorization(content: bytes, host: str) -> str | None:
    """Return the value of Authorization for a host, or None if the file has no entry for the host.

    Raises FormatError if curl rejects the file.
    """
    if len(content) > MAX_BYTES:
        raise FormatError(f"it has more than {MAX_BYTES} bytes")
    credentials = _login_and_password(content, host.lower().encode())
    return None if credentials is None else basic(*credentials)


def basic(login: bytes, password: bytes) -> str:
    """Return the value of Authorization for a login and a password (Basic, RFC 7617)."""
    return "Basic " + base64.b64encode(login + b":" + password).decode()


def _login_and_password(content: bytes, host: bytes) -> tuple[bytes, bytes] | None:
    """Return login and password of the host's first entry with a password, otherwise of its last with a login."""
    only_login = None
    for entry in _entries(content, host):
        login, password = entry.get(b"login"), entry.get(b"password")
        if password is not None:
            return login or b"", password
        if login is not None:
            only_login = login, b""
    return only_login


def _entries(content: bytes, host: bytes) -> Iterator[dict[bytes, bytes]]:
    """Yield login and password of each entry for the host or for all hosts (`default`).

    An entry is yielded as soon as it has both, and otherwise at its end.
    """
    lines = iter(content.split(b"\n"))
    words = _words(lines)
    entry: dict[bytes, bytes] = {}
    is_ours = False
    for word in words:
        keyword = word.lower()
        if keyword in (b"login", b"password"):
            value = next(words, None)
            if value is None:
                break
            entry[keyword] = value
            if is_ours and len(entry) == len((b"login", b"password")):
                yield entry
        elif keyword in (b"machine", b"default", b"macdef"):
            if is_ours:
                yield entry
            entry = {}
            name = b"" if keyword == b"default" else next(words, b"").lower()
            is_ours = keyword == b"default" or (keyword == b"machine" and name == host)
            if keyword == b"macdef":
                any(line in (b"", b"\r") for line in lines)  # skips the lines up to an empty one
    if is_ours:
        yield entry


def _words(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the words of all lines except comments.

    Raises FormatError if a quoted word has no closing quote.
    """
    for line in lines:
        if line.lstrip(b" \t").startswith(b"#"):
            continue
        for match in _WORD.finditer(line):
            quoted, plain, open_quote = match.groups()
            if open_quote:
                raise FormatError("a quoted word has no closing quote")
            yield plain or _ESCAPED.sub(lambda escaped: _CONTROLS.get(escaped[1], escaped[1]), quoted)
