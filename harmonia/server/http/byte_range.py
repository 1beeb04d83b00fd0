"""Range and If-Range: RFC 9110 sections 13.1.5 and 14."""

import re
import sys

from harmonia.untrusted import integer

_SPEC = re.compile(r"(?i:bytes)=[ \t,]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t,]*", re.ASCII)


class UnsatisfiableError(Exception):
    """A range that has no byte of what there is."""


def requested(header: str | None, if_range: str | None, etag: str | None, size: int) -> tuple[int, int] | None:
    """The bytes asked for, as start and stop, or None where the whole is to be sent.

    A Range that is malformed, of another unit, or of several parts may be ignored, and is; so is one whose If-Range
    names another version than ours. UnsatisfiableError where the one range lies beyond the `size`.
    """
    if header is None or (if_range is not None and if_range.strip() != etag):
        return None
    match = _SPEC.fullmatch(header.strip())
    first, last = match.groups() if match else ("", "")
    if first:
        start, stop = _number(first), _number(last) + 1 if last else size
        if last and stop <= start:
            return None
    elif last:
        start, stop = max(size - _number(last), 0), size
    else:
        return None
    if start >= size:
        raise UnsatisfiableError
    return start, min(stop, size)


def _number(digits: str) -> int:
    """Return the number, cut to more than any file has bytes."""
    number = integer(digits, sys.maxsize)
    return sys.maxsize if number is None else number
