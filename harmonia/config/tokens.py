"""Access tokens and their scopes.

A server stores only the hashes of tokens, in a file with one line for each token:

    # name     scopes             hash
    builder    read               sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b
    people     read,browse        sha256:…

The hash is a plain SHA-256, without salt and without many rounds. Those protect passwords, because people choose them
and attackers can guess them. A token is 32 random bytes (`new`), so an attacker with all hashes has to try some 2²⁵⁵
tokens. To accept or refuse a token takes one microsecond.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from harmonia.errors import FormatError

Scope = Literal["read", "browse", "metrics", "push", "sign"]
"""`read` allows access by hash part, as Nix needs, `browse` allows to search the store, `metrics` is for Prometheus.

`push` allows to upload paths that are signed, `sign` to have them signed by the server while they are pushed.
"""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "harmonia_"  # lets people and scanners for leaked secrets recognise a token
_RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_LINE = re.compile(rf"\s*({_NAME.pattern})\s+([^\s#]+)\s+{_HASH.pattern}\s*(?:#.*)?", re.DOTALL)
_INDEX_BYTES = 8  # first bytes of a hash, the key of the look-up


@dataclass(frozen=True, slots=True)
class Token:
    """The record of a token: enough to verify a token, but useless for signing in."""

    name: str
    scopes: frozenset[Scope]
    sha256: bytes = field(repr=False)

    def __str__(self) -> str:
        """Return the line for the file."""
        scopes = ",".join(scope for scope in SCOPES if scope in self.scopes)
        return f"{self.name}  {scopes}  sha256:{self.sha256.hex()}"


class Tokens:
    """Look-up of the tokens that clients present.

    The time of a look-up reveals nothing useful to an attacker. The key in the dict is a part of the token's hash, and
    Python's hash of bytes has a random key in each process, so an attacker cannot choose what a look-up compares. Then
    the full hashes are compared in constant time. Besides, even a full hash does not reveal the token.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._by_index = {token.sha256[:_INDEX_BYTES]: token for token in tokens}

    def find_token(self, presented: str) -> Token | None:
        """Return the record of the token that a client presents, or None if the token is not valid."""
        sha256 = _sha256(presented)
        token = self._by_index.get(sha256[:_INDEX_BYTES])
        return token if token is not None and hmac.compare_digest(token.sha256, sha256) else None


def new(name: str, scopes: Iterable[Scope]) -> tuple[str, Token]:
    """Return a new random token, and its record for the server.

    Raises FormatError if the file cannot represent the name or the scopes.
    """
    secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    token = Token(name, frozenset(scopes), _sha256(secret))
    parse(str(token))
    return secret, token


def parse(text: str) -> tuple[Token, ...]:
    """Return the tokens of a file.

    Raises FormatError if a line is malformed. The message does not quote the line, because a user may have put a secret
    in it.
    """
    by_name: dict[str, Token] = {}
    indexes = set()
    scopes: dict[str, frozenset[Scope]] = {}  # by their text: few of them for many tokens
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            _check_words(number, line.partition("#")[0].split())
            continue
        name, given, digest = match.groups()
        if given not in scopes:
            scopes[given] = _scopes(number, given)
        sha256 = bytes.fromhex(digest)
        index = sha256[:_INDEX_BYTES]
        if name in by_name or index in indexes:
            raise FormatError(f"line {number}: repeats the name or the hash of an earlier line")
        by_name[name] = Token(name, scopes[given], sha256)
        indexes.add(index)
    return tuple(by_name.values())


def _scopes(number: int, given: str) -> frozenset[Scope]:
    words = given.split(",")
    scopes = frozenset(scope for scope in SCOPES if scope in words)
    if len(scopes) != len(words):
        raise FormatError(f"line {number}: unknown or repeated scope; scopes are {', '.join(SCOPES)}")
    return scopes


def _check_words(number: int, words: list[str]) -> None:
    """Raise FormatError with the cause, given the words of a malformed line. Accept a line without words."""
    if words and len(words) != 3:  # noqa: PLR2004 (as the message lists)
        raise FormatError(f"line {number}: expected NAME SCOPES HASH")
    if words and not _HASH.fullmatch(words[2]):
        raise FormatError(f"line {number}: the hash is not sha256: and 64 hexadecimal digits, in lower case")
    if words:
        raise FormatError(f"line {number}: the name has other characters than letters, digits and ._@-")


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
