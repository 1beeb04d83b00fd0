"""Range and If-Range: RFC 9110 sections 13.1.5 and 14."""

import re
import sys

from harmonia.untrusted import integer

_SPEC = re.compile(r"(?i:bytes)=[ \t,]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t,]*", re.ASCII)


class UnsatisfiableError(Exception):
    """A range that has no byte of what there is."""


def is_one(header: str) -> bool:
    """Return whether it asks for one range of bytes. Any other Range is ignored, as it may be."""
    return _parse(header) is not None


def requested(header: str | None, if_range: str | None, etag: str | None, size: int) -> tuple[int, int] | None:
    """Return the bytes asked for, as start and stop, or None if the whole is to be sent.

    A Range that is malformed, of another unit, or of several parts may be ignored, and is. So is one if its If-Range
    names another version than ours. Raises UnsatisfiableError if the one range lies beyond the `size`.
    """
    wanted = _parse(header or "")
    if wanted is None or (if_range is not None and if_range.strip() != etag):
        return None
    first, last = wanted
    if first is None:
        start, stop = max(size - (last or 0), 0), size
    else:
        start, stop = first, size if last is None else last + 1
    if start >= size:
        raise UnsatisfiableError
    return start, min(stop, size)


def _parse(header: str) -> tuple[int | None, int | None] | None:
    """Return the positions of the first and the last byte; or None and how many bytes at the end; or None."""
    match = _SPEC.fullmatch(header.strip())
    if match is None:
        return None
    first, last = (_number(digits) if digits else None for digits in match.groups())
    if first is None and last is None:
        return None
    return None if first is not None and last is not None and last < first else (first, last)


def _number(digits: str) -> int:
    """Return the number, cut to more than any file has bytes."""
    number = integer(digits, sys.maxsize)
    return sys.maxsize if number is None else number
