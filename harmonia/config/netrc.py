"""netrc(5): which user and password a host gets, by the rules of curl, which Nix reads the file with.

The authority is curl's `lib/netrc.c`, whose releases differ in details. If they do, we follow the newest. A Nix with a
curl before 7.84 knows no quotes; with some from 8.11 on (and Debian's 7.88) it finds no password that stands without a
login before another `machine`.
"""

import base64
import re
from collections.abc import Iterable, Iterator

from harmonia.errors import FormatError

MAX_BYTES = 128 << 10
"""The largest file that curl reads."""

_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"|([^\s"]\S*)|(")', re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_CONTROLS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def authorization(content: bytes, host: str) -> str | None:
    """Return the Basic authorization of a host, or None.

    Raises FormatError if curl rejects the file.
    """
    if len(content) > MAX_BYTES:
        raise FormatError(f"it has more than {MAX_BYTES} bytes")
    found = _login_and_password(content, host.lower().encode())
    return None if found is None else basic(*found)


def basic(login: bytes, password: bytes) -> str:
    """Return the value of an Authorization header (RFC 7617)."""
    return "Basic " + base64.b64encode(login + b":" + password).decode()


def _login_and_password(content: bytes, host: bytes) -> tuple[bytes, bytes] | None:
    """Return those of the first entry that has a password, otherwise those of the last that has a login."""
    found = None
    for entry in _entries(content, host):
        login, password = entry.get(b"login"), entry.get(b"password")
        if password is not None:
            return login or b"", password
        if login is not None:
            found = login, b""
    return found


def _entries(content: bytes, host: bytes) -> Iterator[dict[bytes, bytes]]:
    """Yield what each entry of a host, or of all, has. One that has a login and a password needs no end."""
    lines = iter(content.split(b"\n"))
    words = _words(lines)
    entry: dict[bytes, bytes] = {}
    is_ours = False
    for word in words:
        keyword = word.lower()
        if keyword in (b"login", b"password"):
            entry[keyword] = next(words, b"")
            if is_ours and len(entry) == len((b"login", b"password")):
                yield entry
        elif keyword in (b"machine", b"default", b"macdef"):
            if is_ours:
                yield entry
            entry = {}
            name = b"" if keyword == b"default" else next(words, b"").lower()
            is_ours = keyword == b"default" or (keyword == b"machine" and name == host)
            if keyword == b"macdef":
                any(line in (b"", b"\r") for line in lines)  # which skips them up to an empty one
    if is_ours:
        yield entry


def _words(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the words of all lines but comments. Raises FormatError at a quote that nothing closes."""
    for line in lines:
        if line.lstrip(b" \t").startswith(b"#"):
            continue
        for match in _WORD.finditer(line):
            quoted, plain, open_quote = match.groups()
            if open_quote:
                raise FormatError("a quoted word has no closing quote")
            yield plain or _ESCAPED.sub(lambda escaped: _CONTROLS.get(escaped[1], escaped[1]), quoted)
