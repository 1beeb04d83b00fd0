"""Tokens that let a client in, and what each of them is good for.

A server knows only their hashes, a line for each in a file:

    # name     scopes             hash
    builder    read               sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b
    people     read,browse        sha256:…

The hash is a plain SHA-256, with neither salt nor many rounds. Those are for passwords, which people choose and others
can guess: a token is 32 random bytes (`new`), and who has all hashes would still have to try 2²⁵⁵ of them. So it costs
a request one microsecond, and is cheap to refuse, too.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from harmonia.errors import FormatError

Scope = Literal["read", "browse", "metrics"]
"""`read` is for Nix and all who know a hash part, `browse` for searching the store, `metrics` for Prometheus."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "harmonia_"  # by which scanners for leaked secrets, and people, know one
_RANDOM_BYTES = 32  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_LINE = re.compile(rf"\s*({_NAME.pattern})\s+([^\s#]+)\s+{_HASH.pattern}\s*(?:#.*)?", re.DOTALL)
_INDEX_BYTES = 8  # bytes of a hash that a token is found by


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token: enough to recognise it, and no use to anybody who reads it."""

    name: str
    scopes: frozenset[Scope]
    sha256: bytes = field(repr=False)

    def __str__(self) -> str:
        """Its line in the file."""
        scopes = ",".join(scope for scope in SCOPES if scope in self.scopes)
        return f"{self.name}  {scopes}  sha256:{self.sha256.hex()}"


class Tokens:
    """Tokens, to be found by what a client presents.

    How long that takes tells nothing of use. What a token is found by is a part of its hash, in a dict: Python's own
    hash of bytes has a random key in each process, so that nobody else can tell with what a look-up compares. What then
    decides is compared in constant time. And whoever learned a whole hash would have no token yet.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._by_index = {token.sha256[:_INDEX_BYTES]: token for token in tokens}

    def find_token(self, presented: str) -> Token | None:
        sha256 = _sha256(presented)
        token = self._by_index.get(sha256[:_INDEX_BYTES])
        return token if token is not None and hmac.compare_digest(token.sha256, sha256) else None


def new(name: str, scopes: Iterable[Scope]) -> tuple[str, Token]:
    """A secret token, and what a server is to know of it. FormatError for a name that cannot stand in a file."""
    secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    token = Token(name, frozenset(scopes), _sha256(secret))
    parse(str(token))
    return secret, token


def parse(text: str) -> tuple[Token, ...]:
    """The tokens of a file. FormatError shows nothing of a line: a secret may be where something else should."""
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
            raise FormatError(f"line {number} has the name or the hash of a line before it")
        by_name[name] = Token(name, scopes[given], sha256)
        indexes.add(index)
    return tuple(by_name.values())


def _scopes(number: int, given: str) -> frozenset[Scope]:
    words = given.split(",")
    known = frozenset(scope for scope in SCOPES if scope in words)
    if len(known) != len(words):
        raise FormatError(f"line {number} has an unknown scope, or one twice; there are {', '.join(SCOPES)}")
    return known


def _check_words(number: int, words: list[str]) -> None:
    """Raise FormatError with what is wrong, unless the line is empty."""
    if words and len(words) != 3:  # noqa: PLR2004 (as the message lists)
        raise FormatError(f"line {number} has {len(words)} words in place of a name, scopes and a hash")
    if words and not _HASH.fullmatch(words[2]):
        raise FormatError(f"line {number} has no hash of the form sha256:, 64 hexadecimal digits")
    if words:
        raise FormatError(f"line {number} has a name of other than letters, digits and ._@-")


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
