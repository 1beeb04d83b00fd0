"""Byte ranges: Range and If-Range (RFC 9110 sections 13.1.5 and 14)."""

import re
import sys
from typing import NamedTuple

from harmonia.untrusted import integer

_SPEC = re.compile(r"(?i:bytes)=[ \t,]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t,]*", re.ASCII)


UNKNOWN_LAST = 2**53 - 1
"""Last position of a range up to an end that is not known yet (RFC 8673)."""


class ByteRange(NamedTuple):
    """A requested range: first and last position. If `first` is None, `last` is a number of bytes at the end."""

    first: int | None
    last: int | None

    @property
    def is_open(self) -> bool:
        """Return True if the range goes from its first position to the end."""
        return self.first is not None and (self.last is None or self.last >= UNKNOWN_LAST)


class UnsatisfiableError(Exception):
    """A range that lies beyond the end of the representation."""


def is_single(header: str) -> bool:
    """Return True if a Range header has exactly one range of bytes. Others are ignored, which RFC 9110 allows."""
    return _parse(header) is not None


def requested(header: str, if_range: str | None, etag: str | None) -> ByteRange | None:
    """Return the requested range, or None if the whole representation must be sent.

    A Range that is malformed, in another unit, or with several parts is ignored, which RFC 9110 allows. A Range is also
    ignored if If-Range is not our ETag.
    """
    return _parse(header) if if_range is None or if_range.strip() == etag else None


def bounds(part: ByteRange, size: int) -> tuple[int, int]:
    """Return the start and stop of a range in a representation of `size` bytes.

    Raises UnsatisfiableError if the range lies beyond the end.
    """
    if part.first is None:
        start, stop = max(size - (part.last or 0), 0), size
    else:
        start, stop = part.first, size if part.last is None else part.last + 1
    if start >= size:
        raise UnsatisfiableError
    return start, min(stop, size)


def _parse(header: str) -> ByteRange | None:
    match = _SPEC.fullmatch(header.strip())
    if match is None:
        return None
    texts = match.groups()
    first, last = (_number(digits) if digits else None for digits in texts)
    if first is None and last is None:
        return None
    # Compare the digits, because numbers above sys.maxsize are all read as that.
    first_order, last_order = ((len(digits), digits) for digits in (text.lstrip("0") for text in texts))
    return None if first is not None and last is not None and last_order < first_order else ByteRange(first, last)


def _number(digits: str) -> int:
    """Return the number, or sys.maxsize if it is larger: no file has so many bytes."""
    number = integer(digits, sys.maxsize)
    return sys.maxsize if number is None else number
