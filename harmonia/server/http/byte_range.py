"""Range and If-Range: RFC 9110 sections 13.1.5 and 14."""

import re
import sys
from typing import NamedTuple

from harmonia.untrusted import integer

_SPEC = re.compile(r"(?i:bytes)=[ \t,]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t,]*", re.ASCII)


UNKNOWN_LAST = 2**53 - 1
"""The last position of a range that goes on to the end, wherever that will be (RFC 8673)."""


class Wanted(NamedTuple):
    """A range: its first and last position, or None and how many bytes at the end."""

    first: int | None
    last: int | None

    @property
    def is_open(self) -> bool:
        """Whether it goes from its first position to the end."""
        return self.first is not None and (self.last is None or self.last >= UNKNOWN_LAST)


class UnsatisfiableError(Exception):
    """A range that has no byte of what there is."""


def is_one(header: str) -> bool:
    """Return whether it asks for one range of bytes. Any other Range is ignored, as it may be."""
    return _parse(header) is not None


def wanted(header: str, if_range: str | None, etag: str | None) -> Wanted | None:
    """Return the range asked for, or None if the whole is to be sent.

    A Range that is malformed, of another unit, or of several parts may be ignored, and is. So is one if its If-Range
    names another version than ours.
    """
    return _parse(header) if if_range is None or if_range.strip() == etag else None


def located(part: Wanted, size: int) -> tuple[int, int]:
    """Return where the range starts and stops. Raise UnsatisfiableError if it lies beyond the `size`."""
    if part.first is None:
        start, stop = max(size - (part.last or 0), 0), size
    else:
        start, stop = part.first, size if part.last is None else part.last + 1
    if start >= size:
        raise UnsatisfiableError
    return start, min(stop, size)


def _parse(header: str) -> Wanted | None:
    match = _SPEC.fullmatch(header.strip())
    if match is None:
        return None
    first, last = (_number(digits) if digits else None for digits in match.groups())
    if first is None and last is None:
        return None
    return None if first is not None and last is not None and last < first else Wanted(first, last)


def _number(digits: str) -> int:
    """Return the number, cut to more than any file has bytes."""
    number = integer(digits, sys.maxsize)
    return sys.maxsize if number is None else number
