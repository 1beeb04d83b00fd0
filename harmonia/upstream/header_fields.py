"""Parsers of response header fields, for every form that RFC 9110 allows."""

import re
import time
from collections.abc import Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime

from multidict import CIMultiDictProxy

from harmonia.untrusted import integer

_MAX_SECONDS = 1 << 31
_MAX_POSITION = (1 << 63) - 1
_CONTENT_RANGE = re.compile(
    r"bytes[ \t]+([0-9]+)[ \t]*-[ \t]*[0-9]+[ \t]*/[ \t]*(?:[0-9]+|\*)", re.ASCII | re.IGNORECASE
)

Headers = CIMultiDictProxy[str]


def elements(headers: Headers, name: str) -> Iterator[str]:
    """Yield the elements of a list field, in lower case, from all lines of the field (sections 5.3, 5.6.1)."""
    for line in headers.getall(name, ()):
        for element in line.split(","):
            if stripped := element.strip(" \t").lower():
                yield stripped


def accepts_ranges(headers: Headers) -> bool:
    return "bytes" in elements(headers, "Accept-Ranges")


def content_range_start(headers: Headers) -> int | None:
    """Return the position of the first byte of a partial response, or None if Content-Range is missing or malformed."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip(" \t"))
    return integer(match[1], _MAX_POSITION) if match else None


def retry_after_s(headers: Headers) -> float:
    """Return the seconds of Retry-After, a number or a date (section 10.2.3); 0 if it is missing or malformed."""
    text = headers.get("Retry-After", "").strip(" \t")
    if (seconds := integer(text, _MAX_SECONDS)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(text[:100])
        return max(date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time(), 0)  # asctime dates have no zone
    except (ValueError, OverflowError):
        return 0
