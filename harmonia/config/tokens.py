"""Access tokens and their scopes.

A server stores only the hashes of tokens, in a file with one line for each token:

    # name     scopes             hash      end
    builder    read               sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b
    people     read,browse        sha256:…  until:2026-12-31
    ci         push,sign:myapp-*  sha256:…  until:2026-12-31T18:00:00+01:00

A token with `until:` is valid through that day in UTC, or until that time. Without, it does not expire.

The hash is a plain SHA-256, without salt and without many rounds. Those protect passwords, because people choose them
and attackers can guess them. A token is 32 random bytes (`new`), so an attacker with all hashes has to try some 2²⁵⁵
tokens. To accept or refuse a token takes one microsecond.
"""

import hashlib
import hmac
import math
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from harmonia.config import name_patterns
from harmonia.errors import FormatError

Scope = Literal["read", "browse", "metrics", "push", "sign"]
"""`read` allows access by hash part, as Nix needs, `browse` allows to search the store, `metrics` is for Prometheus.

`push` allows to upload paths that are signed, `sign` to have them signed by the server while they are pushed. Only
`sign` may have patterns: `sign:myapp-*,sign:mylib-*` allows it for paths with these names.
"""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_WARN_BEFORE_END_S = 14 * 86400

LAST_END_S = 253402300799.0
"""The latest end of a token: the last second of the year 9999."""

_SIGN = "sign:"
_UNTIL = "until:"
_PREFIX = "harmonia_"  # lets people and scanners for leaked secrets recognise a token
_RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_LINE = re.compile(
    rf"\s*({_NAME.pattern})\s+([^\s#]+)\s+{_HASH.pattern}(?:\s+{_UNTIL}([^\s#]*))?\s*(?:#.*)?", re.DOTALL
)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_TIME = re.compile(rf"{_DAY.pattern}T\d{{2}}:\d{{2}}(?::\d{{2}})?(?:Z|[+-]\d{{2}}:\d{{2}})", re.ASCII)
_INDEX_BYTES = 8  # first bytes of a hash, the key of the look-up


@dataclass(frozen=True, slots=True)
class Token:
    """The record of a token: enough to verify a token, but useless for signing in."""

    name: str
    scopes: frozenset[Scope]
    sha256: bytes = field(repr=False)
    sign_names: tuple[str, ...] = ()
    """Patterns of the names of paths that the scope `sign` is for. Without patterns, it is for all."""
    expires_at: float = math.inf
    """The first moment at which the token is not valid, in seconds since 1970."""

    def __str__(self) -> str:
        """Return the line for the file."""
        until = "" if self.expires_at == math.inf else f"  {_UNTIL}{self.end}"
        return f"{self.name}  {self.scope_text}  sha256:{self.sha256.hex()}{until}"

    @property
    def scope_text(self) -> str:
        """Return the scopes as in the file."""
        words: list[str] = [
            scope for scope in SCOPES if scope in self.scopes and not (scope == "sign" and self.sign_names)
        ]
        return ",".join([*words, *(_SIGN + pattern for pattern in self.sign_names)])

    @property
    def end(self) -> str:
        """Return the time at which the token expires in UTC, or "never"."""
        return format_time(self.expires_at)

    @property
    def number(self) -> int:
        """Return a number for this token in metrics, which is not 0 and fits a double."""
        return int.from_bytes(self.sha256[:6]) + 1

    def may_sign(self, name: str) -> bool:
        """Return True if the server may sign a pushed path with this name for the owner of the token."""
        return "sign" in self.scopes and (
            not self.sign_names or name_patterns.compile_patterns(self.sign_names).fullmatch(name) is not None
        )


