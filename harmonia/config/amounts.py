"""Sizes and durations with units: `20 GB`, `1.5G`, `30s`, `1h 30min`."""

import re
import reprlib
from decimal import Decimal

from harmonia.errors import FormatError

SIZE = '"500M", "20G" or "20GiB" (powers of 1024), "20GB" (powers of 1000)'
DURATION = '"30s", "5m" or "1h 30min"'

_MAX_INTEGER = (1 << 63) - 1  # the largest integer in TOML and SQLite
_NUMBER = r"[0-9]{1,19}(?:\.[0-9]{1,9})?"
_SIZE = re.compile(rf"({_NUMBER}) ?(?:([KMGTP])(i?B|i)?|B)?", re.ASCII | re.IGNORECASE)
_PART = re.compile(rf"({_NUMBER}) ?([a-z]+) ?")
_WORDS_S = {
    "ms msec": "0.001",
    "s sec secs second seconds": "1",
    "m min mins minute minutes": "60",
    "h hr hour hours": "3600",
    "d day days": "86400",
    "w week weeks": "604800",
}
_UNITS_S = {word: Decimal(seconds) for words, seconds in _WORDS_S.items() for word in words.split()}


def size(text: str) -> int:
    """Return a size in bytes. Units are those of GNU coreutils: G and GiB are 1024³ bytes, GB is 1000³.

    Raises FormatError if `text` is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise FormatError(f"expected a size like {SIZE}, found {reprlib.repr(text)}")
    number, prefix, suffix = match.groups(default="")
    exponent = 1 + "KMGTP".index(prefix.upper()) if prefix else 0
    size_bytes = int(Decimal(number) * (1000 if suffix.upper() == "B" else 1024) ** exponent)
    if size_bytes > _MAX_INTEGER:
        raise FormatError(f"expected a size of at most {_MAX_INTEGER} bytes, found {reprlib.repr(text)}")
    return size_bytes


def duration(text: str) -> int | float:
    """Return a duration in seconds. Units are those of systemd.time(7), up to weeks. The default unit is the second.

    Raises FormatError if `text` is not a duration.
    """
    with_unit = f"{text}s" if re.fullmatch(_NUMBER, text) else text
    parts = _PART.findall(with_unit)
    if not parts or _PART.sub("", with_unit) or not all(unit in _UNITS_S for _, unit in parts):
        raise FormatError(f"expected seconds, or a duration like {DURATION}, found {reprlib.repr(text)}")
    seconds = sum(Decimal(number) * _UNITS_S[unit] for number, unit in parts)
    return int(seconds) if seconds == int(seconds) else float(seconds)