class Tokens:
    """Look-up of the tokens that clients present.

    The time of a look-up reveals nothing useful to an attacker. The key in the dict is a part of the token's hash, and
    Python's hash of bytes has a random key in each process, so an attacker cannot choose what a look-up compares. Then
    the full hashes are compared in constant time. Besides, even a full hash does not reveal the token.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._by_index = {token.sha256[:_INDEX_BYTES]: token for token in tokens}

    def find_token(self, presented: str) -> Token | None:
        """Return the record of the token that a client presents, which may have expired, or None if there is none."""
        sha256 = _sha256(presented)
        token = self._by_index.get(sha256[:_INDEX_BYTES])
        return token if token is not None and hmac.compare_digest(token.sha256, sha256) else None


def format_time(moment: float) -> str:
    """Return seconds since 1970 as a time in UTC, like 2026-12-31T17:00:00Z; "never" for infinity."""
    if moment == math.inf:
        return "never"
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%dT%H:%M:%SZ}"


def parse_end(text: str) -> float:
    """Return the moment at which a token with `until:text` expires, in seconds since 1970.

    `text` is a day, which the token is still valid in, in UTC, or a time with zone. Raises FormatError otherwise.
    """
    with suppress(ValueError, OverflowError):  # no such day
        end = math.inf
        if _DAY.fullmatch(text):
            end = (datetime.fromisoformat(text).replace(tzinfo=UTC) + timedelta(days=1)).timestamp()
        elif _TIME.fullmatch(text):
            end = datetime.fromisoformat(text).timestamp()
        if 0 <= end <= LAST_END_S:
            return end
    raise FormatError("expected a day like 2026-12-31, or a time with zone like 2026-12-31T18:00:00Z")


def expiry_problem(token: Token, now: float) -> str | None:
    """Return what `check-config` and `doctor` warn of if the token has expired at the time `now`, or will soon.

    Return None if it is valid for another 14 days.
    """
    if token.expires_at - now >= _WARN_BEFORE_END_S:
        return None
    return f"the token {token.name} {'expires' if token.expires_at > now else 'expired'} at {token.end}"


def new(name: str, scopes: Iterable[str], expires_at: float = math.inf) -> tuple[str, Token]:
    """Return a new random token, and its record for the server. `scopes` are as in the file, with patterns.

    Raises FormatError if the name or a scope is malformed.
    """
    secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    tokens = parse(f"{name} {','.join(dict.fromkeys(scopes))} sha256:{_sha256(secret).hex()}")
    if len(tokens) != 1:
        raise FormatError("the name is empty or has a line break")
    return secret, replace(tokens[0], expires_at=expires_at)


def parse(text: str) -> tuple[Token, ...]:
    """Return the tokens of a file.

    Raises FormatError if a line is malformed. The message does not quote the line, because a user may have put a secret
    in it.
    """
    by_name: dict[str, Token] = {}
    indexes = set()
    scopes: dict[str, tuple[frozenset[Scope], tuple[str, ...]]] = {}  # by their text: few of them for many tokens
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            _check_words(number, line.partition("#")[0].split())
            continue
        name, given, digest, end = match.groups()
        if given not in scopes:
            scopes[given] = _scopes(number, given)
        try:
            expires_at = math.inf if end is None else parse_end(end)
        except FormatError as error:
            raise FormatError(f"line {number}: {_UNTIL} {error}") from None
        sha256 = bytes.fromhex(digest)
        index = sha256[:_INDEX_BYTES]
        if name in by_name or index in indexes:
            raise FormatError(f"line {number}: repeats the name or the hash of an earlier line")
        allowed, sign_names = scopes[given]
        by_name[name] = Token(name, allowed, sha256, sign_names, expires_at)
        indexes.add(index)
    return tuple(by_name.values())


def without_token(text: str, name: str) -> str:
    """Return the text of a file without the line of the token `name`. All other lines stay as they are.

    Malformed lines do not matter. Raises FormatError if no line has this name.
    """
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if (match := _LINE.fullmatch(line)) is None or match[1] != name]
    if len(kept) == len(lines):
        raise FormatError(f"no token {name!r}")
    return "".join(kept)


def _scopes(number: int, given: str) -> tuple[frozenset[Scope], tuple[str, ...]]:
    """Return the scopes in a line, and the patterns of `sign`."""
    words = given.split(",")
    sign_names = tuple(word.removeprefix(_SIGN) for word in words if word.startswith(_SIGN))
    plain = [word for word in words if not word.startswith(_SIGN)]
    if sign_names:
        plain.append("sign")
    scopes = frozenset(scope for scope in SCOPES if scope in plain)
    if len(scopes) != len(plain) or len(set(sign_names)) != len(sign_names):
        raise FormatError(f"line {number}: unknown or repeated scope; scopes are {', '.join(SCOPES)} and sign:PATTERN")
    try:
        for pattern in sign_names:
            name_patterns.check_pattern(pattern)
    except FormatError:
        raise FormatError(f"line {number}: a pattern of sign cannot match any name of a store path") from None
    return scopes, sign_names


def _check_words(number: int, words: list[str]) -> None:
    """Raise FormatError with the cause, given the words of a malformed line. Accept a line without words."""
    if words and len(words) != 3 and not (len(words) == 4 and words[3].startswith(_UNTIL)):  # noqa: PLR2004 (listed)
        raise FormatError(f"line {number}: expected NAME SCOPES HASH, and perhaps {_UNTIL}DAY")
    if words and not _HASH.fullmatch(words[2]):
        raise FormatError(f"line {number}: the hash is not sha256: and 64 hexadecimal digits, in lower case")
    if words:
        raise FormatError(f"line {number}: the name has other characters than letters, digits and ._@-")


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
